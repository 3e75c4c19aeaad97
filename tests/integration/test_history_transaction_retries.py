"""Tests of the short transactions: contention and lost connections."""

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
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.transaction_retries import OutboxConflict, in_transaction
from django_eventsource.models import StoredEvent
from tests.support.events import add, draft, texts
from tests.support.histories import (
    ALIASES,
    SERVERS,
    before_oldest,
    cut_connections,
    in_thread,
    with_orm,
)

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(params=SERVERS)
def history(request: pytest.FixtureRequest) -> Iterator[DatabaseHistory]:
    """Publish with transactions of several statements, as without SQL for the database."""
    yield with_orm(request.param)
    connections[request.param].close()


# Contention


class Locked:
    """Work that fails a number of times and then returns a value."""

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
        OutboxConflict("settled by another process"),
    ],
    ids=["sqlite", "serialization", "deadlock", "wait", "mysql-deadlock", "snapshot", "overtaken"],
)
def test_a_transaction_that_lost_to_another_is_retried(error: OperationalError) -> None:
    assert in_transaction("default", Locked(error, error)) == "done"


@real_commits
@pytest.mark.parametrize(
    "error", [OperationalError("disk full"), OperationalError(), postgres_error("57P01")]
)
def test_other_failures_are_not_retried(error: OperationalError) -> None:
    """On a working connection the work would fail again."""
    with pytest.raises(OperationalError):
        in_transaction("default", Locked(error))


@real_commits
def test_retries_end_at_the_deadline() -> None:
    work = Locked(OperationalError("database is locked"))
    with pytest.raises(OperationalError, match="locked"):
        in_transaction("default", work, patience=-1)


@pytest.mark.django_db
def test_contention_inside_a_transaction_is_raised() -> None:
    """Only the outermost transaction can be repeated."""
    with pytest.raises(OperationalError, match="locked"):
        in_transaction("default", Locked(OperationalError("database is locked")))


# Lost connections


def cut(history: DatabaseHistory) -> None:
    """Cut this thread's connection at the server, so that the client does not notice it."""
    in_thread(lambda: cut_connections(history.using))


def stored(history: DatabaseHistory) -> list[str]:
    return texts(history.read("t", before_oldest(history), max_events=1000).entries)


@real_commits
def test_an_idle_connection_that_was_lost_is_replaced(history: DatabaseHistory) -> None:
    """The publisher does not notice it."""
    (first,) = add(history, "a")
    cut(history)
    (second,) = add(history, "b")
    assert second.seq == first.seq + 1
    assert stored(history) == ["a", "b"]


@real_commits
def test_work_whose_connection_was_lost_before_the_commit_is_repeated(
    history: DatabaseHistory,
) -> None:
    """The server has rolled it back."""
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
def test_a_second_lost_connection_is_raised(history: DatabaseHistory) -> None:
    """The next call works."""
    add(history, "a")

    def run(execute: Any, sql: str, *args: Any) -> Any:
        cut(history)
        return execute(sql, *args)

    with connections[history.using].execute_wrapper(run), pytest.raises(DatabaseError):
        add(history, "lost")
    add(history, "b")
    assert stored(history) == ["a", "b"]


@real_commits
def test_staged_events_are_settled_on_a_new_connection(history: DatabaseHistory) -> None:
    """The connection is lost between the commit and the settling."""
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b")])
    cut(history)
    assert texts(settle()) == stored(history) == ["a", "b"]


@real_commits
def test_a_connection_lost_inside_a_transaction_is_raised(history: DatabaseHistory) -> None:
    """The next publisher has a new connection."""
    with pytest.raises(DatabaseError), transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("lost")])
        cut(history)
        settle()
    add(history, "a")
    assert stored(history) == ["a"]


# Connections lost during the commit


def lose_commit(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, *, arrives: bool, then: Any = None
) -> None:
    """Cut the connection at the next commit, before or after the commit reaches the server.

    :param then: a function to call before the publisher continues.
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
def test_a_commit_that_lost_its_connection_is_published_once(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool, before: list[str]
) -> None:
    """The history checks whether its events are stored, and appends them if not."""
    for text in before:
        add(history, text)
    lose_commit(history, monkeypatch, arrives=arrives)
    entries = history.append("t", [draft("a"), draft("b", kind=Kind.CLOSE)])
    assert stored(history) == [*before, "a", "b"]
    assert history.read("t", entries[0].seq - 1).entries == tuple(entries)
    assert history.newest("t") == (entries[1].seq, entries[1].seq)


@real_commits
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_a_number_of_another_publisher_does_not_confirm_a_commit(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    """After a failed commit another publisher has received the same sequence numbers."""
    for text in before:
        add(history, text)
    lose_commit(history, monkeypatch, arrives=False, then=lambda: add(history, "x", "y"))
    (entry,) = add(history, "mine")
    assert stored(history) == [*before, "x", "y", "mine"]
    assert history.read("t", entry.seq - 1).entries == (entry,)


@real_commits
def test_a_doubtful_commit_of_a_trimmed_event_is_raised(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history can neither confirm nor repeat it."""
    history.max_events = 1
    first = history.newest("t")[0]

    def trim() -> None:
        add(history, "b", "c")
        history.prune()

    lose_commit(history, monkeypatch, arrives=True, then=trim)
    with pytest.raises(
        OperationalError, match="Publish it again if listeners may receive it twice"
    ):
        add(history, "a")
    assert stored(history) == ["c"]
    assert history.newest("t")[0] > first


