"""The contract: what every history promises. Each test runs over each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test.utils import CaptureQueriesContext

from django_eventsource.cursors import join_cursor, short_key, split_cursor
from django_eventsource.events import (
    Event,
    EventId,
    JSONIdEvent,
    StringEvent,
    StringIdEvent,
)
from django_eventsource.exceptions import EventTooLarge
from django_eventsource.frames import encode_event
from django_eventsource.history import Draft, Entry, Head, History, Kind, Slice
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.history.redis import RedisHistory
from tests.histories import ALIASES, NAMES, add, age, draft, make, texts

pytestmark = pytest.mark.django_db(databases=ALIASES)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def history(name: str) -> History:
    return make(name)


# Appending and reading


def test_numbers_are_consecutive_and_per_token(history: History) -> None:
    """Each token counts on its own, by one."""
    one = add(history, "a", "b") + add(history, "c")
    other = add(history, "d", token="other")
    assert [entry.seq - one[0].seq for entry in one] == [0, 1, 2]
    assert texts(history.read("other", other[0].seq - 1).entries) == ["d"]


def test_first_number_is_the_clock(history: History) -> None:
    """A token's first number is the time in microseconds."""
    before = time.time_ns() // 1000
    (entry,) = add(history, "a")
    assert before <= entry.seq <= time.time_ns() // 1000


def test_nothing_appended_is_nothing(history: History) -> None:
    """An empty append gives no entry and moves no number."""
    (first,) = add(history, "a")
    assert history.append("t", []) == []
    (second,) = add(history, "b")
    assert second.seq == first.seq + 1


def test_read_gives_what_follows(history: History) -> None:
    """Reading gives the events after a number, in order, and nothing before."""
    entries = add(history, "a", "b", "c")
    slice_ = history.read("t", entries[0].seq)
    assert texts(slice_.entries) == ["b", "c"]
    assert slice_.complete
    assert not slice_.more
    assert slice_.last == entries[2].seq


def test_read_at_the_head_is_empty_and_complete(history: History) -> None:
    """A listener that has everything misses nothing."""
    entries = add(history, "a")
    slice_ = history.read("t", entries[0].seq)
    assert (slice_.entries, slice_.complete, slice_.more) == ((), True, False)


def test_read_keeps_every_field(history: History) -> None:
    """Action, bytes (NUL too), own id and kind come back as they were."""
    drafts = [
        Draft(action="été", data="a\nb\0\u2028".encode(), event_id="own", kind=Kind.EVENT),
        Draft(action="retry", data=b"5", kind=Kind.RETRY),
        Draft(action="close", data=b"", kind=Kind.FINISH),
    ]
    entries = history.append("t", drafts)
    read = history.read("t", entries[0].seq - 1).entries
    assert [entry.draft for entry in read] == drafts
    assert list(read) == entries


def test_read_is_bounded_by_number(history: History) -> None:
    """No more events than asked for, and ``more`` says that there are."""
    entries = add(history, "a", "b", "c")
    slice_ = history.read("t", entries[0].seq - 1, max_events=2)
    assert texts(slice_.entries) == ["a", "b"]
    assert slice_.more


def test_read_is_bounded_by_bytes(history: History) -> None:
    """No more bytes than asked for, but always at least one event."""
    entries = add(history, "12345", "123", "12", "1")
    start = entries[0].seq - 1
    assert texts(history.read("t", start, max_bytes=3).entries) == ["12345"]
    assert texts(history.read("t", start + 1, max_bytes=5).entries) == ["123", "12"]


def test_tokens_differ_by_case_accent_and_space(history: History) -> None:
    """Tokens are compared exactly, whatever a database's collation thinks."""
    tokens = ["token", "Token", "tokén", "token ", "to ken/ü?#%"]
    for token in tokens:
        add(history, token, token=token)
    for token in tokens:
        seq = history.newest(token)[0]
        assert texts(history.read(token, seq - 1).entries) == [token]


# What cannot be vouched for


def test_read_after_an_unknown_number(history: History) -> None:
    """A number that was never given out is not complete, below or above."""
    entries = add(history, "a", "b")
    for after in (1, entries[0].seq - 2, entries[1].seq + 1):
        slice_ = history.read("t", after)
        assert not slice_.complete
        assert slice_.entries == ()
        assert slice_.last == entries[1].seq


