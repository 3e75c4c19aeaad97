"""The statistics of a process: what each room counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from django.db import transaction

from django_eventsource import _runtime, apublish, publish_many
from django_eventsource._statistics import BOUNDS, Histogram
from django_eventsource.delivery.counters import counters
from django_eventsource.delivery.group_membership import GroupMembership
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.events import StringEvent
from django_eventsource.history import get_history
from django_eventsource.monitoring.statistics import statistics
from django_eventsource.operations.close_requests import aclose_streams
from django_eventsource.operations.stream_timeouts import StreamTimeouts
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.signals import Reason
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import listen
from tests.support.events import add
from tests.support.layers import FaultySharedLayer, layer_of
from tests.support.streams import StreamTask
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture(autouse=True)
def site(settings) -> Iterator[None]:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    yield
    assert not list(registry.streams())


# Histograms


def test_a_histogram_counts_each_duration_up_to_the_next_bound() -> None:
    """The last count is of those above all bounds."""
    histogram = Histogram()
    for seconds in (0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1] + 5):
        histogram.observe(seconds)
    found = histogram.distribution()
    assert (found.counts[:2], found.counts[-1], found.count) == ((2, 1), 1, 4)
    assert found.seconds == pytest.approx(BOUNDS[0] * 2.01 + BOUNDS[-1] + 5)


def test_a_negative_duration_counts_as_none() -> None:
    """The clock of another machine may be ahead."""
    histogram = Histogram()
    histogram.observe(-3)
    assert (histogram.distribution().counts[0], histogram.distribution().seconds) == (1, 0)


def test_no_count_is_lost_between_threads() -> None:
    """Several event loops and publishers count at the same time."""
    batch = Batch([b"x"], published=time.time())

    def count() -> None:
        for _ in range(2000):
            counters.count_batch(batch, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = statistics().delivery
    assert (found.events, found.latency.count) == (8000, 8000)


# Streams


async def test_streams_are_counted_and_their_ends_by_reason() -> None:
    async with listen("t"), listen("t") as second:
        assert (statistics().streams.open, statistics().streams.opened) == (2, 2)
        await apublish("t", "close")
        await second.next("close")
        await until(lambda: statistics().streams.open == 0)
    async with listen("u"):
        pass
    await until(lambda: Reason.CLIENT_DISCONNECTED in statistics().streams.closed)
    found = statistics().streams
    assert (found.open, found.opened) == (0, 3)
    assert found.closed == {Reason.TOKEN_CLOSED: 2, Reason.CLIENT_DISCONNECTED: 1}


# Delivery


async def test_a_live_event_is_counted_for_each_stream_and_its_latency_once() -> None:
    async with listen("t") as one, listen("t") as two:
        event = await apublish("t", "ping", "x")
        await one.next("ping")
        await two.next("ping")
        found = statistics().delivery
    assert (found.events, found.bytes) == (2, 2 * len(f"id: {event.id}\nevent: ping\ndata: x\n\n"))
    assert (found.latency.count, found.replays, found.repairs) == (1, 0, 0)
    assert dict(found.resets) == {}


async def test_messages_between_processes_are_not_counted() -> None:
    """The stream of the control token is not one of a listener."""
    async with listen("t"):
        await aclose_streams(token="t")
        await until(lambda: statistics().streams.closed == {Reason.CLOSE_REQUESTED: 1})
    found = statistics()
    assert (found.delivery.events, found.delivery.replayed_events) == (0, 0)
    assert (found.publishing.events, found.publishing.latency.count) == (0, 0)


async def test_a_replay_is_counted_once_however_many_reads_it_takes(settings) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 65536
    first = await apublish("t", "ping", "before")
    add(get_history(), *["x" * 20_000] * 4)
    async with listen("t", last_event_id=str(first.id)) as stream:
        for _ in range(4):
            await stream.next("ping")
        found = statistics().delivery
        assert (found.replays, found.replayed_events, found.events) == (1, 4, 0)
        assert found.replayed_bytes > 80_000


@pytest.mark.parametrize(("cursor", "reason"), [("nonsense", "unknown"), ("5", "expired")])
async def test_resets_are_counted_by_their_reason(cursor: str, reason: str) -> None:
    await apublish("t", "ping", "x")
    async with listen("t", last_event_id=cursor) as stream:
        await stream.next("reset")
    assert dict(statistics().delivery.resets) == {reason: 1}


async def test_a_reset_of_an_open_stream_is_counted() -> None:
    """The history has dropped events that the stream has not received."""
    hub = get_hub()
    (entry,) = add(get_history(), "x")
    reader = await StreamTask().live()
    feed = hub._feeds["t"]
    feed._reset(entry.seq + 5, reopened=False, ahead=False)
    await until(lambda: b"reset" in reader.body)
    assert dict(statistics().delivery.resets) == {"expired": 1}
    await reader.close()


def test_an_overflow_is_counted_and_its_reset() -> None:
    """A live-only event is lost with the buffer."""
    subscriber = Subscriber(buffer_bytes=10, keepalive_seconds=None)
    one = subscriber.add("t", 1)
    one.live = True
    assert one.push(Batch([b"x" * 10]))
    assert not one.push(Batch([b"x"]))
    assert subscriber.take_overflow_reset()
    found = statistics().delivery
    assert (found.overflows, dict(found.resets)) == (1, {"overflow": 1})


def test_an_overflow_of_the_messages_between_processes_is_not_counted() -> None:
    subscriber = Subscriber(buffer_bytes=10, keepalive_seconds=None)
    subscriber.add(CONTROL_TOKEN, 1).live = True
    subscriber.offer_volatile(Batch([b"x" * 10]))
    subscriber.overflow()
    assert subscriber.take_overflow_reset()
    found = statistics().delivery
    assert (found.overflows, dict(found.resets)) == (0, {})


async def test_the_latency_of_an_event_that_a_history_check_finds_begins_at_its_storage(
    settings,
) -> None:
    """No message has brought it."""
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    async with listen("t") as stream:
        add(get_history(), "x")
        await stream.next("ping")
        await until(lambda: statistics().delivery.latency.count == 1)
    assert (statistics().delivery.repairs, statistics().delivery.events) == (0, 1)


async def test_a_gap_that_is_read_from_the_history_is_a_repair(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 30
    monkeypatch.setattr(Hub, "reorder_seconds", 0.001)
    async with listen("t") as stream:
        _, second = add(get_history(), "a", "b")
        get_hub()._feeds["t"].receive(second.batch())
        assert [(await stream.next()).data for _ in range(2)] == ["a", "b"]
    assert statistics().delivery.repairs == 1


async def test_the_layer_is_silent_while_it_delivers_nothing_and_while_it_fails(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}
    monkeypatch.setattr(FaultySharedLayer, "made", [])
    monkeypatch.setattr(GroupMembership, "answer_seconds", 0.05)
    reader = await StreamTask().live()
    layer = layer_of(get_hub())
    layer.silent = True
    await until(lambda: statistics().delivery.layer_silence_seconds > 0.3)
    layer.silent = False
    await until(lambda: statistics().delivery.layer_silence_seconds < 0.3)
    layer.failing.add("group_send")
    await until(lambda: statistics().delivery.layer_silence_seconds > 0.3)
    await reader.close()


# Publishing


@pytest.mark.django_db(transaction=True)
def test_published_events_are_counted_when_they_are_stored() -> None:
    """A transaction counts after its commit."""
    publish_many([("t", "ping", "a"), ("t", "ping", "b"), ("u", "ping", "c")])
    found = statistics().publishing
    assert (found.events, found.latency.count) == (3, 2)
    publish_many([("t", "ping", "live"), ("t", "ping", "only")], StringEvent)
    assert statistics().publishing.events == 5
    with transaction.atomic():
        publish_many([("t", "ping", "a")])
        assert statistics().publishing.events == 5
    assert statistics().publishing.events == 6


class InternalEvent(StringEvent):
    internal = True


def test_live_only_events_of_the_package_itself_are_not_counted() -> None:
    """Neither are its stored ones."""
    publish_many([("t", "ping", "live")], InternalEvent)
    assert (statistics().publishing.events, statistics().publishing.latency.count) == (0, 0)


# The event loop


async def test_a_busy_event_loop_shows_in_its_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamTimeouts, "SWEEP_SECONDS", 0.01)
    async with listen("t"):
        await until(lambda: statistics().loop_lag.count)
        before = statistics().loop_lag.seconds
        await asyncio.sleep(0.001)
        time.sleep(0.2)
        await until(lambda: statistics().loop_lag.seconds > before + 0.1)


# Process


async def test_a_forked_process_counts_from_zero() -> None:
    async with listen("t") as stream:
        await apublish("t", "ping", "x")
        await stream.next("ping")
        assert statistics().delivery.events
    _runtime.reset_all()
    found = statistics()
    assert (found.streams.opened, found.delivery.events, found.delivery.latency.count) == (0, 0, 0)
    assert (found.publishing.events, found.loop_lag.count) == (0, 0)
