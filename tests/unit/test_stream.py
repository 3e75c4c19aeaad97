"""The body of a stream: opening, replay, live events, and ends."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from django_eventsource.delivery.hub import get_hub
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.history import History, Kind, Position, Slice, get_history
from django_eventsource.history.records import Missing
from django_eventsource.protocol.cursors import Cursor, parse_cursor, parse_cursors
from django_eventsource.protocol.frames import KEEPALIVE, Decoder, ServerSentEvent
from django_eventsource.publishing import apublish
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.stream import EventStream, retry_body
from tests.support.cursors import cursor_texts
from tests.support.events import add, draft
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture
def history(memory_history: History) -> History:
    return memory_history


@pytest.fixture(autouse=True)
def quick(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    monkeypatch.setattr(EventStream, "BACKOFF_SECONDS", (0.01,))


def open_stream(cursor: str | None = None, **options: Any) -> OpenStream:
    position = get_history().locate("t", parse_cursor(cursor))
    listener = Listener(tokens=("t",))
    return OpenStream("t", position, listener=listener, asked=cursor, **options)


class Reader:
    """Reads a stream as a client would."""

    def __init__(self, stream: OpenStream) -> None:
        self.stream = stream
        self.decoder = Decoder()
        self.events: list[ServerSentEvent] = []
        self.ended = False

    async def chunk(self) -> bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                chunk = await self.stream.__anext__()
            except StopAsyncIteration:
                self.ended = True
                return b""
        self.events += self.decoder.feed(chunk)
        return chunk

    async def read(self, count: int) -> list[str]:
        """Read until there are so many events; return the data of all so far."""
        while len(self.events) < count and not self.ended:
            await self.chunk()
        return [event.data for event in self.events]

    async def read_to_end(self) -> list[str]:
        while not self.ended:
            await self.chunk()
        return [event.data for event in self.events]


async def is_waiting() -> None:
    """Wait until the only stream waits for events."""
    await until(lambda: get_hub()._feeds and get_hub()._feeds["t"].subscriptions)
    (subscription,) = get_hub()._feeds["t"].subscriptions
    subscriber = subscription.subscriber
    await until(lambda: subscriber._waiter)


# Opening


async def test_the_first_bytes_of_a_durable_stream_set_the_cursor(history: History) -> None:
    """The cursor is the position at which the stream starts."""
    (entry,) = add(history, "a")
    reader = Reader(open_stream())
    assert await reader.chunk() == f"id: {entry.seq}\n\n".encode()
    assert reader.decoder.last_event_id == str(entry.seq)
    assert reader.events == []
    await reader.stream.aclose()


def first_bytes(position: Position, *, asked: str | None, durable: bool) -> bytes:
    """Return the first bytes of a stream of one token."""
    first = EventStream("t", position, asked=asked, durable=durable)._opening
    assert first is not None
    return first


def test_the_configured_reconnection_time_is_sent_first(settings) -> None:
    settings.EVENTSOURCE_RETRY_MS = 700
    position = Position(seq=5, cursor=Cursor.at(5))
    first = first_bytes(position, asked=None, durable=True)
    assert first == b"event: retry\nretry: 700\n\nid: 5\n\n"


def test_a_live_only_stream_without_a_last_event_id_opens_with_a_comment() -> None:
    """A last event id that was sent is kept as the cursor."""
    position = Position(seq=5, cursor=Cursor.at(5))
    assert first_bytes(position, asked=None, durable=False) == b": open\n"
    assert first_bytes(position, asked="5", durable=False) == b"id: 5\n\n"


@pytest.mark.parametrize(
    ("asked", "reason", "after"),
    [
        ("3", "expired", "3"),
        ("3+", "expired", "3+"),
        ("x:abc", "unknown", None),
        (" ", "unknown", None),
    ],
)
def test_a_listener_whose_events_are_gone_receives_reset(
    asked: str, reason: Missing, after: str | None
) -> None:
    """The reset also sets the cursor."""
    position = Position(seq=5, cursor=Cursor.at(5, reopened=True), missing=reason)
    (event,) = Decoder().feed(first_bytes(position, asked=asked, durable=True))
    assert (event.event, event.id) == ("reset", "5+")
    assert json.loads(event.data) == {"reason": reason, "after": after, "resume": "5+"}


def test_the_state_is_sent_before_the_cursor(settings) -> None:
    """A listener that is disconnected within the state has no cursor yet."""
    settings.EVENTSOURCE_RETRY_MS = 700
    state = draft("s1").frame() + draft("s2").frame()
    for asked, known in [(None, True), ("3", False)]:
        position = Position(seq=5, cursor=Cursor.at(5), missing=None if known else "unknown")
        first = EventStream("t", position, asked=asked, state=state)._opening
        assert first is not None
        decoder = Decoder("before")
        events = decoder.feed(first.removesuffix(b"id: 5\n\n"))
        names = [event.event for event in events]
        assert names == ([] if known else ["reset"]) + ["ping", "ping"]
        assert decoder.last_event_id == "before"
        decoder.feed(b"id: 5\n\n")
        assert first.endswith(b"id: 5\n\n")
        assert decoder.last_event_id == "5"


def test_a_live_only_stream_sends_the_state_without_a_cursor() -> None:
    position = Position(seq=5, cursor=Cursor.at(5))
    first = EventStream("t", position, durable=False, state=b"data: x\n\n")._opening
    assert first == b"data: x\n\n: open\n"


def test_several_tokens_open_with_one_cursor_and_a_reset_for_each_lost_token() -> None:
    others = {
        "b": Position(seq=6, cursor=Cursor.at(6, reopened=True), missing="unknown"),
        "c": Position(seq=7, cursor=Cursor.at(7)),
    }
    stream = EventStream("a", Position(seq=5, cursor=Cursor.at(5)), asked="~xyz", others=others)
    assert stream._opening is not None
    decoder = Decoder()
    (event,) = decoder.feed(stream._opening)
    assert cursor_texts(event.id, ["a", "b", "c"]) == {"a": "5", "b": "6+", "c": "7"}
    assert json.loads(event.data) == {
        "reason": "unknown",
        "after": None,
        "resume": event.id,
        "token": "b",
    }


# Replay and live


async def test_a_listener_receives_missed_events_then_live_events_in_order(
    history: History,
) -> None:
    entries = add(history, *"abc")
    reader = Reader(open_stream(str(entries[0].seq)))
    assert await reader.read(2) == ["b", "c"]
    await apublish("t", "ping", "d")
    assert await reader.read(3) == ["b", "c", "d"]
    await reader.stream.aclose()


async def test_events_between_opening_and_subscribing_are_delivered(history: History) -> None:
    stream = open_stream()
    add(history, "a")
    reader = Reader(stream)
    await reader.chunk()
    add(history, "b")
    assert await reader.read(2) == ["a", "b"]
    await stream.aclose()


async def test_buffered_events_are_sent_in_one_write(history: History) -> None:
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    feed = get_hub()._feeds["t"]
    for entry in add(history, *"abc"):
        feed.receive(entry.batch())
    await waiting
    assert [event.data for event in reader.events] == ["a", "b", "c"]
    await reader.stream.aclose()


async def test_a_long_replay_is_read_in_parts_of_the_buffer_size(
    history: History, settings
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100
    (start,) = add(history, "start")
    add(history, *["x" * 40 for _ in range(20)])
    reader = Reader(open_stream(str(start.seq)))
    await reader.chunk()
    sizes = []
    while len(reader.events) < 20:
        sizes.append(len(await reader.chunk()))
    assert max(sizes) < 300
    assert len(sizes) >= 10
    await reader.stream.aclose()


async def test_a_stalled_reader_receives_all_events_later(history: History, settings) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 2000
    reader = Reader(open_stream())
    await reader.chunk()
    await apublish("t", "ping", "first")
    await reader.read(1)
    for n in range(300):
        await apublish("t", "ping", str(n))
    (subscription,) = next(iter(get_hub()._feeds.values())).subscriptions
    subscriber = subscription.subscriber
    assert subscriber._size <= 2000
    assert await reader.read(301) == ["first", *map(str, range(300))]
    await reader.stream.aclose()


async def test_a_stalled_reader_of_live_only_events_receives_reset(settings) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 300
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    reader = Reader(open_stream(durable=False))
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.read(1))
    await until(lambda: get_hub()._feeds and get_hub()._feeds["t"].last is not None)
    await apublish("t", "ping", "first")
    await waiting
    for n in range(100):
        await apublish("t", "ping", f"{n:03}")
    (subscription,) = get_hub()._feeds["t"].subscriptions
    subscriber = subscription.subscriber
    await until(lambda: subscriber._lost)
    await reader.chunk()
    assert reader.events[1].event == "reset"
    await reader.stream.aclose()


async def test_a_silent_stream_sends_a_keepalive_comment(settings) -> None:
    reader = Reader(open_stream(keepalive_seconds=0.05))
    await reader.chunk()
    assert await reader.chunk() == KEEPALIVE
    await reader.stream.aclose()


# Ends


async def test_a_close_event_is_delivered_and_ends_the_stream(history: History) -> None:
    """The hub keeps nothing of the stream."""
    reader = Reader(open_stream())
    await reader.chunk()
    await apublish("t", "ping", "a")
    await reader.read(1)
    await apublish("t", "close", "bye")
    await apublish("t", "ping", "too late")
    assert await reader.read_to_end() == ["a", "bye"]
    assert reader.events[-1].event == "close"
    assert not next(iter(get_hub()._feeds.values())).subscriptions
    await reader.chunk()
    assert reader.ended


async def test_a_listener_from_before_a_close_receives_the_rest_and_the_end(
    history: History,
) -> None:
    (start,) = add(history, "start")
    add(history, "a")
    history.append("t", [draft("bye", kind=Kind.CLOSE)])
    add(history, "anew")
    assert await Reader(open_stream(str(start.seq))).read_to_end() == ["a", "bye"]


async def test_a_live_only_close_ends_the_stream(settings) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    reader = Reader(open_stream(durable=False))
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.read_to_end())
    await is_waiting()
    await apublish("t", "close", "bye")
    assert await waiting == ["bye"]


async def test_a_stream_that_was_never_read_is_not_subscribed() -> None:
    """It can be closed without an error."""
    stream = open_stream()
    await stream.aclose()
    await stream.aclose()
    reader = Reader(stream)
    assert await reader.chunk() == b""
    assert reader.ended
    early = open_stream()
    await early.__anext__()
    await early.aclose()
    assert await Reader(early).read_to_end() == []
    assert not get_hub()._feeds


async def test_closing_a_stream_wakes_its_reader() -> None:
    stream = open_stream()
    await stream.__anext__()
    waiting = asyncio.ensure_future(Reader(stream).read_to_end())
    await is_waiting()
    await stream.aclose()
    assert await waiting == []


async def test_a_cancelled_stream_is_unsubscribed_at_once() -> None:
    stream = open_stream()
    await stream.__anext__()
    waiting = asyncio.ensure_future(stream.__anext__())
    await is_waiting()
    feed = next(iter(get_hub()._feeds.values()))
    assert len(feed.subscriptions) == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not feed.subscriptions


async def test_a_replay_can_be_cancelled_if_send_never_suspends(
    history: History, settings
) -> None:
    """After a disconnect the send() of some servers returns at once."""
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 1
    (start,) = add(history, "start")
    add(history, *["x"] * 5000)
    stream = open_stream(str(start.seq))
    chunks = 0

    async def serve() -> None:
        nonlocal chunks
        async for _ in stream:
            chunks += 1

    serving = asyncio.ensure_future(serve())
    await until(lambda: chunks)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert chunks < 100


async def test_a_stream_dropped_in_any_thread_is_unsubscribed() -> None:
    """Middleware may drop the iterator without closing it."""
    stream: OpenStream | None = open_stream(keepalive_seconds=0.05)
    assert stream is not None
    await stream.__anext__()
    await stream.__anext__()
    feed = next(iter(get_hub()._feeds.values()))
    holder = [stream]
    stream = None
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    gc.collect()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while feed.subscriptions:
            await asyncio.sleep(0)


def test_a_stream_dropped_after_its_loop_causes_no_error() -> None:
    """The same applies to a stream whose constructor failed."""

    async def start() -> EventStream:
        stream = open_stream(keepalive_seconds=0.05)
        await stream.__anext__()
        await stream.__anext__()
        return stream

    stream = asyncio.run(start())
    del stream
    EventStream.__new__(EventStream).__del__()


# Ended by the server


class Ends(list[Any]):
    """The reasons that a stream reports when it has ended."""

    def __init__(self, stream: OpenStream) -> None:
        super().__init__()
        stream.on_end = self.note

    def note(self, stream: OpenStream) -> None:
        self.append(stream.reason)


async def test_ending_a_stream_sends_the_buffer_and_a_reconnection_time_first(
    history: History,
) -> None:
    add(history, "start")
    reader = Reader(open_stream())
    ends = Ends(reader.stream)
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    feed = get_hub()._feeds["t"]
    for entry in add(history, *"ab"):
        feed.receive(entry.batch())
    reader.stream.end(Reason.MAX_AGE, 1234)
    reader.stream.end(Reason.CLOSE_REQUESTED, 99)
    for entry in add(history, "c"):
        feed.receive(entry.batch())
    await waiting
    assert await reader.read_to_end() == ["a", "b"]
    assert reader.decoder.retry_ms == 1234
    assert ends == [Reason.MAX_AGE]
    assert await Reader(open_stream(reader.decoder.last_event_id)).read(1) == ["c"]


async def test_ending_a_stream_without_a_reconnection_time_sends_nothing() -> None:
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    reader.stream.end(Reason.REFUSED)
    assert await waiting == b""
    assert reader.ended
    assert reader.stream.reason is Reason.REFUSED


async def test_a_stream_that_ends_early_sends_its_cursor_and_a_reconnection_time() -> None:
    """The stream is never subscribed."""
    reader = Reader(open_stream())
    ends = Ends(reader.stream)
    reader.stream.end(Reason.SHUTDOWN, 700)
    assert await reader.read_to_end() == []
    assert reader.decoder.last_event_id
    assert reader.decoder.retry_ms == 700
    assert ends == [Reason.SHUTDOWN]
    assert not get_hub()._feeds


async def test_ending_during_a_replay_leaves_the_rest_for_the_next_stream(
    history: History, settings
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100
    (start,) = add(history, "start")
    add(history, *(str(n) * 40 for n in range(5)))
    reader = Reader(open_stream(str(start.seq)))
    await reader.read(1)
    reader.stream.end(Reason.CLOSE_REQUESTED, 5)
    got = await reader.read_to_end()
    assert len(got) < 5
    late = Reader(open_stream(reader.decoder.last_event_id))
    assert got + await late.read(5 - len(got)) == [str(n) * 40 for n in range(5)]
    await late.stream.aclose()


async def test_events_read_while_the_stream_ends_are_left_for_the_next_stream(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start,) = add(history, "start")
    (entry,) = add(history, "a")
    reader = Reader(open_stream(str(start.seq)))
    hub = get_hub()
    real = hub.read

    async def read(token: str, after: int) -> Slice:
        slice_ = await real(token, after)
        reader.stream.end(Reason.MAX_AGE, 5)
        return slice_

    monkeypatch.setattr(hub, "read", read)
    assert await reader.read_to_end() == []
    assert reader.decoder.last_event_id == str(start.seq)
    assert reader.decoder.retry_ms == 5
    assert entry.seq > start.seq


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_aborting_drops_the_buffer_and_cancels_the_sending_task(
    history: History, steps: int
) -> None:
    (start,) = add(history, "start")
    add(history, "a")
    stream = open_stream(str(start.seq))
    ends = Ends(stream)
    task: Any = Mock()
    stream.begin_sending(task)
    reader = Reader(stream)
    for _ in range(steps):
        await reader.chunk()
    stream.abort(Reason.STALLED)
    stream.abort(Reason.CLIENT_DISCONNECTED)
    task.cancel.assert_called_once_with()
    assert await reader.chunk() == b""
    assert reader.ended
    assert stream.sending_since is None
    assert ends == []
    stream.end_sending()
    assert ends == [Reason.STALLED]


async def test_aborting_a_stream_wakes_its_reader() -> None:
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    reader.stream.abort(Reason.CLOSE_REQUESTED)
    assert await waiting == b""
    assert reader.stream.reason is Reason.CLOSE_REQUESTED


async def test_each_end_is_reported_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open stream has no reason."""
    cases: dict[Reason, Callable[[Reader], Any]] = {
        Reason.TOKEN_CLOSED: lambda reader: apublish("t", "close", ""),
        Reason.CLIENT_DISCONNECTED: lambda reader: reader.stream.aclose(),
        Reason.FAILED: lambda reader: patch.setattr(
            Subscriber, "take_overflow_reset", lambda self: 1 / 0
        ),
    }
    for reason, end in cases.items():
        reader = Reader(open_stream())
        ends = Ends(reader.stream)
        await reader.chunk()
        with monkeypatch.context() as patch:
            assert (reader.stream.reason, ends) == (None, [])
            waiting = asyncio.ensure_future(reader.read_to_end())
            if reason is not Reason.FAILED:
                await is_waiting()
            await (end(reader) or asyncio.sleep(0))
            await waiting
        await reader.stream.aclose()
        assert (reader.stream.reason, ends) == (reason, [reason])