def test_empty_token_is_complete_from_its_floor(history: History) -> None:
    """A listener of a token without events gets the first one."""
    floor = history.newest("t")[0]
    assert history.read("t", floor).complete
    assert not history.read("t", floor + 1).complete
    add(history, "first", "second")
    slice_ = history.read("t", floor)
    assert slice_.complete
    assert texts(slice_.entries) == ["first", "second"]


def test_trimmed_events_are_told(name: str) -> None:
    """Once events are trimmed, reading from before them is not complete."""
    history = make(name, MAX_EVENTS=2)
    entries = add(history, "a", "b", "c", "d")
    history.prune()
    assert not history.read("t", entries[0].seq).complete
    slice_ = history.read("t", entries[1].seq)
    assert slice_.complete
    assert texts(slice_.entries) == ["c", "d"]


def test_floor_before_trimmed_events_is_told(name: str) -> None:
    """A listener from before a token's first event is told when that one is trimmed."""
    history = make(name, MAX_EVENTS=1)
    floor = history.newest("t")[0]
    add(history, "a", "b")
    history.prune()
    assert not history.read("t", floor).complete


# Trimming


def test_prune_by_number(name: str) -> None:
    """Each token keeps MAX_EVENTS events."""
    history = make(name, MAX_EVENTS=3)
    entries = add(history, *"abcdefgh")
    history.prune()
    assert texts(history.read("t", entries[4].seq).entries) == ["f", "g", "h"]
    assert not history.read("t", entries[3].seq).complete


def kept(history: History, token: str = "t") -> list[str]:
    """Give the texts of the events that are kept, after pruning."""
    history.prune()
    return texts(history.read(token, history.oldest(token), max_events=10_000).entries)


def test_a_token_keeps_max_bytes(name: str) -> None:
    """The newest events whose values are together not larger than MAX_BYTES are kept."""
    history = make(name, MAX_BYTES=10)
    entries = add(history, "12345", "123", "1234567")
    assert kept(history) == ["123", "1234567"]
    assert not history.read("t", entries[0].seq - 1).complete
    assert history.read("t", entries[0].seq).complete
    add(history, "1")
    assert kept(history) == ["1234567", "1"]
    add(history, "", "")
    assert kept(history) == ["1234567", "1", "", ""]


def test_the_newest_event_is_kept_even_if_it_is_larger(name: str) -> None:
    """A listener can always resume at the newest event."""
    history = make(name, MAX_BYTES=10)
    add(history, "a", "x" * 11)
    assert kept(history) == ["x" * 11]
    add(history, "y" * 20)
    assert kept(history) == ["y" * 20]
    add(history, "z")
    assert kept(history) == ["z"]


def test_each_token_has_its_own_bytes(name: str) -> None:
    """A token is not trimmed for the events of another one."""
    history = make(name, MAX_BYTES=10)
    for token in ("t", "u", "v"):
        add(history, "12345678", token=token)
    assert [kept(history, token) for token in ("t", "u", "v")] == [["12345678"]] * 3


@pytest.mark.parametrize("bound", [{"MAX_EVENTS": 2}, {"MAX_AGE": 100}])
def test_bytes_of_events_trimmed_by_another_bound_do_not_count(
    name: str, bound: dict[str, Any]
) -> None:
    """What MAX_EVENTS and MAX_AGE have removed makes room."""
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
    """More events are removed than one step takes, and their own ids with them."""
    history = make(name, MAX_BYTES=2_000)
    drafts = [draft("x", own_id=f"own-{n}") for n in range(1_200)]
    entries = history.append("t", drafts)
    add(history, "y" * 1_900)
    assert len(kept(history)) == 101
    assert history.locate("t", "own-1100").seq == entries[1_100].seq
    assert not history.locate("t", "own-1099").known


def test_prune_by_age(name: str) -> None:
    """Events older than MAX_AGE go, younger ones stay."""
    history = make(name, MAX_AGE=100)
    old = add(history, "a", "b")
    age(history, 101)
    add(history, "c")
    # Redis removes with the append.
    assert history.prune() == (0 if name == "redis" else 2)
    assert history.prune() == 0
    assert texts(history.read("t", old[1].seq).entries) == ["c"]
    assert not history.read("t", old[0].seq).complete


