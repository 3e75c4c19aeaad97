"""Tests of the database history beyond the contract: outbox, concurrency, failures."""

from __future__ import annotations

import asyncio
import datetime
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.db.models.signals import post_delete, post_save
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_eventsource import publish
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.history import Draft, Entry, Head, Kind, get_history
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.records import utc
from django_eventsource.history.transaction_retries import in_transaction
from django_eventsource.models import FLOOR_KEY, PendingEvent, StoredEvent, TokenHead
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.frames import Decoder
from tests.support.events import add, draft, texts
from tests.support.histories import (
    ALIASES,
    DATABASES,
    SERVERS,
    age,
    before_oldest,
    cut_connections,
    in_thread,
    to_outbox,
    with_orm,
)
from tests.support.processes import POSTGRES, run_python, start_python
from tests.support.singles import Single

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


ISOLATIONS = ["READ COMMITTED", "REPEATABLE READ"]
NO_WAIT = {
    "postgres": "SET lock_timeout = '1s'",
    "mariadb": "SET SESSION innodb_lock_wait_timeout = 1",
}


def isolate(using: str, isolation: str) -> None:
    """Set the isolation level of this thread's later transactions."""
    with connections[using].cursor() as cursor:
        cursor.execute(
            f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {isolation}"
            if using == "postgres"
            else f"SET SESSION TRANSACTION ISOLATION LEVEL {isolation}"
        )


@pytest.fixture(params=DATABASES)
def using(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def history(using: str) -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING=using)
    if not connections[using].in_atomic_block:
        connections[using].close()


# The outbox


@real_commits
def test_staged_events_are_visible_after_the_commit(history: DatabaseHistory) -> None:
    """Before the commit no other connection sees them."""
    (first,) = add(history, "a")
    with transaction.atomic(using=history.using):
        history.stage("t", [draft("b")])
        assert in_thread(lambda: history.read("t", first.seq).entries) == ()
    history.heads([])
    assert texts(history.read("t", first.seq).entries) == ["b"]


@real_commits
def test_a_rolled_back_event_is_never_published(history: DatabaseHistory) -> None:
    """Neither is one of a savepoint that was rolled back."""
    (first,) = add(history, "a")
    with transaction.atomic(using=history.using):
        history.stage("t", [draft("kept")])
        with pytest.raises(RuntimeError), transaction.atomic(using=history.using):
            history.stage("t", [draft("gone")])
            raise RuntimeError
    history.heads([])
    assert texts(history.read("t", first.seq).entries) == ["kept"]
    assert not PendingEvent.objects.using(history.using).exists()


def publish_in_transaction(history: DatabaseHistory, *texts: str) -> list[Entry]:
    """Publish several events in one transaction, with one call for each."""
    with transaction.atomic(using=history.using):
        settles = [history.stage("t", [draft(text)]) for text in texts]
    return [entry for settle in settles for entry in settle()]


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_an_open_transaction_does_not_block_other_publishers(
    history: DatabaseHistory, isolation: str
) -> None:
    """An exception is SQLite, where every transaction that has written holds the only write
    lock."""
    (first,) = add(history, "a")
    history.max_events = 3

    def others() -> None:
        isolate(history.using, isolation)
        with connections[history.using].cursor() as cursor:
            cursor.execute(NO_WAIT[history.using])
        for n in range(4):
            add(history, f"plain {n}")
            publish_in_transaction(history, f"in {n}", f"too {n}")
        assert history.heads(["t"])["t"].seq == first.seq + 12
        history.prune()

    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("late"), draft("later")])
        in_thread(others)
        history.stage("t", [draft("last")])
    settle()
    entries = history.read("t", before_oldest(history)).entries
    assert texts(entries)[-3:] == ["late", "later", "last"]
    assert entries[-1].seq == first.seq + 15


@real_commits
@pytest.mark.parametrize("using", SERVERS)
def test_a_head_check_settles_pending_events_of_a_dead_process(history: DatabaseHistory) -> None:
    floor = history.newest("t")[0]
    run_python(
        """
import os, sys
from django.db import transaction
from django_eventsource.history import get_history, Draft
history = get_history()
with transaction.atomic(using=history.using):
    history.stage("t", [Draft(action="ping", data=b"a"), Draft(action="ping", data=b"b")])
os._exit(0)
""",
        EVENTSOURCE_HISTORY={
            "BACKEND": POSTGRES["BACKEND"],
            "OPTIONS": {"USING": history.using},
        },
    )
    assert history.read("t", floor).entries == ()
    heads = history.heads(["t"])
    slice_ = history.read("t", floor)
    assert texts(slice_.entries) == ["a", "b"]
    assert heads["t"] == Head(seq=slice_.last, has_epoch=True)


