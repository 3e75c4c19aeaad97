"""Feeds: order, gaps, heads and floors. No I/O, so every case can be made."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_eventsource.delivery import feed as feeds
from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.history import Entry, Head, Kind, Slice
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.frames import Decoder
from tests.support.events import draft
from tests.support.loops import ManualLoop
from tests.support.singles import Single


def entry(seq: int, kind: Kind = Kind.EVENT) -> Entry:
    return Entry(seq=seq, draft=draft(str(seq), kind=kind))


def read(*seqs: int, last: int, complete: bool = True) -> Slice:
    """Return the slice of a history."""
    return Slice(entries=tuple(entry(seq) for seq in seqs), complete=complete, last=last)


def send(feed: Feed, seq: int | None, text: str = "", *, closes: bool = False) -> bool:
    """Deliver an event; return whether the feed has a gap."""
    one = draft(text or str(seq), kind=Kind.CLOSE if closes else Kind.EVENT)
    feed.receive(Batch([one.frame(seq)], None if seq is None else [seq], closes=closes))
    return feed.has_gap


def send_many(feed: Feed, *seqs: int, closes: bool = False) -> None:
    """Deliver one message with several events."""
    feed.receive(Batch([entry(seq).frame() for seq in seqs], seqs, closes=closes))


def floor(feed: Feed, seq: int, *, certain: bool) -> None:
    """Check a history that has no events of the token and stands at a floor."""
    head = Head(seq=seq, has_epoch=False, generation=feed._generation or "")
    feed.check(feed.last or 0, head, recent=certain)


def lose_history(feed: Feed, seq: int) -> None:
    """Check a history whose store was lost since the check before."""
    last = feed.last or 0
    before = feed._generation or "before"
    feed.check(last, Head(seq=last, has_epoch=False, generation=before), recent=True)
    feed.check(last, Head(seq=seq, has_epoch=False, generation=f"after {before}"), recent=True)


def subscribe(feed: Feed, position: int = 10, *, size: int = 10_000) -> Single:
    """Return a subscriber that has caught up at a position."""
    subscriber = Single(position, buffer_bytes=size, keepalive_seconds=None)
    subscriber.join(feed)
    subscriber.catch_up(read(last=position))
    return subscriber


def got(subscriber: Single) -> list[str]:
    """The data of all events that the stream would write now."""
    chunk = subscriber.take_overflow_reset() + subscriber.take()
    return [event.data for event in Decoder().feed(chunk)]


@pytest.fixture
def feed() -> Feed:
    return Feed("t", lambda: None)


# Order


def test_an_event_that_a_write_delivers_follows_the_event_that_is_written(feed: Feed) -> None:
    """It overtakes it for no subscriber."""

    class Nested:
        """A writer that accepts nothing, and delivers the next event once."""

        done = False

        def write(self, batch: Batch) -> bool:
            if not Nested.done:
                Nested.done = True
                send(feed, 12)
            return False

    subscribers = [subscribe(feed) for _ in range(3)]
    for one in subscribers:
        one.writer = Nested()
        one._waiter = Pending()
    send(feed, 11)
    assert Nested.done
    assert [got(one) for one in subscribers] == [["11", "12"]] * 3
    send(feed, 13)
    assert [got(one) for one in subscribers] == [["13"]] * 3


def test_a_subscriber_that_cannot_be_written_to_reads_the_history(
    feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    """The others receive the event."""

    class Broken:
        def write(self, batch: Batch) -> bool:
            raise LookupError

    subscribers = [subscribe(feed) for _ in range(3)]
    broken = subscribers[1]
    broken.writer = Broken()
    broken._waiter = Pending()
    send(feed, 11)
    assert [one.behind is not None for one in subscribers] == [False, True, False]
    assert broken.seq == 10
    assert [got(one) for one in (subscribers[0], subscribers[2])] == [["11"], ["11"]]
    assert "Could not pass events of 't' to a listener." in caplog.text


class Pending:
    """The future of a stream that waits."""

    def done(self) -> bool:
        return False

    def set_result(self, result: None) -> None:
        """Wake nothing."""


def test_events_in_order_are_passed_on_to_every_subscriber(feed: Feed) -> None:
    one, two = subscribe(feed), subscribe(feed)
    assert not any([send(feed, 11), send(feed, 12)])
    assert got(one) == got(two) == ["11", "12"]
    assert got(one) == []


def test_all_subscribers_share_the_bytes_of_an_event(feed: Feed) -> None:
    one, two = subscribe(feed), subscribe(feed)
    send(feed, 11)
    assert one._buffer[0] is two._buffer[0]


def test_repeated_events_are_dropped(feed: Feed) -> None:
    subscriber = subscribe(feed)
    for seq in (11, 11, 10, 9, 12):
        send(feed, seq)
    assert got(subscriber) == ["11", "12"]


def test_early_events_wait_for_the_missing_one(feed: Feed) -> None:
    """Messages may overtake each other."""
    subscriber = subscribe(feed)
    assert send(feed, 13)
    assert send(feed, 12)
    assert got(subscriber) == []
    assert not send(feed, 11)
    assert got(subscriber) == ["11", "12", "13"]
    assert not feed.has_gap


def test_a_gap_is_closed_from_the_history(feed: Feed) -> None:
    """The events that were held follow."""
    subscriber = subscribe(feed)
    assert send(feed, 13)
    assert feed.has_gap
    assert not feed.apply_slice(10, read(11, 12, last=13))
    assert got(subscriber) == ["11", "12", "13"]
    assert not feed.has_gap


def test_a_long_gap_is_read_in_parts(feed: Feed) -> None:
    subscriber = subscribe(feed)
    assert feed.apply_slice(10, read(11, 12, last=14))
    assert not feed.apply_slice(12, read(13, 14, last=14))
    assert got(subscriber) == ["11", "12", "13", "14"]


def test_an_event_that_arrives_during_a_read_is_passed_on_once(feed: Feed) -> None:
    subscriber = subscribe(feed)
    send(feed, 11)
    send(feed, 12)
    feed.apply_slice(10, read(11, 12, 13, last=13))
    assert got(subscriber) == ["11", "12", "13"]


def test_the_early_events_are_bounded(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events beyond the bound are read from the history."""
    monkeypatch.setattr(feeds, "MAX_EARLY_BYTES", 2 * len(entry(12).frame()))
    subscriber = subscribe(feed)
    for seq in (12, 13, 14):
        assert send(feed, seq)
    feed.apply_slice(10, read(11, last=14))
    assert got(subscriber) == ["11", "12", "13"]


