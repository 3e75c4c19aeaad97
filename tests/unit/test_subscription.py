"""Subscribers: the bounded buffer of a stream, and its position in each of its tokens."""

from __future__ import annotations

import asyncio
import json

import pytest

from django_eventsource.delivery import feed as feeds
from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.subscription import Subscriber, Subscription, share_of
from django_eventsource.history import Entry, Head, Kind, Slice
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.cursors import join_cursor, max_length, short_key
from django_eventsource.protocol.frames import KEEPALIVE, Decoder
from tests.support.cursors import cursor_texts
from tests.support.events import draft
from tests.support.singles import Single


def entry(seq: int, kind: Kind = Kind.EVENT) -> Entry:
    return Entry(seq=seq, draft=draft(str(seq), kind=kind))


def read(*seqs: int, last: int, complete: bool = True) -> Slice:
    """Return the slice of a history."""
    return Slice(entries=tuple(entry(seq) for seq in seqs), complete=complete, last=last)


def send(feed: Feed, seq: int | None, text: str = "", *, closes: bool = False) -> None:
    """Deliver an event."""
    one = draft(text or str(seq), kind=Kind.CLOSE if closes else Kind.EVENT)
    feed.receive(Batch([one.frame(seq)], None if seq is None else [seq], closes=closes))


def send_many(feed: Feed, seq: int, texts: list[str]) -> None:
    """Deliver several events in one message."""
    frames = [draft(text).frame(seq + n) for n, text in enumerate(texts)]
    feed.receive(Batch(frames, range(seq, seq + len(frames))))


def subscribe(feed: Feed, position: int = 10, *, size: int = 10_000) -> Single:
    """Return a subscriber that has caught up at a position."""
    subscriber = Single(position, buffer_bytes=size, keepalive_seconds=None)
    subscriber.join(feed)
    subscriber.catch_up(read(last=position))
    return subscriber


def got(subscriber: Subscriber) -> list[str]:
    """The data of all events that the stream would write now."""
    chunk = subscriber.take_overflow_reset() + subscriber.take()
    return [event.data for event in Decoder().feed(chunk)]


@pytest.fixture
def feed() -> Feed:
    return Feed("t", lambda: None)


# Bounds


def test_a_live_only_close_is_buffered_even_if_the_buffer_is_full(feed: Feed) -> None:
    subscriber = subscribe(feed, size=60)
    send(feed, None, "x" * 30)
    send(feed, None, "bye" * 10, closes=True)
    assert subscriber.ending
    assert got(subscriber)[-1] == "bye" * 10


def test_a_single_event_larger_than_the_bound_is_buffered(feed: Feed) -> None:
    subscriber = subscribe(feed, size=10)
    send(feed, 11, "x" * 1000)
    assert got(subscriber) == ["x" * 1000]


def test_an_overflow_drops_the_buffer_and_the_events_are_read_again(feed: Feed) -> None:
    subscriber = subscribe(feed, size=100)
    for seq in range(11, 30):
        send(feed, seq)
        assert subscriber._size <= 100
    assert not subscriber.live
    assert subscriber.seq == 10
    chunk = subscriber.catch_up(read(*range(11, 30), last=29))
    assert [event.data for event in Decoder().feed(chunk)] == [str(n) for n in range(11, 30)]
    assert subscriber.live
    assert subscriber.take_overflow_reset() == b""


def test_an_overflow_repeats_no_event_that_was_taken_for_the_socket(feed: Feed) -> None:
    subscriber = subscribe(feed, size=100)
    send(feed, 11)
    assert got(subscriber) == ["11"]
    for seq in range(12, 20):
        send(feed, seq)
    assert subscriber.seq == 11


def test_lost_live_only_events_are_reported_by_one_reset(feed: Feed) -> None:
    """The reset does not move the cursor."""
    subscriber = subscribe(feed, size=100)
    for n in range(10):
        send(feed, None, f"live {n}")
    subscriber.catch_up(read(last=10))
    chunk = subscriber.take_overflow_reset() + subscriber.take()
    events = Decoder("before").feed(chunk)
    assert events[0].event == "reset"
    assert json.loads(events[0].data) == {"reason": "overflow", "after": None, "resume": None}
    assert events[0].id == "before", "it does not move the cursor"
    assert subscriber.take_overflow_reset() == b"", "it is reported once"