@real_commits
def test_a_publisher_finds_its_event_that_a_head_check_settled(history: DatabaseHistory) -> None:
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b", kind=Kind.CLOSE)])
    add(history, "c")
    history.heads([])
    entries = settle()
    assert texts(entries) == ["a", "b"]
    assert entries[1].closes
    assert entries[1].seq == entries[0].seq + 1 == history.newest("t")[1]


@real_commits
def test_a_pending_event_that_cannot_be_settled_is_logged_and_skipped(
    history: DatabaseHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """Events of other tokens are settled. The row may be one of a newer release."""
    to_outbox(history, draft("x"), token="bad")
    PendingEvent.objects.using(history.using).update(kind="newer")
    to_outbox(history, draft("a"), token="good")
    (entry,) = add(history, "x", token="other")
    heads = history.heads(["bad", "good", "other"])
    assert [heads[token].has_epoch for token in ("bad", "good", "other")] == [False, True, True]
    assert heads["other"].seq == entry.seq
    assert "sequence numbers to pending events of 'bad' failed" in caplog.text


@real_commits
def test_no_signal_is_sent_for_rows_of_the_history(history: DatabaseHistory) -> None:
    """A receiver of all signals is not called, and a function that runs on commit may publish."""
    seen = []

    def receiver(sender: type, **kwargs: object) -> None:
        seen.append(sender)

    for signal in (post_save, post_delete):
        signal.connect(receiver)
    try:
        history.max_events = 1
        with transaction.atomic(using=history.using):
            settle = history.stage("t", [draft("a"), draft("b")])
        settle()
        history.prune()
    finally:
        for signal in (post_save, post_delete):
            signal.disconnect(receiver)
    assert seen == []
    entries = in_transaction(history.using, lambda: publish_on_commit(history))
    assert texts(entries) == ["inner"]


def publish_on_commit(history: DatabaseHistory) -> list[Entry]:
    entries: list[Entry] = []
    transaction.on_commit(lambda: entries.extend(add(history, "inner")), using=history.using)
    return entries


@real_commits
def test_an_event_settled_and_trimmed_elsewhere_has_no_entry(
    history: DatabaseHistory,
) -> None:
    history.max_events = 1
    settle = to_outbox(history, draft("a"))
    history.heads([])
    add(history, "b", "c")
    history.prune()
    assert settle() == [None]


@real_commits
def test_transactions_begin_with_a_write(history: DatabaseHistory) -> None:
    """On SQLite, a transaction that began with a read could not wait for a writer."""
    add(history, "a")
    settle = to_outbox(history, draft("b"))
    for work in (partial(add, history, "c"), settle):
        with CaptureQueriesContext(connections[history.using]) as queries:
            work()
        begun = [one["sql"] for one in queries if not one["sql"].startswith("BEGIN")]
        assert begun[0].startswith(("UPDATE", "WITH head AS", "EXECUTE", "PREPARE"))


# Keys


def statements(history: DatabaseHistory, work: Callable[[], object]) -> list[str]:
    """Return the first words of the statements that work runs, without those of transactions."""
    with CaptureQueriesContext(connections[history.using]) as queries:
        work()
    words = [one["sql"].partition(" ")[0] for one in queries]
    return [word for word in words if word not in ("BEGIN", "COMMIT")]


@real_commits
def test_only_a_key_costs_another_statement(history: DatabaseHistory) -> None:
    """It is looked up in the same transaction. The number of an event that is not stored is
    returned to the head."""
    add(history, "a")
    keyed = partial(history.append, "t", [draft("c", key="k")])
    assert statements(history, keyed) == ["UPDATE", "SELECT", "SELECT", "INSERT"]
    assert statements(history, keyed) == ["UPDATE", "SELECT", "SELECT", "UPDATE"]


@real_commits
def test_only_a_key_costs_another_statement_in_a_transaction(history: DatabaseHistory) -> None:
    """An event with a key is written to the outbox with one statement, as any other."""
    history = with_orm(history.using)
    add(history, "a")
    settling = ["UPDATE", "SELECT", "UPDATE", "SELECT", "INSERT", "DELETE"]
    keyed = [*settling[:4], "SELECT", *settling[4:]]
    # The first event is looked up by the reference of the repeated one, and then by its key.
    repeated = [*settling[:4], "SELECT", "UPDATE", "DELETE", "SELECT", "SELECT"]
    for one, expected in (
        (draft("b"), settling),
        (draft("c", key="k"), keyed),
        (draft("d", key="k"), repeated),
    ):
        settles: list[Callable[[], object]] = []

        def stage(one: Draft = one, settles: Any = settles) -> None:
            settles.append(history.stage("t", [one]))

        assert statements(history, stage) == ["INSERT"]
        assert statements(history, settles[0]) == expected


@real_commits
@pytest.mark.parametrize("using", SERVERS)
def test_two_open_transactions_may_publish_a_key(history: DatabaseHistory) -> None:
    """Neither waits. The event of the one that settles first is stored."""
    (first,) = add(history, "a")

    def other() -> Entry | None:
        with connections[history.using].cursor() as cursor:
            cursor.execute(NO_WAIT[history.using])
        with transaction.atomic(using=history.using):
            settle = history.stage("t", [draft("other", own_id="own", key="k")])
        return settle()[0]

    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("mine", key="k")])
        settled = in_thread(other)
        assert isinstance(settled, Entry)
        assert not settled.repeated
    (mine,) = settle()
    assert mine is not None
    assert (mine.repeated, mine.seq, mine.id) == (True, first.seq + 1, "own")
    assert texts(history.read("t", first.seq).entries) == ["other"]


