"""The database history, beyond the contract: the outbox, concurrency, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection, connections, transaction
from django.db.models.signals import post_delete, post_save
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext

from django_eventsource.history import Entry, Kind
from django_eventsource.history import database as module
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.models import PendingEvent, StoredEvent, TokenHead
from tests.histories import add, age, draft, texts
from tests.processes import POSTGRES, run_python, start_python

BOTH = ["default", "postgres"]
real_commits = pytest.mark.django_db(transaction=True, databases=BOTH)


@pytest.fixture(params=BOTH)
def using(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def history(using: str) -> DatabaseHistory:
    return DatabaseHistory(USING=using)


def in_thread(work: Callable[[], object]) -> object:
    """Run work in a thread with connections of its own, and close them."""

    def run() -> object:
        try:
            return work()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result(60)


# The outbox


@real_commits
def test_staged_events_wait_for_the_commit(history: DatabaseHistory) -> None:
    """Inside a transaction nobody else sees an event; after it everybody does."""
    (first,) = add(history, "a")
    with transaction.atomic(using=history.using):
        history.stage("t", [draft("b")])
        assert in_thread(lambda: history.read("t", first.seq).entries) == ()
    history.heads([])
    assert texts(history.read("t", first.seq).entries) == ["b"]


@real_commits
def test_a_rollback_leaves_nothing(history: DatabaseHistory) -> None:
    """A rolled back event never gets a number, nor does that of a rolled back savepoint."""
    (first,) = add(history, "a")
    with transaction.atomic(using=history.using):
        history.stage("t", [draft("kept")])
        with pytest.raises(RuntimeError), transaction.atomic(using=history.using):
            history.stage("t", [draft("gone")])
            raise RuntimeError
    history.heads([])
    assert texts(history.read("t", first.seq).entries) == ["kept"]
    assert not PendingEvent.objects.using(history.using).exists()


@real_commits
def test_an_open_transaction_holds_nobody_up() -> None:
    """A long transaction that has published holds no lock that publishers wait for.

    On SQLite any transaction that has written holds the one write lock there is.
    """
    history = DatabaseHistory(USING="postgres")
    (first,) = add(history, "a")
    with transaction.atomic(using="postgres"):
        settle = history.stage("t", [draft("late")])
        in_thread(lambda: add(history, "early"))
    settle()
    assert texts(history.read("t", first.seq).entries) == ["early", "late"]


@real_commits
def test_the_next_head_check_settles_what_a_dead_process_left(history: DatabaseHistory) -> None:
    """Whatever committed is published, by whoever looks next."""
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
    heads, _ = history.heads(["t"])
    slice_ = history.read("t", floor)
    assert texts(slice_.entries) == ["a", "b"]
    assert heads["t"] == slice_.last


@real_commits
def test_an_event_that_others_settled_knows_its_number(history: DatabaseHistory) -> None:
    """A publisher finds its event even when a head check was faster."""
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b", kind=Kind.FINISH)])
    add(history, "c")
    history.heads([])
    entries = settle()
    assert texts(entries) == ["a", "b"]
    assert entries[1].finishes
    assert entries[1].seq == entries[0].seq + 1 == history.newest("t")[1]


@real_commits
def test_one_pending_event_that_fails_is_no_other_tokens_trouble(
    history: DatabaseHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that cannot be settled, as of a newer release, is logged and left."""
    history.stage("bad", [draft("x")])
    PendingEvent.objects.using(history.using).update(kind="newer")
    history.stage("good", [draft("a")])
    (entry,) = add(history, "x", token="other")
    heads, _ = history.heads(["bad", "good", "other"])
    assert set(heads) == {"good", "other"}
    assert heads["other"] == entry.seq
    assert "Pending events of 'bad' could not be settled" in caplog.text


@real_commits
def test_a_receiver_of_everything_disturbs_nothing(history: DatabaseHistory) -> None:
    """Signals are not sent for the history's own rows, and a commit hook may publish."""
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
    entries = history._in_transaction(lambda: publish_on_commit(history))
    assert texts(entries) == ["inner"]


def publish_on_commit(history: DatabaseHistory) -> list[Entry]:
    entries: list[Entry] = []
    transaction.on_commit(lambda: entries.extend(add(history, "inner")), using=history.using)
    return entries


@real_commits
def test_an_event_that_was_trimmed_before_its_publisher_looked(
    history: DatabaseHistory,
) -> None:
    """Settled by others and gone again: its publisher learns of no place."""
    history.max_events = 1
    settle = history.stage("t", [draft("a")])
    history.heads([])
    add(history, "b", "c")
    history.prune()
    assert settle() == []


