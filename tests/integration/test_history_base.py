"""Tests of the contract of a history. Each test runs over each history."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test.utils import CaptureQueriesContext

from django_eventsource.history import Draft, Head, History, Kind
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.redis.backend import RedisHistory
from django_eventsource.protocol.cursors import (
    Cursor,
    join_cursor,
    parse_cursor,
    parse_cursors,
    short_key,
)
from django_eventsource.protocol.rewind import parse_rewind
from tests.support.events import add, draft, texts
from tests.support.histories import ALIASES, NAMES, age, before_oldest, make

pytestmark = pytest.mark.django_db(databases=ALIASES)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def history(name: str) -> History:
    return make(name)


# Appending and reading


def test_sequence_numbers_of_each_token_are_consecutive(history: History) -> None:
    one = add(history, "a", "b") + add(history, "c")
    other = add(history, "d", token="other")
    assert [entry.seq - one[0].seq for entry in one] == [0, 1, 2]
    assert texts(history.read("other", other[0].seq - 1).entries) == ["d"]


def test_the_first_sequence_number_is_the_clock_in_microseconds(history: History) -> None:
    before = time.time_ns() // 1000
    (entry,) = add(history, "a")
    assert before <= entry.seq <= time.time_ns() // 1000


def test_an_empty_append_stores_nothing(history: History) -> None:
    """An empty append returns no entry and assigns no sequence number."""
    (first,) = add(history, "a")
    assert history.append("t", []) == []
    (second,) = add(history, "b")
    assert second.seq == first.seq + 1


def test_a_read_returns_the_events_after_a_position(history: History) -> None:
    """A read returns them in order, and none from before the position."""
    entries = add(history, "a", "b", "c")
    slice_ = history.read("t", entries[0].seq)
    assert texts(slice_.entries) == ["b", "c"]
    assert slice_.complete
    assert not slice_.more
    assert slice_.last == entries[2].seq


def test_read_at_the_head_is_empty_and_complete(history: History) -> None:
    """A listener that has every event misses none."""
    entries = add(history, "a")
    slice_ = history.read("t", entries[0].seq)
    assert (slice_.entries, slice_.complete, slice_.more) == ((), True, False)


def test_a_read_returns_every_field_unchanged(history: History) -> None:
    """Action, bytes (also NUL), own id and kind are stored as they are."""
    drafts = [
        Draft(action="été", data="a\nb\0\u2028".encode(), event_id="own", kind=Kind.EVENT),
        Draft(action="retry", data=b"5", kind=Kind.RETRY),
        Draft(action="close", data=b"", kind=Kind.CLOSE),
    ]
    entries = history.append("t", drafts)
    read = history.read("t", entries[0].seq - 1).entries
    assert [entry.draft for entry in read] == drafts
    assert list(read) == entries


def test_a_read_returns_at_most_max_events(history: History) -> None:
    """`more` reports that further events are stored."""
    entries = add(history, "a", "b", "c")
    slice_ = history.read("t", entries[0].seq - 1, max_events=2)
    assert texts(slice_.entries) == ["a", "b"]
    assert slice_.more


def test_a_read_returns_at_most_max_bytes_but_one_event(history: History) -> None:
    """The first event is returned even if it is larger."""
    entries = add(history, "12345", "123", "12", "1")
    start = entries[0].seq - 1
    assert texts(history.read("t", start, max_bytes=3).entries) == ["12345"]
    assert texts(history.read("t", start + 1, max_bytes=5).entries) == ["123", "12"]


@pytest.mark.parametrize(
    "sizes",
    [
        [20] * 100,
        [*range(1, 101)],
        [*range(100, 0, -1)],
        [1] * 400 + [1900],
        [1900] + [1] * 400,
        [10] * 90 + [900] * 9 + [0] * 300,
    ],
    ids=[
        "equal",
        "growing",
        "shrinking",
        "one large at the end",
        "one large at the start",
        "few large",
    ],
)
@pytest.mark.parametrize("times", [False, True])
def test_the_pages_of_a_replay_are_bounded_and_full(
    history: History, sizes: list[int], *, times: bool
) -> None:
    """Whatever the sizes of the events, all of them are read, once."""
    values = ["x" * size for size in sizes]
    seq = add(history, *values)[0].seq - 1
    pages: list[list[str]] = []
    more = True
    while more:
        slice_ = history.read("t", seq, max_bytes=1000, times=times)
        pages.append(texts(slice_.entries))
        more, seq = slice_.more, slice_.entries[-1].seq
    assert list(chain(*pages)) == values
    for page, following in pairwise(pages):
        size = sum(map(len, page))
        assert size + len(following[0]) > 1000
        assert size <= 1000 or len(page) == 1
    assert sum(map(len, pages[-1])) <= 1000 or len(pages[-1]) == 1


def test_the_pages_of_a_trimmed_token_are_bounded_and_full(name: str) -> None:
    """The bytes of the events that are gone do not count, at any position."""
    history = make(name, MAX_EVENTS=20)
    seq = add(history, *["x" * 10] * 50)[0].seq
    history.prune()
    assert [
        len(history.read("t", seq + after, max_bytes=45).entries) for after in (29, 30, 40, 46, 49)
    ] == [4, 4, 4, 3, 0]


def test_tokens_differ_by_case_accent_and_space(history: History) -> None:
    """Tokens are compared exactly, whatever collation a database uses."""
    tokens = ["token", "Token", "tokén", "token ", "to ken/ü?#%"]
    for token in tokens:
        add(history, token, token=token)
    for token in tokens:
        seq = history.newest(token)[0]
        assert texts(history.read(token, seq - 1).entries) == [token]


# Reads that are not complete


def test_a_read_after_an_unknown_number_is_not_complete(history: History) -> None:
    """Numbers below and above the assigned ones are unknown. Events after them are returned."""
    entries = add(history, "a", "b")
    for after, found in (
        (0, "ab"),
        (1, "ab"),
        (entries[0].seq - 2, "ab"),
        (entries[1].seq + 1, ""),
    ):
        slice_ = history.read("t", after)
        assert not slice_.complete
        assert texts(slice_.entries) == list(found)
        assert slice_.last == entries[1].seq


def test_a_listener_at_the_floor_receives_the_first_events(history: History) -> None:
    floor = history.newest("t")[0]
    assert history.read("t", floor).complete
    assert not history.read("t", floor + 1).complete
    add(history, "first", "second")
    slice_ = history.read("t", floor)
    assert slice_.complete
    assert texts(slice_.entries) == ["first", "second"]


def test_a_read_from_before_trimmed_events_is_not_complete(name: str) -> None:
    history = make(name, MAX_EVENTS=2)
    entries = add(history, "a", "b", "c", "d")
    history.prune()
    assert not history.read("t", entries[0].seq).complete
    slice_ = history.read("t", entries[1].seq)
    assert slice_.complete
    assert texts(slice_.entries) == ["c", "d"]


def test_a_read_from_the_floor_is_not_complete_after_a_trim(name: str) -> None:
    """A listener from before the first event misses that event once it is trimmed."""
    history = make(name, MAX_EVENTS=1)
    floor = history.newest("t")[0]
    add(history, "a", "b")
    history.prune()
    assert not history.read("t", floor).complete


# Trimming


def test_prune_keeps_max_events_of_a_token(name: str) -> None:
    history = make(name, MAX_EVENTS=3)
    entries = add(history, *"abcdefgh")
    history.prune()
    assert texts(history.read("t", entries[4].seq).entries) == ["f", "g", "h"]
    assert not history.read("t", entries[3].seq).complete


def kept(history: History, token: str = "t") -> list[str]:
    """Return the texts of the events that are kept, after pruning."""
    history.prune()
    return texts(history.read(token, before_oldest(history, token), max_events=10_000).entries)


def test_prune_keeps_max_bytes_of_a_token(name: str) -> None:
    """The newest events are kept whose values have no more bytes together."""
    history = make(name, MAX_BYTES=10)
    entries = add(history, "12345", "123", "1234567")
    assert kept(history) == ["123", "1234567"]
    assert not history.read("t", entries[0].seq - 1).complete
    assert history.read("t", entries[0].seq).complete
    add(history, "1")
    assert kept(history) == ["1234567", "1"]
    add(history, "", "")
    assert kept(history) == ["1234567", "1", "", ""]


def test_the_newest_event_is_kept_even_if_it_is_larger_than_max_bytes(name: str) -> None:
    """A listener can always resume at the newest event."""
    history = make(name, MAX_BYTES=10)
    add(history, "a", "x" * 11)
    assert kept(history) == ["x" * 11]
    add(history, "y" * 20)
    assert kept(history) == ["y" * 20]
    add(history, "z")
    assert kept(history) == ["z"]


def test_events_of_other_tokens_do_not_count_for_max_bytes(name: str) -> None:
    history = make(name, MAX_BYTES=10)
    for token in ("t", "u", "v"):
        add(history, "12345678", token=token)
    assert [kept(history, token) for token in ("t", "u", "v")] == [["12345678"]] * 3


@pytest.mark.parametrize("bound", [{"MAX_EVENTS": 2}, {"MAX_AGE": 100}])
def test_bytes_of_events_trimmed_by_another_bound_do_not_count(
    name: str, bound: dict[str, Any]
) -> None:
    """Events that MAX_EVENTS or MAX_AGE removed do not count for MAX_BYTES."""
    history = make(name, MAX_BYTES=10, **bound)
    for _ in range(5):
        add(history, "123", "4567")
        assert kept(history) == ["123", "4567"]
        if "MAX_AGE" in bound:
            age(history, 101)
            history.prune()
    add(history, "1234567890")
    assert kept(history)[-1] == "1234567890"


def test_many_small_events_are_trimmed_for_a_large_one(name: str) -> None:
    """More events are removed than one step trims, together with their own ids."""
    history = make(name, MAX_BYTES=2_000)
    drafts = [draft("x", own_id=f"own-{n}") for n in range(1_200)]
    entries = history.append("t", drafts)
    add(history, "y" * 1_900)
    assert len(kept(history)) == 101
    assert history.locate("t", parse_cursor("own-1100")).seq == entries[1_100].seq
    assert not history.locate("t", parse_cursor("own-1099")).known


def test_prune_removes_events_older_than_max_age(name: str) -> None:
    """Younger events stay."""
    history = make(name, MAX_AGE=100)
    old = add(history, "a", "b")
    age(history, 101)
    add(history, "c")
    # Redis removes them with the append.
    assert history.prune() == (0 if isinstance(history, RedisHistory) else 2)
    assert history.prune() == 0
    assert texts(history.read("t", old[1].seq).entries) == ["c"]
    assert not history.read("t", old[0].seq).complete


def test_sequence_numbers_continue_after_all_events_were_pruned(name: str) -> None:
    """A listener at the newest position is not reset."""
    history = make(name, MAX_AGE=100)
    (last,) = add(history, "a")
    age(history, 101)
    history.prune()
    assert history.read("t", last.seq).complete
    assert not history.read("t", last.seq - 1).complete
    (entry,) = add(history, "b")
    assert entry.seq == last.seq + 1
    assert texts(history.read("t", last.seq).entries) == ["b"]


def test_a_token_idle_for_token_max_age_begins_a_new_epoch(name: str) -> None:
    """Its sequence numbers are higher, and those of the earlier epoch are unknown."""
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    floor = history.newest("t")[0]
    old = add(history, "a", "b")
    age(history, 201)
    history.prune()
    assert not history.heads(["t"])["t"].has_epoch
    (new,) = add(history, "c")
    assert new.seq > old[1].seq
    for after in (floor, old[0].seq):
        assert not history.read("t", after).complete
    assert texts(history.read("t", new.seq - 1).entries) == ["c"]


def test_a_new_epoch_is_above_the_floor_if_the_clock_was_set_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sequence number of an earlier epoch is assigned again."""
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    (old,) = add(history, "a")
    age(history, 201)
    history.prune()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    (new,) = add(history, "b")
    assert new.seq > old.seq


