"""Tests of the choice of the history."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_eventsource import history
from django_eventsource.history import History, get_history
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory


class ThirdPartyHistory(MemoryHistory):
    """A backend as a third party would write it."""

    def __init__(self, *, COLOUR: str, **options: object) -> None:  # noqa: N803
        super().__init__(**options)
        self.colour = COLOUR


def test_the_default_history_is_the_default_database() -> None:
    history = get_history()
    assert isinstance(history, DatabaseHistory)
    assert history.using == "default"
    assert history.shared


def test_the_history_is_made_once_until_its_setting_changes(settings) -> None:
    first = get_history()
    assert get_history() is first
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "tests.unit.test_history.ThirdPartyHistory",
        "OPTIONS": {"COLOUR": "red", "MAX_EVENTS": 5},
    }
    other = get_history()
    assert isinstance(other, ThirdPartyHistory)
    assert (other.colour, other.max_events, other.shared) == ("red", 5, False)
    settings.EVENTSOURCE_POLL_SECONDS = 1
    assert get_history() is other


def test_a_reset_drops_the_history_and_its_lock() -> None:
    """A forked process resets it. A thread of its parent may have held the lock."""
    first, lock = get_history(), history._lock
    with lock:
        history._reset()
        assert get_history() is not first


def test_threads_that_ask_at_once_get_the_same_history(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_HISTORY = {"BACKEND": "django_eventsource.history.memory.MemoryHistory"}
    barrier = threading.Barrier(8)
    real = history.make_history

    def slow() -> History:
        made = real()
        time.sleep(0.01)
        return made

    monkeypatch.setattr(history, "make_history", slow)

    def ask() -> History:
        barrier.wait()
        return get_history()

    with ThreadPoolExecutor(max_workers=8) as executor:
        found = {id(future.result()) for future in [executor.submit(ask) for _ in range(8)]}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"BACKEND": "nowhere.History"}, "cannot be imported: 'nowhere.History'"),
        ({"BACKEND": 5}, "cannot be imported: 5"),
        ({"BACKEND": ".dots"}, "cannot be imported: '.dots'"),
        ({"BACKEND": "django_eventsource.events.Event"}, "must name a subclass"),
        ({"BACKEND": "django_eventsource.history.get_history"}, "must name a subclass"),
        ({"OPTIONS": {"SIZE": 5}}, "OPTIONS do not fit .*SIZE"),
        ({"OPTIONS": {"MAX_AGE": 0}}, "MAX_AGE must be a positive number"),
        ({"OPTIONS": 5}, "OPTIONS must be a dictionary, not 5"),
        ({"COLOUR": 5}, 'must be a dictionary with "BACKEND" and "OPTIONS"'),
        ("database", 'must be a dictionary with "BACKEND" and "OPTIONS"'),
    ],
)
def test_a_wrong_setting_raises_an_error_that_names_it(
    settings, setting: object, message: str
) -> None:
    settings.EVENTSOURCE_HISTORY = setting
    with pytest.raises(ImproperlyConfigured, match=f"EVENTSOURCE_HISTORY.*{message}"):
        get_history()