async def test_a_cancelled_stream_reports_that_the_client_disconnected() -> None:
    stream = open_stream()
    ends = Ends(stream)
    await stream.__anext__()
    waiting = asyncio.ensure_future(stream.__anext__())
    await is_waiting()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ends == [Reason.CLIENT_DISCONNECTED]


async def test_a_dropped_stream_reports_its_end_once() -> None:
    """The reason is its own, or that the client disconnected."""
    stream: OpenStream | None = open_stream()
    assert stream is not None
    ends = Ends(stream)
    stream = None
    gc.collect()
    assert ends == [Reason.CLIENT_DISCONNECTED]
    stream = open_stream()
    ends = Ends(stream)
    stream.end(Reason.MAX_AGE)
    stream = None
    gc.collect()
    assert ends == [Reason.MAX_AGE]


async def test_the_stall_time_counts_only_while_the_server_sends_a_chunk(history: History) -> None:
    reader = Reader(open_stream())
    assert reader.stream.sending_since is None
    assert reader.stream.stalled_for(1e12) == 0
    await reader.chunk()
    since = reader.stream.sending_since
    assert since is not None
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    assert reader.stream.sending_since is None
    await apublish("t", "ping", "a")
    await waiting
    assert reader.stream.sending_since is not None
    assert reader.stream.sending_since >= since
    reader.stream.sending_since = since - 5
    assert reader.stream.stalled_for(since) == 5
    reader.stream.note_progress()
    assert reader.stream.sending_since >= since
    await reader.stream.aclose()


