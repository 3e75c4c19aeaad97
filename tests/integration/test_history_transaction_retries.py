"""Short transactions: tried again after contention, and when their connection was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext

from django_eventsource.history import Head, Kind
from django_eventsource.history import transactions as module
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.transactions import Overtaken, in_transaction
from django_eventsource.models import StoredEvent
from tests.histories import ALIASES, SERVERS, add, cut_connections, draft, in_thread, texts

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(params=SERVERS)
def history(request: pytest.FixtureRequest) -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING=request.param)
    connections[request.param].close()


# Contention


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
        OperationalError(1020, "Record has changed since last read"),
        Overtaken("settled by others"),
    ],
    ids=["sqlite", "serialization", "deadlock", "wait", "mysql-deadlock", "snapshot", "overtaken"],
)
def test_contention_is_tried_again(error: OperationalError) -> None:
    """Whoever was second tries again."""
    assert in_transaction("default", Locked(error, error)) == "done"


@real_commits
@pytest.mark.parametrize(
    "error", [OperationalError("disk full"), OperationalError(), postgres_error("57P01")]
)
def test_failures_are_not_tried_again(error: OperationalError) -> None:
    """What fails for another reason, on a connection that works, would fail again."""
    with pytest.raises(OperationalError):
        in_transaction("default", Locked(error))


@real_commits
def test_contention_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again ends at its deadline."""
    monkeypatch.setattr(module, "CONTENTION_SECONDS", -1)
    with pytest.raises(OperationalError, match="locked"):
        in_transaction("default", Locked(OperationalError("database is locked")))


@pytest.mark.django_db
def test_contention_inside_a_transaction_is_the_callers() -> None:
    """Only the outermost transaction can be tried again."""
    with pytest.raises(OperationalError, match="locked"):
        in_transaction("default", Locked(OperationalError("database is locked")))


# Lost connections


def cut(history: DatabaseHistory) -> None:
    """Cut this thread's connection at the server, without telling this end."""
    in_thread(lambda: cut_connections(history.using))


def stored(history: DatabaseHistory) -> list[str]:
    return texts(history.read("t", history.oldest("t"), max_events=1000).entries)


@real_commits
def test_a_connection_found_dead_is_replaced(history: DatabaseHistory) -> None:
    """A publisher does not notice that its connection died while it did nothing."""
    (first,) = add(history, "a")
    cut(history)
    (second,) = add(history, "b")
    assert second.seq == first.seq + 1
    assert stored(history) == ["a", "b"]


@real_commits
def test_a_connection_lost_on_the_way_is_replaced(history: DatabaseHistory) -> None:
    """What was done before the commit is undone by the server, and done again."""
    (first,) = add(history, "a")
    cuts = [cut]

    def run(execute: Any, sql: str, *args: Any) -> Any:
        result = execute(sql, *args)
        if sql.startswith("UPDATE") and cuts:
            cuts.pop()(history)
        return result

    with connections[history.using].execute_wrapper(run):
        (second,) = add(history, "b")
    assert not cuts
    assert second.seq == first.seq + 1
    assert stored(history) == ["a", "b"]


@real_commits
def test_a_second_loss_is_told(history: DatabaseHistory) -> None:
    """A fresh connection that is lost as well is no accident, and the next call works."""
    add(history, "a")

    def run(execute: Any, sql: str, *args: Any) -> Any:
        cut(history)
        return execute(sql, *args)

    with connections[history.using].execute_wrapper(run), pytest.raises(DatabaseError):
        add(history, "lost")
    add(history, "b")
    assert stored(history) == ["a", "b"]


@real_commits
def test_a_connection_lost_after_the_commit_of_a_transaction(history: DatabaseHistory) -> None:
    """Staged events are settled on a fresh connection."""
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b")])
    cut(history)
    assert texts(settle()) == stored(history) == ["a", "b"]


@real_commits
def test_a_loss_inside_a_transaction_is_the_callers(history: DatabaseHistory) -> None:
    """Its business data is lost with it. The next publisher has a new connection."""
    with pytest.raises(DatabaseError), transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("lost")])
        cut(history)
        settle()
    add(history, "a")
    assert stored(history) == ["a"]


# Commits of which nobody knows whether they arrived