def test_live_only_events_dropped_by_a_durable_event_are_reported(feed: Feed) -> None:
    subscriber = subscribe(feed, size=100)
    send(feed, None, "live")
    for seq in range(11, 20):
        send(feed, seq)
    assert b"overflow" in subscriber.take_overflow_reset()


def test_no_reset_follows_a_close_that_was_read(feed: Feed) -> None:
    """Live-only events were lost while the close was read."""
    subscriber = Single(10, buffer_bytes=60, keepalive_seconds=None)
    subscriber.join(feed)
    for _ in range(3):
        send(feed, None, "x" * 40)
    assert subscriber._lost
    subscriber.catch_up(Slice(entries=(entry(11, Kind.CLOSE),), complete=True, last=11))
    assert subscriber.take_overflow_reset() + subscriber.take() == b""


# Catching up while the feed holds what comes next


def test_an_overflow_at_the_end_of_a_catch_up_repeats_no_event(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The early events of the feed find no room."""
    monkeypatch.setattr(feeds, "MAX_HELD_BYTES", 40)
    subscriber = Single(10, buffer_bytes=100, keepalive_seconds=None)
    subscriber.join(feed)
    for seq in range(12, 20):
        send(feed, seq)
    written = subscriber.catch_up(read(11, last=11))
    assert not subscriber.live, "it has overflowed"
    written += subscriber.catch_up(read(*range(subscriber.seq + 1, 20), last=19))
    texts = [event.data for event in Decoder().feed(written)]
    assert texts == [str(seq) for seq in range(11, 20)]


def test_an_overflow_after_a_catch_up_loses_no_event(feed: Feed) -> None:
    """The early events of the feed are buffered, and not taken for the socket yet."""
    subscriber = Single(10, buffer_bytes=100, keepalive_seconds=None)
    subscriber.join(feed)
    send(feed, 12)
    written = subscriber.catch_up(read(11, last=11))
    assert subscriber.live
    assert subscriber.has_frames
    for seq in range(13, 20):
        send(feed, seq)
    assert not subscriber.live, "it has overflowed"
    written += subscriber.catch_up(read(*range(subscriber.seq + 1, 20), last=19))
    texts = [event.data for event in Decoder().feed(written)]
    assert texts == [str(seq) for seq in range(11, 20)]


# Several tokens


class Pair:
    """A subscriber of two tokens that has caught up at 10 and 20."""

    def __init__(self, size: int = 10_000, **first: bool) -> None:
        self.subscriber = Subscriber(buffer_bytes=size, keepalive_seconds=None, joined=True)
        self.a = self.subscriber.add("a", 10, **first)
        self.b = self.subscriber.add("b", 20)
        self.feeds = {token: Feed(token, lambda: None) for token in "ab"}
        for one in (self.a, self.b):
            self.feeds[one.token].add(one)
            if not one.close_buffered:
                self.feeds[one.token].catch_up(one, read(last=one.seq))

    def catch_up(self, subscription: Subscription, slice_: Slice) -> bytes:
        return self.feeds[subscription.token].catch_up(subscription, slice_)

    def send(self, token: str, seq: int | None, text: str = "", *, closes: bool = False) -> None:
        send(self.feeds[token], seq, text, closes=closes)


def cursor(a: int, b: int, *, reopened: bool = False) -> str:
    return join_cursor([(short_key("a"), a, reopened), (short_key("b"), b, False)])


def test_the_id_of_each_event_contains_the_position_in_every_token() -> None:
    """It covers the events that were buffered before."""
    pair = Pair()
    pair.send("a", 11)
    pair.send("b", 21)
    pair.send("a", 12)
    events = Decoder().feed(pair.subscriber.take())
    assert [event.data for event in events] == ["11", "21", "12"]
    assert [event.id for event in events] == [cursor(11, 20), cursor(11, 21), cursor(12, 21)]


def test_the_joined_cursor_replaces_any_id_and_nothing_else() -> None:
    pair = Pair()
    frame = draft("one\ntwo", own_id="own").frame(11)
    pair.feeds["a"].receive(Batch([frame], [11]))
    assert pair.subscriber.take() == frame.replace(b"own", cursor(11, 20).encode(), 1)


def test_live_only_events_of_several_tokens_have_no_id() -> None:
    pair = Pair()
    pair.send("a", None, "live")
    assert pair.subscriber.take() == draft("live").frame()


def test_an_overflow_takes_every_token_back_to_what_was_taken() -> None:
    pair = Pair(size=200)
    pair.send("a", 11)
    pair.send("b", 21)
    pair.subscriber.take()
    pair.send("a", 12)
    pair.send("b", 22, "x" * 200)
    assert (pair.a.seq, pair.b.seq) == (11, 21)
    assert pair.subscriber.behind is pair.a
    assert not pair.subscriber.has_frames
    pair.catch_up(pair.a, read(12, last=12))
    assert pair.subscriber.behind is pair.b
    (event,) = Decoder().feed(pair.catch_up(pair.b, read(22, last=22)))
    assert event.id == cursor(12, 22)
    assert pair.subscriber.behind is None


@pytest.mark.parametrize("size", [150, 200, 230, 300])
def test_a_buffer_of_several_tokens_is_bounded(size: int) -> None:
    """The joined cursors in the events count."""
    pair = Pair(size=size)
    for seq in range(11, 31):
        pair.send("a", seq, "x")
        assert pair.subscriber._size <= size


def test_a_close_that_was_sent_stays_closed_after_an_overflow(feed: Feed) -> None:
    pair = Pair(size=200)
    pair.send("a", 11, closes=True)
    pair.subscriber.take()
    pair.send("b", 21, "x" * 150)
    pair.send("b", 22, "x" * 150)
    assert pair.subscriber.behind is pair.b
    pair.send("a", 12)
    pair.send("a", None, "late")
    pair.catch_up(pair.b, read(21, 22, last=22))
    assert got(pair.subscriber) == []


def test_a_close_that_was_only_buffered_is_read_again_after_an_overflow() -> None:
    pair = Pair(size=200)
    pair.send("a", 11, closes=True)
    assert pair.a.close_buffered
    pair.send("b", 21, "x" * 200)
    assert not pair.a.close_buffered
    assert pair.subscriber.behind is pair.a
    chunk = pair.catch_up(pair.a, Slice(entries=(entry(11, Kind.CLOSE),), complete=True, last=11))
    assert [event.event for event in Decoder().feed(chunk)] == ["close"]
    assert (pair.a.close_buffered, pair.subscriber.ending) == (True, False)


def test_the_close_of_the_last_open_token_ends_the_stream() -> None:
    pair = Pair()
    pair.send("a", 11, closes=True)
    assert not pair.subscriber.ending
    pair.send("b", None, "bye", closes=True)
    assert pair.subscriber.ending
    assert got(pair.subscriber) == ["11", "bye"]


def test_the_position_of_a_closed_token_stays_in_the_cursor() -> None:
    """The token needs no feed and no read."""
    pair = Pair(closed=True)
    pair.send("a", 11)
    pair.send("b", 21)
    (event,) = Decoder().feed(pair.subscriber.take())
    assert event.id == cursor(10, 21)
    assert pair.subscriber.behind is None


def test_the_cursor_states_until_the_first_event_that_a_token_was_reopened() -> None:
    pair = Pair(reopened=True)
    pair.send("b", 21)
    pair.send("a", 11)
    events = Decoder().feed(pair.subscriber.take())
    assert [event.id for event in events] == [cursor(10, 21, reopened=True), cursor(11, 21)]


def test_a_reset_contains_its_token_and_moves_no_other() -> None:
    pair = Pair()
    pair.send("b", 21)
    pair.a.move(50, reopened=True, missing=True, after=10)
    events = Decoder().feed(pair.subscriber.take())
    resume = cursor(50, 21, reopened=True)
    assert events[-1].id == resume
    assert json.loads(events[-1].data) == {
        "reason": "expired",
        "after": "10",
        "resume": resume,
        "token": "a",
    }
    pair.a.move(60)
    assert pair.subscriber.take() == f"id: {cursor(60, 21)}\n\n".encode()


def test_a_client_that_ignores_ids_without_data_receives_the_cursor_as_an_event() -> None:
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None, cursor_event=True)
    subscriber.only.move(20)
    assert subscriber.take() == b"id: 20\nevent: cursor\ndata: 20\n\n"


def test_a_loss_of_live_only_events_is_reported_without_a_token() -> None:
    """It moves no cursor."""
    pair = Pair(size=100)
    pair.send("a", None, "live")
    pair.send("b", 21, "x" * 100)
    (event,) = Decoder("before").feed(pair.subscriber.take_overflow_reset())
    assert json.loads(event.data) == {"reason": "overflow", "after": None, "resume": None}
    assert event.id == "before"


# Ends


def test_end_keeps_the_buffered_events(feed: Feed) -> None:
    """Nothing is buffered after the last bytes."""
    subscriber = subscribe(feed)
    send(feed, 11)
    subscriber.end(draft("last").frame())
    subscriber.end(draft("again").frame())
    send(feed, 12)
    send(feed, None, "live")
    assert got(subscriber) == ["11", "last"]
    assert subscriber.behind is None


def test_abort_drops_the_buffered_events(feed: Feed) -> None:
    """No reset is sent."""
    subscriber = subscribe(feed, size=100)
    for n in range(10):
        send(feed, None, f"live {n}")
    subscriber.abort()
    send(feed, 11)
    assert subscriber.take_overflow_reset() + subscriber.take() == b""
    assert subscriber.behind is None
    assert subscriber.is_ready


def test_bytes_that_the_server_has_not_accepted_leave_less_room(feed: Feed) -> None:
    subscriber = subscribe(feed, size=100)
    subscriber.in_flight = 90
    send(feed, 11)
    assert subscriber.live, "one frame is always held"
    send(feed, 12)
    assert not subscriber.live
    subscriber.catch_up(read(11, 12, last=12))
    subscriber.in_flight = 0
    send(feed, 13)
    send(feed, 14)
    assert got(subscriber) == ["13", "14"]


def test_a_batch_may_exceed_the_bound_only_if_there_is_nothing_else(feed: Feed) -> None:
    texts = ["x" * 60, "y" * 60]
    subscriber = subscribe(feed, size=100)
    send_many(feed, 11, texts)
    assert got(subscriber) == texts, "there was nothing else"
    subscriber.in_flight = 1
    send_many(feed, 13, texts)
    assert not subscriber.live
    assert subscriber.seq == 12


def test_a_listener_that_is_behind_is_reset_if_the_history_was_replaced(feed: Feed) -> None:
    """Other events have the next sequence numbers now."""
    behind = Single(30, buffer_bytes=1000, keepalive_seconds=None)
    live = subscribe(feed, size=1000)
    for seq in range(11, 41):
        send(feed, seq)
    behind.join(feed)
    got(live)
    assert not feed.check(40, Head(seq=25, has_epoch=True), recent=True)
    assert [event.event for event in Decoder().feed(live.take())] == ["reset"]
    for seq in range(26, 36):
        send(feed, seq, "new")
    chunk = behind.catch_up(read(31, 32, 33, 34, 35, last=35))
    (event,) = Decoder().feed(chunk)
    assert event.event == "reset"
    assert json.loads(event.data) == {"reason": "expired", "after": "30", "resume": "35"}
    assert behind.live
    send(feed, 36)
    assert got(behind) == ["36"]
    assert behind.catch_up(read(37, last=37)) != b"", "once"


def test_a_joined_cursor_is_as_long_as_max_length_states() -> None:
    """The text is split by token again."""
    subscriber = Subscriber(buffer_bytes=100, keepalive_seconds=None, joined=True)
    tokens = [f"token {n}" for n in range(16)]
    for n, token in enumerate(tokens):
        one = subscriber.add(token, n)
    assert isinstance(one, Subscription)
    assert len(one.cursor) == max_length(16)
    assert cursor_texts(one.cursor, tokens) == {token: str(n) for n, token in enumerate(tokens)}


# Keepalives and waiting


def test_every_second_tick_without_data_buffers_a_keepalive(feed: Feed) -> None:
    """A stalled stream receives no second one."""
    subscriber = subscribe(feed)
    for _ in range(2):
        subscriber.keep_alive()
        assert subscriber.take() == b""
        subscriber.keep_alive()
        assert subscriber.take() == KEEPALIVE
    for _ in range(8):
        subscriber.keep_alive()
    assert subscriber.take() == KEEPALIVE
    send(feed, 11)
    got(subscriber)
    subscriber.keep_alive()
    assert subscriber.take() == b""


async def test_an_event_wakes_a_waiting_stream(feed: Feed) -> None:
    subscriber = subscribe(feed)
    waiting = asyncio.ensure_future(subscriber.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    send(feed, 11)
    send(feed, 12)
    await waiting
    await subscriber.wait()
    assert got(subscriber) == ["11", "12"]


async def test_a_subscriber_accepts_events_after_its_wait_was_cancelled(feed: Feed) -> None:
    subscriber = subscribe(feed)
    waiting = asyncio.ensure_future(subscriber.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    send(feed, 11)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    send(feed, 12)
    assert got(subscriber) == ["11", "12"]


# The buffer


@pytest.fixture
def buffer() -> Single:
    return Single(0, buffer_bytes=100)


def held(buffer: Single) -> bytes:
    return b"".join(buffer._buffer)


def test_the_buffer_takes_three_eighths_of_the_memory_of_a_stream() -> None:
    """The server may take as much, and asyncio 64 KiB."""
    assert 2 * share_of(256 * 1024) + 64 * 1024 == 256 * 1024


@pytest.mark.parametrize(
    ("waiting", "in_flight", "frames", "fits"),
    [
        (0, 0, [100], True),
        (0, 0, [101], True),
        (0, 0, [50, 51], True),
        (0, 99, [2], True),
        (0, 99, [1, 1], False),
        (0, 98, [1, 1], True),
        (1, 0, [99], True),
        (1, 0, [100], False),
        (1, 0, [50, 50], False),
        (50, 50, [1], False),
    ],
)
def test_a_batch_is_accepted_up_to_the_bound(
    buffer: Single, waiting: int, in_flight: int, frames: list[int], fits: bool
) -> None:
    """A single event, or one batch beside nothing else, may exceed it."""
    if waiting:
        buffer.write(b"w" * waiting)
    buffer.in_flight = in_flight
    batch = Batch([b"x" * size for size in frames])
    assert buffer.offer(batch) is fits
    assert held(buffer) == b"w" * waiting + (batch.data if fits else b"")
    assert buffer._size == len(held(buffer))


@pytest.mark.parametrize("how", ["write", "offer", "wake"])
async def test_a_waiting_stream_is_woken_once(buffer: Single, how: str) -> None:
    waiter = buffer.waiter(asyncio.get_running_loop())
    for _ in range(2):
        buffer.dirty = False
        if how == "write":
            buffer.write(b"x")
        elif how == "offer":
            assert buffer.offer(Batch([b"x"]))
        else:
            buffer.wake()
        assert buffer.dirty
    await asyncio.wait_for(waiter, 1)


def test_a_keepalive_is_buffered_only_if_nothing_was_written_and_nothing_waits(
    buffer: Single,
) -> None:
    buffer.keep_alive()
    assert not buffer.has_frames
    buffer.keep_alive()
    assert held(buffer) == KEEPALIVE
    buffer.quiet = True
    buffer.keep_alive()
    assert held(buffer) == KEEPALIVE
    buffer._buffer.clear()
    assert buffer.offer(Batch([b"x"]))
    assert not buffer.quiet
