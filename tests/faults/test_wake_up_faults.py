"""Faults of the wake-ups that need a separate server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest
from django.conf import settings

from tests.faults.cluster import Postgres
from tests.support.processes import POSTGRES, start_python
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])

PUBLISH = """
import logging
logging.basicConfig()
from django_eventsource import publish
from django_eventsource.history import get_history
for n in range(20):
    publish("t", "ping", str(n))
print(*(entry.draft.data.decode() for entry in get_history().read("t", 0).entries))
"""


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Run a server whose queue of notifications is as short as possible."""
    with closing(Postgres(settings.TEST_DIR / "pg-queue")) as server:
        server.server.psql("ALTER SYSTEM SET max_notify_queue_pages = 64")
        server.restart("fast")
        yield server


def connect(postgres: Postgres) -> psycopg.Connection[tuple[object, ...]]:
    database = postgres.settings["postgres"]
    return psycopg.connect(
        host=database["HOST"], user=database["USER"], dbname=database["NAME"], autocommit=True
    )


def test_a_full_queue_of_notifications_fails_no_publisher(postgres: Postgres) -> None:
    """The events are stored, and the failure is logged."""
    with ExitStack() as stack:
        slow, other = (stack.enter_context(connect(postgres)) for _ in range(2))
        # A session that listens, and never ends its transaction, keeps all later notifications.
        slow.execute("LISTEN other")
        slow.execute("BEGIN")
        slow.execute("SELECT 1")
        with pytest.raises(psycopg.errors.OperationalError, match="too many notifications"):
            for n in range(1000):
                other.execute("SELECT pg_notify('other', %s)", [f"{n:07000}"])
        process = start_python(PUBLISH, DATABASES=postgres.settings, EVENTSOURCE_HISTORY=POSTGRES)
        try:
            out, err = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, err
    assert out.split() == [str(n) for n in range(20)]
    assert "Cannot wake other processes" in err
    assert "too many notifications" in err