@real_commits
def test_an_event_with_a_known_key_that_a_head_check_dropped_is_found_by_its_key(
    history: DatabaseHistory,
) -> None:
    """Events without a key of the same call are found by their references."""
    (first,) = history.append("t", [draft("a", own_id="own", key="k")])
    settles = [history.stage("t", [draft("b", key="k")]), history.stage("t", [draft("c")])]
    in_thread(lambda: history.heads([]))
    assert not PendingEvent.objects.using(history.using).exists()
    (dropped,), (other,) = (settle() for settle in settles)
    assert (dropped.repeated, dropped.seq, dropped.id) == (True, first.seq, "own")
    assert (other.repeated, other.seq) == (False, first.seq + 1)
    assert texts(history.read("t", first.seq - 1).entries) == ["a", "c"]


@real_commits
def test_an_event_whose_first_one_was_trimmed_meanwhile_has_no_entry(
    history: DatabaseHistory,
) -> None:
    history.max_events = 1
    history.append("t", [draft("a", key="k")])
    settle = to_outbox(history, draft("b", key="k"))
    history.heads([])
    add(history, "c", "d")
    history.prune()
    assert settle() == [None]


@real_commits
def test_keys_repeated_in_one_outbox_are_settled_in_batches(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a batch and over several ones, each key is stored once, in order."""
    monkeypatch.setattr(history._outbox, "batch_bytes", 60)
    keys = [str(n % 7) for n in range(40)]
    with transaction.atomic(using=history.using):
        settles = [history.stage("t", [draft(f"{n} x", key=key)]) for n, key in enumerate(keys)]
    entries = [entry for settle in settles for entry in settle()]
    assert [entry.repeated for entry in entries] == [False] * 7 + [True] * 33
    first = entries[0].seq
    assert [entry.seq - first for entry in entries] == [n % 7 for n in range(40)]
    assert texts(history.read("t", first - 1).entries) == [f"{n} x" for n in range(7)]
    assert history.newest("t")[0] == first + 6
    assert sizes(history)[0] == sizes(history)[1]


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ["READ COMMITTED"])
def test_a_key_that_was_stored_before_the_lock_was_acquired_is_known(
    history: DatabaseHistory, isolation: str
) -> None:
    """At REPEATABLE READ the database refuses a transaction that read before it had the lock, or
    lets the other one wait."""
    isolate(history.using, isolation)
    meanwhile = {
        "UPDATE": lambda: add(history, "first"),
        "SELECT": lambda: history.append("t", [draft("theirs", key="k")]),
    }

    def run(execute: Any, sql: str, params: Any, *args: Any) -> Any:
        result = execute(sql, params, *args)
        word = sql.split()[0]
        # This transaction reads the floor before it has the lock on the head.
        if word == "UPDATE" or params == (FLOOR_KEY,):
            work = meanwhile.pop(word, None)
            if work is not None:
                in_thread(work)
        return result

    with connections[history.using].execute_wrapper(run):
        (mine,) = history.append("t", [draft("mine", key="k")])
    connections[history.using].close()
    assert not meanwhile
    assert mine.repeated
    entries = history.read("t", before_oldest(history)).entries
    assert texts(entries) == ["first", "theirs"]
    assert mine.seq == entries[1].seq


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_simultaneous_first_events_of_a_token_with_a_key_are_stored_once(
    history: DatabaseHistory, isolation: str
) -> None:
    """Directly and in transactions, at each isolation level."""
    barrier = threading.Barrier(6)
    tokens = [f"token {n}" for n in range(15)]

    def work(n: int) -> dict[str, tuple[bool, int]]:
        isolate(history.using, isolation)
        found = {}
        for token in tokens:
            barrier.wait(60)
            if n % 2:
                (entry,) = history.append(token, [draft(str(n), key="k")])
            else:
                with transaction.atomic(using=history.using):
                    settle = history.stage(token, [draft(str(n), key="k")])
                (entry,) = settle()
            found[token] = (entry.repeated, entry.seq)
        return found

    with ThreadPoolExecutor(max_workers=6) as executor:
        futures = [executor.submit(in_thread, partial(work, n)) for n in range(6)]
        results = [future.result(90) for future in futures]
    for token in tokens:
        entries = history.read(token, before_oldest(history, token)).entries
        assert [entry.seq for entry in entries] == [entries[0].seq]
        found = [result[token] for result in results]
        assert {seq for _, seq in found} == {entries[0].seq}
        # If another thread settled the stored event, its publisher finds it by its reference.
        assert [repeated for repeated, _ in found].count(False) == 1


# The size of a token


def sizes(history: DatabaseHistory) -> tuple[int, int]:
    """Return the size in the head and the sum of the sizes of its events.

    Each event's offset must be the sum up to its end.
    """
    head = TokenHead.objects.using(history.using).get(token="t")
    events = list(head.events.using(history.using).order_by("seq"))
    ends = accumulate((event.size for event in events), initial=head.start_offset)
    assert [event.end_offset for event in events] == list(ends)[1:]
    return head.size, sum(event.size for event in events)


@real_commits
def test_an_append_with_the_orm_takes_three_statements(using: str) -> None:
    """It updates the head, reads it, and inserts the event."""
    history = with_orm(using)
    add(history, "a")
    with CaptureQueriesContext(connections[history.using]) as queries:
        add(history, "b")
    words = [one["sql"].partition(" ")[0] for one in queries]
    assert [word for word in words if word not in ("BEGIN", "COMMIT")] == [
        "UPDATE",
        "SELECT",
        "INSERT",
    ]
    assert sizes(history) == (2, 2)


@real_commits
def test_the_size_in_the_head_is_the_sum_over_its_events(history: DatabaseHistory) -> None:
    """Appends, settled transactions and prunes run at once, and each bound removes events."""
    history.max_events, history.max_bytes = 400, 1_000
    barrier = threading.Barrier(4)

    def work(n: int) -> None:
        barrier.wait(30)
        for _ in range(10):
            add(history, *("x" * n for n in range(40)))
            history.stage("t", [draft("y" * n)])()
            history.prune()

    def run(n: int) -> object:
        return in_thread(partial(work, n))

    with ThreadPoolExecutor(max_workers=4) as executor:
        list(executor.map(run, range(4)))
    kept, events = sizes(history)
    assert kept == events > 0
    history.prune()
    assert sizes(history)[0] == sizes(history)[1] <= 1_000


@real_commits
@pytest.mark.parametrize("times", [False, True])
def test_a_page_that_is_trimmed_during_its_read_is_read_again(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, *, times: bool
) -> None:
    """Otherwise the events that are kept would be taken for no events."""
    start = add(history, *["x" * 10] * 30)[0].seq - 1
    find = history._head
    trims = [29, 25]

    def find_and_trim(*args: Any) -> Any:
        found = find(*args)
        if trims:
            history.max_events = trims.pop()
            in_thread(history.prune)
        return found

    monkeypatch.setattr(history, "_head", find_and_trim)
    slice_ = history.read("t", start, max_bytes=45, times=times)
    assert [entry.seq - start for entry in slice_.entries] == [6, 7, 8, 9]
    assert (slice_.complete, slice_.more) == (False, True)


@real_commits
@pytest.mark.parametrize("times", [False, True])
def test_a_page_has_no_gap_if_events_are_trimmed_during_its_read(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, *, times: bool
) -> None:
    """A page of small events is read in several steps. The trim comes before the second one."""
    start = add(history, *["x"] * 30, *["y" * 100] * 10)[0].seq - 1
    steps = 0

    def trim_before_the_second(fetch: Callable[..., Any], *args: Any) -> Any:
        nonlocal steps
        if (steps := steps + 1) == 2:
            history.max_events = 32  # the eighth event is the last one that is removed
            in_thread(history.prune)
        return fetch(*args)

    for name in ("_rows_with_times", "_rows"):
        fetch = getattr(history, name)
        monkeypatch.setattr(history, name, partial(trim_before_the_second, fetch))
    slice_ = history.read("t", start, max_bytes=100, times=times)
    assert [entry.seq - start for entry in slice_.entries] == [1, 2, 3, 4, 5]
    assert (slice_.complete, slice_.more, steps) == (True, True, 2)


# Concurrent publishers


@real_commits
def test_twenty_threads_and_processes_get_consecutive_numbers(history: DatabaseHistory) -> None:
    """No call fails because of a lock."""
    code = """
import sys, threading
from django.db import connections
from django_eventsource import publish
sys.stdin.readline()
def work(thread):
    for n in range(10):
        publish("t", "ping", f"{sys.argv[1]} {thread} {n}")
    connections.close_all()
threads = [threading.Thread(target=work, args=[n]) for n in range(5)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    setting = {"BACKEND": POSTGRES["BACKEND"], "OPTIONS": {"USING": history.using}}
    processes = [start_python(code, n, EVENTSOURCE_HISTORY=setting) for n in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    rows = list(
        StoredEvent.objects.using(history.using).order_by("seq").values_list("seq", "data")
    )
    assert [seq - rows[0][0] for seq, _ in rows] == list(range(200))
    said = [tuple(map(int, bytes(data).split())) for _, data in rows]
    assert len(set(said)) == 200
    for process_number in range(4):
        for thread in range(5):
            own = [n for p, t, n in said if (p, t) == (process_number, thread)]
            assert own == list(range(10))


@real_commits
def test_staged_and_direct_events_share_consecutive_numbers(history: DatabaseHistory) -> None:

    def work(n: int) -> None:
        try:
            for step in range(5):
                if n % 2:
                    with transaction.atomic(using=history.using):
                        settle = history.stage("t", [draft(f"{n} {step}")])
                    settle()
                else:
                    add(history, f"{n} {step}")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=8) as executor:
        list(executor.map(work, range(8)))
    rows = list(
        StoredEvent.objects.using(history.using).order_by("seq").values_list("seq", "data")
    )
    assert [seq - rows[0][0] for seq, _ in rows] == list(range(40))
    assert len({bytes(data) for _, data in rows}) == 40
    assert not PendingEvent.objects.using(history.using).exists()


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_committed_events_of_all_kinds_of_publishers_keep_their_order(
    history: DatabaseHistory, isolation: str
) -> None:
    """Publishers append directly, in transactions, in rolled back and in long ones, while other
    threads check heads and prune."""
    started, done = threading.Barrier(7), threading.Event()

    def plain(name: str) -> None:
        for n in range(15):
            add(history, f"{name} {n}")

    def several(name: str) -> None:
        for n in range(5):
            publish_in_transaction(history, *(f"{name} {3 * n + m}" for m in range(3)))

    def fickle(name: str) -> None:
        for n in range(15):
            with pytest.raises(RuntimeError), transaction.atomic(using=history.using):
                history.stage("t", [draft(f"gone {n}")])
                raise RuntimeError
            publish_in_transaction(history, f"{name} {n}")

    def long(name: str) -> None:
        with transaction.atomic(using=history.using):
            settle = history.stage("t", [draft(f"{name} {n}") for n in range(15)])
            assert done.wait(60)
        settle()

    def tend(name: str) -> None:
        while not done.is_set():
            history.heads(["t"])
            history.prune()

    def run(work: Callable[[str], None], name: str) -> None:
        try:
            isolate(history.using, isolation)
            started.wait(60)
            work(name)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=7) as executor:
        waiting = [executor.submit(run, long, "long"), executor.submit(run, tend, "tend")]
        works = [plain, plain, several, several, fickle]
        try:
            running = [
                executor.submit(run, work, f"{work.__name__}{n}") for n, work in enumerate(works)
            ]
            for future in running:
                future.result(60)  # all of them finish while the long transaction is open
        finally:
            done.set()
        for future in waiting:
            future.result(60)
    history.heads([])
    entries = history.read("t", before_oldest(history), max_events=1000).entries
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(90))
    said: dict[str, list[int]] = {}
    for text in texts(entries):
        name, n = text.split()
        said.setdefault(name, []).append(int(n))
    assert set(said) == {"plain0", "plain1", "several2", "several3", "fickle4", "long"}
    assert all(numbers == list(range(15)) for numbers in said.values())
    assert texts(entries)[-1] == "long 14"


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ["READ COMMITTED"])
def test_a_snapshot_older_than_the_lock_settles_nothing_twice(using: str, isolation: str) -> None:
    """At REPEATABLE READ the database refuses a transaction that read before it had the lock, or
    lets it wait."""
    history = with_orm(using)
    settle = history.stage("t", [draft("staged")])
    isolate(history.using, isolation)
    meanwhile = {"UPDATE": lambda: add(history, "first"), "SELECT": lambda: history.heads([])}

    def run(execute: Any, sql: str, *args: Any) -> Any:
        result = execute(sql, *args)
        work = meanwhile.pop(sql.split()[0], None)
        if work is not None:
            in_thread(work)
        return result

    with connections[history.using].execute_wrapper(run):
        (entry,) = settle()
    connections[history.using].close()
    assert not meanwhile
    entries = history.read("t", before_oldest(history)).entries
    assert texts(entries) == ["first", "staged"]
    assert entry == entries[1]