def lose_commit(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, *, arrives: bool, then: Any = None
) -> None:
    """Cut the connection at the next commit: before it reaches the server, or after it.

    :param then: what happens before anybody looks.
    """
    connection = connections[history.using]
    real = connection._commit

    def commit() -> None:
        monkeypatch.undo()
        if arrives:
            real()
        cut(history)
        if then is not None:
            in_thread(then)
        if arrives:
            raise OperationalError("server closed the connection unexpectedly")
        real()

    monkeypatch.setattr(connection, "_commit", commit)


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_a_commit_in_doubt_is_neither_lost_nor_repeated(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool, before: list[str]
) -> None:
    """The publisher looks whether its events are there, and appends them if they are not."""
    for text in before:
        add(history, text)
    lose_commit(history, monkeypatch, arrives=arrives)
    entries = history.append("t", [draft("a"), draft("b", kind=Kind.FINISH)])
    assert stored(history) == [*before, "a", "b"]
    assert history.read("t", entries[0].seq - 1).entries == tuple(entries)
    assert history.newest("t") == (entries[1].seq, entries[1].seq)


@real_commits
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_a_number_that_another_got_is_not_mine(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    """Where the commit did not arrive, somebody else has taken the numbers since."""
    for text in before:
        add(history, text)
    lose_commit(history, monkeypatch, arrives=False, then=lambda: add(history, "x", "y"))
    (entry,) = add(history, "mine")
    assert stored(history) == [*before, "x", "y", "mine"]
    assert history.read("t", entry.seq - 1).entries == (entry,)


@real_commits
def test_an_event_that_nobody_can_tell_of(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trimmed before its publisher could look: it is told, and nothing is repeated."""
    history.max_events = 1
    first = history.newest("t")[0]

    def trim() -> None:
        add(history, "b", "c")
        history.prune()

    lose_commit(history, monkeypatch, arrives=True, then=trim)
    with pytest.raises(OperationalError, match="publish it again if that does no harm"):
        add(history, "a")
    assert stored(history) == ["c"]
    assert history.newest("t")[0] > first


@real_commits
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_a_commit_that_is_still_under_way_is_waited_for(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    """A server may work on a commit whose connection is gone: looking now is too early."""
    for text in before:
        add(history, text)
    connection = connections[history.using]
    slow: list[threading.Thread] = []

    def commit() -> None:
        monkeypatch.undo()
        mine, connection.connection = connection.connection, None
        slow.append(threading.Thread(target=finish, args=[mine]))
        slow[0].start()
        raise OperationalError("server closed the connection unexpectedly")

    def finish(mine: Any) -> None:
        try:
            in_thread(lambda: wait_for_waiters(history.using))
        finally:
            mine.commit()
            mine.close()

    monkeypatch.setattr(connection, "_commit", commit)
    (entry,) = add(history, "a")
    slow[0].join(60)
    assert stored(history) == [*before, "a"]
    assert history.heads(["t"]) == {"t": Head(seq=entry.seq, life=True)}


def wait_for_waiters(using: str) -> None:
    """Return when somebody waits for a lock."""
    waiters = {
        "postgres": "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        "mariadb": "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    }
    deadline = time.monotonic() + 30
    found = None
    while not found:
        assert time.monotonic() < deadline
        with connections[using].cursor() as cursor:
            cursor.execute(waiters[using])
            found = cursor.fetchone()
        time.sleep(0.2)  # MariaDB shows what it showed to a look less than 0.1 s ago


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_settling_in_doubt(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Staged events are settled once, and their publisher finds the numbers."""
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b")])
    lose_commit(history, monkeypatch, arrives=arrives)
    entries = settle()
    assert stored(history) == texts(entries) == ["a", "b"]
    assert entries == list(history.read("t", entries[0].seq - 1).entries)


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_nothing_to_append_in_doubt(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """An empty append stays one."""
    add(history, "a")
    lose_commit(history, monkeypatch, arrives=arrives)
    assert history.append("t", []) == []
    assert stored(history) == ["a"]


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_a_lease_in_doubt(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """A process that had no lease is told so, whichever attempt found it out."""
    lose_commit(history, monkeypatch, arrives=arrives)
    assert not history.announce("p", {"t": ["a"]}, 60)
    assert history.present("t") == ["a"]
    lose_commit(history, monkeypatch, arrives=arrives)
    assert history.announce("p", {"t": ["b"]}, 60)
    assert history.present("t") == ["b"]


@real_commits
def test_appending_takes_no_statement_more(history: DatabaseHistory) -> None:
    """What is needed in doubt costs nothing where there is none: update, select, insert."""
    add(history, "a")
    with CaptureQueriesContext(connections[history.using]) as queries:
        add(history, "b")
    begun = [one["sql"].split()[0] for one in queries]
    assert [word for word in begun if word not in ("BEGIN", "COMMIT")] == [
        "UPDATE",
        "SELECT",
        "INSERT",
    ]
    refs = StoredEvent.objects.using(history.using).values_list("ref", flat=True)
    assert len(set(refs)) == 2
