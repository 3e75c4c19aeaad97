"""Tests of presence in the database beyond the contract: clock, statements, races."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from django.db import connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.models import ProcessLease, TokenPresence
from tests.support.histories import ALIASES, DATABASES, MARIADB, age, in_thread

pytestmark = pytest.mark.django_db(databases=ALIASES)
real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(params=DATABASES)
def history(request: pytest.FixtureRequest) -> DatabaseHistory:
    return DatabaseHistory(USING=request.param)


def statements(history: DatabaseHistory, changes: dict[str, list[str]]) -> int:
    with CaptureQueriesContext(connections[history.using]) as queries:
        history.announce("p", changes, 60)
    return len([one for one in queries if "SAVEPOINT" not in one["sql"]])


def test_an_announcement_takes_at_most_four_statements(history: DatabaseHistory) -> None:
    """A renewal runs one, and changes run three more for any number of listeners."""
    history.announce("p", {}, 60)
    assert statements(history, {}) == 1
    assert statements(history, {"t": ["a"]}) == 4
    assert statements(history, {f"t{n}": [str(m) for m in range(20)] for n in range(150)}) == 4
    assert statements(history, {f"t{n}": [] for n in range(150)}) == 3
    assert not TokenPresence.objects.using(history.using).filter(token="t0").exists()


def test_leases_use_the_clock_of_the_database(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with a wrong clock does not end another lease, and its own lease expires."""
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(timezone, "now", lambda: pytest.fail("the process's clock was read"))
    history.announce("p", {"t": ["a"]}, 60)
    monkeypatch.undo()
    assert history.announce("p", {}, 60)
    assert history.present("t") == ["a"]
    until = ProcessLease.objects.using(history.using).get().until
    assert abs(until - timezone.now() - timedelta(seconds=60)) < timedelta(seconds=30)


@pytest.mark.parametrize("history", [MARIADB], indirect=True)
def test_leases_are_valid_in_sessions_of_different_time_zones(history: DatabaseHistory) -> None:
    """MariaDB's local time depends on the session, so leases are in UTC."""
    with connections["mariadb"].cursor() as cursor:
        cursor.execute("SELECT @@session.time_zone")
        (zone,) = cursor.fetchone()
        cursor.execute("SET time_zone = '+09:00'")
        history.announce("p", {"t": ["a"]}, 60)
        cursor.execute("SET time_zone = '-09:00'")
        assert history.present("t") == ["a"]
        age(history, 61)
        assert history.present("t") == []
        cursor.execute("SET time_zone = %s", [zone])


def test_prune_removes_all_rows_of_dead_processes(history: DatabaseHistory) -> None:
    for n in range(3):
        history.announce(f"dead {n}", {"t": ["a"], "other": ["b"]}, 60)
    age(history, 61)
    history.announce("alive", {"t": ["c"]}, 60)
    history.prune()
    assert ProcessLease.objects.using(history.using).get().process == "alive"
    assert TokenPresence.objects.using(history.using).get().token == "t"


@pytest.mark.parametrize("how", ["withdraw", "prune"])
def test_a_lease_renewed_during_its_removal_is_kept(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """An expired lease that another process removed is ignored."""
    history.announce("p", {"t": ["a"]}, 60)
    age(history, 61)
    presence = history._presence
    real = presence._drop

    def drop(*args: object) -> None:
        if how == "prune":
            history.announce("p", {"t": ["b"]}, 60)
        else:
            real(*args)
        real(*args)

    monkeypatch.setattr(presence, "_drop", drop)
    if how == "prune":
        history.prune()
        assert history.present("t") == ["b"]
    else:
        history.withdraw("p")
        assert not ProcessLease.objects.using(history.using).exists()


@real_commits
def test_a_process_whose_lease_was_removed_must_announce_again(history: DatabaseHistory) -> None:
    history.announce("p", {"t": ["a"]}, 60)
    in_thread(lambda: TokenPresence.objects.using(history.using).all().delete())
    in_thread(lambda: ProcessLease.objects.using(history.using).all().delete())
    assert not history.announce("p", {}, 60)
    assert history.present("t") == []
    assert history.announce("p", {"t": ["a"]}, 60)
    assert history.present("t") == ["a"]


@real_commits
def test_concurrent_announcements_leave_the_last_ones(history: DatabaseHistory) -> None:
    """Processes announce, withdraw and prune at once."""
    names = [f"t{n}" for n in range(20)]

    def work(n: int) -> None:
        try:
            for step in range(6):
                changes = {name: [f"{n} {step}"] for name in names}
                history.announce(f"p{n}", changes, 60)
                if step == 2:
                    history.withdraw(f"p{n}")
                history.prune()
        finally:
            connections[history.using].close()

    with ThreadPoolExecutor(max_workers=6) as executor:
        list(executor.map(work, range(6)))
    for name in names:
        assert sorted(history.present(name)) == [f"{n} 5" for n in range(6)]
