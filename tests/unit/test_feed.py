"""Feeds: order, gaps, heads and floors. No I/O, so every case can be made."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_eventsource import feeds
from django_eventsource.feeds import Feed
from django_eventsource.frames import Decoder
from django_eventsource.history import Entry, Kind, Slice
from tests.histories import draft
from tests.singles import Single


def entry(seq: int, kind: Kind = Kind.EVENT) -> Entry:
    return Entry(seq=seq, draft=draft(str(seq), kind=kind))


def read(*seqs: int, last: int, complete: bool = True) -> Slice:
    """What a history would give."""
    return Slice(entries=tuple(entry(seq) for seq in seqs), complete=complete, last=last)


def send(feed: Feed, seq: int | None, text: str = "", *, finish: bool = False) -> bool:
    """What the layer would bring; tell whether the feed has a gap."""
    one = draft(text or str(seq), kind=Kind.FINISH if finish else Kind.EVENT)
    feed.receive(seq, [one.frame(seq)], finish)
    return feed.has_gap


def subscribe(feed: Feed, position: int = 10, *, size: int = 10_000) -> Single:
    """A subscriber that has caught up at a place."""
    subscriber = Single(position, buffer_bytes=size, keepalive_seconds=None)
    feed.add(subscriber.only)
    subscriber.catch_up(read(last=position))
    return subscriber


def got(subscriber: Single) -> list[str]:
    """The data of all events that the stream would write now."""
    chunk = subscriber.take_loss() + subscriber.take()
    return [event.data for event in Decoder().feed(chunk)]


@pytest.fixture
def feed() -> Feed:
    return Feed("t", "g", lambda: None)


# Order


def test_events_in_order_are_passed_on(feed: Feed) -> None:
    """What comes in order reaches every subscriber, in one write."""
    one, two = subscribe(feed), subscribe(feed)
    assert not any([send(feed, 11), send(feed, 12)])
    assert got(one) == got(two) == ["11", "12"]
    assert got(one) == []


def test_all_subscribers_share_the_bytes(feed: Feed) -> None:
    """A frame is the same object in every buffer."""
    one, two = subscribe(feed), subscribe(feed)
    send(feed, 11)
    assert one._buffer[0] is two._buffer[0]


def test_repeated_events_are_dropped(feed: Feed) -> None:
    """An event that came already is not passed on again."""
    subscriber = subscribe(feed)
    for seq in (11, 11, 10, 9, 12):
        send(feed, seq)
    assert got(subscriber) == ["11", "12"]


def test_early_events_wait_for_the_missing_one(feed: Feed) -> None:
    """Messages that overtook each other are put in order."""
    subscriber = subscribe(feed)
    assert send(feed, 13)
    assert send(feed, 12)
    assert got(subscriber) == []
    assert not send(feed, 11)
    assert got(subscriber) == ["11", "12", "13"]
    assert not feed.has_gap


def test_a_gap_is_closed_from_the_history(feed: Feed) -> None:
    """What the layer lost is read, and what was held follows."""
    subscriber = subscribe(feed)
    assert send(feed, 13)
    assert feed.has_gap
    assert not feed.pass_on(10, read(11, 12, last=13))
    assert got(subscriber) == ["11", "12", "13"]
    assert not feed.has_gap


def test_a_long_gap_is_read_in_parts(feed: Feed) -> None:
    """As long as the history has more, more is read."""
    subscriber = subscribe(feed)
    assert feed.pass_on(10, read(11, 12, last=14))
    assert not feed.pass_on(12, read(13, 14, last=14))
    assert got(subscriber) == ["11", "12", "13", "14"]


def test_what_came_while_reading_is_not_passed_on_twice(feed: Feed) -> None:
    """A read that was overtaken by the layer does no harm."""
    subscriber = subscribe(feed)
    send(feed, 11)
    send(feed, 12)
    feed.pass_on(10, read(11, 12, 13, last=13))
    assert got(subscriber) == ["11", "12", "13"]


def test_events_held_are_bounded(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the history is relied on."""
    monkeypatch.setattr(feeds, "MAX_EARLY_BYTES", 2 * len(entry(12).frame()))
    subscriber = subscribe(feed)
    for seq in (12, 13, 14):
        assert send(feed, seq)
    feed.pass_on(10, read(11, last=14))
    assert got(subscriber) == ["11", "12", "13"]