@real_commits
def test_serialization_failures_are_retried() -> None:
    """A serialization failure in a short transaction does not reach the publisher."""
    history = DatabaseHistory(USING="postgres")
    add(history, "a")
    barrier = threading.Barrier(4)

    def work(n: int) -> None:
        try:
            with connections["postgres"].cursor() as cursor:
                cursor.execute(
                    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"
                )
            barrier.wait(30)
            for step in range(10):
                add(history, f"{n} {step}")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=4) as executor:
        list(executor.map(work, range(4)))
    assert StoredEvent.objects.using("postgres").count() == 41


# Connections


@real_commits
@pytest.mark.parametrize("using", SERVERS)
async def test_a_read_after_one_that_lost_its_connection_succeeds(
    history: DatabaseHistory,
) -> None:
    await history.alocate("t", None)
    await asyncio.to_thread(in_thread, partial(cut_connections, history.using))
    with pytest.raises(DatabaseError):
        await history.aheads(["t"])
    assert not (await history.aheads(["t"]))["t"].has_epoch
    await history.call(connections.close_all)


@real_commits
@pytest.mark.parametrize("using", SERVERS)
async def test_streams_receive_every_event_although_connections_are_cut(
    history: DatabaseHistory, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": POSTGRES["BACKEND"],
        "OPTIONS": {"USING": history.using},
    }
    position = await history.alocate("t", None)
    subscriber = Single(position.seq, buffer_bytes=100_000, keepalive_seconds=None)
    await get_hub().subscribe(subscriber)
    received: list[str] = []
    for n in range(8):
        await asyncio.to_thread(in_thread, partial(cut_connections, history.using))
        await history.call(add, history, str(n))
        while len(received) <= n:
            received += await next_events(subscriber)
    assert received == [str(n) for n in range(8)]
    tasks = list(get_hub()._tasks)
    for task in tasks:
        task.cancel()  # a running task would open a connection again
    await asyncio.gather(*tasks, return_exceptions=True)
    await history.call(connections.close_all)