# Failures


async def test_an_error_ends_the_stream_without_an_exception(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is logged, and the listener reconnects."""
    reader = Reader(open_stream())
    await reader.chunk()
    monkeypatch.setattr(Subscriber, "take_overflow_reset", lambda self: 1 / 0)
    await reader.chunk()
    assert reader.ended
    assert "failed and is ended" in caplog.text
    assert not next(iter(get_hub()._feeds.values())).subscriptions


async def test_a_failed_read_of_the_history_is_retried(
    history: History, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile keepalives and live-only events are delivered."""
    (start,) = add(history, "start")
    stream = open_stream(str(start.seq), keepalive_seconds=0.05)
    real = history.read
    monkeypatch.setattr(history, "read", lambda *args, **kwargs: 1 / 0)
    reader = Reader(stream)
    await reader.chunk()
    assert await reader.chunk() == KEEPALIVE
    add(history, "a")
    monkeypatch.setattr(history, "read", real)
    assert await reader.read(1) == ["a"]
    assert "Reading the history of 't' failed" in caplog.text
    await stream.aclose()


async def test_a_live_only_close_comes_after_the_unread_events(
    history: History, monkeypatch: pytest.MonkeyPatch, settings
) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    (start,) = add(history, "start")
    add(history, "a")
    stream = open_stream(str(start.seq))
    real = history.read
    tries = []

    def fail(*args: Any, **kwargs: Any) -> Slice:
        tries.append(1)
        raise ConnectionError

    monkeypatch.setattr(history, "read", fail)
    reader = Reader(stream)
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.read_to_end())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not tries:
            await asyncio.sleep(0)
        await apublish("t", "close", "bye")
        before = len(tries)
        while len(tries) < before + 3:
            await asyncio.sleep(0.001)
    monkeypatch.setattr(history, "read", real)
    assert await waiting == ["a", "bye"]