def test_numbers_go_on_after_everything_was_pruned(name: str) -> None:
    """A token whose events are all gone keeps its place: nobody at the head is reset."""
    history = make(name, MAX_AGE=100)
    (last,) = add(history, "a")
    age(history, 101)
    history.prune()
    assert history.read("t", last.seq).complete
    assert not history.read("t", last.seq - 1).complete
    (entry,) = add(history, "b")
    assert entry.seq == last.seq + 1
    assert texts(history.read("t", last.seq).entries) == ["b"]


def test_idle_token_is_forgotten_and_never_resumed_falsely(name: str) -> None:
    """After TOKEN_MAX_AGE a new life begins above the old one, whose ids are unknown."""
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    floor = history.newest("t")[0]
    old = add(history, "a", "b")
    age(history, 201)
    history.prune()
    assert not history.heads(["t"])["t"].life
    (new,) = add(history, "c")
    assert new.seq > old[1].seq
    for after in (floor, old[0].seq):
        assert not history.read("t", after).complete
    assert texts(history.read("t", new.seq - 1).entries) == ["c"]


def test_new_life_is_above_the_floor_when_the_clock_goes_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock set back gives no number of an earlier life again."""
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    (old,) = add(history, "a")
    age(history, 201)
    history.prune()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    (new,) = add(history, "b")
    assert new.seq > old.seq


def test_floor_rises_with_forgotten_tokens(name: str) -> None:
    """The floor tells the highest number of any forgotten token."""
    history = make(name, MAX_AGE=100, TOKEN_MAX_AGE=200)
    (last,) = add(history, "a")
    age(history, 201)
    history.prune()
    (later,) = add(history, "b", token="other")
    heads = history.heads(["t", "other"])
    assert heads["other"] == Head(seq=later.seq, life=True, epoch=heads["t"].epoch)
    assert not heads["t"].life
    assert last.seq <= heads["t"].seq < later.seq
    age(history, 201)
    history.prune()
    (head,) = history.heads(["t"]).values()
    assert not head.life
    assert head.seq >= later.seq
    assert history.heads([]) == {}


# Places


def test_oldest_is_the_place_before_what_is_kept(name: str) -> None:
    """Reading from the oldest place is complete, and gives all that is kept."""
    history = make(name, MAX_EVENTS=2, MAX_AGE=100)
    assert history.oldest("t") == history.newest("t")[0]
    entries = add(history, "a")
    assert history.read("t", history.oldest("t")).entries == tuple(entries)
    entries += add(history, "b", "c", "d")
    history.prune()
    assert history.oldest("t") == entries[1].seq
    assert texts(history.read("t", history.oldest("t")).entries) == ["c", "d"]
    age(history, 101)
    history.prune()
    assert history.oldest("t") == history.newest("t")[0] == entries[3].seq


def test_heads_of_many_tokens(history: History) -> None:
    """One call gives the head of every token, with a history or without."""
    names = [f"token {n}" for n in range(1200)]
    add(history, "a", token=names[0])
    (last,) = add(history, "b", token=names[1100])
    heads = history.heads(names)
    assert list(heads) == names
    assert {name for name in names if heads[name].life} == {names[0], names[1100]}
    assert heads[names[1100]] == Head(seq=last.seq, life=True, epoch=heads[names[0]].epoch)
    assert heads[names[1]].seq == history.newest(names[1])[0]


def test_locate_fresh_listener(history: History) -> None:
    """Without a last event id a listener starts at the newest event."""
    entries = add(history, "a", "b")
    for cursor in (None, ""):
        position = history.locate("t", cursor)
        assert position.seq == entries[1].seq
        assert position.cursor == str(entries[1].seq)
        assert (position.known, position.closed) == (True, False)


def test_locate_by_sequence_number(history: History) -> None:
    """An id that was given out is found again."""
    entries = add(history, "a", "b")
    position = history.locate("t", str(entries[0].seq))
    assert (position.seq, position.known) == (entries[0].seq, True)


@pytest.mark.parametrize("cursor", ["1", "x:abc", "-5", "9" * 18, "9" * 19, "1+1", " "])
def test_locate_unknown_id(history: History, cursor: str) -> None:
    """An id that was never given out leads to the newest event, and says so."""
    entries = add(history, "a")
    position = history.locate("t", cursor)
    assert (position.seq, position.known) == (entries[0].seq, False)


def test_locate_by_own_id(history: History) -> None:
    """An id of a class's own is found again; of equal ones the oldest, to lose nothing."""
    entries = history.append("t", [draft(own_id=own) for own in ("u", "v", "v", "w")])
    assert history.locate("t", "v").seq == entries[1].seq
    assert not history.locate("t", "x").known
    assert not history.locate("other", "v").known


