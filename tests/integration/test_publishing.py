"""Publishing: from any code, if and only if the transaction commits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import InMemoryChannelLayer, get_channel_layer
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import connection, transaction
from django.test import TestCase

import django_eventsource
from django_eventsource import apublish, apublish_many, publish, publish_many, publishing
from django_eventsource.events import Event, EventId, JSONIdEvent, StringEvent
from django_eventsource.exceptions import DeliveryFailed, InvalidToken, UnknownAction
from django_eventsource.frames import Decoder
from django_eventsource.history import Draft, Entry, get_history
from django_eventsource.history import base as history_base
from django_eventsource.hub import get_hub
from django_eventsource.layers import MESSAGE_TYPE
from django_eventsource.models import PendingEvent, StoredEvent
from django_eventsource.publishing import LOOP_BYTES, apublish_posted
from django_eventsource.signals import event_published
from django_eventsource.streams import EventStream
from django_eventsource.tokens import group_name
from tests.histories import texts
from tests.processes import run_python

real_commits = pytest.mark.django_db(transaction=True)


class SharedLayer:
    """Stands for a layer that other processes hear; it can fail and hang when told."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.hang = False
        self.tried = 0

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self.tried += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.sent.append((group, message))


@pytest.fixture
def layer(settings) -> SharedLayer:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_publishing.SharedLayer"}}
    layer = get_channel_layer()
    assert isinstance(layer, SharedLayer)
    return layer


def stored(token: str = "t") -> list[str]:
    """What the history of the default database holds."""
    rows = StoredEvent.objects.filter(head__token=token).order_by("seq")
    return [row.text() for row in rows]


# What is published


def test_the_public_names() -> None:
    """The package gives its two verbs."""
    assert django_eventsource.__all__ == [
        "aclose_streams",
        "alisteners",
        "apublish",
        "apublish_many",
        "close_streams",
        "listeners",
        "publish",
        "publish_many",
    ]


@real_commits
def test_publish_stores_and_sends(layer: SharedLayer) -> None:
    """A durable event goes to the history, then its frame to the layer, and has its id."""
    event = publish("t", "ping", "a\nb")
    assert stored() == ["a\nb"]
    ((group, message),) = layer.sent
    assert group == group_name("t")
    assert message == {
        "type": MESSAGE_TYPE,
        "group": group,
        "seq": int(event.id),
        "finish": False,
        "frames": [f"id: {event.id}\nevent: ping\ndata: a\ndata: b\n\n".encode()],
    }


def test_publish_live_only(layer: SharedLayer, memory_history: Any) -> None:
    """A live-only event is sent and not stored."""
    event = publish("t", "close", "bye", StringEvent)
    assert event.id is None
    ((_, message),) = layer.sent
    assert (message["seq"], message["finish"]) == (None, True)
    assert message["frames"] == [b"event: close\ndata: bye\n\n"]
    assert not memory_history.heads(["t"])["t"].life


def test_classes_may_be_mixed(layer: SharedLayer, memory_history: Any) -> None:
    """Each event of a token keeps its own class's guarantee."""
    one = publish("t", "ping", "1")
    publish("t", "ping", "2", StringEvent)
    three = publish("t", "ping", {"n": 3}, JSONIdEvent)
    assert int(three.id) == int(one.id) + 1
    assert texts(memory_history.read("t", int(one.id)).entries) == ['{"n": 3}']
    assert [message["seq"] for _, message in layer.sent] == [int(one.id), None, int(three.id)]


def test_an_own_id_is_the_one_that_is_sent(layer: SharedLayer, memory_history: Any) -> None:
    """The returned event's computed id is the one that listeners get."""

    class Counted(Event):
        ACTIONS = ["ping"]
        count = 0

        @property
        def id(self) -> str:
            type(self).count += 1
            return f"own-{self.count}"

    event = publish("t", "ping", "x", Counted)
    assert event.id == "own-1"
    ((_, message),) = layer.sent
    assert message["frames"][0].startswith(b"id: own-1\n")
    assert memory_history.locate("t", "own-1").known


