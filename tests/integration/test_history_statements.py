"""Tests of the statements with which the database history publishes, by database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.test.utils import CaptureQueriesContext

from django_eventsource.history import Entry, Kind
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.database.prepared import PreparedStatement
from django_eventsource.history.database.sql import fill
from django_eventsource.models import PendingEvent, StoredEvent, TokenHead
from tests.support.events import add, draft, texts
from tests.support.histories import (
    ALIASES,
    DATABASES,
    age,
    before_oldest,
    cut_connections,
    in_thread,
    to_outbox,
    with_orm,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)

TRANSACTION = {"BEGIN", "COMMIT"}


@pytest.fixture(params=DATABASES)
def history(request: pytest.FixtureRequest) -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING=request.param)
    connections[request.param].close()


@pytest.fixture
def postgres() -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING="postgres")
    connections["postgres"].close()


@pytest.fixture
def sqlite() -> DatabaseHistory:
    return DatabaseHistory()


def statements(history: DatabaseHistory, work: Callable[[], object]) -> list[str]:
    """Run work and return the first word of each of its statements."""
    with CaptureQueriesContext(connections[history.using]) as queries:
        work()
    return [one["sql"].split()[0] for one in queries]


def without_transaction(words: list[str]) -> list[str]:
    return [word for word in words if word not in TRANSACTION]


def stored(history: DatabaseHistory) -> list[str]:
    return texts(history.read("t", before_oldest(history), max_events=1000).entries)


# The number of statements

APPEND = {
    "default": ["BEGIN", "UPDATE", "INSERT", "COMMIT"],
    "postgres": ["WITH"],
    "mariadb": ["BEGIN", "UPDATE", "INSERT", "COMMIT"],
}
STAGE = {"default": ["UPDATE", "INSERT"], "postgres": ["INSERT"], "mariadb": ["INSERT"]}
SETTLE = {
    "default": [],
    "postgres": ["WITH"],
    "mariadb": ["UPDATE", "SELECT", "UPDATE", "INSERT", "DELETE"],
}


@pytest.mark.parametrize("count", [1, 500])
def test_an_append_takes_one_or_two_statements(history: DatabaseHistory, count: int) -> None:
    """The number of events does not matter. On PostgreSQL there is no separate commit."""
    add(history, "a")
    texts = ["x"] * count
    assert statements(history, partial(add, history, *texts)) == APPEND[history.using]


def test_an_event_of_a_transaction_takes_few_statements(history: DatabaseHistory) -> None:
    """On SQLite nothing is left to do after the commit."""
    add(history, "a")
    settles: list[Callable[[], object]] = []

    def stage() -> None:
        settles.append(history.stage("t", [draft("b")]))

    with transaction.atomic(using=history.using):
        assert statements(history, stage) == STAGE[history.using]
    words = statements(history, settles[0])
    assert without_transaction(words) == SETTLE[history.using]
    if history.using == "postgres":
        assert words == ["WITH"]
    assert stored(history) == ["a", "b"]


def test_a_head_check_settles_events_without_a_transaction(postgres: DatabaseHistory) -> None:
    """One statement looks for a single event, and one moves several. They are tried again until
    no event is left."""
    add(postgres, "a")
    to_outbox(postgres, draft("b"), draft("c", kind=Kind.CLOSE))
    words = statements(postgres, lambda: postgres.heads([]))
    assert words == ["SELECT", "WITH", "SELECT", "WITH", "WITH", "SELECT", "SELECT"]
    assert stored(postgres) == ["a", "b", "c"]
    assert postgres.newest("t")[0] == postgres.newest("t")[1]


def test_a_publisher_whose_event_was_settled_finds_it_without_a_lock(
    postgres: DatabaseHistory,
) -> None:
    """It tries to settle, sees that nothing is pending, and reads the number."""
    add(postgres, "a")
    settle = postgres.stage("t", [draft("b")])
    postgres.heads([])
    assert statements(postgres, settle) == ["WITH", "SELECT", "SELECT"]


def test_a_page_of_a_replay_takes_two_statements(history: DatabaseHistory) -> None:
    """One reads the token's row, and one the events, also if the bytes allowed end the page."""
    (first, *_) = add(history, *["x" * 10] * 100)
    pages = []
    words = statements(
        history, lambda: pages.append(history.read("t", first.seq, max_bytes=45).entries)
    )
    assert words == ["SELECT", "SELECT"]
    assert list(map(len, pages)) == [4]
    # Here the first event is larger than the bytes allowed.
    assert statements(history, lambda: history.read("t", first.seq, max_bytes=5)) == [
        *words,
        "SELECT",
    ]


