"""Troubles that come by the thousand."""

from __future__ import annotations

import logging

import pytest
from django.db import DatabaseError, connections, transaction

from django_eventsource import troubles as module
from django_eventsource.troubles import Troubles, is_unmigrated, log_failure
from tests.histories import ALIASES


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_one_of_many_is_told_with_its_traceback(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each is a line; a traceback comes with the first, and again after a while."""
    troubles = Troubles(logging.getLogger("test"))
    for at, about in ((0, "a"), (1, "b"), (9.9, "c"), (10, "d"), (15, "e")):
        now[0] = 100.0 + at
        troubles.tell("Cannot read %r.", about, ConnectionError("away"))
    assert [record.exc_info is not None for record in caplog.records] == [
        *(True, False, False, True, False)
    ]
    assert [record.getMessage() for record in caplog.records][:2] == [
        "Cannot read 'a'.",
        "Cannot read 'b'. (ConnectionError('away'))",
    ]


def test_each_kind_has_its_own(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """What fails otherwise is seen at once."""
    troubles = Troubles(logging.getLogger("test"))
    for text in ("Cannot read %r.", "Cannot write %r."):
        troubles.tell(text, "a", ValueError("x"))
    assert all(record.exc_info for record in caplog.records)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("using", ALIASES)
@pytest.mark.parametrize(
    ("sql", "missing"),
    [
        ("SELECT x FROM nowhere", True),
        ("INSERT INTO nowhere VALUES (1)", True),
        ("SELECT missing_column FROM django_eventsource_tokenhead", True),
        ("SELECT 1 FROM django_eventsource_tokenhead WHERE", False),
        ("INSERT INTO django_eventsource_tokenhead (token) VALUES (NULL)", False),
    ],
)
@pytest.mark.django_db(databases=ALIASES)
def test_a_missing_table_is_recognised(using: str, sql: str, missing: bool) -> None:
    """By the error of each database; other errors are not taken for it."""
    with (
        pytest.raises(DatabaseError) as caught,
        transaction.atomic(using),
        connections[using].cursor() as cursor,
    ):
        cursor.execute(sql)
    assert is_unmigrated(caught.value) == missing


@pytest.mark.parametrize(
    "error", [ValueError("no such table"), DatabaseError(), DatabaseError("away")]
)
def test_other_errors_are_no_missing_table(error: Exception) -> None:
    """Only the database can report that."""
    assert not is_unmigrated(error)


def test_missing_tables_are_one_line_a_minute(
    now: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever task or request finds it out."""
    monkeypatch.setattr(module, "_last_line", 0.0)
    troubles, log = Troubles(logging.getLogger("test")), logging.getLogger("task")
    for at in (0, 10, 59, 61):
        now[0] = 100.0 + at
        troubles.tell("Cannot read %r.", "a", DatabaseError("no such table: x\nLINE 1"))
        log_failure(log, "The %s failed.", "task", error=DatabaseError("no such table: y"))
    lines = ["The database is not migrated (no such table: x): run `manage.py migrate`."] * 2
    assert [record.getMessage() for record in caplog.records] == lines
    assert not any(record.exc_info for record in caplog.records)
    log_failure(log, "The %s failed.", "task", error=DatabaseError("away"))
    assert caplog.records[-1].getMessage() == "The task failed."
    assert caplog.records[-1].exc_info is not None