def test_a_number_as_own_id(layer: SharedLayer, memory_history: Any) -> None:
    """An id that is no text is sent as its text."""

    class Numbered(Event):
        ACTIONS = ["ping"]
        id = 7

    publish("t", "ping", "x", Numbered)
    assert layer.sent[0][1]["frames"][0].startswith(b"id: 7\n")


def test_default_value_is_empty(layer: SharedLayer, memory_history: Any) -> None:
    """A value is not needed."""
    publish("t", "close")
    assert layer.sent[0][1]["frames"][0].endswith(b"event: close\ndata: \n\n")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", "ping"), InvalidToken, "empty"),
        (("x" * 256, "ping"), InvalidToken, "256 characters"),
        ((5, "ping"), InvalidToken, "must be a string"),
        (("t", "pong"), UnknownAction, "Unknown action 'pong': StringIdEvent allows ping"),
        (("t", "reset"), UnknownAction, "Unknown action 'reset'"),
        (("t", "retry", "-5"), ValueError, "ASCII digits"),
        (("t", "ping", 5), ValueError, "must be a string"),
        (("t", "ping", "{", JSONIdEvent), ValueError, "not JSON"),
    ],
)
def test_bad_input_publishes_nothing(
    layer: SharedLayer, memory_history: Any, arguments: Any, error: Any, message: str
) -> None:
    """What is wrong is said, and nothing was published."""
    with pytest.raises(error, match=message):
        publish(*arguments)
    assert layer.sent == []
    assert not memory_history.heads(["t"])["t"].life


def test_a_class_that_lists_reset_is_refused(memory_history: Any) -> None:
    """The reserved action is not for users."""

    class Bad(EventId):
        ACTIONS = ["reset"]

    with pytest.raises(ImproperlyConfigured, match="reserved"):
        publish("t", "reset", "", Bad)


# Transactions


@real_commits
def test_a_commit_publishes(layer: SharedLayer) -> None:
    """Inside a transaction the id is unknown and nothing is sent; after it both are there."""
    with transaction.atomic():
        event = publish("t", "ping", "a")
        assert event.id is None
        assert layer.sent == []
    assert stored() == ["a"]
    assert event.id == str(StoredEvent.objects.get().seq)
    assert len(layer.sent) == 1


@real_commits
def test_a_rollback_publishes_nothing(layer: SharedLayer) -> None:
    """Neither a durable nor a live-only event leaves a rolled back transaction."""
    with pytest.raises(RuntimeError), transaction.atomic():
        durable = publish("t", "ping", "a")
        publish("t", "ping", "b", StringEvent)
        raise RuntimeError
    assert (stored(), layer.sent, durable.id) == ([], [], None)
    assert not PendingEvent.objects.exists()


@real_commits
def test_a_rolled_back_savepoint_publishes_nothing(layer: SharedLayer) -> None:
    """Of nested transactions only what commits is published, in order."""
    with transaction.atomic():
        publish("t", "ping", "a")
        with pytest.raises(RuntimeError), transaction.atomic():
            publish("t", "ping", "b")
            raise RuntimeError
        with transaction.atomic():
            publish("t", "ping", "c")
    assert stored() == ["a", "c"]
    assert [message["seq"] is not None for _, message in layer.sent] == [True, True]


@real_commits
def test_a_memory_history_waits_for_the_commit(layer: SharedLayer, memory_history: Any) -> None:
    """A history without transactions is appended to on commit."""
    with pytest.raises(RuntimeError), transaction.atomic():
        publish("t", "ping", "a")
        raise RuntimeError
    with transaction.atomic():
        event = publish("t", "ping", "b")
        assert not memory_history.heads(["t"])["t"].life
    assert memory_history.heads(["t"])["t"].seq == int(event.id)