@real_commits
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_the_check_waits_for_a_commit_that_is_still_running(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    """The server may still run a commit whose connection was lost."""
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
    assert history.heads(["t"]) == {"t": Head(seq=entry.seq, has_epoch=True)}


def wait_for_waiters(using: str) -> None:
    """Return when another connection waits for a lock."""
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
        time.sleep(0.2)  # MariaDB refreshes the table every 0.1 s


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_settling_that_lost_its_connection_settles_once(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """The publisher receives the sequence numbers."""
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("a"), draft("b")])
    lose_commit(history, monkeypatch, arrives=arrives)
    entries = settle()
    assert stored(history) == texts(entries) == ["a", "b"]
    assert entries == list(history.read("t", entries[0].seq - 1).entries)


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_an_empty_append_that_lost_its_connection_stores_nothing(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    add(history, "a")
    lose_commit(history, monkeypatch, arrives=arrives)
    assert history.append("t", []) == []
    assert stored(history) == ["a"]


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_a_doubtful_announcement_reports_the_missing_lease(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """It announces again if any attempt found no valid lease."""
    lose_commit(history, monkeypatch, arrives=arrives)
    assert not history.announce("p", {"t": ["a"]}, 60)
    assert history.present("t") == ["a"]
    lose_commit(history, monkeypatch, arrives=arrives)
    assert history.announce("p", {"t": ["b"]}, 60)
    assert history.present("t") == ["b"]


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_of_an_event_with_a_key_that_lost_its_connection_is_published_once(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Its publisher is the first one, and its key is known afterwards."""
    add(history, "earlier")
    lose_commit(history, monkeypatch, arrives=arrives)
    (first,) = history.append("t", [draft("a", key="k")])
    assert not first.repeated
    (again,) = history.append("t", [draft("b", key="k")])
    assert (again.repeated, again.seq) == (True, first.seq)
    assert stored(history) == ["earlier", "a"]


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_an_event_with_a_known_key_that_lost_its_connection_is_not_stored(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    (first,) = history.append("t", [draft("a", own_id="one", key="k")])
    lose_commit(history, monkeypatch, arrives=arrives)
    (again,) = history.append("t", [draft("b", key="k")])
    assert (again.repeated, again.seq, again.id) == (True, first.seq, "one")
    assert stored(history) == ["a"]
    (after,) = add(history, "c")
    assert after.seq == first.seq + 1


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
def test_a_key_that_was_trimmed_while_the_connection_was_lost_is_free(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    history.max_events = 1
    history.append("t", [draft("a", key="k")])

    def trim() -> None:
        add(history, "x", "y")
        history.prune()

    lose_commit(history, monkeypatch, arrives=arrives, then=trim)
    (again,) = history.append("t", [draft("b", key="k")])
    assert not again.repeated
    assert stored(history) == ["y", "b"]


@real_commits
def test_a_key_that_another_publisher_used_after_a_failed_commit_is_known(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_commit(
        history,
        monkeypatch,
        arrives=False,
        then=lambda: history.append("t", [draft("theirs", key="k")]),
    )
    (mine,) = history.append("t", [draft("mine", key="k")])
    assert mine.repeated
    assert history.newest("t")[0] == mine.seq
    assert stored(history) == ["theirs"]


@real_commits
@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_settling_events_with_and_without_a_key_that_lost_its_connection_settles_once(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, arrives: bool, known: bool
) -> None:
    """Events without a key are not stored twice because of the last event, whose key is known."""
    if known:
        history.append("t", [draft("first", key="k")])
    with transaction.atomic(using=history.using):
        plain = history.stage("t", [draft("a"), draft("b")])
        keyed = history.stage("t", [draft("k", key="k")])
    lose_commit(history, monkeypatch, arrives=arrives)
    assert texts(plain()) == ["a", "b"]
    (entry,) = keyed()
    assert entry.repeated is known
    assert stored(history) == (["first", "a", "b"] if known else ["a", "b", "k"])
    assert texts(history.read("t", entry.seq - 1).entries)[0] == ("first" if known else "k")


@real_commits
def test_the_check_of_doubtful_commits_adds_no_statement(history: DatabaseHistory) -> None:
    """An append takes an update, a select and an insert."""
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
