"""Tests of ``manage.py prune_events``."""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError

from django_eventsource.history import Draft, get_history
from django_eventsource.models import StoredEvent


def prune_events():
    output = StringIO()
    call_command("prune_events", stdout=output)
    return output.getvalue()


def append(token, count):
    return get_history().append(
        token, [Draft(action="ping", data=b"%d" % n) for n in range(count)]
    )


@pytest.mark.parametrize(
    ("count", "answer"),
    [(2, "Removed 0 events.\n"), (3, "Removed 1 event.\n"), (7, "Removed 5 events.\n")],
)
@pytest.mark.django_db
def test_events_over_the_bounds_are_removed(settings, count, answer):
    """What is over MAX_EVENTS is removed, the oldest first, and the number is told."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_EVENTS": 2}}
    seqs = [entry.seq for entry in append("token", count)]
    assert prune_events() == answer
    assert list(StoredEvent.objects.order_by("seq").values_list("seq", flat=True)) == seqs[-2:]
    assert prune_events() == "Removed 0 events.\n"


@pytest.mark.django_db
def test_old_events_are_removed(settings):
    """What is older than MAX_AGE is removed, of every token."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_AGE": 3600}}
    append("one", 2)
    append("two", 1)
    StoredEvent.objects.update(created="2020-01-01T00:00Z")
    (kept,) = append("two", 1)
    assert prune_events() == "Removed 3 events.\n"
    assert StoredEvent.objects.get().seq == kept.seq


def test_configured_history_is_the_one_pruned(settings):
    """The command works on whatever history is configured."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
        "OPTIONS": {"MAX_EVENTS": 2},
    }
    append("token", 3)
    pruned = prune_events()
    assert pruned.startswith("Removed ")
    assert get_history().prune() == 0


def test_help_says_what_it_is_for(capsys):
    """The command's help says when to run it."""
    with pytest.raises(SystemExit) as left:
        call_command("prune_events", "--help")
    assert left.value.code == 0
    assert "MAX_EVENTS, MAX_BYTES or MAX_AGE" in " ".join(capsys.readouterr().out.split())


def test_a_database_that_fails_is_told_in_one_line(monkeypatch):
    """A missing table is one line with the way out."""
    monkeypatch.setattr(
        get_history(), "prune", lambda: (_ for _ in ()).throw(OperationalError("no such table: x"))
    )
    with pytest.raises(
        CommandError, match=r"failed: no such table: x\. Was `manage.py migrate` run"
    ):
        call_command("prune_events")
