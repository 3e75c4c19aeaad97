"""Streams: opening, replay, live, ends, and what they let go of."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import connection

from django_eventsource import streams as module
from django_eventsource.cursors import split_cursor
from django_eventsource.frames import KEEPALIVE, Decoder, ServerSentEvent
from django_eventsource.history import History, Kind, Position, Slice, get_history
from django_eventsource.hub import get_hub
from django_eventsource.publishing import apublish
from django_eventsource.streams import EventStream, Reason, come_back_later, let_go
from django_eventsource.subscribers import Subscriber
from tests.histories import add, draft

pytestmark = pytest.mark.usefixtures("memory_history")

SECONDS = 10


@pytest.fixture
def history(memory_history: History) -> History:
    return memory_history


@pytest.fixture(autouse=True)
def quick(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", (0.01,))


def open_stream(cursor: str | None = None, **options: Any) -> EventStream:
    return EventStream("t", get_history().locate("t", cursor), asked=cursor, **options)


class Reader:
    """Reads a stream as a client would."""

    def __init__(self, stream: EventStream) -> None:
        self.stream = stream
        self.decoder = Decoder()
        self.events: list[ServerSentEvent] = []
        self.ended = False

    async def chunk(self) -> bytes:
        async with asyncio.timeout(SECONDS):
            try:
                chunk = await self.stream.__anext__()
            except StopAsyncIteration:
                self.ended = True
                return b""
        self.events += self.decoder.feed(chunk)
        return chunk

    async def read(self, count: int) -> list[str]:
        """Read until there are so many events; give all data so far."""
        while len(self.events) < count and not self.ended:
            await self.chunk()
        return [event.data for event in self.events]

    async def read_to_end(self) -> list[str]:
        while not self.ended:
            await self.chunk()
        return [event.data for event in self.events]


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def is_waiting() -> None:
    """Let the loop run until the one stream there is waits for events."""
    await until(lambda: get_hub()._feeds and get_hub()._feeds["t"].subscriptions)
    (subscription,) = get_hub()._feeds["t"].subscriptions
    subscriber = subscription.subscriber
    await until(lambda: subscriber._waiter)


# Opening


async def test_first_bytes_commit_the_cursor(history: History) -> None:
    """A durable stream's first bytes come at once and name the place where it starts."""
    (entry,) = add(history, "a")
    reader = Reader(open_stream())
    assert await reader.chunk() == f"id: {entry.seq}\n\n".encode()
    assert reader.decoder.last_event_id == str(entry.seq)
    assert reader.events == []
    await reader.stream.aclose()


def first_bytes(position: Position, *, asked: str | None, durable: bool) -> bytes:
    """What a stream of one token begins with."""
    first = EventStream("t", position, asked=asked, durable=durable)._opening
    assert first is not None
    return first


def test_opening_with_a_retry(settings) -> None:
    """The configured reconnection time comes first."""
    settings.EVENTSOURCE_RETRY_MS = 700
    position = Position(seq=5, cursor="5")
    first = first_bytes(position, asked=None, durable=True)
    assert first == b"event: retry\nretry: 700\n\nid: 5\n\n"


def test_opening_of_a_live_only_class() -> None:
    """Without a cursor to commit a comment is sent; a cursor that was asked for is kept."""
    position = Position(seq=5, cursor="5")
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
def test_opening_for_a_listener_whose_events_are_gone(
    asked: str, reason: str, after: str | None
) -> None:
    """It begins with reset, which also moves the cursor."""
    position = Position(seq=5, cursor="5+", known=False)
    (event,) = Decoder().feed(first_bytes(position, asked=asked, durable=True))
    assert (event.event, event.id) == ("reset", "5+")
    assert json.loads(event.data) == {"reason": reason, "after": after, "resume": "5+"}


def test_the_state_comes_before_the_cursor(settings) -> None:
    """Who is cut off in the state has not got it; nothing before the cursor commits a place."""
    settings.EVENTSOURCE_RETRY_MS = 700
    state = draft("s1").frame() + draft("s2").frame()
    for asked, known in [(None, True), ("3", False)]:
        position = Position(seq=5, cursor="5", known=known)
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