def test_the_floor_rises_to_the_numbers_of_dropped_tokens(name: str) -> None:
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    (last,) = add(history, "a")
    age(history, 201)
    history.prune()
    (later,) = add(history, "b", token="other")
    heads = history.heads(["t", "other"])
    assert heads["other"] == Head(seq=later.seq, has_epoch=True, generation=heads["t"].generation)
    assert not heads["t"].has_epoch
    assert last.seq <= heads["t"].seq < later.seq
    age(history, 201)
    history.prune()
    (head,) = history.heads(["t"]).values()
    assert not head.has_epoch
    assert head.seq >= later.seq
    assert history.heads([]) == {}


# Positions


def test_a_read_from_before_the_oldest_event_returns_all_that_are_kept(name: str) -> None:
    """The position before the oldest kept event is complete; without one it is the newest
    position."""
    history = make(name, MAX_EVENTS=2, MAX_AGE=100)
    assert before_oldest(history) == history.newest("t")[0]
    entries = add(history, "a")
    assert history.read("t", before_oldest(history)).entries == tuple(entries)
    entries += add(history, "b", "c", "d")
    history.prune()
    assert before_oldest(history) == entries[1].seq
    assert texts(history.read("t", before_oldest(history)).entries) == ["c", "d"]
    age(history, 101)
    history.prune()
    assert before_oldest(history) == history.newest("t")[0] == entries[3].seq


