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
    ("count", "output"),
    [(2, "Removed 0 events.\n"), (3, "Removed 1 event.\n"), (7, "Removed 5 events.\n")],
)
@pytest.mark.django_db
def test_events_beyond_max_events_are_removed(settings, count, output):
    """The oldest are removed first, and the command prints their number."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_EVENTS": 2}}
    seqs = [entry.seq for entry in append("token", count)]
    assert prune_events() == output
    assert list(StoredEvent.objects.order_by("seq").values_list("seq", flat=True)) == seqs[-2:]
    assert prune_events() == "Removed 0 events.\n"


@pytest.mark.django_db
def test_events_older_than_max_age_are_removed_of_every_token(settings):
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_AGE": 3600}}
    append("one", 2)
    append("two", 1)
    StoredEvent.objects.update(created="2020-01-01T00:00Z")
    (kept,) = append("two", 1)
    assert prune_events() == "Removed 3 events.\n"
    assert StoredEvent.objects.get().seq == kept.seq


def test_the_configured_history_is_pruned(settings):
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
        "OPTIONS": {"MAX_EVENTS": 2},
    }
    append("token", 3)
    pruned = prune_events()
    assert pruned.startswith("Removed ")
    assert get_history().prune() == 0


def test_the_help_states_when_to_run_the_command(capsys):
    with pytest.raises(SystemExit) as left:
        call_command("prune_events", "--help")
    assert left.value.code == 0
    assert "MAX_EVENTS, MAX_BYTES or MAX_AGE" in " ".join(capsys.readouterr().out.split())


def test_a_missing_table_is_reported_in_one_line(monkeypatch):
    """The line names the way out."""
    monkeypatch.setattr(
        get_history(), "prune", lambda: (_ for _ in ()).throw(OperationalError("no such table: x"))
    )
    with pytest.raises(
        CommandError,
        match=r"failed: no such table: x\. If tables are missing, run `manage.py migrate`",
    ):
        call_command("prune_events")