def test_the_state_of_a_live_only_class() -> None:
    """It is sent, and no cursor."""
    position = Position(seq=5, cursor="5")
    first = EventStream("t", position, durable=False, state=b"data: x\n\n")._opening
    assert first == b"data: x\n\n: open\n"


def test_opening_of_several_tokens() -> None:
    """One cursor for all of them; one reset for each whose events are gone, which names it."""
    others = {"b": Position(seq=6, cursor="6+", known=False), "c": Position(seq=7, cursor="7")}
    stream = EventStream("a", Position(seq=5, cursor="5"), asked="~xyz", others=others)
    assert stream.tokens == ["a", "b", "c"]
    assert stream._opening is not None
    decoder = Decoder()
    (event,) = decoder.feed(stream._opening)
    assert split_cursor(event.id, ["a", "b", "c"]) == {"a": "5", "b": "6+", "c": "7"}
    assert json.loads(event.data) == {
        "reason": "unknown",
        "after": None,
        "resume": event.id,
        "token": "b",
    }


# Replay and live


async def test_replay_then_live(history: History) -> None:
    """A listener that was away gets what it missed, then what comes, once and in order."""
    entries = add(history, *"abc")
    reader = Reader(open_stream(str(entries[0].seq)))
    assert await reader.read(2) == ["b", "c"]
    await apublish("t", "ping", "d")
    assert await reader.read(3) == ["b", "c", "d"]
    await reader.stream.aclose()


async def test_events_between_opening_and_subscribing(history: History) -> None:
    """What is published after the view took the cursor and before the stream joined."""
    stream = open_stream()
    add(history, "a")
    reader = Reader(stream)
    await reader.chunk()
    add(history, "b")
    assert await reader.read(2) == ["a", "b"]
    await stream.aclose()


async def test_buffered_events_are_one_write(history: History) -> None:
    """What waits is written together."""
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    feed = get_hub()._feeds["t"]
    for entry in add(history, *"abc"):
        feed.receive(entry.seq, [entry.frame()], entry.finishes)
    await waiting
    assert [event.data for event in reader.events] == ["a", "b", "c"]
    await reader.stream.aclose()


async def test_a_long_replay_is_read_in_parts(history: History, settings) -> None:
    """A replay costs no more memory than the buffer's bound at a time."""
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


async def test_a_stalled_reader_loses_nothing(history: History, settings) -> None:
    """Whoever stops reading falls behind, costs little, and gets everything later."""
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


async def test_live_only_events_lost_by_a_stalled_reader_are_told(settings) -> None:
    """A listener of live-only events that reads too slowly gets reset."""
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


async def test_keepalive(settings) -> None:
    """A silent stream writes a comment line."""
    reader = Reader(open_stream(keepalive_seconds=0.05))
    await reader.chunk()
    assert await reader.chunk() == KEEPALIVE
    await reader.stream.aclose()


# Ends


async def test_close_ends_the_stream(history: History) -> None:
    """The close is delivered, then the stream ends and leaves nothing behind."""
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


async def test_replay_up_to_a_close(history: History) -> None:
    """A listener from before a close gets the rest up to it, then the end."""
    (start,) = add(history, "start")
    add(history, "a")
    history.append("t", [draft("bye", kind=Kind.FINISH)])
    add(history, "anew")
    assert await Reader(open_stream(str(start.seq))).read_to_end() == ["a", "bye"]


async def test_a_live_only_close_ends_the_stream(settings) -> None:
    """A close without an id ends the streams there are."""
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    reader = Reader(open_stream(durable=False))
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.read_to_end())
    await is_waiting()
    await apublish("t", "close", "bye")
    assert await waiting == ["bye"]


async def test_a_stream_that_was_never_read_leaves_nothing() -> None:
    """Nothing is subscribed before the second step; closing early is fine."""
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