async def next_events(subscriber: Single) -> list[str]:
    """Return the next events, as a stream does, also after a read failed."""
    async with asyncio.timeout(60):
        await subscriber.wait()
    chunk = b""
    while not subscriber.live:
        with suppress(DatabaseError):
            slice_ = await get_hub().read("t", subscriber.seq)
            chunk += get_hub().catch_up(subscriber.only, slice_)
    return [event.data for event in Decoder().feed(chunk + subscriber.take())]


@real_commits
@pytest.mark.parametrize("using", SERVERS)
def test_publishing_works_again_after_a_server_restart(
    history: DatabaseHistory, using: str, request: Any
) -> None:
    """A publisher fails while the server is down."""
    (first,) = add(history, "a")
    restart = {"postgres": restart_postgres, "mariadb": restart_mariadb}[using]
    with restart(request):
        with pytest.raises(DatabaseError):
            add(history, "lost")
        with pytest.raises(DatabaseError):
            add(history, "lost")
    (second,) = add(history, "b")
    assert second.seq == first.seq + 1


@contextmanager
def restart_mariadb(request: Any) -> Iterator[None]:
    server = request.getfixturevalue("database_servers").mariadb
    server.stop()
    yield
    server.start()


@contextmanager
def restart_postgres(request: Any) -> Iterator[None]:
    server = request.getfixturevalue("database_servers").postgres
    server.stop()
    yield
    server.ensure_postgres_running()