def calls_of(history: History, work: Callable[[], object]) -> int:
    """Count the statements, or the round trips to a Redis server, that work takes."""
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
    """Whatever a client sends: two statements or one round trip, and a fresh listener one."""
    entries = add(history, "a", "b", "c", token="t")
    add(history, "large", token="t")
    (own,) = history.append("t", [draft("own", own_id="own")])
    known = [str(entries[0].seq), f"{entries[1].seq}+", str(own.seq), "own"]
    most = 1 if isinstance(history, RedisHistory) else 2
    for token in ("t", "without a history"):
        assert calls_of(history, lambda token=token: history.locate(token, None)) <= 1
    for cursor in known + ABSURD:
        assert calls_of(history, lambda cursor=cursor: history.locate("t", cursor)) <= most, cursor
    for cursor in ABSURD:
        assert calls_of(history, lambda cursor=cursor: history.locate("none", cursor)) <= 2


def test_an_absurd_cursor_of_many_tokens_is_bounded(history: History) -> None:
    """One id for 16 tokens, none of which it fits, costs at most twice a fresh listener."""
    tokens = [f"token {n}" for n in range(16)]
    for token in tokens:
        add(history, "a", "b", token=token)
    ids = [
        join_cursor((short_key(token), seq, False) for token in tokens)
        for seq in (0, 1, 2**62, 10**17)
    ]
    ids.append(join_cursor([(short_key(tokens[0]), 5, True)] * 16))

    def open_with(last_event_id: str | None) -> None:
        cursors = split_cursor(last_event_id, tokens)
        for token in tokens:
            assert history.locate(token, cursors[token]).known == (cursors[token] is None)

    fresh = calls_of(history, lambda: open_with(None))
    assert fresh <= 16
    for text in [*ids, " ", "~nonsense"]:
        assert calls_of(history, lambda text=text: open_with(text)) <= 2 * fresh, text


def test_a_kept_close_is_recognised_by_each_kind_of_cursor(history: History) -> None:
    """The id of a close ends the stream, also when the close was trimmed."""
    (own,) = history.append("t", [draft(own_id="own", kind=Kind.FINISH)])
    (last,) = history.append("t", [draft(kind=Kind.FINISH)])
    assert history.locate("t", "own").closed
    assert history.locate("t", str(own.seq)).closed
    assert history.locate("t", str(last.seq)).closed
    assert not history.locate("t", f"{last.seq}+").closed
    assert not history.locate("t", str(own.seq - 1)).closed


def test_own_id_comes_before_a_number(history: History) -> None:
    """An own id that looks like a sequence number means the event that has it."""
    (first,) = add(history, "a")
    entries = history.append("t", [draft(own_id="o"), draft(own_id=str(first.seq))])
    assert history.locate("t", str(first.seq)).seq == entries[1].seq
    assert history.locate("t", str(entries[0].seq)).seq == entries[0].seq


def test_own_id_is_forgotten_with_its_event(name: str) -> None:
    """The id of a trimmed event is unknown."""
    history = make(name, MAX_EVENTS=1)
    history.append("t", [draft(own_id="u"), draft(own_id="u"), draft(own_id="v")])
    history.prune()
    assert not history.locate("t", "u").known
    assert history.locate("t", "v").known


def test_locate_at_a_close(history: History) -> None:
    """A listener that has seen the close is told; one from before it is not."""
    (before,) = add(history, "a")
    (close,) = history.append("t", [draft(kind=Kind.FINISH)])
    assert not history.locate("t", str(before.seq)).closed
    assert history.locate("t", str(close.seq)).closed
    (after,) = add(history, "b")
    assert history.locate("t", str(close.seq)).closed
    assert not history.locate("t", str(after.seq)).closed