def test_messages_before_the_first_catch_up_are_held(feed: Feed) -> None:
    """A feed that does not know its place yet loses nothing and reports no gap."""
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    assert not send(feed, 12)
    assert subscriber.catch_up(read(11, last=11)) != b""
    assert subscriber.live
    assert got(subscriber) == ["12"]


# Catching up


def test_a_subscriber_behind_reads_until_it_meets_the_feed(feed: Feed) -> None:
    """Live events are not buffered for one that is behind; it reads them."""
    subscribe(feed, 20)
    late = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(late.only)
    send(feed, 21)
    assert late.catch_up(read(11, 12, last=20)) == entry(11).frame() + entry(12).frame()
    assert not late.live
    late.catch_up(read(*range(13, 21), last=20))
    assert not late.live, "the feed is at 21"
    late.catch_up(read(21, last=21))
    assert late.live
    send(feed, 22)
    assert got(late) == ["22"]


def test_a_subscriber_ahead_of_the_feed_skips_what_it_has(feed: Feed) -> None:
    """One that read more than the layer brought gets nothing twice."""
    early = subscribe(feed, 10)
    ahead = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(ahead.only)
    ahead.catch_up(read(11, 12, last=12))
    assert ahead.live
    for seq in (11, 12, 13):
        send(feed, seq)
    assert got(ahead) == ["13"]
    assert got(early) == ["11", "12", "13"]


