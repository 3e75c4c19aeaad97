"""Subscribers: the bounded buffer of a stream, and its place in each of its tokens."""

from __future__ import annotations

import asyncio
import json

import pytest

from django_eventsource import feeds
from django_eventsource.cursors import join_cursor, max_length, short_key, split_cursor
from django_eventsource.feeds import Feed
from django_eventsource.frames import KEEPALIVE, Decoder
from django_eventsource.history import Entry, Kind, Slice
from django_eventsource.subscribers import Subscriber, Subscription
from tests.histories import draft
from tests.singles import Single


def entry(seq: int, kind: Kind = Kind.EVENT) -> Entry:
    return Entry(seq=seq, draft=draft(str(seq), kind=kind))


def read(*seqs: int, last: int, complete: bool = True) -> Slice:
    """What a history would give."""
    return Slice(entries=tuple(entry(seq) for seq in seqs), complete=complete, last=last)


def send(feed: Feed, seq: int | None, text: str = "", *, finish: bool = False) -> None:
    """What the layer would bring."""
    one = draft(text or str(seq), kind=Kind.FINISH if finish else Kind.EVENT)
    feed.receive(seq, [one.frame(seq)], finish)


def send_many(feed: Feed, seq: int, texts: list[str]) -> None:
    """What the layer would bring in one message."""
    frames = [draft(text).frame(seq + n) for n, text in enumerate(texts)]
    feed.receive(seq, frames, False)


def subscribe(feed: Feed, position: int = 10, *, size: int = 10_000) -> Single:
    """A subscriber that has caught up at a place."""
    subscriber = Single(position, buffer_bytes=size, keepalive_seconds=None)
    feed.add(subscriber.only)
    subscriber.catch_up(read(last=position))
    return subscriber


def got(subscriber: Subscriber) -> list[str]:
    """The data of all events that the stream would write now."""
    chunk = subscriber.take_loss() + subscriber.take()
    return [event.data for event in Decoder().feed(chunk)]


@pytest.fixture
def feed() -> Feed:
    return Feed("t", "g", lambda: None)


# Bounds


def test_live_only_close_ends_even_a_full_subscriber(feed: Feed) -> None:
    """A close without an id always finds room."""
    subscriber = subscribe(feed, size=60)
    send(feed, None, "x" * 30)
    send(feed, None, "bye" * 10, finish=True)
    assert subscriber.finished
    assert got(subscriber)[-1] == "bye" * 10


def test_one_event_larger_than_the_buffer_is_held(feed: Feed) -> None:
    """The bound never keeps a single event out."""
    subscriber = subscribe(feed, size=10)
    send(feed, 11, "x" * 1000)
    assert got(subscriber) == ["x" * 1000]


def test_overflow_drops_the_buffer_not_the_listener(feed: Feed) -> None:
    """A full subscriber falls behind and reads everything from the history."""
    subscriber = subscribe(feed, size=100)
    for seq in range(11, 30):
        send(feed, seq)
        assert subscriber._size <= 100
    assert not subscriber.live
    assert subscriber.position == 10
    chunk = subscriber.catch_up(read(*range(11, 30), last=29))
    assert [event.data for event in Decoder().feed(chunk)] == [str(n) for n in range(11, 30)]
    assert subscriber.live
    assert subscriber.take_loss() == b""


def test_overflow_goes_back_to_what_was_written(feed: Feed) -> None:
    """Events already taken for the socket are not sent again."""
    subscriber = subscribe(feed, size=100)
    send(feed, 11)
    assert got(subscriber) == ["11"]
    for seq in range(12, 20):
        send(feed, seq)
    assert subscriber.position == 11


def test_lost_live_only_events_are_told(feed: Feed) -> None:
    """Live-only events that no history has are reported with reset."""
    subscriber = subscribe(feed, size=100)
    for n in range(10):
        send(feed, None, f"live {n}")
    subscriber.catch_up(read(last=10))
    chunk = subscriber.take_loss() + subscriber.take()
    events = Decoder("before").feed(chunk)
    assert events[0].event == "reset"
    assert json.loads(events[0].data) == {"reason": "overflow", "after": None, "resume": None}
    assert events[0].id == "before", "it does not move the cursor"
    assert subscriber.take_loss() == b"", "it is told once"