@real_commits
def test_a_live_only_event_waits_for_the_commit(layer: SharedLayer) -> None:
    """It is sent after the commit, and a failure then reaches nobody's data."""
    with transaction.atomic():
        publish("t", "ping", "a", StringEvent)
        assert layer.sent == []
    assert len(layer.sent) == 1
    layer.error = ConnectionError("down")
    done = []
    with transaction.atomic():
        publish("t", "ping", "a", StringEvent)
        transaction.on_commit(lambda: done.append(1))
    assert done == [1]


@real_commits
def test_a_commit_is_published_even_if_the_process_dies_right_after_it() -> None:
    """The outbox is part of the transaction; whoever looks next publishes."""
    run_python(
        """
import os
from django.db import transaction
from django_eventsource import publish, publishing
publishing._append = lambda *args: os._exit(0)
with transaction.atomic():
    publish("t", "ping", "a")
raise SystemExit("it lived")
"""
    )
    assert PendingEvent.objects.count() == 1
    get_history().heads([])
    assert stored() == ["a"]


@real_commits
def test_a_failure_after_the_commit_is_not_the_callers(
    layer: SharedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A history that fails after COMMIT neither raises nor stops other hooks, nor loses."""
    done = []
    history = get_history()
    with monkeypatch.context() as patch:
        patch.setattr(history, "_settle", lambda *args, **kwargs: 1 / 0)
        with transaction.atomic():
            publish("t", "ping", "a")
            transaction.on_commit(lambda: done.append(1))
    assert done == [1]
    assert stored() == []
    history.heads([])
    assert stored() == ["a"]


@real_commits
def test_an_event_that_was_settled_and_trimmed_meanwhile(layer: SharedLayer) -> None:
    """If others were so fast that it is gone again, its publisher has nothing to send."""
    history = get_history()
    history.max_events = 1
    with transaction.atomic():
        event = publish("t", "ping", "a")
        hook = connection.run_on_commit.pop()
    history.heads([])
    publish("t", "ping", "b")
    publish("t", "ping", "c")
    history.prune()
    hook[1]()
    assert event.id is None
    assert len(layer.sent) == 2


@real_commits
def test_a_transaction_by_hand_is_refused(layer: SharedLayer) -> None:
    """Where nobody can tell when the commit comes, nothing is published."""
    publish("t", "ping", "before")
    transaction.set_autocommit(False)
    try:
        for event_class in (None, StringEvent):
            with pytest.raises(
                transaction.TransactionManagementError, match=r"use transaction\.atomic"
            ):
                publish("t", "ping", "a", event_class)
        with transaction.atomic():
            publish("t", "ping", "b")
        transaction.commit()
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    get_history().heads([])
    assert stored() == ["before", "b"]


def test_a_database_without_autocommit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a connection that is configured so and not open yet."""
    connection.close()
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    with pytest.raises(transaction.TransactionManagementError, match="autocommit is off"):
        publish("t", "ping", "a")


class InATestCase(TestCase):
    """What users' tests see."""

    def test_captured_hooks_publish(self) -> None:
        """Under TestCase an event is published when its hooks are captured and run."""
        with self.captureOnCommitCallbacks(execute=True):
            event = publish("t", "ping", "a")
            self.assertIsNone(event.id)
        self.assertEqual(stored(), ["a"])
        self.assertIsNotNone(event.id)


# From any code


@real_commits
async def test_publish_from_async_code(layer: SharedLayer) -> None:
    """apublish is awaited; publish says so where it would block the loop."""
    event = await apublish("t", "ping", "a")
    assert event.id
    with pytest.raises(SynchronousOnlyOperation, match="await apublish"):
        publish("t", "ping", "b")
    assert await sync_to_async(stored)() == ["a"]
    await sync_to_async(lambda: connection.close())()


async def test_publish_in_a_notebook(
    layer: SharedLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With DJANGO_ALLOW_ASYNC_UNSAFE, as notebooks set it, publish works on a loop's thread."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    publish("t", "ping", "a")
    assert len(layer.sent) == 1


@real_commits
def test_publish_from_threads(layer: SharedLayer) -> None:
    """Every thread can publish."""

    def work() -> None:
        publish("t", "ping", "a")
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({message["seq"] for _, message in layer.sent}) == 5


@real_commits
def test_publish_from_a_shell() -> None:
    """A process without streams publishes too."""
    out = run_python("from django_eventsource import publish\nprint(publish('t', 'ping', 'a').id)")
    assert out.strip() == str(StoredEvent.objects.get().seq)


def delivered() -> list[dict[str, Any]]:
    """What publishers hand to this loop's hub, which seems to have a listener of each token."""
    hub = get_hub()
    got: list[dict[str, Any]] = []
    hub.listens_to = lambda group: True  # type: ignore[method-assign]
    hub.deliver = got.extend  # type: ignore[method-assign]
    return got


async def test_publish_reaches_the_hubs_of_this_process(memory_history: Any, settings) -> None:
    """Every hub with a listener gets the event, from any thread."""
    settings.CHANNEL_LAYERS = {}
    got = delivered()
    event = await apublish("t", "ping", "a")
    assert [(message["group"], message["seq"]) for message in got] == [
        (group_name("t"), int(event.id))
    ]


async def test_publish_with_a_configured_in_memory_layer(memory_history: Any, settings) -> None:
    """The in-memory layer is not thread-safe: it is used through the hubs only."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    layer = get_channel_layer()
    assert isinstance(layer, InMemoryChannelLayer)
    await layer.group_add(group_name("t"), "a-channel")
    await apublish("t", "ping", "a")
    assert not layer.channels


# A layer that fails


def test_a_failing_layer_loses_no_durable_event(
    layer: SharedLayer, memory_history: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stored: listeners find it at the next head check. That is logged."""
    layer.error = ConnectionError("down")
    event = publish("t", "ping", "a")
    assert memory_history.heads(["t"])["t"].seq == int(event.id)
    assert "The channel layer failed" in caplog.text


def test_a_failing_layer_is_told_for_a_live_only_event(
    layer: SharedLayer, memory_history: Any
) -> None:
    """Nobody else has it: the publisher must know."""
    layer.error = ConnectionError("down")
    with pytest.raises(DeliveryFailed, match="live only"):
        publish("t", "ping", "a", StringEvent)


def test_a_hanging_layer_holds_nobody_up(
    layer: SharedLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher waits for the layer only so long."""
    monkeypatch.setattr(publishing, "SEND_SECONDS", 0.01)
    layer.hang = True
    assert publish("t", "ping", "a").id
    with pytest.raises(DeliveryFailed, match="TimeoutError"):
        publish("t", "ping", "a", StringEvent)


@real_commits
def test_a_cancelled_publisher_keeps_its_commit(layer: SharedLayer) -> None:
    """Cancellation while sending stops neither other hooks nor the code after the commit."""
    layer.error = asyncio.CancelledError()
    done = []
    with transaction.atomic():
        publish("t", "ping", "a")
        publish("t", "ping", "b", StringEvent)
        transaction.on_commit(lambda: done.append(1))
    assert done == [1]
    assert stored() == ["a"]


# The signal


@real_commits
def test_an_event_that_failed_is_not_told_of(layer: SharedLayer, memory_history: Any) -> None:
    """event_published tells of what is published: not of a live-only event that was lost."""
    got: list[Any] = []

    def receive(event: Event, **kwargs: Any) -> None:
        got.append(event)

    event_published.connect(receive)
    layer.error = ConnectionError("down")
    try:
        with pytest.raises(DeliveryFailed):
            publish("t", "ping", "a", StringEvent)
        assert got == []
        publish("t", "ping", "b")  # a durable one is stored all the same
        assert [event.value for event in got] == [["b"]]
    finally:
        event_published.disconnect(receive)


def test_a_coroutine_receiver_in_a_notebook(
    layer: SharedLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where publish() runs on a loop's thread, what receivers do is not the publisher's."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    got: list[Event] = []

    async def receive(event: Event, **kwargs: Any) -> None:
        got.append(event)

    async def main() -> Event:
        return publish("t", "ping", "a")

    event_published.connect(receive)
    try:
        event = asyncio.run(main())
    finally:
        event_published.disconnect(receive)
    assert got == [event]


# Many at once


def data(layer: SharedLayer) -> list[tuple[str, str]]:
    """The group and the data of all that was sent, frame by frame."""
    return [
        (group, frame.decode().partition("data: ")[2].strip())
        for group, message in layer.sent
        for frame in message["frames"]
    ]


@real_commits
@pytest.mark.parametrize("history", ["memory.MemoryHistory", "database.DatabaseHistory"])
def test_publish_many(layer: SharedLayer, settings, history: str) -> None:
    """Those of a token are consecutive and in their order, and go out in one message."""
    settings.EVENTSOURCE_HISTORY = {"BACKEND": f"django_eventsource.history.{history}"}
    items = [("t", "ping", "a"), ("u", "ping", "1"), ("t", "ping", "b"), ("t", "close", "bye")]
    events = publish_many(items)
    assert [(event.token, event.action, event.value) for event in events] == [
        (token, action, [value]) for token, action, value in items
    ]
    numbers = [int(event.id) for event in events if event.token == "t"]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert texts(get_history().read("t", numbers[0] - 1).entries) == ["a", "b", "bye"]
    assert texts(get_history().read("u", int(events[1].id) - 1).entries) == ["1"]
    (_, first), (_, second) = layer.sent
    assert (first["seq"], first["finish"], len(first["frames"])) == (numbers[0], True, 3)
    assert (second["seq"], second["finish"]) == (int(events[1].id), False)
    assert first["frames"][1] == f"id: {numbers[1]}\nevent: ping\ndata: b\n\n".encode()


def test_publish_many_of_nothing(layer: SharedLayer, memory_history: Any) -> None:
    """Nothing happens."""
    assert publish_many([]) == publish_many(iter([]), StringEvent) == []
    assert layer.sent == []


def test_publish_many_live_only(layer: SharedLayer, memory_history: Any) -> None:
    """A close ends a message: what follows it is for the listeners that come back."""
    items = [("t", "ping", "a"), ("t", "close", "b"), ("t", "ping", "c")]
    assert [event.id for event in publish_many(items, StringEvent)] == [None] * 3
    sent = [(m["seq"], m["finish"], len(m["frames"])) for _, m in layer.sent]
    assert sent == [(None, True, 2), (None, False, 1)]


@pytest.mark.parametrize("event_class", [StringEvent, None])
async def test_a_prompt_reader_gets_many_as_they_come(
    memory_history: Any, settings, monkeypatch: pytest.MonkeyPatch, event_class: type[Event] | None
) -> None:
    """However many there are at once: it is not taken for a slow one, nor reads the history."""
    settings.CHANNEL_LAYERS = {}
    await apublish("t", "ping", "1", JSONIdEvent)  # a life has begun
    position = await get_history().alocate("t", None)
    stream = EventStream("t", position)
    decoder = Decoder()
    got: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            got.extend(event.data for event in decoder.feed(chunk))

    reading = asyncio.ensure_future(read())
    hub = get_hub()
    async with asyncio.timeout(5):
        while (feed := hub._feeds.get("t")) is None or feed.last is None:
            await asyncio.sleep(0.001)
    reads = []
    monkeypatch.setattr(hub, "read", lambda *args: reads.append(args))
    values = [f"{n:01000}" for n in range(1000)]
    await apublish_many((("t", "ping", value) for value in values), event_class)
    async with asyncio.timeout(5):
        while len(got) < len(values):
            await asyncio.sleep(0.001)
    assert got == values
    assert reads == []
    await stream.aclose()
    await reading


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_publish_many_is_cut_into_batches(
    layer: SharedLayer, monkeypatch: pytest.MonkeyPatch, event_class: type[Event] | None
) -> None:
    """By number and by size; a message is not larger than is good for a broker."""
    monkeypatch.setattr(publishing, "BATCH_EVENTS", 4)
    monkeypatch.setattr(publishing, "BATCH_BYTES", 100)
    message_bytes = 70 if event_class else 130
    monkeypatch.setattr(publishing, "MESSAGE_BYTES", message_bytes)
    appended: list[int] = []
    history = get_history()
    append = history.append
    monkeypatch.setattr(
        history,
        "append",
        lambda token, drafts: appended.append(len(drafts)) or append(token, drafts),
    )
    values = [*"abcdefghi", "x" * 60, "y" * 60, "z" * 200, "end"]
    publish_many([("t", "ping", value) for value in values], event_class)
    assert [text for _, text in data(layer)] == values
    if event_class is None:
        assert appended == [4, 4, 2, 1, 1, 1]
    most = max(len(message["frames"]) for _, message in layer.sent)
    assert most == 3
    for _, message in layer.sent:
        sizes = [*map(len, message["frames"])]
        assert len(sizes) == 1 or sum(sizes) <= message_bytes


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_a_bad_item_publishes_nothing(layer: SharedLayer, event_class: type[Event] | None) -> None:
    """The error names it."""
    items = [("t", "ping", "a"), ("t", "nonsense", "b"), ("t", "ping", "c")]
    with pytest.raises(UnknownAction) as caught:
        publish_many(items, event_class)
    assert caught.value.__notes__ == ["It is item 1, counted from 0; nothing was published."]
    with pytest.raises(ValueError, match="token") as bad:
        publish_many([*items[:1], *items[2:], ("", "ping", "")], event_class)
    assert bad.value.__notes__ == ["It is item 2, counted from 0; nothing was published."]
    assert layer.sent == []
    assert not get_history().heads(["t"])["t"].life


@pytest.fixture
def fails(memory_history: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Batches of two are appended, but for one of this token that begins with this."""
    failing = [("t", b"c")]
    append = memory_history.append

    def fail(token: str, drafts: Any) -> Any:
        if (token, drafts[0].data) in failing:
            raise ConnectionError("away")
        return append(token, drafts)

    monkeypatch.setattr(publishing, "BATCH_EVENTS", 2)
    monkeypatch.setattr(memory_history, "append", fail)
    return failing


@pytest.mark.usefixtures("fails")
def test_a_failure_among_many(layer: SharedLayer) -> None:
    """The error says how many had been published."""
    with pytest.raises(ConnectionError, match="away") as caught:
        publish_many([("t", "ping", text) for text in "abcde"])
    assert caught.value.__notes__ == ["2 of 5 events had been published before."]
    assert [text for _, text in data(layer)] == ["a", "b"]


def test_a_failure_among_many_tokens(layer: SharedLayer, fails: list[tuple[str, bytes]]) -> None:
    """They are published token by token: the error says how far each came."""
    fails[:] = [("t7", b"c")]
    items = [(f"t{n}", "ping", text) for text in "abc" for n in range(9)]
    with pytest.raises(ConnectionError, match="away") as caught:
        publish_many(items)
    assert caught.value.__notes__ == [
        "23 of 27 events had been published before: the first 3 of 't0', the first 3 of 't1', "
        "the first 3 of 't2', the first 3 of 't3', the first 3 of 't4' and 3 other tokens."
    ]
    with pytest.raises(ConnectionError) as caught:
        publish_many([("t7", "ping", "c"), ("u", "ping", "a")])
    assert caught.value.__notes__ == ["0 of 2 events had been published before."]


@real_commits
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_failure_among_many_in_a_transaction(
    layer: SharedLayer, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """None is published, whatever becomes of the transaction; and nothing else is said."""
    monkeypatch.setattr(publishing, "BATCH_EVENTS", 2)
    history = get_history()
    stage = history.stage

    def fail(token: str, drafts: Any) -> Any:
        if drafts[0].data == b"c":
            raise OSError("no space left")
        return stage(token, drafts)

    monkeypatch.setattr(history, "stage", fail)

    def work() -> None:
        with pytest.raises(OSError, match="no space") as caught:
            publish_many([("t", "ping", text) for text in "abcde"])
        assert not hasattr(caught.value, "__notes__")
        publish("t", "ping", "after")
        if not goes_on:
            raise caught.value

    with nullcontext() if goes_on else pytest.raises(OSError), transaction.atomic():
        work()
    assert stored("t") == (["after"] if goes_on else [])
    assert [text for _, text in data(layer)] == (["after"] if goes_on else [])
    assert not PendingEvent.objects.exists()


@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_a_layer_that_hangs_is_waited_for_once(
    layer: SharedLayer,
    memory_history: Any,
    monkeypatch: pytest.MonkeyPatch,
    event_class: type[Event] | None,
) -> None:
    """However many batches and tokens there are: it is the publisher who waits."""
    layer.hang = True
    monkeypatch.setattr(publishing, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(publishing, "MESSAGE_BYTES", 100)
    items = [(f"t{n}", "ping", "x" * 200) for n in range(5) for _ in range(5)]
    if event_class is None:
        publish_many(items)
        assert len(texts(get_history().read("t4", get_history().oldest("t4")).entries)) == 5
    else:
        with pytest.raises(DeliveryFailed):
            publish_many(items, event_class)
    assert layer.tried == 1


def test_a_slow_layer_is_waited_for_by_the_batch(
    layer: SharedLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the message: a batch that takes longer in all is left to the head check."""
    send = layer.group_send

    async def slow(group: str, message: dict[str, Any]) -> None:
        await asyncio.sleep(0.2)
        await send(group, message)

    monkeypatch.setattr(layer, "group_send", slow)
    monkeypatch.setattr(publishing, "SEND_SECONDS", 0.5)
    monkeypatch.setattr(publishing, "MESSAGE_BYTES", 100)
    publish_many([("t", "ping", "x" * 200)] * 10)
    assert layer.tried < 3
    assert len(texts(get_history().read("t", get_history().oldest("t")).entries)) == 10


@real_commits
@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_a_layer_that_hangs_is_waited_for_once_at_a_commit(
    layer: SharedLayer, monkeypatch: pytest.MonkeyPatch, event_class: type[Event] | None
) -> None:
    """Each batch has a hook of its own."""
    layer.hang = True
    monkeypatch.setattr(publishing, "SEND_SECONDS", 0.05)
    with transaction.atomic():
        publish_many([(f"t{n}", "ping", "x") for n in range(5)], event_class)
    assert layer.tried == 1


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize("event_class", [StringEvent, JSONIdEvent])
async def test_a_post_takes_no_thread_where_nothing_blocks(
    settings, monkeypatch: pytest.MonkeyPatch, event_class: type[Event]
) -> None:
    """What receivers do may block: with one, it does."""
    settings.CHANNEL_LAYERS = {}
    monkeypatch.setattr(publishing, "sync_to_async", None)
    got = delivered()
    event = await apublish_posted("t", "ping", "1", event_class)
    assert [message["frames"] for message in got] == [[Draft.of(event).frame(event._seq)]]
    assert (event._seq is None) is (event_class is StringEvent)
    with pytest.raises(UnknownAction):
        await apublish_posted("t", "pong", "1", event_class)


@pytest.mark.usefixtures("memory_history")
async def test_a_post_takes_a_thread_where_something_may_block(settings) -> None:
    """Receivers of the signal run in it."""
    settings.CHANNEL_LAYERS = {}
    threads: list[int] = []

    def receive(**kwargs: Any) -> None:
        threads.append(threading.get_ident())

    event_published.connect(receive)
    try:
        await apublish_posted("t", "ping", "1", JSONIdEvent)
    finally:
        event_published.disconnect(receive)
    assert threads
    assert threads != [threading.get_ident()]


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize("size", [100, LOOP_BYTES, LOOP_BYTES + 1, 200_000])
async def test_a_large_post_is_checked_and_encoded_off_the_loop(
    settings, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Other streams go on meanwhile. A small one is done before a thread would have begun."""
    settings.CHANNEL_LAYERS = {}
    threads: set[int] = set()
    encode = history_base.encode_event

    def encode_event(*args: Any) -> bytes:
        threads.add(threading.get_ident())
        return encode(*args)

    class Noted(JSONIdEvent):
        def set_value(self, value: Any) -> None:
            threads.add(threading.get_ident())
            super().set_value(value)

        def get_value(self) -> list[str]:
            threads.add(threading.get_ident())
            return super().get_value()

    monkeypatch.setattr(history_base, "encode_event", encode_event)
    event = await apublish_posted("t", "ping", json.dumps("x" * (size - 2)), Noted)
    assert int(event.id) == get_history().newest("t")[0]
    on_the_loop = threading.get_ident()
    assert (threads == {on_the_loop}) == (size <= LOOP_BYTES)
    assert (on_the_loop in threads) == (size <= LOOP_BYTES)


def test_many_live_only_events_that_failed(layer: SharedLayer, memory_history: Any) -> None:
    """They are told of as one is."""
    layer.error = ConnectionError("broken")
    with pytest.raises(DeliveryFailed, match=r"^Some of 2 events for 't' .* never stored\."):
        publish_many([("t", "ping", "a"), ("t", "ping", "b")], StringEvent)


@real_commits
@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_many_in_a_transaction(layer: SharedLayer, event_class: type[Event] | None) -> None:
    """All of them at the commit, and none without one."""
    items = [(token, "ping", str(n)) for n in range(700) for token in "tu"]
    with pytest.raises(RuntimeError), transaction.atomic():
        publish_many(items, event_class)
        raise RuntimeError
    assert (stored("t"), layer.sent) == ([], [])
    with transaction.atomic():
        events = publish_many(items, event_class)
        assert (layer.sent, {event.id for event in events}) == ([], {None})
    texts = [str(n) for n in range(700)]
    assert [text for group, text in data(layer) if group == group_name("t")] == texts
    assert [text for group, text in data(layer) if group == group_name("u")] == texts
    if event_class is None:
        assert stored("t") == stored("u") == texts
        assert [int(event.id) for event in events[::2]] == list(
            StoredEvent.objects.filter(head__token="t").values_list("seq", flat=True)
        )
    assert not PendingEvent.objects.exists()


def test_numbers_that_others_took_in_between(
    layer: SharedLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not consecutive goes out in messages of its own; what was trimmed in none."""
    numbers = [5, 6, 8, None, 9]

    def append(token: str, drafts: Sequence[Draft]) -> list[Entry | None]:
        placed = zip(numbers, drafts, strict=True)
        return [None if n is None else Entry(seq=n, draft=draft) for n, draft in placed]

    monkeypatch.setattr(get_history(), "append", append)
    publish_many([("t", "ping", text) for text in "abcde"])
    assert [text for _, text in data(layer)] == [*"abce"]
    assert [(m["seq"], len(m["frames"])) for _, m in layer.sent] == [(5, 2), (8, 2)]


@real_commits
async def test_publish_many_from_async_code(layer: SharedLayer) -> None:
    """It is awaited; the plain one is refused on the loop's thread."""
    events = await apublish_many([("t", "ping", "a"), ("t", "ping", "b")])
    assert await sync_to_async(stored)() == ["a", "b"]
    assert int(events[1].id) == int(events[0].id) + 1
    with pytest.raises(SynchronousOnlyOperation, match="apublish_many"):
        publish_many([("t", "ping", "c")])


def test_many_are_told_of_one_by_one(layer: SharedLayer, memory_history: Any) -> None:
    """Each event is a signal."""
    heard: list[str] = []

    def hear(event: Event, **kwargs: Any) -> None:
        heard.append(event.id)

    event_published.connect(hear)
    try:
        events = publish_many([("t", "ping", "a"), ("t", "ping", "b")])
    finally:
        event_published.disconnect(hear)
    assert heard == [event.id for event in events]