async def test_closing_wakes_who_waits() -> None:
    """A stream closed from elsewhere ends at once."""
    stream = open_stream()
    await stream.__anext__()
    waiting = asyncio.ensure_future(Reader(stream).read_to_end())
    await is_waiting()
    await stream.aclose()
    assert await waiting == []


async def test_cancellation_leaves_nothing() -> None:
    """A listener that has gone is forgotten at once."""
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


async def test_cancellation_arrives_though_nothing_else_suspends(
    history: History, settings
) -> None:
    """After a disconnect a server's send() returns at once: the stream lets others in."""
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


async def test_a_dropped_stream_is_forgotten() -> None:
    """Middleware may drop the iterator without closing it, from any thread."""
    stream: EventStream | None = open_stream(keepalive_seconds=0.05)
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
    async with asyncio.timeout(SECONDS):
        while feed.subscriptions:
            await asyncio.sleep(0)


def test_a_stream_dropped_after_its_loop_is_no_error() -> None:
    """Nor is one that was never made whole."""

    async def start() -> EventStream:
        stream = open_stream(keepalive_seconds=0.05)
        await stream.__anext__()
        await stream.__anext__()
        return stream

    stream = asyncio.run(start())
    del stream
    EventStream.__new__(EventStream).__del__()


# Being ended


class Ends(list[Any]):
    """What a stream tells when it has ended."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__()
        stream.on_close = self.note

    def note(self, stream: EventStream) -> None:
        self.append(stream.reason)


async def test_ending_gives_what_is_buffered_first(history: History) -> None:
    """The listener gets it, and the time after which to come back; then the stream ends."""
    add(history, "start")
    reader = Reader(open_stream())
    ends = Ends(reader.stream)
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    feed = get_hub()._feeds["t"]
    for entry in add(history, *"ab"):
        feed.receive(entry.seq, [entry.frame()], entry.finishes)
    reader.stream.end(Reason.AGE, 1234)
    reader.stream.end(Reason.CLOSED, 99)
    for entry in add(history, "c"):
        feed.receive(entry.seq, [entry.frame()], entry.finishes)
    await waiting
    assert await reader.read_to_end() == ["a", "b"]
    assert reader.decoder.retry_ms == 1234
    assert ends == [Reason.AGE]
    assert not reader.stream.is_open
    assert await Reader(open_stream(reader.decoder.last_event_id)).read(1) == ["c"]


async def test_ending_without_a_time() -> None:
    """A stream that waits ends at once, without a byte."""
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    reader.stream.end(Reason.REFUSED)
    assert await waiting == b""
    assert reader.ended
    assert reader.stream.reason is Reason.REFUSED


async def test_ending_before_the_first_byte() -> None:
    """The listener gets its cursor and the time to come back, and nothing is subscribed."""
    reader = Reader(open_stream())
    ends = Ends(reader.stream)
    reader.stream.end(Reason.SHUTDOWN, 700)
    assert await reader.read_to_end() == []
    assert reader.decoder.last_event_id
    assert reader.decoder.retry_ms == 700
    assert ends == [Reason.SHUTDOWN]
    assert not get_hub()._feeds


async def test_ending_in_the_middle_of_a_replay(history: History, settings) -> None:
    """The rest is left for the listener's next stream."""
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100
    (start,) = add(history, "start")
    add(history, *(str(n) * 40 for n in range(5)))
    reader = Reader(open_stream(str(start.seq)))
    await reader.read(1)
    reader.stream.end(Reason.CLOSED, 5)
    got = await reader.read_to_end()
    assert len(got) < 5
    late = Reader(open_stream(reader.decoder.last_event_id))
    assert got + await late.read(5 - len(got)) == [str(n) * 40 for n in range(5)]
    await late.stream.aclose()