def test_heads_returns_the_head_of_every_token(history: History) -> None:
    """One call looks up more tokens than fit into a statement, with an epoch or without."""
    names = [f"token {n}" for n in range(1200)]
    add(history, "a", token=names[0])
    (last,) = add(history, "b", token=names[1100])
    heads = history.heads(names)
    assert list(heads) == names
    assert {name for name in names if heads[name].has_epoch} == {names[0], names[1100]}
    assert heads[names[1100]] == Head(
        seq=last.seq, has_epoch=True, generation=heads[names[0]].generation
    )
    assert heads[names[1]].seq == history.newest(names[1])[0]


def test_a_listener_without_a_cursor_starts_at_the_newest_event(history: History) -> None:
    entries = add(history, "a", "b")
    for cursor in (None, ""):
        position = history.locate("t", parse_cursor(cursor))
        assert position.seq == entries[1].seq
        assert position.cursor == Cursor.at(entries[1].seq)
        assert (position.known, position.closed) == (True, False)


def test_locate_finds_a_sequence_number(history: History) -> None:
    entries = add(history, "a", "b")
    position = history.locate("t", parse_cursor(str(entries[0].seq)))
    assert (position.seq, position.known) == (entries[0].seq, True)


@pytest.mark.parametrize("cursor", ["1", "x:abc", "-5", "9" * 18, "9" * 19, "1+1", " "])
def test_an_unknown_cursor_is_located_at_the_newest_event(history: History, cursor: str) -> None:
    """The position reports that events may be missing."""
    entries = add(history, "a")
    position = history.locate("t", parse_cursor(cursor))
    assert (position.seq, position.known) == (entries[0].seq, False)