def test_a_session_that_replays_often_prepares_its_statements(postgres: DatabaseHistory) -> None:
    (first, *_) = add(postgres, "a", "b", "c")
    read = partial(postgres.read, "t", first.seq)
    before = [statements(postgres, read) for _ in range(PreparedStatement.prepare_at)]
    assert before[0] == ["SELECT", "SELECT"]
    assert before[-1] == ["PREPARE", "EXECUTE"] * 2
    assert statements(postgres, read) == ["EXECUTE", "EXECUTE"]
    assert texts(read().entries) == ["b", "c"]


@pytest.mark.parametrize("count", [0, 501])
def test_other_numbers_of_events_are_stored_in_a_transaction(
    history: DatabaseHistory, count: int
) -> None:
    """One statement contains 500 events at most."""
    (first,) = add(history, "a")
    entries = add(history, *(["x"] * count))
    assert [entry.seq - first.seq for entry in entries] == list(range(1, count + 1))
    assert len(stored(history)) == count + 1


def test_columns_are_the_same_as_those_that_the_orm_writes(history: DatabaseHistory) -> None:
    """Also after a settled transaction."""
    drafts = [
        draft("ä\0%s", own_id="own"),
        draft("bye", kind=Kind.CLOSE),
        draft("5", kind=Kind.RETRY),
        draft(""),
    ]

    def columns(token: str) -> list[tuple[Any, ...]]:
        events = StoredEvent.objects.using(history.using).filter(head__token=token)
        rows = list(events.order_by("seq"))
        head = TokenHead.objects.using(history.using).get(token=token)
        first = head.first
        found = [
            (row.seq - first, row.end_offset, row.action, bytes(row.data), row.event_id, row.kind)
            for row in rows
        ]
        assert all(row.ref and row.created == head.updated for row in rows[-len(drafts) :])
        return [*found, (head.last - first, head.closed and head.closed - first, head.size)]

    for token, chosen in (("orm", with_orm(history.using)), ("sql", history)):
        add(chosen, "first", token=token)
        chosen.append(token, drafts)
        with transaction.atomic(using=history.using):
            settle = chosen.stage(token, drafts)
        assert [entry and entry.draft for entry in settle()] == drafts
    assert columns("sql") == columns("orm")


def test_names_in_sql_are_quoted() -> None:
    """Some names of columns are keywords of a database."""
    quoted = {using: fill(connections[using], "{heads} {key} {head_id} %s") for using in ALIASES}
    assert quoted["default"] == '"django_eventsource_tokenhead" "key" "head_id" %s'
    assert quoted["postgres"] == quoted["default"]
    assert quoted.get("mariadb", "`key`").count("`") in (2, 6)


def test_postgres_with_parameters_bound_by_the_server(
    postgres: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an option of Django's connections; the server must find the types of parameters."""
    connection = connections["postgres"]
    connection.close()
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {"server_side_binding": True})
    add(postgres, "a")
    assert statements(postgres, partial(add, postgres, "b", "c")) == ["WITH"]
    with transaction.atomic(using="postgres"):
        settle = postgres.stage("t", [draft("d", own_id="own")])
    assert statements(postgres, settle) == ["WITH"]
    assert stored(postgres) == ["a", "b", "c", "d"]


# SQLite


