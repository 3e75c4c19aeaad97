"""Troubles that come by the thousand."""

from __future__ import annotations

import logging

import pytest

from django_eventsource import troubles as module
from django_eventsource.troubles import Troubles


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
