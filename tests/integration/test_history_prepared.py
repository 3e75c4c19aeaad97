"""Tests of the statements that a session of PostgreSQL prepares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from django.db import DataError, ProgrammingError, connections, transaction
from django.test.utils import CaptureQueriesContext

from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.database.prepared import PreparedStatement
from tests.support.events import add, draft, texts
from tests.support.histories import ALIASES, before_oldest

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture
def history() -> Iterator[DatabaseHistory]:
    connections["postgres"].close()
    history = DatabaseHistory(USING="postgres")
    add(history, "first")
    yield history
    connections["postgres"].close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare each statement at its first execution in a session."""
    monkeypatch.setattr(PreparedStatement, "prepare_at", 1)


def words(work: Callable[[], object]) -> list[str]:
    """Run work and return the first word of each of its statements."""
    with CaptureQueriesContext(connections["postgres"]) as queries:
        work()
    return [one["sql"].split()[0] for one in queries]


def execute(sql: str) -> None:
    with connections["postgres"].cursor() as cursor:
        cursor.execute(sql)


def stored(history: DatabaseHistory) -> list[str]:
    return texts(history.read("t", before_oldest(history)).entries)


def test_a_session_prepares_an_append_at_the_fifth_execution(history: DatabaseHistory) -> None:
    """The fixture has executed it once, when the token had no head."""
    found = [words(partial(add, history, str(n))) for n in range(2, 7)]
    assert found == [["WITH"], ["WITH"], ["WITH"], ["PREPARE", "EXECUTE"], ["EXECUTE"]]
    assert stored(history) == ["first", "2", "3", "4", "5", "6"]
    connections["postgres"].close()
    assert words(partial(add, history, "7"))[-1] == "WITH"


@pytest.mark.usefixtures("at_once")
def test_an_event_of_a_transaction_is_settled_with_a_prepared_statement(
    history: DatabaseHistory,
) -> None:
    settles = []
    for text in "ab":
        with transaction.atomic(using="postgres"):
            settles.append(history.stage("t", [draft(text)]))
        assert words(settles[-1])[-1] == "EXECUTE"
    assert words(settles[0]) == ["EXECUTE", "SELECT", "SELECT"]
    assert stored(history) == ["first", "a", "b"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("reset", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_a_session_without_the_prepared_statement_executes_it_as_text(
    history: DatabaseHistory, reset: str
) -> None:
    """A pooler passes each transaction to any of its sessions, or resets a session."""
    add(history, "a")
    execute(reset)
    assert words(partial(add, history, "b")) == ["EXECUTE", "WITH"]
    assert words(partial(add, history, "c")) == ["WITH"]
    assert stored(history) == ["first", "a", "b", "c"]


@pytest.mark.usefixtures("at_once")
def test_a_statement_that_another_client_of_the_session_has_prepared_is_used(
    history: DatabaseHistory,
) -> None:
    """The clients of a pooler share its sessions."""
    add(history, "a")
    other = DatabaseHistory(USING="postgres")
    assert words(partial(add, other, "b")) == ["PREPARE", "EXECUTE"]
    assert words(partial(add, other, "c")) == ["EXECUTE"]
    assert stored(history) == ["first", "a", "b", "c"]


@pytest.mark.usefixtures("at_once")
def test_no_statement_is_prepared_inside_of_a_transaction(history: DatabaseHistory) -> None:
    """If it were missing in the session, the error would abort the transaction."""
    execute("DEALLOCATE ALL")
    with transaction.atomic(using="postgres"):
        assert words(partial(add, history, "a")) == ["WITH"]
        execute("SELECT 1")
    assert stored(history) == ["first", "a"]


def test_other_errors_of_a_prepared_statement_are_raised(history: DatabaseHistory) -> None:
    divide = PreparedStatement("postgres", "SELECT 6 / $1 + $2 - $1", ["int", "int"])
    assert [divide.fetch([3, 4]) for _ in range(6)] == [[(3,)]] * 6
    with pytest.raises(DataError, match="division by zero"):
        divide.fetch([0, 4])
    assert divide.fetch([2, 0]) == [(1,)]


@pytest.mark.usefixtures("at_once")
def test_a_statement_is_executed_as_text_after_a_column_has_changed_its_type(
    history: DatabaseHistory,
) -> None:
    """As during a migration, while the processes of the version before it still run."""
    execute("CREATE TABLE typed (n integer)")
    try:
        execute("INSERT INTO typed VALUES (1)")
        statement = PreparedStatement("postgres", "SELECT n FROM typed WHERE $1", ["boolean"])
        assert statement.fetch([True]) == [(1,)]
        execute("ALTER TABLE typed ALTER n TYPE text")
        assert statement.fetch([True]) == [("1",)]
    finally:
        execute("DROP TABLE typed")


@pytest.mark.usefixtures("at_once")
def test_an_error_of_the_preparation_is_raised(history: DatabaseHistory) -> None:
    statement = PreparedStatement("postgres", "SELECT $1 FROM missing", ["int"])
    with pytest.raises(ProgrammingError, match="missing"):
        statement.fetch([1])


def test_a_statement_has_the_same_name_in_every_process() -> None:
    """A different statement or type has another one."""
    first, second, other, typed = (
        PreparedStatement("postgres", sql, [kind])._execute
        for sql, kind in (
            ("SELECT $1", "int"),
            ("SELECT $1", "int"),
            ("SELECT $1, 1", "int"),
            ("SELECT $1", "text"),
        )
    )
    assert first == second
    assert len({first, other, typed}) == 3