def test_reading_what_is_gone_resets(feed: Feed) -> None:
    """A subscriber whose events were trimmed is told, and goes on live."""
    subscriber = Single(5, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    chunk = subscriber.catch_up(read(last=30, complete=False))
    (event,) = Decoder().feed(chunk)
    assert (event.event, event.id) == ("reset", "30")
    assert json.loads(event.data) == {"reason": "expired", "after": "5", "resume": "30"}
    assert subscriber.live
    send(feed, 31)
    assert got(subscriber) == ["31"]


def test_a_closed_subscriber_does_not_become_live(feed: Feed) -> None:
    """One that was removed while it read is left alone."""
    subscriber = Single(5, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    feed.remove(subscriber.only)
    subscriber.catch_up(read(last=5))
    assert not subscriber.live


# Closing


def test_close_is_the_last_event(feed: Feed) -> None:
    """After the close nothing is buffered, live-only events neither."""
    subscriber = subscribe(feed)
    send(feed, 11, "bye", finish=True)
    send(feed, 12)
    send(feed, None, "late")
    assert got(subscriber) == ["bye"]
    assert subscriber.finished


def test_close_in_the_history_ends_the_catch_up(feed: Feed) -> None:
    """A replay stops at the close, though events follow; nothing buffered is sent."""
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    send(feed, None, "live")
    entries = (entry(11), entry(12, Kind.FINISH), entry(13))
    chunk = subscriber.catch_up(Slice(entries=entries, complete=True, last=13))
    assert [event.data for event in Decoder().feed(chunk)] == ["11", "12"]
    assert subscriber.finished
    assert subscriber.live
    assert got(subscriber) == []


# Bounds


def test_live_only_events_are_held_for_one_that_reads(feed: Feed) -> None:
    """They need no catching up, only room."""
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    send(feed, None, "live")
    subscriber.catch_up(read(11, last=11))
    assert got(subscriber) == ["live"]


# Heads and floors


def test_a_head_that_is_further_needs_a_read(feed: Feed) -> None:
    """The head check finds what the layer did not bring."""
    subscribe(feed)
    assert feed.compare(10, 12)
    assert not feed.compare(10, 10)


def test_a_head_that_went_back_resets(feed: Feed) -> None:
    """A history that was replaced by an older one is told; its numbers come again."""
    subscriber = subscribe(feed, 20)
    send(feed, 22)
    assert not feed.compare(20, 15)
    (event,) = Decoder().feed(subscriber.take())
    assert json.loads(event.data) == {"reason": "expired", "after": "20", "resume": "15"}
    assert not feed.has_gap
    send(feed, 16)
    assert got(subscriber) == ["16"]


def test_a_head_asked_for_before_an_event_came_is_no_step_back(feed: Feed) -> None:
    """What the layer brought while the head was asked for is no contradiction."""
    subscriber = subscribe(feed)
    send(feed, 11)
    assert not feed.compare(10, 10)
    assert got(subscriber) == ["11"]


def test_a_gap_that_is_gone_resets_everybody(feed: Feed) -> None:
    """When the history lacks what the layer lost, the listeners are told."""
    subscriber, other = subscribe(feed), Single(3, buffer_bytes=100, keepalive_seconds=None)
    feed.add(other.only)
    send(feed, 12)
    assert not feed.pass_on(10, read(last=50, complete=False))
    (event,) = Decoder().feed(subscriber.take())
    assert json.loads(event.data) == {"reason": "expired", "after": "10", "resume": "50"}
    assert not feed.has_gap
    assert other.take() == b"", "one that is behind finds out by itself"
    send(feed, 51)
    assert got(subscriber) == ["51"]


def test_a_listener_ahead_of_a_gap_is_not_taken_back(feed: Feed) -> None:
    """A reset for what others missed leaves alone who has it already."""
    subscribe(feed, 10)
    ahead = Single(30, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(ahead.only)
    ahead.catch_up(read(last=30))
    feed.pass_on(10, read(last=20, complete=False))
    assert ahead.take() == b""
    feed.pass_on(20, read(*range(21, 32), last=31))
    assert got(ahead) == ["31"]


def test_a_listener_in_the_middle_of_a_gap_misses_nothing_that_is_there(feed: Feed) -> None:
    """What the feed lacks and the history too need not be what the listener lacks."""
    subscribe(feed, 10)
    ahead = Single(15, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(ahead.only)
    ahead.catch_up(read(last=15))
    feed.pass_on(10, read(last=16, complete=False))
    written = ahead.take()
    if not ahead.live:
        written += ahead.catch_up(read(16, last=16))
    assert [event.data for event in Decoder().feed(written)] == ["16"]


def test_a_reset_at_a_close_opens_the_token_anew(feed: Feed) -> None:
    """One that was reset to a close has not seen it, and its cursor says so."""
    subscriber = subscribe(feed)
    feed.pass_on(10, Slice(complete=False, last=50, closed=True))
    (event,) = Decoder().feed(subscriber.take())
    assert event.id == "50+"


def test_a_gap_is_reported(feed: Feed) -> None:
    """Whoever closes gaps is told at once, also of one found while catching up."""
    told = []
    feed = Feed("t", "g", lambda: told.append(1))
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    feed.add(subscriber.only)
    send(feed, 13)
    assert not told
    subscriber.catch_up(read(last=10))
    assert told
    assert feed.has_gap


def test_a_gap_that_the_history_cannot_close_is_not_asked_for_in_a_circle() -> None:
    """A number ahead of the history, as of another database, costs one read."""
    told = []
    feed = Feed("t", "g", lambda: told.append(1))
    subscriber = subscribe(feed)
    send(feed, 5000)
    assert len(told) == 1
    assert not feed.pass_on(10, read(last=10))
    assert len(told) == 1
    send(feed, 11)
    assert got(subscriber) == ["11"]
    assert len(told) == 1


def test_an_overtaken_read_does_not_reset(feed: Feed) -> None:
    """A read from a place that the feed has left says nothing about it."""
    subscriber = subscribe(feed)
    send(feed, 11)
    assert feed.pass_on(10, read(last=11, complete=False))
    assert got(subscriber) == ["11"]


def test_a_risen_floor_takes_listeners_along(feed: Feed) -> None:
    """Listeners of a token without events follow the floor, so that they can resume."""
    subscriber = subscribe(feed, 10)
    feed.raise_to(10, certain=True)
    feed.raise_to(40, certain=True)
    assert subscriber.take() == b"id: 40\n\n"
    feed.raise_to(30, certain=True)
    assert subscriber.take() == b""
    send(feed, 41)
    assert got(subscriber) == ["41"]


def test_a_history_that_was_lost_resets_everybody(feed: Feed) -> None:
    """Wherever they were: its numbers begin anew, and so does what is certain of the token."""
    one, ahead = subscribe(feed, 10), subscribe(feed, 50)
    finished = subscribe(feed, 10)
    finished.only.finished = True
    send(feed, 12)
    feed.restart(40)
    for subscriber in (one, ahead):
        (event,) = Decoder().feed(subscriber.take())
        assert (event.event, event.id) == ("reset", "40")
    assert finished.take() == b""
    assert not feed.has_gap
    send(feed, 41)
    assert got(one) == got(ahead) == ["41"]
    feed.restart(60)
    assert b"reset" in one.take()
    feed.raise_to(70, certain=True)
    assert one.take() == b"id: 70\n\n", "nothing can have come and gone since"


@pytest.mark.parametrize("case", ["had events", "had a head", "not certain"])
def test_a_token_that_was_forgotten_resets(feed: Feed, case: str) -> None:
    """Where events may have come and gone, the floor is no excuse for silence."""
    subscriber = subscribe(feed, 10)
    if case == "had events":
        send(feed, 11)
        got(subscriber)
    elif case == "had a head":
        feed.compare(10, 10)
    feed.raise_to(40, certain=case != "not certain")
    (event,) = Decoder().feed(subscriber.take())
    assert (event.event, event.id) == ("reset", "40")
    feed.raise_to(50, certain=True)
    assert subscriber.take() == b"id: 50\n\n"


def test_a_floor_says_nothing_to_a_feed_without_a_place(feed: Feed) -> None:
    """Before the first catch-up there is nothing to move, nor for a finished subscriber."""
    feed.raise_to(40, certain=True)
    assert feed.last is None
    subscriber = subscribe(feed, 50)
    subscriber.only.finished = True
    feed.raise_to(60, certain=True)
    assert subscriber.take() == b""


# Everything together


@given(st.data())
def test_whatever_the_layer_does_nothing_is_missing(data: st.DataObject) -> None:
    """Lost, repeated and disordered messages, reads and overflows: all events, once, in order."""
    total = data.draw(st.integers(1, 30))
    history = [entry(seq) for seq in range(1, total + 1)]
    feed = Feed("t", "g", lambda: None)
    subscriber = Single(0, buffer_bytes=120, keepalive_seconds=None)
    feed.add(subscriber.only)
    written = b""
    published = 0

    def look(after: int) -> Slice:
        known = tuple(one for one in history[:published] if one.seq > after)
        return Slice(entries=known[:4], complete=True, last=max(published, after))

    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["publish", "layer", "repair", "catch up", "write"])):
            case "publish":
                published = min(published + 1, total)
            case "layer" if published:
                send(feed, data.draw(st.integers(1, published)))
            case "repair" if feed.last is not None:
                feed.pass_on(feed.last, look(feed.last))
            case "catch up" if not subscriber.live:
                written += subscriber.catch_up(look(subscriber.position))
            case "write" if subscriber.live:
                written += subscriber.take()
    published = total
    while subscriber.position < total or subscriber._buffer:
        if not subscriber.live:
            written += subscriber.catch_up(look(subscriber.position))
        elif feed.last is not None and feed.last < total:
            feed.pass_on(feed.last, look(feed.last))
        if subscriber.live:
            written += subscriber.take()
    assert [event.data for event in Decoder().feed(written)] == [
        str(n) for n in range(1, total + 1)
    ]


# Pacing


class Pace:
    """Says when it may be passed on, as the test says."""

    def __init__(self) -> None:
        self.free = True
        self.holding: list[Feed] = []
        self.begun: list[int] = []

    def is_free(self, feed: Feed) -> bool:
        return self.free

    def begin(self, feed: Feed, events: int) -> None:
        self.begun.append(events)

    def hold(self, feed: Feed) -> None:
        self.holding.append(feed)


@pytest.fixture
def pace() -> Pace:
    return Pace()


@pytest.fixture
def paced(pace: Pace) -> Feed:
    return Feed("t", "g", lambda: None, pace)  # type: ignore[arg-type]


def test_a_busy_feed_holds_and_passes_on_together(pace: Pace, paced: Feed) -> None:
    """One write for each subscriber, the same bytes for all, in their order."""
    one, two = subscribe(paced), subscribe(paced)
    send(paced, 11)
    pace.free = False
    for seq in (12, None, 13, 14):
        send(paced, seq, "" if seq else "live")
    assert got(one) == ["11"]
    assert pace.holding
    pace.free = True
    send(paced, 15)
    assert got(one) == [], "what is held comes first"
    paced.flush()
    assert two._buffer[-1] is one._buffer[-1]
    assert got(one) == ["12", "live", "13", "14", "15"]
    assert got(two) == ["11", "12", "live", "13", "14", "15"]
    assert pace.begun == [1, 1, 1, 3]
    paced.flush()
    assert got(one) == []


def test_what_is_large_or_ends_streams_is_not_held(
    pace: Pace, paced: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close ends the streams at once; what is held is bounded."""
    subscriber = subscribe(paced)
    pace.free = False
    monkeypatch.setattr(feeds, "MAX_HELD_BYTES", 100)
    send(paced, 11)
    assert got(subscriber) == []
    send(paced, 12, "x" * 100)
    assert got(subscriber) == ["11", "x" * 100]
    send(paced, 13)
    send(paced, 14, "bye", finish=True)
    assert got(subscriber) == ["13", "bye"]
    assert subscriber.finished


def test_who_comes_while_events_are_held_gets_each_once(pace: Pace, paced: Feed) -> None:
    """One that has read them already, one that has read some, one that stands before them."""
    early = subscribe(paced)
    pace.free = False
    for seq in (11, 12, 13):
        send(paced, seq)
    late, between = Single(10, buffer_bytes=999, keepalive_seconds=None), subscribe(paced, 10)
    paced.add(late.only)
    assert not between.live, "the feed is ahead of it"
    between.catch_up(read(11, 12, last=12))
    late.catch_up(read(11, 12, 13, last=13))
    assert late.live
    paced.flush()
    assert got(early) == ["11", "12", "13"]
    assert got(late) == []
    between.catch_up(read(13, last=13))
    assert between.live
    send(paced, 14)
    paced.flush()
    assert got(early) == got(late) == got(between) == ["14"]


def test_held_events_come_before_a_reset(pace: Pace, paced: Feed) -> None:
    """And before a move of the floor, and before a last word of the server."""
    subscriber = subscribe(paced)
    pace.free = False
    send(paced, 11)
    assert not paced.pass_on(11, read(last=20, complete=False))
    chunk = subscriber.take()
    assert [event.event for event in Decoder().feed(chunk)] == ["ping", "reset"]
    send(paced, None, "live")
    paced.has_life = False
    paced.raise_to(30, certain=True)
    assert got(subscriber) == ["live"]
    send(paced, None, "last")
    subscriber.finish(b"retry: 1\n\n")
    assert got(subscriber) == ["last"]


# Several frames in one message


def test_a_message_of_several_frames(feed: Feed) -> None:
    """It is passed on as one, without what was there already."""
    subscriber = subscribe(feed)
    frames = [entry(seq).frame() for seq in range(11, 16)]
    feed.receive(11, frames[:2], False)
    feed.receive(11, frames[:2], False)
    feed.receive(12, frames[1:], True)
    assert got(subscriber) == ["11", "12", "13", "14", "15"]
    assert subscriber.finished


def test_an_early_message_of_several_frames(feed: Feed) -> None:
    """Each frame waits for the one before it; the close is the last one's."""
    subscriber = subscribe(feed)
    feed.receive(13, [entry(13).frame(), entry(14).frame()], True)
    assert feed.has_gap
    send(feed, 11)
    assert got(subscriber) == ["11"]
    send(feed, 12)
    assert got(subscriber) == ["12", "13", "14"]
    assert subscriber.finished
    assert not feed.has_gap


def test_a_read_that_the_layer_has_overtaken_in_part(feed: Feed) -> None:
    """Of what it gives, only what is new is passed on."""
    subscriber = subscribe(feed)
    for seq in (11, 12, 13):
        send(feed, seq)
    entries = (entry(11), entry(12, Kind.FINISH), entry(13), entry(14))
    assert not feed.pass_on(10, Slice(entries=entries, complete=True, last=14))
    assert got(subscriber) == ["11", "12", "13", "14"]


def test_a_batch_without_room_is_read_again(feed: Feed) -> None:
    """None of it is lost, and none of it comes twice."""
    subscriber = subscribe(feed, size=60)
    send(feed, 11)
    feed.receive(12, [entry(12).frame(), entry(13).frame()], False)
    assert not subscriber.live
    assert subscriber.position == 10
    chunk = subscriber.catch_up(read(11, 12, 13, last=13))
    assert [event.data for event in Decoder().feed(chunk)] == ["11", "12", "13"]
    assert subscriber.live