async def test_a_history_behind_the_channel_layer_is_read_again(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventStream, "STALE_SECONDS", 0.001)
    (start,) = add(history, "start")
    first, second = Reader(open_stream()), Reader(open_stream(str(start.seq)))
    await first.chunk()
    await second.chunk()
    await apublish("t", "ping", "a")
    assert await first.read(1) == ["a"]
    get_hub()._replays.discard()
    real = history.read
    stale = [1, 2, 3]

    def lag(token: str, after: int, **kwargs: Any) -> Slice:
        if stale:
            stale.pop()
            return Slice(complete=True, last=after)
        return real(token, after, **kwargs)

    monkeypatch.setattr(history, "read", lag)
    assert await second.read(1) == ["a"]
    assert not stale
    await first.stream.aclose()
    await second.stream.aclose()


def test_the_body_of_an_unavailable_stream_is_a_random_reconnection_time() -> None:
    times = set()
    for _ in range(20):
        decoder = Decoder("before")
        assert decoder.feed(retry_body()) == []
        assert decoder.last_event_id == "before"
        times.add(decoder.retry_ms)
    assert all(2_000 <= time <= 10_000 for time in times if time is not None)
    assert None not in times
    assert len(times) > 1


# Several tokens, with a real hub; test_cursors.py tests their cursors