@real_commits
def test_the_history_needs_no_session_state(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection pool may use another session for each transaction and each statement."""
    connection = connections[history.using]
    statements: list[str] = []

    def run(execute: Any, sql: str, *args: Any) -> Any:
        statements.append(sql.split()[0].lstrip("("))
        return execute(sql, *args)

    def everything() -> None:
        for work in tour(history):
            connection.close()
            work()

    with connection.execute_wrapper(run):
        everything()
    # Django sets session variables when a connection to MariaDB is opened.
    begins_with = {"SET"} if connection.vendor == "mysql" else {"BEGIN"}
    assert set(statements) <= {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH", *begins_with}
    assert texts(history.read("t", before_oldest(history)).entries) == ["b", "c"]


def tour(history: DatabaseHistory) -> list[Callable[[], object]]:
    """Return the results of every method of a history."""
    history.max_events = 2
    return [
        lambda: add(history, "a", "b"),
        lambda: publish_in_transaction(history, "c"),
        lambda: history.heads(["t"]),
        history.prune,
        lambda: history.locate("t", None),
        lambda: history.locate("t", parse_cursor(str(before_oldest(history)))),
        lambda: history.announce("p", {"t": ["a"]}, 60),
        lambda: history.announce("p", {"t": ["b"]}, 60),
        lambda: history.present("t"),
        lambda: history.withdraw("p"),
    ]


# Several databases


class Misleading:
    """A router that names a lagging replica for reads and another database for writes."""

    def db_for_read(self, model: type, **hints: object) -> str:
        return "postgres"

    db_for_write = db_for_read


@real_commits
def test_the_history_ignores_database_routers(settings) -> None:
    """It reads and writes the database that USING names, because a lagging replica would lose
    events."""
    settings.DATABASE_ROUTERS = ["tests.integration.test_history_database.Misleading"]
    history = DatabaseHistory()
    with CaptureQueriesContext(connections["postgres"]) as queries:
        for work in tour(history):
            work()
    assert list(queries) == []
    assert texts(history.read("t", before_oldest(history)).entries) == ["b", "c"]


@real_commits
def test_events_depend_on_the_transaction_of_their_own_database(settings) -> None:
    """A transaction on another database neither delays nor removes them."""
    settings.EVENTSOURCE_HISTORY = POSTGRES
    history = get_history()
    with pytest.raises(RuntimeError), transaction.atomic(using="default"):
        publish("t", "ping", "of another database's transaction")
        raise RuntimeError
    with pytest.raises(RuntimeError), transaction.atomic(using="postgres"):
        publish("t", "ping", "rolled back")
        raise RuntimeError
    with transaction.atomic(using="default"), transaction.atomic(using="postgres"):
        publish("t", "ping", "of both")
    entries = history.read("t", before_oldest(history)).entries
    assert texts(entries) == ["of another database's transaction", "of both"]
    assert not StoredEvent.objects.using("default").exists()


@real_commits
async def test_a_head_check_closes_a_connection_older_than_conn_max_age() -> None:
    """With CONN_MAX_AGE = 0 no connection stays open after a head check."""
    history = DatabaseHistory()
    await history.alocate("t", None)
    assert await history.call(lambda: connection.connection) is not None
    await history.aheads(["t"])
    assert await history.call(lambda: connection.connection) is None


# Pruning


@real_commits
def test_prune_removes_more_events_than_one_transaction_does(history: DatabaseHistory) -> None:
    history.max_events = 5
    entries = add(history, *map(str, range(1_200)))
    assert history.prune() == 1_195
    slice_ = history.read("t", entries[1_194].seq, max_events=10)
    assert texts(slice_.entries) == ["1195", "1196", "1197", "1198", "1199"]


@real_commits
def test_prune_skips_the_row_of_the_floor(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are far apart, so that trimming it would take long."""
    TokenHead.objects.using(history.using).filter(key="").update(kept=5, last=10**15)
    monkeypatch.setattr(history, "_trim", lambda *args: pytest.fail("the floor was trimmed"))
    assert history.prune() == 0


@real_commits
def test_prunes_during_publishing_leave_consecutive_numbers(history: DatabaseHistory) -> None:
    history.max_events = 5
    done = threading.Event()

    def prune() -> None:
        try:
            while not done.is_set():
                history.prune()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as executor:
        pruning = executor.submit(prune)
        entries = [add(history, str(n))[0] for n in range(60)]
        done.set()
        pruning.result(60)
    history.prune()
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(60))
    assert texts(history.read("t", entries[54].seq).entries) == [str(n) for n in range(55, 60)]