def test_close_with_an_own_id(history: History) -> None:
    """A close is known by its own id too."""
    history.append("t", [draft(own_id="bye", kind=Kind.FINISH)])
    assert history.locate("t", "bye").closed


def test_fresh_listener_opens_a_closed_token_anew(history: History) -> None:
    """A fresh listener's cursor at a close is not that of one who has seen the close."""
    (close,) = history.append("t", [draft(kind=Kind.FINISH)])
    position = history.locate("t", None)
    assert position.cursor == f"{close.seq}+"
    assert not position.closed
    again = history.locate("t", position.cursor)
    assert (again.seq, again.known, again.closed) == (close.seq, True, False)


def test_close_is_known_after_it_was_trimmed(name: str) -> None:
    """The last close is remembered by its number."""
    history = make(name, MAX_AGE=100)
    (close,) = history.append("t", [draft(kind=Kind.FINISH)])
    age(history, 101)
    history.prune()
    assert history.locate("t", str(close.seq)).closed


def test_staged_events_are_appended_when_called(history: History) -> None:
    """What stage() gives back appends, in the order it was staged."""
    settle = history.stage("t", [draft("a"), draft("b")])
    entries = settle()
    assert texts(entries) == ["a", "b"]
    assert texts(history.read("t", entries[0].seq - 1).entries) == ["a", "b"]


# Presence


def test_listeners_of_all_processes_are_present(history: History) -> None:
    """Everybody is counted, the same identity as often as it listens."""
    assert not history.announce("one", {"t": ["a", "", "a"], "other": ["z"]}, 60)
    assert not history.announce("two", {"t": ["b", ""]}, 60)
    assert sorted(history.present("t")) == ["", "", "a", "a", "b"]
    assert history.present("other") == ["z"]
    assert history.present("nobody") == []
    assert sorted(history.present("t", elsewhere="one")) == ["", "b"]
    assert sorted(history.present("t", elsewhere="two")) == ["", "a", "a"]
    assert len(history.present("t", elsewhere="three")) == 5


def test_announcing_says_what_changed(history: History) -> None:
    """Tokens that are named are replaced, the others stay, an empty one goes."""
    history.announce("one", {"t": ["a", "b"], "other": ["c"], "third": ["d"]}, 60)
    assert history.announce("one", {"t": ["b"], "other": []}, 60)
    assert history.announce("one", {}, 60)
    found = [history.present(token) for token in ("t", "other", "third")]
    assert found == [["b"], [], ["d"]]
    assert history.announce("one", {"other": ["e"], "new": [], "t": []}, 60)
    found = [history.present(token) for token in ("t", "other", "new", "third")]
    assert found == [[], ["e"], [], ["d"]]


def test_one_lease_for_all_tokens_of_a_process(history: History) -> None:
    """To renew it is to say nothing else; not to renew it ends everything at once."""
    history.announce("one", {"t": ["a"], "other": ["a"]}, 60)
    age(history, 50)
    assert history.announce("one", {}, 60)
    age(history, 50)
    assert (history.present("t"), history.present("other")) == (["a"], ["a"])
    age(history, 11)
    assert (history.present("t"), history.present("other")) == ([], [])


def test_what_an_expired_lease_left_never_comes_back(history: History) -> None:
    """A process that was away for too long says everything again."""
    history.announce("one", {"t": ["a"], "other": ["b"]}, 60)
    age(history, 61)
    assert not history.announce("one", {"other": ["c"]}, 60)
    assert (history.present("t"), history.present("other")) == ([], ["c"])
    assert history.announce("one", {"t": ["d"], "other": ["c"]}, 60)
    assert (history.present("t"), history.present("other")) == (["d"], ["c"])


def test_withdraw_is_a_clean_end(history: History) -> None:
    """Its listeners are gone at once, those of the others stay; twice does no harm."""
    history.announce("one", {"t": ["a"]}, 60)
    history.announce("two", {"t": ["b"]}, 60)
    history.withdraw("one")
    history.withdraw("one")
    assert history.present("t") == ["b"]
    assert not history.announce("one", {}, 60)


def test_prune_removes_what_dead_processes_left(history: History) -> None:
    """Only that, and no lease that is still valid."""
    history.announce("dead", {"t": ["a"]}, 60)
    age(history, 61)
    history.announce("alive", {"t": ["b"]}, 60)
    assert history.prune() == 0
    assert history.present("t") == ["b"]
    assert history.announce("alive", {}, 60)
    assert not history.announce("dead", {}, 60)
    assert history.present("t") == ["b"]