def test_a_rolled_back_savepoint_takes_its_numbers_back(sqlite: DatabaseHistory) -> None:
    """The numbers stay consecutive, and the size is that of the events."""
    (first,) = add(sqlite, "a")
    with transaction.atomic():
        (one,) = sqlite.stage("t", [draft("b")])()
        with pytest.raises(RuntimeError), transaction.atomic():
            sqlite.stage("t", [draft("gone", kind=Kind.CLOSE), draft("gone")])
            raise RuntimeError
        (two,) = sqlite.stage("t", [draft("c")])()
    assert one is not None
    assert two is not None
    assert [one.seq, two.seq] == [first.seq + 1, first.seq + 2]
    assert stored(sqlite) == ["a", "b", "c"]
    head = TokenHead.objects.get(token="t")
    assert (head.last, head.closed, head.size) == (two.seq, None, 3)


def test_a_rolled_back_first_event_leaves_no_epoch(sqlite: DatabaseHistory) -> None:
    floor = sqlite.newest("t")[0]
    with pytest.raises(RuntimeError), transaction.atomic():
        sqlite.stage("t", [draft("gone")])
        raise RuntimeError
    assert not sqlite.heads(["t"])["t"].has_epoch
    assert sqlite.newest("t")[0] == floor


def test_an_event_on_sqlite_is_stored_with_its_transaction(sqlite: DatabaseHistory) -> None:
    """If the process ends after the commit, the head check of another process finds the event."""
    (first,) = add(sqlite, "a")
    with transaction.atomic():
        sqlite.stage("t", [draft("b")])
        assert in_thread(lambda: sqlite.heads(["t"])["t"].seq) == first.seq
    assert in_thread(lambda: sqlite.heads(["t"])["t"].seq) == first.seq + 1
    assert not PendingEvent.objects.exists()


def test_pending_events_of_an_older_version_are_settled_on_sqlite(
    sqlite: DatabaseHistory,
) -> None:
    settle = to_outbox(sqlite, draft("a"), draft("b"))
    add(sqlite, "c")
    sqlite.heads([])
    assert stored(sqlite) == ["c", "a", "b"]
    assert [entry and entry.draft.data for entry in settle()] == [b"a", b"b"]


