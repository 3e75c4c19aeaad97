"""Publishing: from any code, if and only if the transaction commits."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from django_eventsource.delivery import notifier as notifications
from django_eventsource.delivery.hub import get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.notifier import notifier
from django_eventsource.events import Event, EventId, JSONIdEvent, StringEvent
from django_eventsource.exceptions import DeliveryFailed, InvalidToken, UnknownAction
from django_eventsource.history import Draft, Entry, get_history, records
from django_eventsource.models import PendingEvent, StoredEvent
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.frames import Decoder
from django_eventsource.protocol.messages import MESSAGE_TYPE, decode
from django_eventsource.publishing import LOOP_BYTES, apublish_posted
from django_eventsource.signals import event_published
from django_eventsource.streaming.stream import EventStream
from tests.support.events import texts
from tests.support.layers import RecordingLayer
from tests.support.processes import run_python

real_commits = pytest.mark.django_db(transaction=True)


@pytest.fixture
def layer(settings) -> RecordingLayer:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.RecordingLayer"}}
    layer = get_channel_layer()
    assert isinstance(layer, RecordingLayer)
    return layer


def stored(token: str = "t") -> list[str]:
    """What the history of the default database holds."""
    rows = StoredEvent.objects.filter(head__token=token).order_by("seq")
    return [row.text() for row in rows]


# What is published


def test_the_package_exports_functions_and_their_awaitable_pairs() -> None:
    names = django_eventsource.__all__
    assert names == sorted(names)
    blocking = [name for name in names if f"a{name}" in names]
    # A production is a task of an event loop. start_production() is for synchronous code.
    # publish_changes() is called when the models are loaded.
    alone = ["produce", "publish_changes"]
    assert sorted([*blocking, *(f"a{name}" for name in blocking), *alone]) == names
    plain = [*blocking, "publish_changes", "atrack"]  # atrack() returns an asynchronous generator
    for name in names:
        function = getattr(django_eventsource, name)
        assert inspect.iscoroutinefunction(function) == (name not in plain)


@real_commits
def test_a_durable_event_is_stored_and_sent_and_has_its_id(layer: RecordingLayer) -> None:
    before = time.time()
    event = publish("t", "ping", "a\nb")
    assert stored() == ["a\nb"]
    ((group, message),) = layer.sent
    assert group == group_name("t")
    assert before <= message.pop("published") <= time.time()
    assert message == {
        "type": MESSAGE_TYPE,
        "group": group,
        "seq": int(event.id),
        "closes": False,
        "frames": [f"id: {event.id}\nevent: ping\ndata: a\ndata: b\n\n".encode()],
    }


def test_a_live_only_event_is_sent_and_not_stored(
    layer: RecordingLayer, memory_history: Any
) -> None:
    event = publish("t", "close", "bye", StringEvent)
    assert event.id is None
    ((_, message),) = layer.sent
    assert (message["seq"], message["closes"]) == (None, True)
    assert message["frames"] == [b"event: close\ndata: bye\n\n"]
    assert not memory_history.heads(["t"])["t"].has_epoch


def test_each_event_of_a_token_keeps_the_guarantee_of_its_class(
    layer: RecordingLayer, memory_history: Any
) -> None:
    one = publish("t", "ping", "1")
    publish("t", "ping", "2", StringEvent)
    three = publish("t", "ping", {"n": 3}, JSONIdEvent)
    assert int(three.id) == int(one.id) + 1
    assert texts(memory_history.read("t", int(one.id)).entries) == ['{"n":3}']
    # A live-only event may overtake a durable one, whose publisher does not wait for the layer.
    frames = b"".join(frame for _, message in layer.sent for frame in message["frames"])
    sent = Decoder().feed(frames)
    assert sorted(event.data for event in sent) == ["1", "2", '{"n":3}']
    assert [event.id for event in sent if event.data != "2"] == [one.id, three.id]


def test_the_returned_event_has_the_own_id_that_is_sent(
    layer: RecordingLayer, memory_history: Any
) -> None:

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
    assert memory_history.locate("t", parse_cursor("own-1")).known


def test_an_own_id_that_is_a_number_is_sent_as_text(
    layer: RecordingLayer, memory_history: Any
) -> None:

    class Numbered(Event):
        ACTIONS = ["ping"]
        id = 7

    publish("t", "ping", "x", Numbered)
    assert layer.sent[0][1]["frames"][0].startswith(b"id: 7\n")


def test_the_default_value_is_empty(layer: RecordingLayer, memory_history: Any) -> None:
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
def test_invalid_arguments_raise_and_publish_nothing(
    layer: RecordingLayer, memory_history: Any, arguments: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        publish(*arguments)
    assert layer.sent == []
    assert not memory_history.heads(["t"])["t"].has_epoch


def test_a_class_whose_actions_contain_reset_is_refused(memory_history: Any) -> None:
    """The action is reserved."""

    class Bad(EventId):
        ACTIONS = ["reset"]

    with pytest.raises(ImproperlyConfigured, match="reserved"):
        publish("t", "reset", "", Bad)


# Transactions


@real_commits
def test_a_commit_publishes_the_event(layer: RecordingLayer) -> None:
    """Before the commit the event has no id, and nothing is sent."""
    with transaction.atomic():
        event = publish("t", "ping", "a")
        assert event.id is None
        assert layer.sent == []
    assert stored() == ["a"]
    assert event.id == str(StoredEvent.objects.get().seq)
    assert len(layer.sent) == 1


@real_commits
def test_a_rollback_publishes_nothing(layer: RecordingLayer) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        durable = publish("t", "ping", "a")
        publish("t", "ping", "b", StringEvent)
        raise RuntimeError
    assert (stored(), layer.sent, durable.id) == ([], [], None)
    assert not PendingEvent.objects.exists()


@real_commits
def test_a_rolled_back_savepoint_publishes_nothing(layer: RecordingLayer) -> None:
    """The events of the other savepoints are published in order."""
    with transaction.atomic():
        publish("t", "ping", "a")
        with pytest.raises(RuntimeError), transaction.atomic():
            publish("t", "ping", "b")
            raise RuntimeError
        with transaction.atomic():
            publish("t", "ping", "c")
    assert stored() == ["a", "c"]
    assert [text for _, text in data(layer)] == ["a", "c"]


@real_commits
def test_a_history_outside_of_the_database_is_appended_to_at_the_commit(
    layer: RecordingLayer, memory_history: Any
) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        publish("t", "ping", "a")
        raise RuntimeError
    with transaction.atomic():
        event = publish("t", "ping", "b")
        assert not memory_history.heads(["t"])["t"].has_epoch
    assert memory_history.heads(["t"])["t"].seq == int(event.id)


@real_commits
def test_a_live_only_event_is_sent_after_the_commit(layer: RecordingLayer) -> None:
    """A failure of the send is not raised."""
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
    """The history check of another process finds the event."""
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
    assert stored() == ["a"]
    assert get_history().heads(["t"])["t"].seq == StoredEvent.objects.get().seq


@real_commits
def test_a_failure_of_the_history_after_the_commit_is_not_raised(
    layer: RecordingLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other hooks run."""
    done = []
    monkeypatch.setattr(get_history(), "stage", lambda *args: lambda: 1 / 0)
    with transaction.atomic():
        event = publish("t", "ping", "a")
        transaction.on_commit(lambda: done.append(1))
    assert done == [1]
    assert (event.id, layer.sent) == (None, [])