def test_presence_of_many_tokens(history: History) -> None:
    """More tokens than fit into one statement."""
    names = [f"token {n}" for n in range(1100)]
    history.announce("one", {name: [name] for name in names}, 60)
    assert history.present(names[1050]) == [names[1050]]
    assert history.announce("one", {name: [] for name in names[:1000]}, 60)
    assert [history.present(names[n]) for n in (0, 999)] == [[], []]
    assert history.present(names[1000]) == [names[1000]]


@pytest.mark.parametrize("identity", ["ümlaut 😀", "a\0b", "\ud800", '"', "x" * 5000], ids=ascii)
def test_identities_are_any_text(history: History, identity: str) -> None:
    """They come back as they were, whatever a database thinks of them."""
    history.announce("one", {"t": [identity]}, 60)
    assert history.present("t") == [identity]


def test_processes_and_tokens_differ_by_case(history: History) -> None:
    """Names are compared exactly, whatever a database's collation thinks."""
    history.announce("One", {"t": ["a"], "T": ["b"]}, 60)
    assert not history.announce("one", {"t": ["c"]}, 60)
    assert sorted(history.present("t")) == ["a", "c"]
    assert history.present("T") == ["b"]


@pytest.mark.django_db(transaction=True, databases=ALIASES)
async def test_awaited_methods(history: History) -> None:
    """The a-methods give what the plain ones give."""
    entries = await history.call(add, history, "a", "b")
    assert (await history.aread("t", entries[0].seq)).entries == (entries[1],)
    (head,) = (await history.aheads(["t"])).values()
    assert (head.seq, head.life) == (entries[1].seq, True)
    assert not await history.aannounce("p", {"t": ["a"]}, 60)
    assert await history.apresent("t") == ["a"]
    await history.awithdraw("p")
    assert await history.apresent("t") == []
    assert (await history.alocate("t", None)).seq == entries[1].seq
    assert await history.aprune() == 0
    await history.arelease()


class BlockingHistory(MemoryHistory):
    """A backend as somebody else would write it: it blocks, and says nothing about it."""

    call = History.call

    def read(self, *args: Any, **kwargs: Any) -> Slice:
        self.thread = threading.get_ident()
        return super().read(*args, **kwargs)


async def test_blocking_histories_run_off_the_loop() -> None:
    """A backend that only blocks does not block the event loop."""
    history = BlockingHistory()
    (entry,) = add(history, "a")
    assert (await history.aread("t", entry.seq - 1)).entries == (entry,)
    assert history.thread != threading.get_ident()


# Options


@pytest.mark.parametrize("option", ["MAX_EVENTS", "MAX_BYTES", "MAX_AGE", "TOKEN_MAX_AGE"])
@pytest.mark.parametrize("value", [0, -1, "5", None, True, float("inf")])
def test_bad_options(name: str, option: str, value: object) -> None:
    """An option that is no positive number is an error that names it."""
    with pytest.raises(ImproperlyConfigured, match=f"{option} must be a positive number"):
        make(name, **{option: value})


def test_very_long_ages(name: str) -> None:
    """Who wants to keep events for ever can."""
    history = make(name, MAX_EVENTS=1, MAX_AGE=10**12, TOKEN_MAX_AGE=10**12)
    entries = add(history, "a", "b")
    history.prune()
    assert texts(history.read("t", entries[0].seq).entries) == ["b"]


def test_reset_at_a_close_opens_the_token_anew(name: str) -> None:
    """Where what is gone ends with a close, the place to go on has not seen it."""
    history = make(name)
    (close,) = history.append("t", [draft(kind=Kind.FINISH)])
    slice_ = history.read("t", 5)
    assert (slice_.complete, slice_.closed, slice_.resume) == (False, True, f"{close.seq}+")
    (entry,) = add(history, "a")
    assert history.read("t", 5).resume == str(entry.seq)


def test_max_events_is_whole(name: str) -> None:
    """Half an event or half a byte cannot be kept."""
    for option in ("MAX_EVENTS", "MAX_BYTES"):
        with pytest.raises(ImproperlyConfigured, match=f"{option} must be a whole number"):
            make(name, **{option: 1.5})