def test_locate_finds_the_oldest_event_with_an_own_id(history: History) -> None:
    """So no event between two events with the same id is lost."""
    entries = history.append("t", [draft(own_id=own) for own in ("u", "v", "v", "w")])
    assert history.locate("t", parse_cursor("v")).seq == entries[1].seq
    assert not history.locate("t", parse_cursor("x")).known
    assert not history.locate("other", parse_cursor("v")).known


def calls_of(history: History, work: Callable[[], object]) -> int:
    """Return the number of statements, or of round trips to a Redis server, that work makes."""
    if isinstance(history, DatabaseHistory):
        with CaptureQueriesContext(connections[history.using]) as queries:
            work()
        return len(queries)
    if isinstance(history, RedisHistory):
        (host,) = history._hosts.all
        trips = []
        for name in ("run_once", "_pipe"):
            call = getattr(host, name)
            setattr(host, name, lambda *args, call=call: trips.append(args) or call(*args))
        work()
        del host.run_once, host._pipe
        return len(trips)
    work()
    return 0


ABSURD = ["1", "2+", "x:abc", "9" * 18, "9" * 19, " ", "~", "~" + "A" * 200, "x" * 255]


def test_an_unknown_cursor_costs_no_more_than_a_known_one(history: History) -> None:
    """Any cursor takes two statements or one round trip, and no cursor takes one."""
    entries = add(history, "a", "b", "c", token="t")
    add(history, "large", token="t")
    (own,) = history.append("t", [draft("own", own_id="own")])
    known = [str(entries[0].seq), f"{entries[1].seq}+", str(own.seq), "own"]
    most = 1 if isinstance(history, RedisHistory) else 2
    for token in ("t", "without a history"):
        assert calls_of(history, lambda token=token: history.locate(token, None)) <= 1
    for cursor in known + ABSURD:
        assert (
            calls_of(history, lambda cursor=cursor: history.locate("t", parse_cursor(cursor)))
            <= most
        ), cursor
    for cursor in ABSURD:
        assert (
            calls_of(history, lambda cursor=cursor: history.locate("none", parse_cursor(cursor)))
            <= 2
        )


def test_a_cursor_that_fits_no_token_takes_at_most_twice_the_calls(history: History) -> None:
    """The id does not fit any of 16 tokens; the measure is a listener without a cursor."""
    tokens = [f"token {n}" for n in range(16)]
    for token in tokens:
        add(history, "a", "b", token=token)
    ids = [
        join_cursor((short_key(token), seq, False) for token in tokens)
        for seq in (0, 1, 2**62, 10**17)
    ]
    ids.append(join_cursor([(short_key(tokens[0]), 5, True)] * 16))

    def open_with(last_event_id: str | None) -> None:
        cursors = parse_cursors(last_event_id, tokens)
        for token in tokens:
            assert history.locate(token, cursors[token]).known == (cursors[token] is None)

    fresh = calls_of(history, lambda: open_with(None))
    assert fresh <= 16
    for text in [*ids, " ", "~nonsense"]:
        assert calls_of(history, lambda text=text: open_with(text)) <= 2 * fresh, text


def test_a_kept_close_is_recognised_by_each_kind_of_cursor(history: History) -> None:
    """The sequence number and the own id of a close both find it closed."""
    (own,) = history.append("t", [draft(own_id="own", kind=Kind.CLOSE)])
    (last,) = history.append("t", [draft(kind=Kind.CLOSE)])
    assert history.locate("t", parse_cursor("own")).closed
    assert history.locate("t", parse_cursor(str(own.seq))).closed
    assert history.locate("t", parse_cursor(str(last.seq))).closed
    assert not history.locate("t", parse_cursor(f"{last.seq}+")).closed
    assert not history.locate("t", parse_cursor(str(own.seq - 1))).closed


def test_an_own_id_takes_precedence_over_a_sequence_number(history: History) -> None:
    """An own id that looks like a sequence number finds the event that has it."""
    (first,) = add(history, "a")
    entries = history.append("t", [draft(own_id="o"), draft(own_id=str(first.seq))])
    assert history.locate("t", parse_cursor(str(first.seq))).seq == entries[1].seq
    assert history.locate("t", parse_cursor(str(entries[0].seq))).seq == entries[0].seq


