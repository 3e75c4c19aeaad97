"""Tests of the logging of errors that repeat."""

from __future__ import annotations

import logging

import pytest
from django.db import DatabaseError

from django_eventsource import _logging as module
from django_eventsource._logging import ThrottledLogger, is_unmigrated


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, which a test sets, and let each test start without logged messages."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    module._logged_at.clear()
    return now


def test_a_repeated_error_has_its_traceback_once_in_ten_seconds(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each error is a line. The first one has a traceback, and the first one after ten seconds."""
    throttled = ThrottledLogger(logging.getLogger("test"))
    for at, about in ((0, "a"), (1, "b"), (9.9, "c"), (10, "d"), (15, "e")):
        now[0] = 100.0 + at
        throttled.error("Cannot read %r.", about, error=ConnectionError("away"))
    assert [record.exc_info is not None for record in caplog.records] == [
        *(True, False, False, True, False)
    ]
    assert [record.getMessage() for record in caplog.records][:2] == [
        "Cannot read 'a'.",
        "Cannot read 'b'. (ConnectionError('away'))",
    ]


def test_each_message_of_each_logger_has_its_own_tracebacks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error is not throttled by another message, or by the same message of another logger."""
    for name in ("one", "two"):
        for text in ("Cannot read %r.", "Cannot write %r."):
            ThrottledLogger(logging.getLogger(name)).error(text, "a", error=ValueError("x"))
    assert [record.exc_info is not None for record in caplog.records] == [True] * 4


@pytest.mark.parametrize(
    "error", [ValueError("no such table"), DatabaseError(), DatabaseError("away")]
)
def test_another_error_is_not_a_missing_table(error: Exception) -> None:
    """Only an error of the database that names a missing table or column is one."""
    assert not is_unmigrated(error)


def test_missing_tables_are_one_line_a_minute(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """The tasks and requests that detect them share the limit."""
    requests, tasks = (ThrottledLogger(logging.getLogger(name)) for name in ("one", "two"))
    for at in (0, 10, 59, 61):
        now[0] = 100.0 + at
        requests.error("Cannot read %r.", "a", error=DatabaseError("no such table: x\nLINE 1"))
        tasks.error("The %s failed.", "task", error=DatabaseError("no such table: y"))
    lines = ["The database is not migrated (no such table: x): run `manage.py migrate`."] * 2
    assert [record.getMessage() for record in caplog.records] == lines
    assert not any(record.exc_info for record in caplog.records)
    tasks.error("The %s failed.", "task", error=DatabaseError("away"))
    assert caplog.records[-1].getMessage() == "The task failed."
    assert caplog.records[-1].exc_info is not None