def test_token_is_not_forgotten_before_its_events(name: str) -> None:
    """TOKEN_MAX_AGE below MAX_AGE makes no sense."""
    with pytest.raises(ImproperlyConfigured, match="TOKEN_MAX_AGE"):
        make(name, MAX_AGE=10, TOKEN_MAX_AGE=5)


# Drafts, which need no history


def read_back(event: Event) -> tuple[str, bytes, str | None, Kind]:
    one = Draft.of(event)
    return one.action, one.data, one.event_id, one.kind


def test_draft_of_each_kind() -> None:
    """A draft holds what goes over the wire."""
    assert read_back(StringEvent("t", "ping", "a\r\nb\rc")) == (
        "ping",
        b"a\nb\nc",
        None,
        Kind.EVENT,
    )
    assert read_back(StringIdEvent("t", "retry", "50"))[3] == Kind.RETRY
    assert read_back(JSONIdEvent("t", "close"))[1:] == (b"null", None, Kind.FINISH)


def test_draft_splits_what_an_override_left_whole() -> None:
    """Line ends inside the lines that a class gives are line ends still."""

    class Whole(Event):
        def get_value(self) -> list[str]:
            return [self._value, "end"]

    class Text(Event):
        def get_value(self) -> str:  # type: ignore[override]
            return self._value

    assert Draft.of(Whole("t", "close", "a\nb")).data == b"a\nb\nend"
    assert Draft.of(Whole("t", "close", "a\r\nb\r")).data == b"a\nb\n\nend"
    assert Draft.of(Text("t", "close", "a\nb")).data == b"a\nb"


def test_draft_takes_an_own_id_once() -> None:
    """A computed id is computed once, and checked."""
    ids = iter(["one", "two"])

    class Counted(Event):
        id = property(lambda self: next(ids))

    class Bad(Event):
        id = property(lambda self: "a\nb")

    event = Counted("t", "close")
    assert Draft.of(event).event_id == event.id == "one"
    with pytest.raises(ValueError, match="visible ASCII"):
        Draft.of(Bad("t", "close"))


@pytest.mark.parametrize("value", ["", "-5", "+1", "1.5", "abc", "5\n6", "\u0665", "1" * 16])
def test_draft_refuses_a_bad_retry(value: str) -> None:
    """A retry is ASCII digits."""
    with pytest.raises(ValueError, match="must be ASCII digits"):
        Draft.of(StringIdEvent("t", "retry", value))


def test_draft_refuses_an_event_that_is_too_large_once_it_is_encoded(settings) -> None:
    """Each line of the value is sent with `data: ` before it."""
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1000
    room = 1000 - len(encode_event("ping", b""))
    for value in ("x" * room, "\n" * (room // 7)):
        assert len(Draft.of(StringIdEvent("t", "ping", value)).frame()) <= 1000
        with pytest.raises(EventTooLarge, match=r"has 100\d bytes as it is sent; at most 1000"):
            Draft.of(StringIdEvent("t", "ping", value + "\n"))


def test_draft_refuses_lone_surrogates() -> None:
    """Text without a UTF-8 form is refused, saying where."""
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        Draft.of(StringEvent("t", "ping", "a\ud800"))


def test_frames() -> None:
    """Durable frames carry an id, live-only frames do not."""
    one = Draft(action="ping", data=b"a\nb")
    assert one.frame() == b"event: ping\ndata: a\ndata: b\n\n"
    assert one.frame(7) == b"id: 7\nevent: ping\ndata: a\ndata: b\n\n"
    assert Entry(seq=7, draft=one).frame() == one.frame(7)
    assert draft("x", own_id="u").frame(7) == b"id: u\nevent: ping\ndata: x\n\n"
    assert draft("50", kind=Kind.RETRY).frame(7) == b"id: 7\nevent: retry\nretry: 50\n\n"
    assert draft("50", kind=Kind.RETRY).frame() == b"event: retry\nretry: 50\n\n"


def test_event_id_class_has_no_id_of_its_own() -> None:
    """The id of an EventId class is left to the history."""

    class Mixed(StringEvent, EventId):
        pass

    assert Draft.of(Mixed("t", "ping", "x")).event_id is None
