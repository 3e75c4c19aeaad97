"""The database history, beyond the contract: the outbox, concurrency, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.db.models.signals import post_delete, post_save
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext

from django_eventsource import hub as hub_module
from django_eventsource import publish
from django_eventsource.frames import Decoder
from django_eventsource.history import Entry, Head, Kind, get_history
from django_eventsource.history import database as module
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.hub import get_hub
from django_eventsource.models import PendingEvent, StoredEvent, TokenHead
from tests.histories import (
    ALIASES,
    DATABASES,
    SERVERS,
    add,
    age,
    cut_connections,
    draft,
    in_thread,
    texts,
)
from tests.processes import POSTGRES, run_python, start_python
from tests.singles import Single

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


ISOLATIONS = ["READ COMMITTED", "REPEATABLE READ"]
NO_WAIT = {
    "postgres": "SET lock_timeout = '1s'",
    "mariadb": "SET SESSION innodb_lock_wait_timeout = 1",
}


def isolate(using: str, isolation: str) -> None:
    """Set the isolation of this thread's later transactions."""
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


def publish_in_transaction(history: DatabaseHistory, *texts: str) -> list[Entry]:
    """Publish several events in one transaction, as separate calls would."""
    with transaction.atomic(using=history.using):
        settles = [history.stage("t", [draft(text)]) for text in texts]
    return [entry for settle in settles for entry in settle()]


@real_commits
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_an_open_transaction_holds_nobody_up(history: DatabaseHistory, isolation: str) -> None:
    """A long transaction that has published holds no lock that anybody waits for.

    On SQLite any transaction that has written holds the one write lock there is.
    """
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
    entries = history.read("t", history.oldest("t")).entries
    assert texts(entries)[-3:] == ["late", "later", "last"]
    assert entries[-1].seq == first.seq + 15


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
    heads = history.heads(["t"])
    slice_ = history.read("t", floor)
    assert texts(slice_.entries) == ["a", "b"]
    assert heads["t"] == Head(seq=slice_.last, life=True)


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
    heads = history.heads(["bad", "good", "other"])
    assert [heads[token].life for token in ("bad", "good", "other")] == [False, True, True]
    assert heads["other"].seq == entry.seq
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
    assert settle() == [None]


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


# The size of a token


def sizes(history: DatabaseHistory) -> tuple[int, int]:
    """Give the size that the head contains, and the sum over its events."""
    head = TokenHead.objects.using(history.using).get(token="t")
    return head.size, sum(head.events.using(history.using).values_list("size", flat=True))