def test_sqlite_before_3_35_publishes_with_the_orm(
    sqlite: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot return rows of an update. It needs no outbox either."""
    monkeypatch.setattr(connections["default"].features, "can_return_columns_from_insert", False)
    add(sqlite, "a")
    words = statements(sqlite, partial(add, sqlite, "b"))
    assert without_transaction(words) == ["UPDATE", "SELECT", "INSERT"]
    with transaction.atomic():
        (entry,) = sqlite.stage("t", [draft("c")])()
    assert entry is not None
    assert stored(sqlite) == ["a", "b", "c"]


# PostgreSQL: lost connections


def cut() -> None:
    """Cut this thread's connection at the server, so that the client does not notice it."""
    in_thread(lambda: cut_connections("postgres"))


@contextmanager
def around_next_statement(do: Callable[..., Any]) -> Iterator[None]:
    """Replace the execution of the next publishing statement.

    :param do: called with a function that executes the statement.
    """
    left = [do]

    def run(execute: Any, sql: str, *args: Any) -> Any:
        execution = partial(execute, sql, *args)
        if sql.startswith(("WITH head", "EXECUTE")) and left:
            return left.pop()(execution)
        return execution()

    with connections["postgres"].execute_wrapper(run):
        yield
    assert not left


@pytest.fixture(params=[1, 5], ids=["prepared", "not-prepared"])
def prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each session prepare its statements at once, or not yet."""
    monkeypatch.setattr(PreparedStatement, "prepare_at", request.param)


def executed_then_cut(then: Callable[[], object] = lambda: None) -> Callable[..., None]:
    def do(execution: Callable[[], Any]) -> None:
        execution()
        cut()
        in_thread(then)
        raise OperationalError("server closed the connection unexpectedly")

    return do


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("before", [[], ["earlier"]], ids=["first", "later"])
def test_a_connection_lost_before_the_statement_publishes_once(
    postgres: DatabaseHistory, before: list[str]
) -> None:
    add(postgres, "other", token="other")
    for text in before:
        add(postgres, text)
    cut()
    entries = add(postgres, "a", "b")
    assert stored(postgres) == [*before, "a", "b"]
    assert postgres.read("t", entries[0].seq - 1).entries == tuple(entries)


@pytest.mark.usefixtures("prepared")
def test_a_connection_lost_while_the_statement_waits_publishes_once(
    postgres: DatabaseHistory,
) -> None:
    """The server has ended the statement, so it is repeated."""
    (first,) = add(postgres, "a")
    started = threading.Event()

    def publish() -> list[Entry]:
        with around_next_statement(lambda execution: (started.set(), execution())):
            return add(postgres, "b")

    with ThreadPoolExecutor(max_workers=1) as executor:
        with transaction.atomic(using="postgres"):
            TokenHead.objects.using("postgres").filter(token="t").update(closed=None)
            future = executor.submit(in_thread, publish)
            assert started.wait(30)
            in_thread(wait_for_waiter_and_end_it)
        (entry,) = future.result(60)  # type: ignore[misc]
    assert entry.seq == first.seq + 1
    assert stored(postgres) == ["a", "b"]


def wait_for_waiter_and_end_it() -> None:
    deadline = time.monotonic() + 30
    ended = False
    while not ended:
        assert time.monotonic() < deadline
        with connections["postgres"].cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock'"
            )
            ended = cursor.fetchone() is not None


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("count", [1, 3])
def test_a_connection_lost_after_the_statement_publishes_once(
    postgres: DatabaseHistory, count: int
) -> None:
    """The publisher finds its events by their reference, also after events of others."""
    add(postgres, "earlier")
    do = executed_then_cut(lambda: add(postgres, "other"))
    with around_next_statement(do):
        entries = add(postgres, *"abc"[:count])
    assert stored(postgres) == ["earlier", *"abc"[:count], "other"]
    slice_ = postgres.read("t", entries[0].seq - 1)
    assert list(slice_.entries[:count]) == entries


def test_a_second_lost_connection_of_a_statement_is_raised(postgres: DatabaseHistory) -> None:
    add(postgres, "a")

    def run(execute: Any, sql: str, *args: Any) -> Any:
        cut()
        return execute(sql, *args)

    with connections["postgres"].execute_wrapper(run), pytest.raises(OperationalError):
        add(postgres, "lost")
    add(postgres, "b")
    assert stored(postgres) == ["a", "b"]


def test_a_lost_event_that_was_trimmed_since_is_raised(postgres: DatabaseHistory) -> None:
    """The history can neither confirm nor repeat it."""
    postgres.max_events = 1
    add(postgres, "earlier")

    def trim() -> None:
        add(postgres, "b", "c")
        postgres.prune()

    with (
        around_next_statement(executed_then_cut(trim)),
        pytest.raises(
            OperationalError, match="Publish it again if listeners may receive it twice"
        ),
    ):
        add(postgres, "a")
    assert stored(postgres) == ["c"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_event_newer_than_a_trimmed_token_was_not_trimmed(
    postgres: DatabaseHistory, kept: bool
) -> None:
    """The oldest event that is kept, or the last one, is clearly older than the lost statement."""
    postgres.max_events = 1
    add(postgres, "a", "b")
    postgres.prune()
    age(postgres, 3600)
    if kept:
        add(postgres, "young")
    else:
        postgres.max_age = 60
        postgres.prune()
    cut()
    add(postgres, "c")
    assert stored(postgres) == (["b", "young", "c"] if kept else ["c"])


def test_an_event_as_old_as_a_trimmed_token_is_raised(postgres: DatabaseHistory) -> None:
    """It may have been stored and trimmed."""
    postgres.max_events = 1
    add(postgres, "a", "b")
    postgres.prune()
    cut()
    with pytest.raises(OperationalError, match="published and trimmed since"):
        add(postgres, "c")


def test_a_token_dropped_since_has_no_lost_event(postgres: DatabaseHistory) -> None:
    add(postgres, "a")

    def drop() -> None:
        StoredEvent.objects.using("postgres").all().delete()
        TokenHead.objects.using("postgres").filter(token="t").delete()

    def lose(execution: Callable[[], Any]) -> None:
        cut()
        in_thread(drop)
        execution()

    with around_next_statement(lose):
        add(postgres, "b")
    assert stored(postgres) == ["b"]


def lose_client_side(then: Callable[[Any, str, Any], None]) -> Callable[..., None]:
    """Lose a connection whose session at the server continues.

    :param then: called in a thread with the driver's connection, the statement and its parameters.
    """

    def do(execution: Any) -> None:
        connection = connections["postgres"]
        mine, connection.connection = connection.connection, None
        threading.Thread(target=then, args=[mine, *execution.args[:2]]).start()
        raise OperationalError("server closed the connection unexpectedly")

    return do


def test_the_repetition_waits_for_the_end_of_the_lost_session(postgres: DatabaseHistory) -> None:
    """The server may execute the lost statement after the client has connected again."""
    add(postgres, "a")
    looked = threading.Event()
    executed: list[Any] = []

    def finish(mine: Any, sql: str, params: Any) -> None:
        try:
            assert looked.wait(30)
            executed.append(mine.execute(sql, params).fetchone())
        finally:
            mine.close()

    def watch(execute: Any, sql: str, *args: Any) -> Any:
        result = execute(sql, *args)
        if "pg_stat_activity" in sql:
            looked.set()
        return result

    with (
        connections["postgres"].execute_wrapper(watch),
        around_next_statement(lose_client_side(finish)),
    ):
        (entry,) = add(postgres, "b")
    assert executed == [(entry.seq,)]
    assert stored(postgres) == ["a", "b"]


def test_the_own_session_is_not_the_lost_one(postgres: DatabaseHistory) -> None:
    """After a restart of the server it may have the number of the lost one."""
    with connections["postgres"].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (session,) = cursor.fetchone()
    postgres._writer._wait_for_end(session, "t")


def test_a_lost_session_that_does_not_end_is_raised(
    postgres: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may execute the statement later."""
    monkeypatch.setattr(postgres._writer, "session_seconds", 0.05)
    add(postgres, "a")
    raised = threading.Event()

    def end_later(mine: Any, sql: str, params: Any) -> None:
        raised.wait(30)
        mine.close()

    with (
        around_next_statement(lose_client_side(end_later)),
        pytest.raises(
            OperationalError, match="Publish it again if listeners may receive it twice"
        ),
    ):
        add(postgres, "b")
    raised.set()
    assert stored(postgres) == ["a"]


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("executed", [True, False])
def test_settling_with_a_lost_statement_settles_once(
    postgres: DatabaseHistory, executed: bool
) -> None:
    """The publisher receives the sequence numbers."""
    add(postgres, "earlier")
    with transaction.atomic(using="postgres"):
        settle = postgres.stage("t", [draft("a"), draft("b")])

    def not_executed(execution: Callable[[], Any]) -> None:
        cut()
        execution()

    with around_next_statement(executed_then_cut() if executed else not_executed):
        entries = settle()
    assert [entry and entry.draft.data for entry in entries] == [b"a", b"b"]
    assert tuple(entries) == postgres.read("t", before_oldest(postgres) + 1).entries
    assert not PendingEvent.objects.using("postgres").exists()


# PostgreSQL: settling at the same time


def test_two_settlers_and_twenty_publishers_store_each_event_once(
    postgres: DatabaseHistory,
) -> None:
    """The numbers are consecutive, and each publisher's events keep their order."""
    add(postgres, "first")
    done = threading.Event()
    barrier = threading.Barrier(22)

    def publish(n: int) -> None:
        barrier.wait(60)
        for step in range(10):
            if (n + step) % 3 == 0:
                add(postgres, f"{n} {step}")
            else:
                with transaction.atomic(using="postgres"):
                    settle = postgres.stage("t", [draft(f"{n} {step}")])
                (entry,) = settle()
                assert entry is not None
                assert entry.draft.data == f"{n} {step}".encode()

    def settle(n: int) -> None:
        barrier.wait(60)
        while not done.is_set():
            postgres._writer.settle("t")

    def run(work: Callable[[int], None], n: int) -> object:
        return in_thread(lambda: work(n))

    with ThreadPoolExecutor(max_workers=22) as executor:
        settling = [executor.submit(run, settle, n) for n in range(2)]
        publishing = [executor.submit(run, publish, n) for n in range(20)]
        try:
            for future in publishing:
                future.result(60)
        finally:
            done.set()
        for future in settling:
            future.result(60)
    entries = postgres.read("t", before_oldest(postgres) + 1, max_events=1000).entries
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(200))
    published = [tuple(map(int, text.split())) for text in texts(entries)]
    for n in range(20):
        assert [step for m, step in published if m == n] == list(range(10))
    head = TokenHead.objects.using("postgres").get(token="t")
    assert head.size == sum(len(entry.draft.data) for entry in entries) + len("first")