def test_live_only_events_before_an_overflow_are_told(feed: Feed) -> None:
    """A durable event that finds no room throws out live-only ones: they are lost."""
    subscriber = subscribe(feed, size=100)
    send(feed, None, "live")
    for seq in range(11, 20):
        send(feed, seq)
    assert b"overflow" in subscriber.take_loss()


def test_nothing_follows_a_close_that_was_read(feed: Feed) -> None:
    """A loss that came about while the close was read is not told after it."""
    subscriber = Single(10, buffer_bytes=60, keepalive_seconds=None)
    feed.add(subscriber.only)
    for _ in range(3):
        send(feed, None, "x" * 40)
    assert subscriber._lost
    subscriber.catch_up(Slice(entries=(entry(11, Kind.FINISH),), complete=True, last=11))
    assert subscriber.take_loss() + subscriber.take() == b""


# Catching up while the feed holds what comes next


def test_an_overflow_at_the_end_of_catching_up_repeats_nothing(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is on its way to the socket when what the feed held finds no room."""
    monkeypatch.setattr(feeds, "MAX_HELD_BYTES", 40)
    subscriber = Single(10, buffer_bytes=100, keepalive_seconds=None)
    feed.add(subscriber.only)
    for seq in range(12, 20):
        send(feed, seq)
    written = subscriber.catch_up(read(11, last=11))
    assert not subscriber.live, "it has overflowed"
    written += subscriber.catch_up(read(*range(subscriber.position + 1, 20), last=19))
    texts = [event.data for event in Decoder().feed(written)]
    assert texts == [str(seq) for seq in range(11, 20)]


def test_an_overflow_after_catching_up_loses_nothing(feed: Feed) -> None:
    """What the feed held is buffered then, and not taken for the socket yet."""
    subscriber = Single(10, buffer_bytes=100, keepalive_seconds=None)
    feed.add(subscriber.only)
    send(feed, 12)
    written = subscriber.catch_up(read(11, last=11))
    assert subscriber.live
    assert subscriber.has_frames
    for seq in range(13, 20):
        send(feed, seq)
    assert not subscriber.live, "it has overflowed"
    written += subscriber.catch_up(read(*range(subscriber.position + 1, 20), last=19))
    texts = [event.data for event in Decoder().feed(written)]
    assert texts == [str(seq) for seq in range(11, 20)]


# Several tokens


class Pair:
    """A subscriber of two tokens that has caught up at 10 and 20."""

    def __init__(self, size: int = 10_000, **first: bool) -> None:
        self.subscriber = Subscriber(buffer_bytes=size, keepalive_seconds=None, joined=True)
        self.a = self.subscriber.add("a", 10, **first)
        self.b = self.subscriber.add("b", 20)
        self.feeds = {token: Feed(token, token, lambda: None) for token in "ab"}
        for one in (self.a, self.b):
            self.feeds[one.token].add(one)
            if not one.finished:
                one.catch_up(read(last=one.position))

    def send(self, token: str, seq: int | None, text: str = "", *, finish: bool = False) -> None:
        send(self.feeds[token], seq, text, finish=finish)


def cursor(a: int, b: int, *, anew: bool = False) -> str:
    return join_cursor([(short_key("a"), a, anew), (short_key("b"), b, False)])


def test_each_frame_carries_the_place_in_every_token() -> None:
    """What is buffered before it is in its id; what is after it is not."""
    pair = Pair()
    pair.send("a", 11)
    pair.send("b", 21)
    pair.send("a", 12)
    events = Decoder().feed(pair.subscriber.take())
    assert [event.data for event in events] == ["11", "21", "12"]
    assert [event.id for event in events] == [cursor(11, 20), cursor(11, 21), cursor(12, 21)]


def test_a_frame_is_stamped_whatever_its_id() -> None:
    """The id line is replaced, and nothing else of the frame."""
    pair = Pair()
    frame = draft("one\ntwo", own_id="own").frame(11)
    pair.feeds["a"].receive(11, [frame], False)
    assert pair.subscriber.take() == frame.replace(b"own", cursor(11, 20).encode(), 1)


def test_live_only_frames_are_not_stamped() -> None:
    """They have no id, on a stream of several tokens too."""
    pair = Pair()
    pair.send("a", None, "live")
    assert pair.subscriber.take() == draft("live").frame()


def test_an_overflow_takes_all_tokens_back() -> None:
    """Each goes on from where its events were taken for the socket."""
    pair = Pair(size=200)
    pair.send("a", 11)
    pair.send("b", 21)
    pair.subscriber.take()
    pair.send("a", 12)
    pair.send("b", 22, "x" * 200)
    assert (pair.a.position, pair.b.position) == (11, 21)
    assert pair.subscriber.behind is pair.a
    assert not pair.subscriber.has_frames
    pair.a.catch_up(read(12, last=12))
    assert pair.subscriber.behind is pair.b
    (event,) = Decoder().feed(pair.b.catch_up(read(22, last=22)))
    assert event.id == cursor(12, 22)
    assert pair.subscriber.behind is None


@pytest.mark.parametrize("size", [150, 200, 230, 300])
def test_a_buffer_of_several_tokens_is_bounded(size: int) -> None:
    """The ids that frames are stamped with count."""
    pair = Pair(size=size)
    for seq in range(11, 31):
        pair.send("a", seq, "x")
        assert pair.subscriber._size <= size


def test_a_close_that_was_sent_stays(feed: Feed) -> None:
    """An overflow afterwards opens no token again."""
    pair = Pair(size=200)
    pair.send("a", 11, finish=True)
    pair.subscriber.take()
    pair.send("b", 21, "x" * 150)
    pair.send("b", 22, "x" * 150)
    assert pair.subscriber.behind is pair.b
    pair.send("a", 12)
    pair.send("a", None, "late")
    pair.b.catch_up(read(21, 22, last=22))
    assert got(pair.subscriber) == []


def test_a_close_that_was_only_buffered_is_taken_back() -> None:
    """It is read again, from its place in the history."""
    pair = Pair(size=200)
    pair.send("a", 11, finish=True)
    assert pair.a.finished
    pair.send("b", 21, "x" * 200)
    assert not pair.a.finished
    assert pair.subscriber.behind is pair.a
    chunk = pair.a.catch_up(Slice(entries=(entry(11, Kind.FINISH),), complete=True, last=11))
    assert [event.event for event in Decoder().feed(chunk)] == ["close"]
    assert (pair.a.finished, pair.subscriber.finished) == (True, False)


def test_the_last_close_finishes_the_subscriber() -> None:
    """As long as one token is open, the stream is."""
    pair = Pair()
    pair.send("a", 11, finish=True)
    assert not pair.subscriber.finished
    pair.send("b", None, "bye", finish=True)
    assert pair.subscriber.finished
    assert got(pair.subscriber) == ["11", "bye"]


def test_a_token_that_was_closed_before() -> None:
    """It needs no feed and no reading, and its place stays in the cursor."""
    pair = Pair(finished=True)
    pair.send("a", 11)
    pair.send("b", 21)
    (event,) = Decoder().feed(pair.subscriber.take())
    assert event.id == cursor(10, 21)
    assert pair.subscriber.behind is None


def test_a_token_that_was_opened_anew() -> None:
    """Its cursor says so until its first event."""
    pair = Pair(anew=True)
    pair.send("b", 21)
    pair.send("a", 11)
    events = Decoder().feed(pair.subscriber.take())
    assert [event.id for event in events] == [cursor(10, 21, anew=True), cursor(11, 21)]


def test_a_reset_names_its_token() -> None:
    """It moves that one alone."""
    pair = Pair()
    pair.send("b", 21)
    pair.a.move(50, anew=True, missing=True, after=10)
    events = Decoder().feed(pair.subscriber.take())
    place = cursor(50, 21, anew=True)
    assert events[-1].id == place
    assert json.loads(events[-1].data) == {
        "reason": "expired",
        "after": "10",
        "resume": place,
        "token": "a",
    }
    pair.a.move(60)
    assert pair.subscriber.take() == f"id: {cursor(60, 21)}\n\n".encode()


def test_a_listener_that_needs_events_is_moved_by_an_event() -> None:
    """A cursor that it would ignore is of no use to it later in the stream either."""
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None, cursor_event=True)
    subscriber.only.move(20)
    assert subscriber.take() == b"id: 20\nevent: cursor\ndata: 20\n\n"


def test_a_loss_of_live_only_events_is_of_all_tokens() -> None:
    """Whose they were is not known: no token is named, and no place is moved."""
    pair = Pair(size=100)
    pair.send("a", None, "live")
    pair.send("b", 21, "x" * 100)
    (event,) = Decoder("before").feed(pair.subscriber.take_loss())
    assert json.loads(event.data) == {"reason": "overflow", "after": None, "resume": None}
    assert event.id == "before"


# Ends


def test_finishing_keeps_what_is_buffered(feed: Feed) -> None:
    """The last frame comes after it, and nothing after that."""
    subscriber = subscribe(feed)
    send(feed, 11)
    subscriber.finish(draft("last").frame())
    subscriber.finish(draft("again").frame())
    send(feed, 12)
    send(feed, None, "live")
    assert got(subscriber) == ["11", "last"]
    assert subscriber.behind is None


def test_ending_drops_what_is_buffered(feed: Feed) -> None:
    """Nothing is left to send, and nothing is told."""
    subscriber = subscribe(feed, size=100)
    for n in range(10):
        send(feed, None, f"live {n}")
    subscriber.end()
    send(feed, 11)
    assert subscriber.take_loss() + subscriber.take() == b""
    assert subscriber.behind is None
    assert subscriber.has_news


def test_what_the_server_holds_counts(feed: Feed) -> None:
    """A reader that takes its time leaves less room in the buffer."""
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


def test_a_batch_beside_what_the_server_holds(feed: Feed) -> None:
    """Several events are only held over the bound if there is nothing else."""
    texts = ["x" * 60, "y" * 60]
    subscriber = subscribe(feed, size=100)
    send_many(feed, 11, texts)
    assert got(subscriber) == texts, "there was nothing else"
    subscriber.in_flight = 1
    send_many(feed, 13, texts)
    assert not subscriber.live
    assert subscriber.position == 12


def test_a_history_that_was_replaced_while_one_is_behind(feed: Feed) -> None:
    """Its place is another one's now: what is there under the next numbers is not what follows."""
    behind = Single(30, buffer_bytes=1000, keepalive_seconds=None)
    live = subscribe(feed, size=1000)
    for seq in range(11, 41):
        send(feed, seq)
    feed.add(behind.only)
    got(live)
    assert not feed.compare(40, 25)
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


def test_a_cursor_of_many_tokens_is_as_long_as_stated() -> None:
    """The length grows with the tokens, and the text is split by token again."""
    subscriber = Subscriber(buffer_bytes=100, keepalive_seconds=None, joined=True)
    tokens = [f"token {n}" for n in range(16)]
    for n, token in enumerate(tokens):
        one = subscriber.add(token, n)
    assert isinstance(one, Subscription)
    assert len(one.cursor) == max_length(16)
    assert split_cursor(one.cursor, tokens) == {token: str(n) for n, token in enumerate(tokens)}


# Keepalives and waiting


def test_keepalive_only_on_a_silent_stream(feed: Feed) -> None:
    """Every second tick without a write gives one; a stalled reader gets no more."""
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


async def test_waiting_ends_with_news(feed: Feed) -> None:
    """A waiting stream is woken by an event, and waits no longer than that."""
    subscriber = subscribe(feed)
    waiting = asyncio.ensure_future(subscriber.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    send(feed, 11)
    send(feed, 12)
    await waiting
    await subscriber.wait()
    assert got(subscriber) == ["11", "12"]


async def test_cancelled_waiting_leaves_nothing(feed: Feed) -> None:
    """A subscriber whose stream was cancelled can still be written to."""
    subscriber = subscribe(feed)
    waiting = asyncio.ensure_future(subscriber.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    send(feed, 11)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    send(feed, 12)
    assert got(subscriber) == ["11", "12"]