@pytest.mark.parametrize("kind", Kind)
def test_a_cursor_is_found_with_the_kind_of_its_event(history: History, kind: Kind) -> None:
    (entry,) = history.append("t", [draft("5", own_id="own", kind=kind)])
    for cursor in ("own", str(entry.seq)):
        assert history.find("t", cursor, entry.seq).kind is kind
    assert history.find("t", "unknown", None).kind is None


def test_own_ids_differ_by_case_and_accent(history: History) -> None:
    """They are compared exactly, whatever collation a database uses."""
    history.append("t", [draft(own_id="aB"), draft(own_id="Ab"), draft()])
    for other in ("ab", "AB", "\u00e1B"):
        assert history.find("t", other, None).seq is None
    first = history.find("t", "aB", None).seq
    assert history.find("t", "Ab", None).seq == (first or 0) + 1


def test_the_own_id_of_a_trimmed_event_is_unknown(name: str) -> None:
    history = make(name, MAX_EVENTS=1)
    history.append("t", [draft(own_id="u"), draft(own_id="u"), draft(own_id="v")])
    history.prune()
    assert not history.locate("t", parse_cursor("u")).known
    assert history.locate("t", parse_cursor("v")).known


def test_a_cursor_at_a_close_is_closed(history: History) -> None:
    """A cursor before or after the close is not."""
    (before,) = add(history, "a")
    (close,) = history.append("t", [draft(kind=Kind.CLOSE)])
    assert not history.locate("t", parse_cursor(str(before.seq))).closed
    assert history.locate("t", parse_cursor(str(close.seq))).closed
    (after,) = add(history, "b")
    assert history.locate("t", parse_cursor(str(close.seq))).closed
    assert not history.locate("t", parse_cursor(str(after.seq))).closed


def test_a_close_is_found_by_its_own_id(history: History) -> None:
    history.append("t", [draft(own_id="bye", kind=Kind.CLOSE)])
    assert history.locate("t", parse_cursor("bye")).closed


def test_a_listener_without_a_cursor_reopens_a_closed_token(history: History) -> None:
    """Its cursor differs from that of a listener that has received the close."""
    (close,) = history.append("t", [draft(kind=Kind.CLOSE)])
    position = history.locate("t", None)
    assert position.cursor == Cursor.at(close.seq, reopened=True)
    assert not position.closed
    again = history.locate("t", position.cursor)
    assert (again.seq, again.known, again.closed) == (close.seq, True, False)


def test_a_close_is_known_after_it_was_trimmed(name: str) -> None:
    """The history keeps the sequence number of the last close."""
    history = make(name, MAX_AGE=100)
    (close,) = history.append("t", [draft(kind=Kind.CLOSE)])
    age(history, 101)
    history.prune()
    assert history.locate("t", parse_cursor(str(close.seq))).closed


# Rewinds


def rewound(history: History, text: str | int) -> list[str]:
    """Return the events that a listener without a cursor receives first."""
    position = history.locate("t", None, parse_rewind(text))
    slice_ = history.read("t", position.seq)
    assert slice_.complete
    assert position.rewound == bool(slice_.entries)
    again = history.locate("t", parse_cursor(str(position.cursor)))
    assert (again.seq, again.known, again.closed) == (position.seq, True, False)
    return texts(slice_.entries)


def test_a_rewind_begins_with_the_newest_events(history: History) -> None:
    add(history, *"abcd")
    assert rewound(history, 0) == []
    assert rewound(history, 1) == ["d"]
    assert rewound(history, "3") == ["b", "c", "d"]
    assert rewound(history, 10**9 - 1) == rewound(history, "all") == list("abcd")


def test_a_rewind_of_a_token_without_events_is_at_the_newest_position(history: History) -> None:
    for text in ("all", "5", "30s"):
        position = history.locate("t", None, parse_rewind(text))
        assert position == history.locate("t", None)


def test_a_rewind_by_age_begins_with_the_oldest_event_of_that_age(history: History) -> None:
    add(history, *"ab")
    age(history, 100)
    add(history, *"cd")
    assert rewound(history, "90s") == ["c", "d"]
    assert rewound(history, "2m") == rewound(history, "1h") == list("abcd")
    age(history, 100)
    assert rewound(history, "90s") == []


def test_a_rewind_is_bounded_by_max_events(name: str) -> None:
    """More events may be stored until the next prune."""
    history = make(name, MAX_EVENTS=2)
    add(history, *"abcd")
    for text in ("all", "3", "1h"):
        assert rewound(history, text) == ["c", "d"]


def test_a_rewind_begins_with_the_oldest_event_that_is_kept(name: str) -> None:
    history = make(name, MAX_EVENTS=2)
    add(history, *"abcd")
    history.prune()
    assert rewound(history, "all") == ["c", "d"]