def test_the_number_of_early_events_is_bounded(feed: Feed) -> None:
    """A forged message of 256 KiB may have as many events, which would need 80 MiB."""
    subscribe(feed)
    forged = Batch([b"x"] * 100_000, range(1000, 101_000))
    tracemalloc.start()
    try:
        feed.receive(forged)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 * 1024 * 1024


def test_events_before_the_first_catch_up_are_held_without_a_gap(feed: Feed) -> None:
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    assert not send(feed, 12)
    assert subscriber.catch_up(read(11, last=11)) != b""
    assert subscriber.live
    assert got(subscriber) == ["12"]


# Catching up


def test_a_subscriber_that_is_behind_reads_up_to_the_position_of_the_feed(feed: Feed) -> None:
    """Events that the feed passes on meanwhile are not buffered."""
    subscribe(feed, 20)
    late = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    late.join(feed)
    send(feed, 21)
    assert late.catch_up(read(11, 12, last=20)) == entry(11).frame() + entry(12).frame()
    assert not late.live
    late.catch_up(read(*range(13, 21), last=20))
    assert not late.live, "the feed is at 21"
    late.catch_up(read(21, last=21))
    assert late.live
    send(feed, 22)
    assert got(late) == ["22"]


def test_a_subscriber_ahead_of_the_feed_receives_no_event_twice(feed: Feed) -> None:
    early = subscribe(feed, 10)
    ahead = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    ahead.join(feed)
    ahead.catch_up(read(11, 12, last=12))
    assert ahead.live
    for seq in (11, 12, 13):
        send(feed, seq)
    assert got(ahead) == ["13"]
    assert got(early) == ["11", "12", "13"]