def test_a_settler_that_waited_for_another_one_leaves_no_gap(postgres: DatabaseHistory) -> None:
    """Its statement saw the events that the other one has moved, and moves the later ones."""
    (first,) = add(postgres, "a")
    settles = [postgres.stage("t", [draft(text)]) for text in "bc"]

    waiting = threading.Event()

    def late() -> object:
        with around_next_statement(lambda execution: (waiting.set(), execution())):
            return settles[1]()

    with ThreadPoolExecutor(max_workers=1) as executor:
        with transaction.atomic(using="postgres"):
            settles[0]()
            future = executor.submit(in_thread, late)
            assert waiting.wait(30)
            in_thread(wait_for_waiter)
        (entry,) = future.result(60)  # type: ignore[misc]
    add(postgres, "d")
    entries = postgres.read("t", first.seq - 1).entries
    assert texts(entries) == ["a", "b", "c", "d"]
    assert [one.seq - first.seq for one in entries] == [0, 1, 2, 3]
    assert entry == entries[2]


def wait_for_waiter() -> None:
    deadline = time.monotonic() + 30
    found = None
    while found is None:
        assert time.monotonic() < deadline
        with connections["postgres"].cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            found = cursor.fetchone()


def test_events_around_one_with_a_key_are_settled_in_order(postgres: DatabaseHistory) -> None:
    """Events up to the key are moved by one statement, and the others in a transaction."""
    add(postgres, "first")
    settle = to_outbox(
        postgres, draft("a"), draft("b"), draft("c", key="k"), draft("d", key="k"), draft("e")
    )
    entries = settle()
    assert stored(postgres) == ["first", "a", "b", "c", "e"]
    assert [entry and entry.repeated for entry in entries] == [False, False, False, True, False]


@pytest.mark.parametrize("count", [1, 2])
def test_an_event_of_a_newer_version_stays_pending(
    postgres: DatabaseHistory, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Listeners could not read it. The head check logs it."""
    add(postgres, "a")
    to_outbox(postgres, *[draft("b")] * count)
    PendingEvent.objects.using("postgres").update(kind="newer")
    postgres.heads([])
    assert "sequence numbers to pending events of 't' failed" in caplog.text
    assert stored(postgres) == ["a"]
    assert PendingEvent.objects.using("postgres").count() == count


def test_the_first_event_of_a_token_is_settled(postgres: DatabaseHistory) -> None:
    """The token gets a head."""
    (entry,) = postgres.stage("t", [draft("a", kind=Kind.CLOSE)])()
    assert entry is not None
    assert postgres.newest("t") == (entry.seq, entry.seq)
    assert stored(postgres) == ["a"]