async def test_ending_while_the_history_is_read(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back from it is left for the listener's next stream."""
    (start,) = add(history, "start")
    (entry,) = add(history, "a")
    reader = Reader(open_stream(str(start.seq)))
    hub = get_hub()
    real = hub.read

    async def read(token: str, after: int) -> Slice:
        slice_ = await real(token, after)
        reader.stream.end(Reason.AGE, 5)
        return slice_

    monkeypatch.setattr(hub, "read", read)
    assert await reader.read_to_end() == []
    assert reader.decoder.last_event_id == str(start.seq)
    assert reader.decoder.retry_ms == 5
    assert entry.seq > start.seq


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_aborting_drops_what_is_buffered(history: History, steps: int) -> None:
    """It ends at once, tells who serves it, and is over for whoever waits."""
    (start,) = add(history, "start")
    add(history, "a")
    stream = open_stream(str(start.seq))
    ends = Ends(stream)
    aborted = []
    stream.on_abort = lambda: aborted.append(stream.reason)
    reader = Reader(stream)
    for _ in range(steps):
        await reader.chunk()
    stream.abort(Reason.STALLED)
    stream.abort(Reason.LEFT)
    assert aborted == ends == [Reason.STALLED]
    assert await reader.chunk() == b""
    assert reader.ended
    assert stream.sending_since is None
    assert not stream.is_open


async def test_aborting_wakes_who_waits() -> None:
    """A waiting stream ends at once, and needs nobody who listens for its end."""
    reader = Reader(open_stream())
    await reader.chunk()
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    reader.stream.abort(Reason.CLOSED)
    assert await waiting == b""
    assert reader.stream.reason is Reason.CLOSED


async def test_why_streams_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end has its reason, told once; an open stream has none."""
    cases: dict[Reason, Callable[[Reader], Any]] = {
        Reason.FINISHED: lambda reader: apublish("t", "close", ""),
        Reason.LEFT: lambda reader: reader.stream.aclose(),
        Reason.FAILED: lambda reader: patch.setattr(Subscriber, "take_loss", lambda self: 1 / 0),
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


async def test_a_cancelled_stream_was_left() -> None:
    """Its listener has gone."""
    stream = open_stream()
    ends = Ends(stream)
    await stream.__anext__()
    waiting = asyncio.ensure_future(stream.__anext__())
    await is_waiting()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ends == [Reason.LEFT]


async def test_a_dropped_stream_tells_its_end() -> None:
    """Once, with the reason that it has, or else that it was left."""
    stream: EventStream | None = open_stream()
    assert stream is not None
    ends = Ends(stream)
    stream = None
    gc.collect()
    assert ends == [Reason.LEFT]
    stream = open_stream()
    ends = Ends(stream)
    stream.end(Reason.AGE)
    stream = None
    gc.collect()
    assert ends == [Reason.AGE]


async def test_since_when_the_server_has_a_chunk(history: History) -> None:
    """Between two steps it is known how long the server takes; waiting does not count."""
    reader = Reader(open_stream())
    assert reader.stream.sending_since is None
    reader.stream.progress()
    assert reader.stream.sending_since is None, "nothing is being taken"
    assert reader.stream.stalled_for(1e12) == 0
    await reader.chunk()
    since = reader.stream.sending_since
    assert since is not None
    waiting = asyncio.ensure_future(reader.chunk())
    await is_waiting()
    assert reader.stream.sending_since is None
    assert reader.stream.is_open
    await apublish("t", "ping", "a")
    await waiting
    assert reader.stream.sending_since is not None
    assert reader.stream.sending_since >= since
    reader.stream.sending_since = since - 5
    assert reader.stream.stalled_for(since) == 5
    reader.stream.progress()
    assert reader.stream.sending_since >= since
    await reader.stream.aclose()


# Failures


async def test_an_error_ends_the_stream_cleanly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception never escapes into the server; the listener comes back."""
    reader = Reader(open_stream())
    await reader.chunk()
    monkeypatch.setattr(Subscriber, "take_loss", lambda self: 1 / 0)
    await reader.chunk()
    assert reader.ended
    assert "failed and is ended" in caplog.text
    assert not next(iter(get_hub()._feeds.values())).subscriptions


async def test_a_history_that_fails_ends_no_stream(
    history: History, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is tried again; meanwhile keepalives and live-only events arrive."""
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


async def test_a_live_only_close_waits_for_the_history(
    history: History, monkeypatch: pytest.MonkeyPatch, settings
) -> None:
    """Events that are still to be read come before a close that needs no history."""
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
    async with asyncio.timeout(SECONDS):
        while not tries:
            await asyncio.sleep(0)
        await apublish("t", "close", "bye")
        before = len(tries)
        while len(tries) < before + 3:
            await asyncio.sleep(0.001)
    monkeypatch.setattr(history, "read", real)
    assert await waiting == ["a", "bye"]


async def test_a_history_that_lags_is_asked_again(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the layer brought more than the history shows, reading pauses and goes on."""
    monkeypatch.setattr(module, "STALE_SECONDS", 0.001)
    (start,) = add(history, "start")
    first, second = Reader(open_stream()), Reader(open_stream(str(start.seq)))
    await first.chunk()
    await second.chunk()
    await apublish("t", "ping", "a")
    assert await first.read(1) == ["a"]
    get_hub()._reads.forget()
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


def test_come_back_later() -> None:
    """The whole body is one reconnection time, which differs from listener to listener."""
    times = set()
    for _ in range(20):
        decoder = Decoder("before")
        assert decoder.feed(come_back_later()) == []
        assert decoder.last_event_id == "before"
        times.add(decoder.retry_ms)
    assert all(2_000 <= time <= 10_000 for time in times if time is not None)
    assert None not in times
    assert len(times) > 1


# Several tokens, with a real hub; what they promise is in test_cursors.py


def open_streams(*tokens: str, cursor: str | None = None) -> EventStream:
    cursors = split_cursor(cursor, tokens)
    positions = {token: get_history().locate(token, cursors[token]) for token in tokens}
    first = positions.pop(tokens[0])
    return EventStream(tokens[0], first, asked=cursor, others=positions)


async def test_several_tokens_on_one_stream(history: History) -> None:
    """Replay and live, each token in order, and one cursor to come back with."""
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
    assert last.reason is Reason.FINISHED


async def test_a_stalled_reader_of_several_tokens_loses_nothing(settings) -> None:
    """All its tokens are read again from where they were taken."""
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


# Letting go


async def test_thread_of_the_request_is_let_go() -> None:
    """The executor that a request's context holds is ended."""
    async with ThreadSensitiveContext():
        await sync_to_async(lambda: None)()
        context = SyncToAsync.thread_sensitive_context.get()
        executor = SyncToAsync.context_to_thread_executor[context]
        (thread,) = executor._threads
        await let_go()
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert await sync_to_async(lambda: 5)() == 5


@pytest.mark.django_db(transaction=True)
async def test_connection_of_the_request_is_let_go() -> None:
    """The database connections of the request's thread are closed."""
    async with ThreadSensitiveContext():
        closed = []

        def use() -> None:
            connection.ensure_connection()
            real = connection.connection
            closed.append(lambda: real)

        await sync_to_async(use)()
        raw = closed[0]()
        await let_go()
        with pytest.raises(Exception, match="closed"):
            raw.execute("SELECT 1")


@pytest.mark.django_db
def test_connection_in_a_transaction_is_kept() -> None:
    """A test case's transaction survives a stream."""
    connection.ensure_connection()
    module._close_connections()
    assert connection.connection is not None


async def test_nothing_to_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request's context, or with another asgiref, nothing is touched."""
    await let_go()
    async with ThreadSensitiveContext():
        with monkeypatch.context() as patch:
            patch.delattr(SyncToAsync, "context_to_thread_executor")
            await let_go()


async def test_an_executor_that_has_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context whose executor somebody else has ended is no trouble."""
    monkeypatch.setattr(module, "_close_connections", lambda: None)

    class Gone(dict[Any, Any]):
        def pop(self, *args: Any) -> None:
            return None

    async with ThreadSensitiveContext():
        monkeypatch.setattr(SyncToAsync, "context_to_thread_executor", Gone())
        await let_go()
        SyncToAsync.context_to_thread_executor.clear()