@real_commits
def test_a_token_published_to_during_a_prune_is_kept(history: DatabaseHistory) -> None:
    history.max_age, history.token_max_age = 10, 20
    add(history, "a")
    age(history, 30)
    head = TokenHead.objects.using(history.using).get(token="t")
    add(history, "b")
    floor = history.newest("other")[0]
    history._drop_token(head.pk, head.last, head.updated)
    assert history.heads(["t"]) == {"t": Head(seq=head.last + 1, has_epoch=True)}
    assert history.newest("other")[0] == floor


@real_commits
def test_a_missing_row_of_the_floor_is_created_again(history: DatabaseHistory) -> None:
    """Without it a history still drops tokens and assigns rising numbers."""
    history.max_age, history.token_max_age = 10, 20
    TokenHead.objects.using(history.using).all().delete()
    (last,) = add(history, "a")
    age(history, 30)
    history.prune()
    head = history.heads(["t"])["t"]
    assert (head.has_epoch, head.seq) == (False, pytest.approx(last.seq, abs=60_000_000))
    assert history.newest("t")[0] >= last.seq


@real_commits
def test_trimming_a_dropped_token_does_nothing(history: DatabaseHistory) -> None:
    """Two processes may prune at the same time."""
    assert history._trim(12345, 10) == 0


# Options


def test_using_must_be_an_alias_in_databases() -> None:
    with pytest.raises(ImproperlyConfigured, match="USING must be an alias in DATABASES"):
        DatabaseHistory(USING="nowhere")


@real_commits
def test_emptied_tables_make_earlier_ids_unknown(history: DatabaseHistory) -> None:
    """After a flush no earlier id is resumed, also of a token without events."""
    floor = history.newest("t")[0]
    (old,) = add(history, "a")
    run_python(
        f"from django.core.management import call_command\n"
        f"call_command('flush', database={history.using!r}, interactive=False)",
    )
    for cursor in (floor, old.seq):
        assert not history.locate("t", parse_cursor(str(cursor))).known
    add(history, "b")
    for cursor in (floor, old.seq):
        assert not history.locate("t", parse_cursor(str(cursor))).known


