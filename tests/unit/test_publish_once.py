"""Publishing with a key: the first event of a token with the key is stored, and no other one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.db import connection, connections, transaction

from django_eventsource import apublish, publish
from django_eventsource.delivery.hub import get_hub
from django_eventsource.events import Event, JSONIdEvent, StringEvent, StringIdEvent
from django_eventsource.exceptions import InvalidEvent, UnknownAction
from django_eventsource.history import get_history
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.models import PendingEvent
from django_eventsource.publishing import LOOP_BYTES, apublish_posted
from django_eventsource.signals import event_published
from tests.conftest import MEMORY
from tests.support.events import draft, texts
from tests.support.layers import RecordingLayer

real_commits = pytest.mark.django_db(transaction=True)

HISTORIES = {"memory": MEMORY, "sqlite": {}}


class OwnIdEvent(StringEvent):
    """Its id is its value."""

    id = property(lambda self: self.value[0])


class ConstantIdEvent(StringEvent):
    id = "constant"


class CachedIdEvent(StringEvent):
    id = cached_property(lambda self: self.value[0])


@pytest.fixture(params=HISTORIES)
def history(request: pytest.FixtureRequest, settings: Any) -> None:
    settings.EVENTSOURCE_HISTORY = HISTORIES[request.param]


@pytest.fixture(autouse=True)
def layer(settings: Any) -> RecordingLayer:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.RecordingLayer"}}
    layer = get_channel_layer()
    assert isinstance(layer, RecordingLayer)
    return layer


@pytest.fixture
def signalled() -> Iterator[list[Event]]:
    """Return the list of events for which ``event_published`` was sent."""
    events: list[Event] = []

    def receive(event: Event, **kwargs: Any) -> None:
        events.append(event)

    event_published.connect(receive)
    yield events
    event_published.disconnect(receive)


def stored(token: str = "t") -> list[str]:
    """Return the texts of a token from which no event was trimmed."""
    history = get_history()
    floor = history.newest("a token without events")[0]
    return texts(history.read(token, floor).entries)


# Outside of a transaction


@real_commits
@pytest.mark.usefixtures("history")
def test_a_repeated_event_is_neither_stored_nor_sent(
    layer: RecordingLayer, signalled: list[Event]
) -> None:
    """publish() returns an event with the id of the first one."""
    first = publish("t", "ping", "a", key="k")
    again = publish("t", "ping", "b", key="k")
    assert (again.id, again.value) == (first.id, ["b"])
    assert stored() == ["a"]
    assert len(layer.sent) == 1
    assert signalled == [first]
    after = publish("t", "ping", "c")
    assert int(after.id) == int(first.id) + 1


@pytest.mark.usefixtures("memory_history")
def test_events_without_a_key_are_always_published() -> None:
    assert publish("t", "ping", "a").id != publish("t", "ping", "a").id
    assert stored() == ["a", "a"]


@pytest.mark.usefixtures("memory_history")
def test_the_same_key_of_another_token_is_another_key() -> None:
    for token in ("t", "u"):
        publish(token, "ping", token, key="k")
        publish(token, "ping", "again", key="k")
    assert (stored("t"), stored("u")) == (["t"], ["u"])


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    "event_class", [OwnIdEvent, StringIdEvent, ConstantIdEvent, CachedIdEvent]
)
def test_a_repeated_event_has_the_id_of_the_first_one(event_class: type[Event]) -> None:
    """Its class may be another one, with or without an own id."""
    own = publish("t", "ping", "one", OwnIdEvent, key="own")
    assert publish("t", "ping", "two", event_class, key="own").id == own.id == "one"
    numbered = publish("t", "ping", "one", key="number")
    again = publish("t", "ping", "two", event_class, key="number")
    assert again.id == numbered.id == str(numbered._seq)


@pytest.mark.usefixtures("memory_history")
async def test_apublish_accepts_a_key() -> None:
    first = await apublish("t", "ping", "a", key="k")
    assert (await apublish("t", "ping", "b", key="k")).id == first.id


async def test_a_repeated_event_is_not_delivered_to_the_hub_of_the_process(
    settings: Any,
) -> None:
    settings.EVENTSOURCE_HISTORY, settings.CHANNEL_LAYERS = MEMORY, {}
    delivered: list[Any] = []
    hub = get_hub()
    hub.deliver = lambda *args: delivered.append(args)  # type: ignore[method-assign]
    hub.listens_to = lambda group: True  # type: ignore[method-assign]
    first = await apublish("t", "ping", "a", key="k")
    await apublish("t", "ping", "b", key="k")
    ((_, (batch,)),) = delivered
    assert batch.first == first._seq


def test_a_trimmed_event_frees_its_key(settings: Any) -> None:
    settings.EVENTSOURCE_HISTORY = {**MEMORY, "OPTIONS": {"MAX_EVENTS": 1}}
    first = publish("t", "ping", "a", key="k")
    publish("t", "ping", "b")
    again = publish("t", "ping", "c", key="k")
    assert int(again.id) == int(first.id) + 2


# Keys that are not valid


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    ("key", "given"),
    [("", "empty"), ("x" * 256, "256 characters"), (b"k", "b'k'"), (0, "0"), ("\0", "NUL")],
    ids=["empty", "long", "bytes", "number", "nul"],
)
def test_a_key_that_is_not_valid_publishes_nothing(
    layer: RecordingLayer, key: Any, given: str
) -> None:
    with pytest.raises(InvalidEvent, match=f"The key .*{given}.*1 to 255 characters"):
        publish("t", "ping", "a", key=key)
    assert (stored(), layer.sent) == ([], [])


def test_a_live_only_class_refuses_a_key(layer: RecordingLayer) -> None:
    with pytest.raises(InvalidEvent, match="Events of StringEvent are live only") as caught:
        publish("t", "ping", "a", StringEvent, key="k")
    assert "durable event class" in str(caught.value)
    assert layer.sent == []


@pytest.mark.usefixtures("memory_history")
def test_an_event_that_is_not_valid_does_not_use_its_key() -> None:
    with pytest.raises(UnknownAction):
        publish("t", "pong", "a", key="k")
    publish("t", "ping", "b", key="k")
    assert stored() == ["b"]


# In a transaction


@real_commits
@pytest.mark.usefixtures("history")
def test_events_of_one_transaction_with_a_key_have_one_id_after_the_commit(
    layer: RecordingLayer, signalled: list[Event]
) -> None:
    with transaction.atomic():
        events = [publish("t", "ping", text, key="k") for text in "ab"]
        own = publish("t", "ping", "own", OwnIdEvent, key="k")
        assert [event.id for event in events] == [None, None]
    assert stored() == ["a"]
    assert {event.id for event in (*events, own)} == {str(events[0]._seq)}
    assert len(layer.sent) == 1
    assert signalled == events[:1]
    assert not PendingEvent.objects.exists()


@real_commits
@pytest.mark.usefixtures("history")
def test_a_known_key_is_not_published_at_the_commit(layer: RecordingLayer) -> None:
    first = publish("t", "ping", "a", OwnIdEvent, key="k")
    with transaction.atomic():
        again = publish("t", "ping", "b", OwnIdEvent, key="k")
    assert again.id == first.id == "a"
    assert stored() == ["a"]
    assert len(layer.sent) == 1


@real_commits
@pytest.mark.usefixtures("history")
def test_a_rolled_back_event_does_not_use_its_key() -> None:
    """Also not in a savepoint that was rolled back."""
    with pytest.raises(RuntimeError), transaction.atomic():
        publish("t", "ping", "a", key="k")
        raise RuntimeError
    with transaction.atomic():
        with pytest.raises(RuntimeError), transaction.atomic():
            publish("t", "ping", "b", key="k")
            raise RuntimeError
        event = publish("t", "ping", "c", key="k")
    assert stored() == ["c"]
    assert publish("t", "ping", "d", key="k").id == event.id


@real_commits
def test_an_event_that_another_process_dropped_has_the_id_of_the_first_one(
    layer: RecordingLayer, signalled: list[Event]
) -> None:
    """Another process settles the outbox before the publisher does."""
    first = publish("t", "ping", "a", OwnIdEvent, key="k")
    with transaction.atomic():
        again = publish("t", "ping", "b", key="k")
        hook = connection.run_on_commit.pop()
    get_history().heads([])
    assert not PendingEvent.objects.exists()
    hook[1]()
    assert again.id == first.id == "a"
    assert stored() == ["a"]
    assert len(layer.sent) == 1
    assert signalled == [first]


@real_commits
def test_an_event_with_a_key_that_another_process_settled_is_sent(layer: RecordingLayer) -> None:
    """It is the first one, so its publisher sends it."""
    with transaction.atomic():
        event = publish("t", "ping", "a", key="k")
        hook = connection.run_on_commit.pop()
    get_history().heads([])
    hook[1]()
    assert [message["seq"] for _, message in layer.sent] == [event._seq]


# Posted events


@pytest.mark.parametrize("size", [2, LOOP_BYTES + 1])
async def test_keys_of_two_senders_and_of_the_project_are_separate(
    settings: Any, size: int
) -> None:
    """On the event loop, and in a thread for a large value."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    value = f'"{"x" * size}"'

    async def post(scope: str) -> Event:
        return await apublish_posted("t", "ping", value, JSONIdEvent, "k", scope)

    ids = [(await post(scope)).id for scope in ("ada", "bob", "ada")]
    own = (await apublish("t", "ping", "1", key="k")).id
    assert ids[0] == ids[2]
    assert len({*ids, own}) == len(stored()) == 3


# Simultaneous publishers


@real_commits
@pytest.mark.usefixtures("history")
@pytest.mark.parametrize("atomic", [False, True])
def test_twenty_threads_with_one_key_store_one_event(atomic: bool) -> None:
    barrier = threading.Barrier(20)

    def work(n: int) -> str:
        try:
            barrier.wait(30)
            if not atomic:
                return str(publish("t", "ping", str(n), key="k").id)
            with transaction.atomic():
                event = publish("t", "ping", str(n), key="k")
            return str(event.id)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=20) as executor:
        ids = set(executor.map(work, range(20)))
    assert ids == {str(get_history().newest("t")[0])}
    assert len(stored()) == 1


def test_threads_of_a_memory_history_store_each_key_once() -> None:
    history = MemoryHistory()
    drafts = [draft(str(n), key=str(n % 50)) for n in range(1000)]
    with ThreadPoolExecutor(max_workers=20) as executor:
        work = [partial(history.append, "t", [one]) for one in drafts]
        entries = [entry for found in executor.map(lambda call: call(), work) for entry in found]
    assert [entry.repeated for entry in entries].count(False) == 50
    assert len({entry.seq for entry in entries}) == 50