@real_commits
def test_counting_bytes_adds_no_statement_to_an_append(history: DatabaseHistory) -> None:
    """An append moves the head, reads it, and inserts the event."""
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
def test_the_size_of_a_token_is_that_of_its_events(history: DatabaseHistory) -> None:
    """After appends, outboxes and prunes at once, whatever bound removed the events."""
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
@pytest.mark.parametrize("using", SERVERS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_publishers_of_all_kinds_at_once(history: DatabaseHistory, isolation: str) -> None:
    """Plain, in transactions, rolled back, long, with head checks and prunes in between.

    What committed has consecutive numbers, in the order of each publisher.
    """
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
                future.result(60)  # all of them, while the long transaction is open
        finally:
            done.set()
        for future in waiting:
            future.result(60)
    history.heads([])
    entries = history.read("t", history.oldest("t"), max_events=1000).entries
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
def test_a_snapshot_older_than_the_lock_settles_nothing_twice(
    history: DatabaseHistory, isolation: str
) -> None:
    """Whoever began before the token's life, and read before it had its turn, begins anew.

    At REPEATABLE READ the database refuses such a transaction, or makes the other wait.
    """
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
    entries = history.read("t", history.oldest("t")).entries
    assert texts(entries) == ["first", "staged"]
    assert entry == entries[1]


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


# Connections


@real_commits
@pytest.mark.parametrize("using", SERVERS)
async def test_a_broken_connection_is_replaced(history: DatabaseHistory) -> None:
    """A read whose connection was cut fails; the next one has a new connection."""
    await history.aheads(["t"])
    await asyncio.to_thread(in_thread, partial(cut_connections, history.using))
    with pytest.raises(DatabaseError):
        await history.aheads(["t"])
    assert not (await history.aheads(["t"]))["t"].life
    await history.call(connections.close_all)


@real_commits
@pytest.mark.parametrize("using", SERVERS)
async def test_streams_outlive_their_database_connections(
    history: DatabaseHistory, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that are cut again and again cost no open stream an event."""
    monkeypatch.setattr(hub_module, "BACK_OFF_SECONDS", (0.01,))
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
        task.cancel()  # or it would open a connection again
    await asyncio.gather(*tasks, return_exceptions=True)
    await history.call(connections.close_all)


async def next_events(subscriber: Single) -> list[str]:
    """Wait as a stream does, and come back when a read fails."""
    async with asyncio.timeout(60):
        await subscriber.wait()
    chunk = b""
    while not subscriber.live:
        with suppress(DatabaseError):
            chunk += subscriber.catch_up(await get_hub().read("t", subscriber.position))
    return [event.data for event in Decoder().feed(chunk + subscriber.take())]


@real_commits
@pytest.mark.parametrize("using", SERVERS)
def test_a_server_that_was_restarted(history: DatabaseHistory, using: str, request: Any) -> None:
    """A publisher fails while the server is away, and works again after it."""
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
    server = request.getfixturevalue("mariadb_server")
    server.stop()
    yield
    server.start()


@contextmanager
def restart_postgres(request: Any) -> Iterator[None]:
    server = request.getfixturevalue("postgres_server")
    server.stop()
    yield
    server.ensure_postgres_running()


@real_commits
def test_no_session_state_is_relied_upon(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a pool that gives each transaction another session, all works as before.

    Here every statement outside of a transaction, and every transaction, has a new one.
    """
    connection = connections[history.using]
    statements: list[str] = []

    def run(execute: Any, sql: str, *args: Any) -> Any:
        statements.append(sql.split()[0])
        return execute(sql, *args)

    def everything() -> None:
        for work in tour(history):
            connection.close()
            work()

    with connection.execute_wrapper(run):
        everything()
    # Django sets what MariaDB's connections begin with.
    begins_with = {"SET"} if connection.vendor == "mysql" else {"BEGIN"}
    assert set(statements) <= {"SELECT", "INSERT", "UPDATE", "DELETE", *begins_with}
    assert texts(history.read("t", history.oldest("t")).entries) == ["b", "c"]


def tour(history: DatabaseHistory) -> list[Callable[[], object]]:
    """Give everything that a history can be asked to do."""
    history.max_events = 2
    return [
        lambda: add(history, "a", "b"),
        lambda: publish_in_transaction(history, "c"),
        lambda: history.heads(["t"]),
        history.prune,
        lambda: history.locate("t", None),
        lambda: history.locate("t", str(history.oldest("t"))),
        lambda: history.announce("p", {"t": ["a"]}, 60),
        lambda: history.announce("p", {"t": ["b"]}, 60),
        lambda: history.present("t"),
        lambda: history.withdraw("p"),
    ]


# Several databases


class Misleading:
    """A router that knows a replica which lags, and another place to write to."""

    def db_for_read(self, model: type, **hints: object) -> str:
        return "postgres"

    db_for_write = db_for_read


@real_commits
def test_no_router_misleads_the_history(settings) -> None:
    """It reads and writes where USING says: a replica that lags would lose events."""
    settings.DATABASE_ROUTERS = ["tests.test_history_database.Misleading"]
    history = DatabaseHistory()
    with CaptureQueriesContext(connections["postgres"]) as queries:
        for work in tour(history):
            work()
    assert list(queries) == []
    assert texts(history.read("t", history.oldest("t")).entries) == ["b", "c"]


@real_commits
def test_the_transaction_of_the_events_database_counts(settings) -> None:
    """Business data elsewhere does not hold events back, nor take them back."""
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
    entries = history.read("t", history.oldest("t")).entries
    assert texts(entries) == ["of another database's transaction", "of both"]
    assert not StoredEvent.objects.using("default").exists()


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
    assert history.heads(["t"]) == {"t": Head(seq=head.last + 1, life=True)}
    assert history.newest("other")[0] == floor


@real_commits
def test_a_lost_floor_is_made_again(history: DatabaseHistory) -> None:
    """Without its floor, a history still forgets and still counts upward."""
    history.max_age, history.token_max_age = 10, 20
    TokenHead.objects.using(history.using).all().delete()
    (last,) = add(history, "a")
    age(history, 30)
    history.prune()
    head = history.heads(["t"])["t"]
    assert (head.life, head.seq) == (False, pytest.approx(last.seq, abs=60_000_000))
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


@real_commits
def test_pending_events_that_others_settled_meanwhile(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where fewer can be deleted than were read, nothing is kept, and all is looked at anew.

    No database that is tested lets it come to that; the guard is for those that may.
    """
    settle = history.stage("t", [draft("a")])
    delete = history._outbox.remove
    answers = [0]
    monkeypatch.setattr(
        history._outbox, "remove", lambda pks: answers.pop() if answers else delete(pks)
    )
    (entry,) = settle()
    assert history.read("t", history.oldest("t")).entries == (entry,)