def test_a_subscriber_whose_events_were_trimmed_receives_a_reset(feed: Feed) -> None:
    """It is live afterwards."""
    subscriber = Single(5, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    chunk = subscriber.catch_up(read(last=30, complete=False))
    (event,) = Decoder().feed(chunk)
    assert (event.event, event.id) == ("reset", "30")
    assert json.loads(event.data) == {"reason": "expired", "after": "5", "resume": "30"}
    assert subscriber.live
    send(feed, 31)
    assert got(subscriber) == ["31"]


def test_a_removed_subscription_does_not_become_live(feed: Feed) -> None:
    """It was removed while its stream read the history."""
    subscriber = Single(5, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    feed.remove(subscriber.only)
    subscriber.catch_up(read(last=5))
    assert not subscriber.live


# Closing


def test_nothing_is_buffered_after_a_close(feed: Feed) -> None:
    subscriber = subscribe(feed)
    send(feed, 11, "bye", closes=True)
    send(feed, 12)
    send(feed, None, "late")
    assert got(subscriber) == ["bye"]
    assert subscriber.ending


def test_a_close_in_the_history_ends_the_catch_up(feed: Feed) -> None:
    """Events after it are not sent, and buffered events are dropped."""
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    send(feed, None, "live")
    entries = (entry(11), entry(12, Kind.CLOSE), entry(13))
    chunk = subscriber.catch_up(Slice(entries=entries, complete=True, last=13))
    assert [event.data for event in Decoder().feed(chunk)] == ["11", "12"]
    assert subscriber.ending
    assert subscriber.live
    assert got(subscriber) == []


# Bounds


def test_live_only_events_are_buffered_while_a_subscriber_is_behind(feed: Feed) -> None:
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    send(feed, None, "live")
    subscriber.catch_up(read(11, last=11))
    assert got(subscriber) == ["live"]


# Heads and floors


def test_a_later_head_requires_a_read(feed: Feed) -> None:
    subscribe(feed)
    assert feed.check(10, Head(seq=12, has_epoch=True), recent=True)
    assert not feed.check(10, Head(seq=10, has_epoch=True), recent=True)


def test_an_earlier_head_resets_the_listeners(feed: Feed) -> None:
    """An older store has replaced the history and assigns the numbers again."""
    subscriber = subscribe(feed, 20)
    send(feed, 22)
    assert not feed.check(20, Head(seq=15, has_epoch=True), recent=True)
    (event,) = Decoder().feed(subscriber.take())
    assert json.loads(event.data) == {"reason": "expired", "after": "20", "resume": "15"}
    assert not feed.has_gap
    send(feed, 16)
    assert got(subscriber) == ["16"]


def test_a_head_read_before_an_event_arrived_does_not_reset(feed: Feed) -> None:
    subscriber = subscribe(feed)
    send(feed, 11)
    assert not feed.check(10, Head(seq=10, has_epoch=True), recent=True)
    assert got(subscriber) == ["11"]


def test_a_gap_that_the_history_lacks_resets_the_live_listeners(feed: Feed) -> None:
    """A listener that is behind detects the loss in its own read."""
    subscriber, other = subscribe(feed), Single(3, buffer_bytes=100, keepalive_seconds=None)
    other.join(feed)
    send(feed, 12)
    assert not feed.apply_slice(10, read(last=50, complete=False))
    (event,) = Decoder().feed(subscriber.take())
    assert json.loads(event.data) == {"reason": "expired", "after": "10", "resume": "50"}
    assert not feed.has_gap
    assert other.take() == b"", "one that is behind finds out by itself"
    send(feed, 51)
    assert got(subscriber) == ["51"]


def test_a_listener_ahead_of_a_lost_gap_is_not_reset(feed: Feed) -> None:
    subscribe(feed, 10)
    ahead = Single(30, buffer_bytes=1000, keepalive_seconds=None)
    ahead.join(feed)
    ahead.catch_up(read(last=30))
    feed.apply_slice(10, read(last=20, complete=False))
    assert ahead.take() == b""
    feed.apply_slice(20, read(*range(21, 32), last=31))
    assert got(ahead) == ["31"]


def test_a_listener_in_the_middle_of_a_lost_gap_receives_the_events_that_are_left(
    feed: Feed,
) -> None:
    subscribe(feed, 10)
    ahead = Single(15, buffer_bytes=1000, keepalive_seconds=None)
    ahead.join(feed)
    ahead.catch_up(read(last=15))
    feed.apply_slice(10, read(last=16, complete=False))
    written = ahead.take()
    if not ahead.live:
        written += ahead.catch_up(read(16, last=16))
    assert [event.data for event in Decoder().feed(written)] == ["16"]


def test_a_cursor_reset_to_a_close_states_that_the_close_was_not_received(feed: Feed) -> None:
    subscriber = subscribe(feed)
    feed.apply_slice(10, Slice(complete=False, last=50, closed=True))
    (event,) = Decoder().feed(subscriber.take())
    assert event.id == "50+"


def test_a_gap_is_reported_at_once(feed: Feed) -> None:
    """Also if the first catch-up finds it."""
    reported = []
    feed = Feed("t", lambda: reported.append(1))
    subscriber = Single(10, buffer_bytes=1000, keepalive_seconds=None)
    subscriber.join(feed)
    send(feed, 13)
    assert not reported
    subscriber.catch_up(read(last=10))
    assert reported
    assert feed.has_gap


def test_a_gap_that_the_history_cannot_close_is_reported_once() -> None:
    """A number ahead of the history may come from another database."""
    reported = []
    feed = Feed("t", lambda: reported.append(1))
    subscriber = subscribe(feed)
    send(feed, 5000)
    assert len(reported) == 1
    assert not feed.apply_slice(10, read(last=10))
    assert len(reported) == 1
    send(feed, 11)
    assert got(subscriber) == ["11"]
    assert len(reported) == 1


def test_an_outdated_read_does_not_reset(feed: Feed) -> None:
    """Events have arrived since the read began."""
    subscriber = subscribe(feed)
    send(feed, 11)
    assert feed.apply_slice(10, read(last=11, complete=False))
    assert got(subscriber) == ["11"]


def test_listeners_of_an_empty_token_follow_the_floor(feed: Feed) -> None:
    """They can resume from it."""
    subscriber = subscribe(feed, 10)
    floor(feed, 10, certain=True)
    floor(feed, 40, certain=True)
    assert subscriber.take() == b"id: 40\n\n"
    floor(feed, 30, certain=True)
    assert subscriber.take() == b""
    send(feed, 41)
    assert got(subscriber) == ["41"]


def test_a_lost_history_resets_all_live_listeners(feed: Feed) -> None:
    """The feed has no events of the new history."""
    one, ahead = subscribe(feed, 10), subscribe(feed, 50)
    finished = subscribe(feed, 10)
    finished.only.close_buffered = True
    send(feed, 12)
    lose_history(feed, 40)
    for subscriber in (one, ahead):
        (event,) = Decoder().feed(subscriber.take())
        assert (event.event, event.id) == ("reset", "40")
    assert finished.take() == b""
    assert not feed.has_gap
    send(feed, 41)
    assert got(one) == got(ahead) == ["41"]
    lose_history(feed, 60)
    assert b"reset" in one.take()
    floor(feed, 70, certain=True)
    assert one.take() == b"id: 70\n\n", "nothing can have come and gone since"


@pytest.mark.parametrize("case", ["had events", "had a head", "not certain"])
def test_a_dropped_token_resets_if_events_may_have_been_missed(feed: Feed, case: str) -> None:
    subscriber = subscribe(feed, 10)
    if case == "had events":
        send(feed, 11)
        got(subscriber)
    elif case == "had a head":
        feed.check(10, Head(seq=10, has_epoch=True), recent=True)
    floor(feed, 40, certain=case != "not certain")
    (event,) = Decoder().feed(subscriber.take())
    assert (event.event, event.id) == ("reset", "40")
    floor(feed, 50, certain=True)
    assert subscriber.take() == b"id: 50\n\n"


def test_a_floor_does_not_move_a_feed_without_a_position(feed: Feed) -> None:
    """It does not move a subscriber with a closed token either."""
    floor(feed, 40, certain=True)
    assert feed.last is None
    subscriber = subscribe(feed, 50)
    subscriber.only.close_buffered = True
    floor(feed, 60, certain=True)
    assert subscriber.take() == b""


# Everything together


@given(st.data())
def test_every_event_arrives_once_and_in_order_whatever_the_layer_does(
    data: st.DataObject,
) -> None:
    """Messages are lost, repeated and disordered, and buffers overflow."""
    total = data.draw(st.integers(1, 30))
    history = [entry(seq) for seq in range(1, total + 1)]
    feed = Feed("t", lambda: None)
    subscriber = Single(0, buffer_bytes=120, keepalive_seconds=None)
    subscriber.join(feed)
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
                feed.apply_slice(feed.last, look(feed.last))
            case "catch up" if not subscriber.live:
                written += subscriber.catch_up(look(subscriber.seq))
            case "write" if subscriber.live:
                written += subscriber.take()
    published = total
    while subscriber.seq < total or subscriber._buffer:
        if not subscriber.live:
            written += subscriber.catch_up(look(subscriber.seq))
        elif feed.last is not None and feed.last < total:
            feed.apply_slice(feed.last, look(feed.last))
        if subscriber.live:
            written += subscriber.take()
    assert [event.data for event in Decoder().feed(written)] == [
        str(n) for n in range(1, total + 1)
    ]


# Pacing


@pytest.fixture
def loop(settings) -> ManualLoop:
    settings.EVENTSOURCE_COALESCE_SECONDS = 0.005
    return ManualLoop()


@pytest.fixture
def paced(loop: ManualLoop) -> Feed:
    """A feed that holds events while the one before them is written."""
    return Feed("t", lambda: None, loop)  # type: ignore[arg-type]


def test_events_are_held_while_the_one_before_them_is_written(
    loop: ManualLoop, paced: Feed
) -> None:
    """They are one write for each subscriber, the same bytes for all, in their order."""
    one, two = subscribe(paced), subscribe(paced)
    send(paced, 11)
    for seq in (12, None, 13, 14):
        send(paced, seq, "" if seq else "live")
    assert got(one) == ["11"]
    loop.write(0.001)
    loop.now += 1
    send(paced, 15)
    assert got(one) == [], "held events come first"
    loop.go_to(loop.now)
    assert two._buffer[-1] is one._buffer[-1]
    assert got(one) == ["12", "live", "13", "14", "15"]
    assert got(two) == ["11", "12", "live", "13", "14", "15"]
    paced.flush()
    assert got(one) == []


def test_a_subscription_receives_held_events_once_whatever_it_has_read(paced: Feed) -> None:
    """One has read all of them, one has read some, and one stands before them."""
    early = subscribe(paced)
    send(paced, 11)
    got(early)
    for seq in (12, 13, 14):
        send(paced, seq)
    late, between = Single(11), subscribe(paced, 11)
    late.join(paced)
    assert not between.live, "the feed is ahead of it"
    between.catch_up(read(12, 13, last=13))
    late.catch_up(read(12, 13, 14, last=14))
    assert late.live
    paced.flush()
    assert got(early) == ["12", "13", "14"]
    assert got(late) == []
    between.catch_up(read(14, last=14))
    assert between.live
    send(paced, 15)
    paced.flush()
    assert got(early) == got(late) == got(between) == ["15"]


def test_held_events_come_before_a_reset(paced: Feed) -> None:
    """They come before a move to another floor too."""
    subscriber = subscribe(paced)
    send(paced, 11)
    got(subscriber)
    send(paced, 12)
    assert not paced.apply_slice(12, read(last=20, complete=False))
    chunk = subscriber.take()
    assert [event.event for event in Decoder().feed(chunk)] == ["ping", "reset"]
    floor(paced, 25, certain=True)
    got(subscriber)
    send(paced, None, "live")
    floor(paced, 30, certain=True)
    assert got(subscriber) == ["live"]


# Several frames in one message


def test_a_message_with_several_events_is_passed_on_without_the_known_ones(feed: Feed) -> None:
    subscriber = subscribe(feed)
    send_many(feed, 11, 12)
    send_many(feed, 11, 12)
    send_many(feed, 12, 13, 14, 15, closes=True)
    assert got(subscriber) == ["11", "12", "13", "14", "15"]
    assert subscriber.ending


def test_each_event_of_an_early_message_waits_for_the_one_before_it(feed: Feed) -> None:
    """The close is the last event."""
    subscriber = subscribe(feed)
    send_many(feed, 13, 14, closes=True)
    assert feed.has_gap
    send(feed, 11)
    assert got(subscriber) == ["11"]
    send(feed, 12)
    assert got(subscriber) == ["12", "13", "14"]
    assert subscriber.ending
    assert not feed.has_gap


def test_only_the_new_events_of_a_partly_outdated_read_are_passed_on(feed: Feed) -> None:
    subscriber = subscribe(feed)
    for seq in (11, 12, 13):
        send(feed, seq)
    entries = (entry(11), entry(12, Kind.CLOSE), entry(13), entry(14))
    assert not feed.apply_slice(10, Slice(entries=entries, complete=True, last=14))
    assert got(subscriber) == ["11", "12", "13", "14"]


def test_a_batch_without_room_is_read_from_the_history(feed: Feed) -> None:
    """No event is lost or repeated."""
    subscriber = subscribe(feed, size=60)
    send(feed, 11)
    send_many(feed, 12, 13)
    assert not subscriber.live
    assert subscriber.seq == 10
    chunk = subscriber.catch_up(read(11, 12, 13, last=13))
    assert [event.data for event in Decoder().feed(chunk)] == ["11", "12", "13"]
    assert subscriber.live


def test_a_rewound_listener_that_is_live_without_a_read_receives_reset_for_a_later_gap() -> None:
    """Only the first read of a rewind may begin later than its position."""
    feed = Feed("t", lambda: None)
    first = Subscriber(buffer_bytes=10_000, keepalive_seconds=None)
    feed.add(first.add("t", 10))
    feed.catch_up(first.subscriptions[0], Slice(complete=True, last=10))
    subscriber = Subscriber(buffer_bytes=60, keepalive_seconds=None)
    rewound = subscriber.add("t", 10, reopened=True, rewound=True)
    feed.add(rewound)
    assert feed.try_go_live(rewound)
    feed.receive(entry(11).batch())
    subscriber.take()
    for seq in range(12, 40):
        feed.receive(entry(seq).batch())
    assert not rewound.live
    late = Slice(entries=tuple(map(entry, range(30, 40))), complete=False, last=39)
    (event, *_) = Decoder().feed(feed.catch_up(rewound, late))
    assert event.event == "reset"