def test_a_rewind_does_not_go_back_past_a_close(history: History) -> None:
    """A stream ends at a close, so that the events after it would not be sent."""
    add(history, "a")
    history.append("t", [draft("first", kind=Kind.CLOSE)])
    assert rewound(history, "all") == ["a", "first"]
    add(history, *"bc")
    assert rewound(history, "all") == rewound(history, "1h") == ["b", "c"]
    history.append("t", [draft("second", kind=Kind.CLOSE)])
    assert rewound(history, "all") == ["b", "c", "second"]
    assert rewound(history, 1) == ["second"]
    history.append("t", [draft("third", kind=Kind.CLOSE), draft("d")])
    assert rewound(history, "all") == rewound(history, 2) == ["d"]
    history.append("t", [draft("fourth", kind=Kind.CLOSE), draft("fifth", kind=Kind.CLOSE)])
    assert rewound(history, "all") == ["fifth"]


def test_a_rewind_begins_with_the_newest_whole(history: History) -> None:
    """It replaces the events before it. With a close, the later one counts."""
    add(history, *"ab")
    history.append("t", [draft("whole", kind=Kind.WHOLE)])
    assert rewound(history, "all") == rewound(history, "1h") == rewound(history, 3) == ["whole"]
    add(history, *"cd")
    assert rewound(history, "all") == rewound(history, 10) == ["whole", "c", "d"]
    assert rewound(history, 2) == ["c", "d"]
    history.append("t", [draft("close", kind=Kind.CLOSE)])
    assert rewound(history, "all") == ["whole", "c", "d", "close"]
    add(history, "e")
    assert rewound(history, "all") == ["e"]
    history.append("t", [draft("newer", kind=Kind.WHOLE), draft("newest", kind=Kind.WHOLE)])
    assert rewound(history, "all") == ["newest"]
    age(history, 100)
    assert rewound(history, "90s") == []


def test_a_rewind_reads_more_events_than_fit_into_one_batch(history: History) -> None:
    history.append("t", [draft(str(n)) for n in range(600)])
    assert rewound(history, 599)[0] == "1"
    assert len(rewound(history, 300)) == 300


def test_a_cursor_takes_precedence_over_a_rewind(history: History) -> None:
    entries = add(history, *"abc")
    cursor = parse_cursor(str(entries[1].seq))
    assert history.locate("t", cursor, parse_rewind("all")) == history.locate("t", cursor)


def test_a_read_with_times_returns_when_each_event_was_stored(history: History) -> None:
    before = datetime.datetime.now(datetime.UTC)
    entries = add(history, *"ab")
    after = datetime.datetime.now(datetime.UTC)
    read = history.read("t", entries[0].seq - 1, times=True).entries
    assert texts(read) == ["a", "b"]
    for entry in read:
        assert entry.created is not None
        # Redis has a clock of its own on the same machine.
        margin = datetime.timedelta(milliseconds=1)
        assert before - margin <= entry.created <= after + margin
    assert [entry.created for entry in history.read("t", 0).entries] == [None, None]


def test_staged_events_are_appended_in_their_order(history: History) -> None:
    """The function that stage() returns appends them."""
    settle = history.stage("t", [draft("a"), draft("b")])
    entries = settle()
    assert texts(entries) == ["a", "b"]
    assert texts(history.read("t", entries[0].seq - 1).entries) == ["a", "b"]


# Keys


def test_a_draft_with_a_known_key_is_not_stored(history: History) -> None:
    """Its entry has the sequence number and the id of the first event."""
    (first,) = history.append("t", [draft("a", key="k")])
    assert not first.repeated
    (again,) = history.append("t", [draft("other", key="k")])
    assert (again.repeated, again.seq, again.id) == (True, first.seq, first.id)
    (after,) = add(history, "b")
    assert after.seq == first.seq + 1
    assert texts(history.read("t", before_oldest(history)).entries) == ["a", "b"]
    (later,) = history.append("t", [draft("much later", key="k")])
    assert (later.repeated, later.seq) == (True, first.seq)
    assert history.newest("t")[0] == after.seq


@pytest.mark.parametrize("ids", [("one", "two"), ("one", None), (None, "two")])
def test_the_entry_of_a_known_key_has_the_own_id_of_the_first_event(
    history: History, ids: tuple[str | None, str | None]
) -> None:
    """Whether the first or the second event has an own id."""
    (first,) = history.append("t", [draft(own_id=ids[0], key="k")])
    (again,) = history.append("t", [draft(own_id=ids[1], key="k")])
    assert (again.repeated, again.id) == (True, ids[0] or str(first.seq))
    assert not history.locate("t", parse_cursor("two")).known


def test_a_key_belongs_to_one_token(history: History) -> None:
    for token in ("t", "u"):
        (entry,) = history.append(token, [draft(token, key="k")])
        assert not entry.repeated
        assert texts(history.read(token, entry.seq - 1).entries) == [token]