@real_commits
def test_an_event_that_was_trimmed_before_its_publisher_sends_is_not_sent(
    layer: RecordingLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_history(), "stage", lambda *args: lambda: [None])
    with transaction.atomic():
        event = publish("t", "ping", "a")
    assert (event.id, layer.sent) == (None, [])


@real_commits
def test_a_transaction_that_is_managed_by_hand_is_refused(layer: RecordingLayer) -> None:
    """Its commit cannot be detected."""
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
    """Also if its connection is not open yet."""
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
async def test_publish_raises_on_the_loop_and_apublish_is_awaited(layer: RecordingLayer) -> None:
    event = await apublish("t", "ping", "a")
    assert event.id
    with pytest.raises(SynchronousOnlyOperation, match="await apublish"):
        publish("t", "ping", "b")
    assert await sync_to_async(stored)() == ["a"]
    await sync_to_async(lambda: connection.close())()


async def test_publish_works_on_a_loop_if_django_allows_it(
    layer: RecordingLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebooks set DJANGO_ALLOW_ASYNC_UNSAFE."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    publish("t", "ping", "a")
    assert len(layer.sent) == 1


@real_commits
def test_every_thread_can_publish(layer: RecordingLayer) -> None:

    def work() -> None:
        publish("t", "ping", "a")
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batches = [decoded[1] for _, message in layer.sent if (decoded := decode(message))]
    assert len({seq for batch in batches for seq in batch.seqs or ()}) == 5


@real_commits
def test_a_process_without_streams_can_publish() -> None:
    out = run_python("from django_eventsource import publish\nprint(publish('t', 'ping', 'a').id)")
    assert out.strip() == str(StoredEvent.objects.get().seq)


def delivered() -> list[tuple[str, Batch]]:
    """Return the list of what publishers deliver to this loop's hub."""
    got: list[tuple[str, Batch]] = []

    def deliver(group: str, batches: Sequence[Batch]) -> None:
        got.extend((group, batch) for batch in batches)

    get_hub().deliver = deliver  # type: ignore[method-assign]
    get_hub().listens_to = lambda group: True  # type: ignore[method-assign]
    return got


async def test_publish_delivers_to_the_hubs_of_this_process(memory_history: Any, settings) -> None:
    """From any thread."""
    settings.CHANNEL_LAYERS = {}
    got = delivered()
    event = await apublish("t", "ping", "a")
    assert [(group, batch.first) for group, batch in got] == [(group_name("t"), int(event.id))]


async def test_a_configured_in_memory_layer_is_used_by_the_hubs_only(
    memory_history: Any, settings
) -> None:
    """It is not thread-safe."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    layer = get_channel_layer()
    assert isinstance(layer, InMemoryChannelLayer)
    await layer.group_add(group_name("t"), "a-channel")
    await apublish("t", "ping", "a")
    assert not layer.channels


# A layer that fails


def test_a_failure_of_the_layer_is_logged_and_loses_no_durable_event(
    layer: RecordingLayer, memory_history: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Listeners receive the event at the next history check."""
    layer.error = ConnectionError("down")
    event = publish("t", "ping", "a")
    assert memory_history.heads(["t"])["t"].seq == int(event.id)
    assert layer.sent == []
    assert "Sending to the channel layer failed" in caplog.text


def test_a_failure_of_the_layer_is_raised_for_a_live_only_event(
    layer: RecordingLayer, memory_history: Any
) -> None:
    layer.error = ConnectionError("down")
    with pytest.raises(DeliveryFailed, match="live only"):
        publish("t", "ping", "a", StringEvent)


def test_a_layer_that_cannot_be_made_is_logged_and_loses_no_durable_event(
    settings, memory_history: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "nowhere.Layer"}}
    event = publish("t", "ping", "a")
    assert memory_history.heads(["t"])["t"].seq == int(event.id)
    assert "Sending to the channel layer failed" in caplog.text