@real_commits
def test_more_pending_events_than_a_batch(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long outbox is settled whole, in order, batch by batch."""
    monkeypatch.setattr(module, "BATCH", 3)
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft(str(n)) for n in range(8)])
    entries = settle()
    assert texts(entries) == [str(n) for n in range(8)]
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(8))


@real_commits
def test_transactions_begin_with_a_write(history: DatabaseHistory) -> None:
    """One that began with a read could not wait for a writer on SQLite."""
    add(history, "a")
    settle = history.stage("t", [draft("b")])
    for work in (partial(add, history, "c"), settle):
        with CaptureQueriesContext(connections[history.using]) as queries:
            work()
        begun = [one["sql"] for one in queries if not one["sql"].startswith("BEGIN")]
        assert begun[0].startswith("UPDATE")


# Many publishers at once


@real_commits
def test_twenty_threads_and_processes_at_once(history: DatabaseHistory) -> None:
    """Every event gets a number of its own, none is missing, and no lock is in the way."""
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
def test_transactions_and_plain_publishers_at_once(history: DatabaseHistory) -> None:
    """Outbox and direct publishers share one unbroken row of numbers."""

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
def test_serializable_transactions_are_tried_again() -> None:
    """A serialization failure in our own short transaction reaches no publisher."""
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


# Contention and failures


class Locked:
    """Work that fails as often as told, then gives a value."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def postgres_error(sqlstate: str) -> OperationalError:
    error = OperationalError("could not serialize")
    error.__cause__ = Exception()
    error.__cause__.sqlstate = sqlstate  # type: ignore[attr-defined]
    return error


@real_commits
@pytest.mark.parametrize(
    "error",
    [
        OperationalError("database is locked"),
        postgres_error("40001"),
        postgres_error("40P01"),
        OperationalError(1205, "Lock wait timeout exceeded"),
        OperationalError(1213, "Deadlock found"),
    ],
    ids=["sqlite", "serialization", "deadlock", "mysql-wait", "mysql-deadlock"],
)
def test_contention_is_tried_again(error: OperationalError) -> None:
    """Whoever was second tries again."""
    assert DatabaseHistory()._in_transaction(Locked(error, error)) == "done"


@real_commits
@pytest.mark.parametrize(
    "error", [OperationalError("disk full"), OperationalError(), postgres_error("57P01")]
)
def test_failures_are_not_tried_again(error: OperationalError) -> None:
    """A commit whose outcome is unknown must not be repeated."""
    with pytest.raises(OperationalError):
        DatabaseHistory()._in_transaction(Locked(error))


@real_commits
def test_contention_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again ends at its deadline."""
    monkeypatch.setattr(module, "CONTENTION_SECONDS", -1)
    with pytest.raises(OperationalError, match="locked"):
        DatabaseHistory()._in_transaction(Locked(OperationalError("database is locked")))


@pytest.mark.django_db
def test_contention_inside_a_transaction_is_the_callers() -> None:
    """Only the outermost transaction can be tried again."""
    with pytest.raises(OperationalError, match="locked"):
        DatabaseHistory()._in_transaction(Locked(OperationalError("database is locked")))


@real_commits
async def test_a_broken_connection_is_replaced() -> None:
    """After a connection was cut, the next call has a new one."""
    history = DatabaseHistory(USING="postgres")

    def cut() -> None:
        with connections["postgres"].cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(DatabaseError):
        await history.call(cut)
    assert (await history.aheads(["t"]))[0] == {}
    await history.call(connections.close_all)


@real_commits
async def test_release_ends_a_connection_that_is_not_kept() -> None:
    """With CONN_MAX_AGE = 0 no connection stays open when nothing is done."""
    history = DatabaseHistory()
    await history.aheads(["t"])
    await history.arelease()
    assert await history.call(lambda: connection.connection) is None


# Pruning


@real_commits
def test_prune_in_batches(history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long history is trimmed in short transactions."""
    monkeypatch.setattr(module, "BATCH", 4)
    history.max_events = 5
    entries = add(history, *"abcdefghijklmnopq")
    assert history.prune() == 12
    slice_ = history.read("t", entries[11].seq, max_events=10)
    assert texts(slice_.entries) == ["m", "n", "o", "p", "q"]


@real_commits
def test_the_floor_is_no_token_to_prune(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor's numbers are far apart; nothing is counted through between them."""
    TokenHead.objects.using(history.using).filter(key="").update(kept=5, last=10**15)
    monkeypatch.setattr(history, "_cut", lambda *args: pytest.fail("the floor was cut"))
    assert history.prune() == 0


@real_commits
def test_prune_while_publishing(history: DatabaseHistory) -> None:
    """Publishers and prunes at once leave an unbroken row."""
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
def test_a_token_that_moved_is_not_forgotten(history: DatabaseHistory) -> None:
    """Whoever publishes between the look and the deletion keeps the token."""
    history.max_age, history.token_max_age = 10, 20
    add(history, "a")
    age(history, 30)
    head = TokenHead.objects.using(history.using).get(token="t")
    add(history, "b")
    floor = history.newest("other")[0]
    history._forget_one(head.pk, head.last, head.updated)
    assert history.heads(["t"])[0] == {"t": head.last + 1}
    assert history.newest("other")[0] == floor


@real_commits
def test_a_lost_floor_is_made_again(history: DatabaseHistory) -> None:
    """Without its floor, a history still forgets and still counts upward."""
    history.max_age, history.token_max_age = 10, 20
    TokenHead.objects.using(history.using).all().delete()
    (last,) = add(history, "a")
    age(history, 30)
    history.prune()
    assert history.heads(["t"]) == ({}, pytest.approx(last.seq, abs=60_000_000))
    assert history.newest("t")[0] >= last.seq


@real_commits
def test_a_head_that_is_gone_is_no_trouble(history: DatabaseHistory) -> None:
    """Two prunes at once do not stumble over each other."""
    assert history._cut(12345, 10) == 0


# Options


def test_unknown_database() -> None:
    """USING names an alias."""
    with pytest.raises(ImproperlyConfigured, match="USING must be an alias in DATABASES"):
        DatabaseHistory(USING="nowhere")


@real_commits
def test_emptied_tables_make_earlier_ids_unknown(history: DatabaseHistory) -> None:
    """After a flush no id from before it is resumed falsely, not even an empty token's."""
    floor = history.newest("t")[0]
    (old,) = add(history, "a")
    run_python(
        f"from django.core.management import call_command\n"
        f"call_command('flush', database={history.using!r}, interactive=False)",
    )
    for cursor in (floor, old.seq):
        assert not history.locate("t", str(cursor)).known
    add(history, "b")
    for cursor in (floor, old.seq):
        assert not history.locate("t", str(cursor)).known