def test_different_keys_are_different_events(history: History) -> None:
    """Keys are compared exactly, whatever collation a database uses."""
    keys = ["key", "Key", "kéy", "key ", "k" * 255]
    entries = [history.append("t", [draft(key, key=key)])[0] for key in keys]
    assert not any(entry.repeated for entry in entries)
    assert texts(history.read("t", entries[0].seq - 1).entries) == keys


def test_a_close_with_a_known_key_does_not_close_the_token(history: History) -> None:
    history.append("t", [draft("a", key="k")])
    history.append("t", [draft(kind=Kind.CLOSE, key="k")])
    assert history.newest("t")[1] is None


@pytest.mark.parametrize("bound", [{"MAX_EVENTS": 2}, {"MAX_BYTES": 2}, {"MAX_AGE": 100}])
def test_the_key_of_a_trimmed_event_is_free(name: str, bound: dict[str, Any]) -> None:
    """A later event with the key is stored, and its key is known."""
    history = make(name, **bound)
    (first,) = history.append("t", [draft("a", own_id="one", key="k")])
    if "MAX_AGE" in bound:
        age(history, 101)
    add(history, "b")
    add(history, "c")
    history.prune()
    (again,) = history.append("t", [draft("d", key="k")])
    assert (again.repeated, again.seq) == (False, first.seq + 3)
    add(history, "e")
    history.prune()
    (last,) = history.append("t", [draft("f", key="k")])
    assert (last.repeated, last.seq, last.id) == (True, again.seq, str(again.seq))


def test_a_new_epoch_begins_without_keys(name: str) -> None:
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    (old,) = history.append("t", [draft("a", key="k")])
    age(history, 201)
    history.prune()
    (new,) = history.append("t", [draft("b", key="k")])
    assert not new.repeated
    assert new.seq > old.seq
    assert texts(history.read("t", new.seq - 1).entries) == ["b"]


def test_bytes_of_an_event_with_a_known_key_do_not_count(name: str) -> None:
    history = make(name, MAX_BYTES=10)
    history.append("t", [draft("12345", key="k")])
    for _ in range(3):
        history.append("t", [draft("1234567890", key="k")])
    add(history, "67890")
    assert kept(history) == ["12345", "67890"]


def test_one_of_the_staged_events_with_a_key_is_stored(history: History) -> None:
    """The entries of the others have its sequence number."""
    settles = [history.stage("t", [draft(text, key="k")]) for text in "abc"]
    add(history, "other")
    entries = [entry for settle in reversed(settles) for entry in settle() if entry is not None]
    assert sorted(entry.repeated for entry in entries) == [False, True, True]
    (seq,) = {entry.seq for entry in entries}
    stored = history.read("t", before_oldest(history)).entries
    assert [entry.seq for entry in stored if entry.draft.data != b"other"] == [seq]


# Presence


def test_listeners_of_all_processes_are_present(history: History) -> None:
    """Each listener counts, also if several have the same identity."""
    assert not history.announce("one", {"t": ["a", "", "a"], "other": ["z"]}, 60)
    assert not history.announce("two", {"t": ["b", ""]}, 60)
    assert sorted(history.present("t")) == ["", "", "a", "a", "b"]
    assert history.present("other") == ["z"]
    assert history.present("nobody") == []
    assert sorted(history.present("t", exclude_process="one")) == ["", "b"]
    assert sorted(history.present("t", exclude_process="two")) == ["", "a", "a"]
    assert len(history.present("t", exclude_process="three")) == 5


def test_announce_replaces_the_listeners_of_the_named_tokens(history: History) -> None:
    """Other tokens stay as they were, and a token without listeners is removed."""
    history.announce("one", {"t": ["a", "b"], "other": ["c"], "third": ["d"]}, 60)
    assert history.announce("one", {"t": ["b"], "other": []}, 60)
    assert history.announce("one", {}, 60)
    found = [history.present(token) for token in ("t", "other", "third")]
    assert found == [["b"], [], ["d"]]
    assert history.announce("one", {"other": ["e"], "new": [], "t": []}, 60)
    found = [history.present(token) for token in ("t", "other", "new", "third")]
    assert found == [[], ["e"], [], ["d"]]


def test_one_lease_covers_all_tokens_of_a_process(history: History) -> None:
    """An announcement without changes renews all of them, and they expire together."""
    history.announce("one", {"t": ["a"], "other": ["a"]}, 60)
    age(history, 50)
    assert history.announce("one", {}, 60)
    age(history, 50)
    assert (history.present("t"), history.present("other")) == (["a"], ["a"])
    age(history, 11)
    assert (history.present("t"), history.present("other")) == ([], [])