def test_a_durable_publish_does_not_wait_for_a_layer_that_hangs(
    layer: RecordingLayer, memory_history: Any
) -> None:
    layer.hang = True
    for _ in range(10):
        assert publish("t", "ping", "a").id
    assert not notifier.flush(0)


def test_publishers_under_load_do_not_wait_for_a_layer_that_hangs(
    layer: RecordingLayer, memory_history: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The notifier drops what does not fit into its queue. The history has all events."""
    layer.hang = True
    tokens = [f"t{n % 4}" for n in range(200)]
    value = "x" * 64 * 1024
    with ThreadPoolExecutor(max_workers=4) as executor:
        events = list(executor.map(lambda token: publish(token, "ping", value), tokens))
    assert layer._tried < len(events) / 4  # not one attempt for each event
    assert not notifier.flush(0)
    for token in set(tokens):
        seqs = sorted(int(event.id) for event in events if event.token == token)
        assert len(seqs) == 50
        assert [
            one.seq for one in memory_history.read(token, seqs[0] - 1, max_bytes=2**30).entries
        ] == seqs
    assert "The channel layer is slower than the publishers." in caplog.text


def test_a_live_only_publish_waits_a_limited_time_for_a_layer_that_hangs(
    layer: RecordingLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.LayerSender, "send_seconds", 0.01)
    layer.hang = True
    with pytest.raises(DeliveryFailed, match="TimeoutError"):
        publish("t", "ping", "a", StringEvent)


@real_commits
def test_a_cancellation_while_sending_does_not_affect_the_commit(layer: RecordingLayer) -> None:
    """Other hooks and the code after the commit run."""
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
def test_no_signal_is_sent_for_a_live_only_event_that_was_lost(
    layer: RecordingLayer, memory_history: Any
) -> None:
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


def test_a_coroutine_receiver_runs_although_publish_runs_on_a_loop(
    layer: RecordingLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def data(layer: RecordingLayer) -> list[tuple[str, str]]:
    """The group and the data of all that was sent, frame by frame."""
    return [
        (group, frame.decode().partition("data: ")[2].strip())
        for group, message in layer.sent
        for frame in message["frames"]
    ]


@real_commits
@pytest.mark.parametrize("history", ["memory.MemoryHistory", "database.DatabaseHistory"])
def test_publish_many_sends_the_events_of_a_token_in_one_message(
    layer: RecordingLayer, settings, history: str
) -> None:
    """They have consecutive sequence numbers, in their order."""
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
    assert (first["seq"], first["closes"], len(first["frames"])) == (numbers[0], True, 3)
    assert (second["seq"], second["closes"]) == (int(events[1].id), False)
    assert first["frames"][1] == f"id: {numbers[1]}\nevent: ping\ndata: b\n\n".encode()


def test_publish_many_without_items_does_nothing(
    layer: RecordingLayer, memory_history: Any
) -> None:
    assert publish_many([]) == publish_many(iter([]), StringEvent) == []
    assert layer.sent == []


def test_a_close_ends_a_message_of_publish_many(
    layer: RecordingLayer, memory_history: Any
) -> None:
    items = [("t", "ping", "a"), ("t", "close", "b"), ("t", "ping", "c")]
    assert [event.id for event in publish_many(items, StringEvent)] == [None] * 3
    sent = [(m["seq"], m["closes"], len(m["frames"])) for _, m in layer.sent]
    assert sent == [(None, True, 2), (None, False, 1)]


@pytest.mark.parametrize("event_class", [StringEvent, None])
async def test_a_fast_listener_receives_many_events_without_a_read_of_the_history(
    memory_history: Any, settings, monkeypatch: pytest.MonkeyPatch, event_class: type[Event] | None
) -> None:
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
def test_publish_many_is_split_by_number_and_size(
    layer: RecordingLayer, monkeypatch: pytest.MonkeyPatch, event_class: type[Event] | None
) -> None:
    monkeypatch.setattr(publishing, "BATCH_EVENTS", 4)
    monkeypatch.setattr(publishing, "BATCH_BYTES", 100)
    message_bytes = 70 if event_class else 130
    for module in (publishing, notifications):
        monkeypatch.setattr(module, "MESSAGE_BYTES", message_bytes)
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
def test_an_invalid_item_publishes_nothing(
    layer: RecordingLayer, event_class: type[Event] | None
) -> None:
    """The error contains its index."""
    items = [("t", "ping", "a"), ("t", "nonsense", "b"), ("t", "ping", "c")]
    with pytest.raises(UnknownAction) as caught:
        publish_many(items, event_class)
    assert caught.value.__notes__ == ["It is item 1, counted from 0; nothing was published."]
    with pytest.raises(ValueError, match="token") as bad:
        publish_many([*items[:1], *items[2:], ("", "ping", "")], event_class)
    assert bad.value.__notes__ == ["It is item 2, counted from 0; nothing was published."]
    assert layer.sent == []
    assert not get_history().heads(["t"])["t"].has_epoch


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
def test_an_error_of_publish_many_contains_the_number_of_published_events(
    layer: RecordingLayer,
) -> None:
    with pytest.raises(ConnectionError, match="away") as caught:
        publish_many([("t", "ping", text) for text in "abcde"])
    assert caught.value.__notes__ == ["2 of 5 events had been published before."]
    assert [text for _, text in data(layer)] == ["a", "b"]


def test_an_error_of_publish_many_contains_the_number_for_each_token(
    layer: RecordingLayer, fails: list[tuple[str, bytes]]
) -> None:
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
def test_an_error_of_publish_many_in_a_transaction_publishes_nothing(
    layer: RecordingLayer, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
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


def test_a_live_only_publish_many_waits_once_for_a_layer_that_hangs(
    layer: RecordingLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of batches and tokens."""
    layer.hang = True
    monkeypatch.setattr(publishing.LayerSender, "send_seconds", 0.05)
    monkeypatch.setattr(publishing, "MESSAGE_BYTES", 100)
    items = [(f"t{n}", "ping", "x" * 200) for n in range(5) for _ in range(5)]
    with pytest.raises(DeliveryFailed):
        publish_many(items, StringEvent)
    assert layer.tried == 1


@real_commits
def test_a_live_only_publish_many_waits_once_for_a_layer_that_hangs_at_the_commit(
    layer: RecordingLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer.hang = True
    monkeypatch.setattr(publishing.LayerSender, "send_seconds", 0.05)
    with transaction.atomic():
        publish_many([(f"t{n}", "ping", "x") for n in range(5)], StringEvent)
    assert layer.tried == 1


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize("event_class", [StringEvent, JSONIdEvent])
async def test_a_post_is_published_on_the_loop_if_nothing_blocks(
    settings, monkeypatch: pytest.MonkeyPatch, event_class: type[Event]
) -> None:
    settings.CHANNEL_LAYERS = {}
    monkeypatch.setattr(publishing, "sync_to_async", None)
    got = delivered()
    event = await apublish_posted("t", "ping", "1", event_class)
    assert [batch.data for _, batch in got] == [Draft.of(event).frame(event._seq)]
    assert (event._seq is None) is (event_class is StringEvent)
    with pytest.raises(UnknownAction):
        await apublish_posted("t", "pong", "1", event_class)


@pytest.mark.usefixtures("memory_history")
async def test_a_post_is_published_in_a_thread_if_a_receiver_may_block(settings) -> None:
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
    settings.CHANNEL_LAYERS = {}
    threads: set[int] = set()
    encode = records.encode_event

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

    monkeypatch.setattr(records, "encode_event", encode_event)
    event = await apublish_posted("t", "ping", json.dumps("x" * (size - 2)), Noted)
    assert int(event.id) == get_history().newest("t")[0]
    on_the_loop = threading.get_ident()
    assert (threads == {on_the_loop}) == (size <= LOOP_BYTES)
    assert (on_the_loop in threads) == (size <= LOOP_BYTES)


def test_a_failure_of_many_live_only_events_is_raised_as_one_error(
    layer: RecordingLayer, memory_history: Any
) -> None:
    layer.error = ConnectionError("broken")
    with pytest.raises(DeliveryFailed, match=r"^Some of 2 events for 't' .* never stored\."):
        publish_many([("t", "ping", "a"), ("t", "ping", "b")], StringEvent)


@real_commits
@pytest.mark.parametrize("event_class", [None, StringEvent])
def test_publish_many_in_a_transaction_publishes_at_the_commit(
    layer: RecordingLayer, event_class: type[Event] | None
) -> None:
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


def test_events_without_consecutive_numbers_are_sent_in_several_messages(
    layer: RecordingLayer, memory_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trimmed events are not sent."""
    numbers = [5, 6, 8, None, 9]

    def append(token: str, drafts: Sequence[Draft]) -> list[Entry | None]:
        placed = zip(numbers, drafts, strict=True)
        return [None if n is None else Entry(seq=n, draft=draft) for n, draft in placed]

    monkeypatch.setattr(get_history(), "append", append)
    publish_many([("t", "ping", text) for text in "abcde"])
    assert [text for _, text in data(layer)] == [*"abce"]
    assert [(m["seq"], len(m["frames"])) for _, m in layer.sent] == [(5, 2), (8, 2)]


@real_commits
async def test_publish_many_raises_on_the_loop_and_apublish_many_is_awaited(
    layer: RecordingLayer,
) -> None:
    events = await apublish_many([("t", "ping", "a"), ("t", "ping", "b")])
    assert await sync_to_async(stored)() == ["a", "b"]
    assert int(events[1].id) == int(events[0].id) + 1
    with pytest.raises(SynchronousOnlyOperation, match="apublish_many"):
        publish_many([("t", "ping", "c")])


def test_publish_many_sends_one_signal_for_each_event(
    layer: RecordingLayer, memory_history: Any
) -> None:
    heard: list[str] = []

    def hear(event: Event, **kwargs: Any) -> None:
        heard.append(event.id)

    event_published.connect(hear)
    try:
        events = publish_many([("t", "ping", "a"), ("t", "ping", "b")])
    finally:
        event_published.disconnect(hear)
    assert heard == [event.id for event in events]