def open_streams(*tokens: str, cursor: str | None = None) -> EventStream:
    cursors = parse_cursors(cursor, tokens)
    positions = {token: get_history().locate(token, cursors[token]) for token in tokens}
    first = positions.pop(tokens[0])
    return EventStream(tokens[0], first, asked=cursor, others=positions)


async def test_a_stream_of_several_tokens_replays_each_in_order_and_resumes_from_one_cursor(
    history: History,
) -> None:
    for token in "abc":
        add(history, f"{token}0", token=token)
    reader = Reader(open_streams("a", "b", "c"))
    await reader.chunk()
    for n in (1, 2):
        for token in "abc":
            await apublish(token, "ping", f"{token}{n}")
    got = await reader.read(6)
    for token in "abc":
        assert [text for text in got if text[0] == token] == [f"{token}1", f"{token}2"]
    await reader.stream.aclose()
    assert not any(feed.subscriptions for feed in get_hub()._feeds.values())
    await apublish("b", "close", "b bye")
    await apublish("b", "ping", "b anew")
    await apublish("c", "ping", "c3")
    late = Reader(open_streams("c", "a", "b", cursor=reader.decoder.last_event_id))
    assert sorted(await late.read(2)) == ["b bye", "c3"]
    await late.stream.aclose()
    last = open_streams("a", "b", "c", cursor=late.decoder.last_event_id)
    await last.__anext__()
    waiting = asyncio.ensure_future(Reader(last).read_to_end())
    await until(lambda: last._subscriber._waiter)
    feed = get_hub()._feeds.get("b")
    assert feed is None or not feed.subscriptions, "it is closed for this listener"
    await apublish("a", "close", "a bye")
    await apublish("c", "close", "c bye")
    assert sorted(await waiting) == ["a bye", "c bye"]
    assert last.reason is Reason.TOKEN_CLOSED


async def test_a_stalled_reader_of_several_tokens_receives_all_events_later(settings) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 2000
    for token in "ab":
        add(get_history(), "start", token=token)
    reader = Reader(open_streams("a", "b"))
    await reader.chunk()
    await apublish("a", "ping", "a first")
    await reader.read(1)
    for n in range(100):
        await apublish("a", "ping", f"a {n}")
        await apublish("b", "ping", f"b {n}")
    got = await reader.read(201)
    assert [text for text in got if text[0] == "a"] == ["a first", *(f"a {n}" for n in range(100))]
    assert [text for text in got if text[0] == "b"] == [f"b {n}" for n in range(100)]
    await reader.stream.aclose()