def test_listeners_of_an_expired_lease_do_not_return(history: History) -> None:
    """The process must announce all its listeners again."""
    history.announce("one", {"t": ["a"], "other": ["b"]}, 60)
    age(history, 61)
    assert not history.announce("one", {"other": ["c"]}, 60)
    assert (history.present("t"), history.present("other")) == ([], ["c"])
    assert history.announce("one", {"t": ["d"], "other": ["c"]}, 60)
    assert (history.present("t"), history.present("other")) == (["d"], ["c"])


def test_withdraw_removes_the_listeners_of_a_process(history: History) -> None:
    """Listeners of other processes stay, and a second call is harmless."""
    history.announce("one", {"t": ["a"]}, 60)
    history.announce("two", {"t": ["b"]}, 60)
    history.withdraw("one")
    history.withdraw("one")
    assert history.present("t") == ["b"]
    assert not history.announce("one", {}, 60)


def test_prune_removes_listeners_of_expired_leases(history: History) -> None:
    """Valid leases stay."""
    history.announce("dead", {"t": ["a"]}, 60)
    age(history, 61)
    history.announce("alive", {"t": ["b"]}, 60)
    assert history.prune() == 0
    assert history.present("t") == ["b"]
    assert history.announce("alive", {}, 60)
    assert not history.announce("dead", {}, 60)
    assert history.present("t") == ["b"]


def test_a_process_announces_more_tokens_than_fit_into_a_statement(history: History) -> None:
    names = [f"token {n}" for n in range(1100)]
    history.announce("one", {name: [name] for name in names}, 60)
    assert history.present(names[1050]) == [names[1050]]
    assert history.announce("one", {name: [] for name in names[:1000]}, 60)
    assert [history.present(names[n]) for n in (0, 999)] == [[], []]
    assert history.present(names[1000]) == [names[1000]]


@pytest.mark.parametrize("identity", ["ümlaut 😀", "a\0b", "\ud800", '"', "x" * 5000], ids=ascii)
def test_an_identity_may_be_any_text(history: History, identity: str) -> None:
    """Identities are stored unchanged on every database."""
    history.announce("one", {"t": [identity]}, 60)
    assert history.present("t") == [identity]


def test_processes_and_tokens_differ_by_case(history: History) -> None:
    """Names are compared exactly, whatever collation a database uses."""
    history.announce("One", {"t": ["a"], "T": ["b"]}, 60)
    assert not history.announce("one", {"t": ["c"]}, 60)
    assert sorted(history.present("t")) == ["a", "c"]
    assert history.present("T") == ["b"]


@pytest.mark.django_db(transaction=True, databases=ALIASES)
async def test_awaited_methods_return_what_the_blocking_ones_return(history: History) -> None:
    entries = await history.call(add, history, "a", "b")
    assert (await history.aread("t", entries[0].seq)).entries == (entries[1],)
    assert not await history.aannounce("p", {"t": ["a"]}, 60)
    assert await history.apresent("t") == ["a"]
    await history.awithdraw("p")
    assert await history.apresent("t") == []
    assert (await history.alocate("t", None)).seq == entries[1].seq
    assert await history.aprune() == 0
    # The last call, because it closes the connection of its thread.
    (head,) = (await history.aheads(["t"])).values()
    assert (head.seq, head.has_epoch) == (entries[1].seq, True)


# Options


@pytest.mark.parametrize("option", ["MAX_EVENTS", "MAX_BYTES", "MAX_AGE", "TOKEN_MAX_AGE"])
@pytest.mark.parametrize("value", [0, -1, "5", None, True, float("inf")])
def test_an_option_that_is_not_a_positive_number_is_named(
    name: str, option: str, value: object
) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"{option} must be a positive (whole )?number"):
        make(name, **{option: value})


def test_events_can_be_kept_for_thousands_of_years(name: str) -> None:
    history = make(name, MAX_EVENTS=1, MAX_AGE=10**12, TOKEN_MAX_AGE=10**12)
    entries = add(history, "a", "b")
    history.prune()
    assert texts(history.read("t", entries[0].seq).entries) == ["b"]


def test_an_incomplete_read_reports_whether_the_newest_event_is_a_close(name: str) -> None:
    """A stream that continues there has not sent the close."""
    history = make(name)
    (close,) = history.append("t", [draft(kind=Kind.CLOSE)])
    slice_ = history.read("t", 5)
    assert (slice_.complete, slice_.closed, slice_.last) == (False, True, close.seq)
    (entry,) = add(history, "a")
    slice_ = history.read("t", 5)
    assert (slice_.closed, slice_.last) == (False, entry.seq)


def test_max_events_and_max_bytes_must_be_whole_numbers(name: str) -> None:
    for option in ("MAX_EVENTS", "MAX_BYTES"):
        with pytest.raises(
            ImproperlyConfigured, match=f"{option} must be a positive whole number"
        ):
            make(name, **{option: 1.5})


def test_token_max_age_must_not_be_less_than_max_age(name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="TOKEN_MAX_AGE"):
        make(name, MAX_AGE=10, TOKEN_MAX_AGE=5)