@real_commits
def test_settling_restarts_if_fewer_rows_are_deleted_than_were_read(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tested database lets this happen; the check is for those that may."""
    history = with_orm(history.using)
    settle = to_outbox(history, draft("a"))
    delete = history._outbox.remove
    counts = [0]
    monkeypatch.setattr(
        history._outbox, "remove", lambda pks: counts.pop() if counts else delete(pks)
    )
    (entry,) = settle()
    assert history.read("t", before_oldest(history)).entries == (entry,)


# Indexes


@real_commits
def test_an_update_of_a_head_writes_no_entry_of_an_index() -> None:
    """PostgreSQL then keeps the new row in the page of the old one (a heap-only tuple)."""
    history = DatabaseHistory(USING="postgres")
    connection = connections["postgres"]
    counts = """
        SELECT pg_stat_get_xact_tuples_updated(oid), pg_stat_get_xact_tuples_hot_updated(oid)
        FROM pg_class WHERE relname = %s
    """
    add(history, "first")
    with transaction.atomic("postgres"), connection.cursor() as cursor:
        history._writer.write("t", [draft("second")], [uuid.uuid4()])
        cursor.execute(counts, [TokenHead._meta.db_table])
        updated, hot_updated = cursor.fetchone()
    assert updated == hot_updated >= 1
    connection.close()


EXPLAIN = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN", "mysql": "EXPLAIN"}
ANALYZE = {"sqlite": "ANALYZE", "postgresql": "ANALYZE", "mysql": "ANALYZE TABLE"}
SEARCHED = {
    "sqlite": r"storedevent USING INDEX \w+ \((.*)\)",
    "postgresql": r"Index Cond: (.*\b(?:event_id|seq)\b.*)",
    "mysql": r"storedevent (?:ref|const) .* (\S*const,const) ",
}
"""What the plan of each database contains for the search of an index."""
FOR_ONE_TOKEN = {"sqlite": "head_id=? AND ", "postgresql": "head_id = ", "mysql": "const,const"}


@real_commits
@pytest.mark.parametrize("by_number", [False, True], ids=["own-id", "number"])
def test_a_cursor_is_searched_in_the_indexes_of_one_token(
    history: DatabaseHistory, by_number: bool
) -> None:
    """Otherwise each reconnection would read all events of the token, or of all tokens."""
    for n in range(30):
        drafts = [draft(str(i), own_id=f"{n}-{i}") for i in range(50)]
        seq = history.append(f"t{n}", drafts)[9].seq
    connection = connections[history.using]
    with connection.cursor() as cursor:
        for model in (TokenHead, StoredEvent):
            cursor.execute(f"{ANALYZE[connection.vendor]} {model._meta.db_table}")
        with CaptureQueriesContext(connection) as queries:
            history.find("t29", "unknown", seq if by_number else None)
        (sql,) = [one["sql"] for one in queries if "event_id" in one["sql"]]
        cursor.execute(f"{EXPLAIN[connection.vendor]} {sql}")
        plan = [" ".join(map(str, row)) for row in cursor.fetchall()]
    connection.close()
    found = [re.search(SEARCHED[connection.vendor], line) for line in plan]
    searched = [one[1] for one in found if one is not None]
    assert len(searched) == 1 + by_number, plan
    assert all(FOR_ONE_TOKEN[connection.vendor] in one for one in searched), plan


@contextmanager
def at(seconds: float) -> Iterator[None]:
    """Set the clocks of the process to a time in seconds since 1970."""
    local = timezone.make_naive(utc(seconds), timezone.get_default_timezone())
    with (
        patch.object(time, "time", lambda: seconds),
        patch.object(timezone, "now", lambda: local),
    ):
        yield


@real_commits
@pytest.mark.parametrize("change", ["2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z"])
def test_a_rewind_by_age_contains_the_events_around_a_change_of_the_local_time(
    settings: Any, using: str, change: str
) -> None:
    """Without ``USE_TZ``, local times are stored. They jump at the change, or occur twice."""
    settings.USE_TZ = False
    settings.TIME_ZONE = "Europe/Berlin"
    now = datetime.datetime.fromisoformat(change).timestamp() + 10
    history = DatabaseHistory(USING=using, MAX_AGE=60)
    for seconds in (4000, 20, 5):
        with at(now - seconds):
            add(history, f"{seconds} s ago")
    with at(now):
        before = history.rewind("t", 100, 30)
        assert before is not None
        assert texts(history.read("t", before).entries) == ["20 s ago", "5 s ago"]
        history.prune()
        assert texts(history.read("t", before).entries) == ["20 s ago", "5 s ago"]
    connections[using].close()
