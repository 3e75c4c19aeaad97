"""The histories that the contract is tested with, and helpers to fill them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.db.models import F

from django_eventsource.history import Draft, Entry, History
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.database.writer import Writer
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.history.redis.backend import RedisHistory
from django_eventsource.models import ProcessLease
from tests.support import mariadb
from tests.support.valkey import shared_server


def with_orm(using: str = "default", **options: Any) -> DatabaseHistory:
    """Return a database history that publishes as it does on a database without SQL for it."""
    history = DatabaseHistory(USING=using, **options)
    history._writer = Writer(using, history._outbox, history.first_seq)
    return history


def to_outbox(
    history: DatabaseHistory, *drafts: Draft, token: str = "t"
) -> Callable[[], Sequence[Entry | None]]:
    """Stage drafts in the outbox, also on SQLite, where only older versions did."""
    return Writer.stage(history._writer, token, drafts)


HISTORIES = {
    "memory": MemoryHistory,
    "sqlite": DatabaseHistory,
    "sqlite-orm": with_orm,
    "postgres": lambda **options: DatabaseHistory(USING="postgres", **options),
    "postgres-orm": lambda **options: with_orm("postgres", **options),
    "mariadb": lambda **options: DatabaseHistory(USING="mariadb", **options),
    "redis": lambda **options: RedisHistory(HOSTS=[shared_server().url], **options),
    "redis-outbox": lambda **options: RedisHistory(
        HOSTS=[shared_server().url], OUTBOX=True, **options
    ),
}

MARIADB = pytest.param(
    "mariadb", marks=pytest.mark.skipif(bool(mariadb.MISSING), reason=mariadb.MISSING)
)
NAMES = [*(name for name in HISTORIES if name != "mariadb"), MARIADB]
"""The names of the histories to test the contract with."""
SERVERS = ["postgres", MARIADB]
"""The databases with more than one write lock."""
DATABASES = ["default", *SERVERS]
"""The databases to test the database history with."""
ALIASES = ["default", "postgres", *([] if mariadb.MISSING else ["mariadb"])]
"""The aliases of the databases that are installed."""


def make(name: str, **options: object) -> History:
    """Return a history by its name in ``NAMES``."""
    return HISTORIES[name](**options)


def before_oldest(history: History, token: str = "t") -> int:
    """Return the position before the oldest event kept; the newest one if none is kept."""
    if isinstance(history, MemoryHistory):
        if epoch := history._epochs.get(token):
            return epoch.kept - 1
    elif isinstance(history, RedisHistory):
        rows = history._host(token).client.xrange(*history._keys(token, "events"), count=1)
        for entry_id, fields in rows:
            return int(fields.get(b"p", int(entry_id.partition(b"-")[0]) - 1))
    elif head := history._head(token)[0]:
        return head.kept - 1
    return history.newest(token)[0]


def age(history: History, seconds: float) -> None:
    """Age all events and leases of a history."""
    if isinstance(history, MemoryHistory):
        for epoch in history._epochs.values():
            epoch.updated -= seconds
            epoch.entries = {
                seq: (at - seconds, entry) for seq, (at, entry) in epoch.entries.items()
            }
        for lease in history._leases.values():
            lease.until -= seconds
        return
    if isinstance(history, RedisHistory):
        for host in history._hosts.all:
            age_server(host.client, seconds)
        return
    assert isinstance(history, DatabaseHistory)
    history._heads.update(updated=F("updated") - timedelta(seconds=seconds))
    history._events.update(created=F("created") - timedelta(seconds=seconds))
    leases = ProcessLease.objects.using(history.using)
    leases.update(until=F("until") - timedelta(seconds=seconds))


def age_server(client: Any, seconds: float) -> None:
    """Age all keys of a Redis server that expire."""
    by = int(seconds * 1_000_000)
    for key in client.scan_iter("*"):
        if key.endswith(b":floor"):
            client.hincrby(key, "made", -by)
        elif key.endswith(b":head"):
            client.hincrby(key, "oldest", -by)
        elif key.endswith(b":events"):
            expires_in = client.pttl(key)
            entries = client.xrange(key)
            client.delete(key)
            for entry_id, fields in entries:
                at, lengths = fields[b"m"].split(b" ", 1)
                client.xadd(key, {**fields, b"m": b"%d %s" % (int(at) - by, lengths)}, entry_id)
            client.pexpire(key, expires_in)
        if (expires_in := client.pttl(key)) > 0:
            client.pexpire(key, int(expires_in - seconds * 1000))


def in_thread(work: Callable[[], object]) -> object:
    """Run work in a thread with its own database connections, and close them."""

    def run() -> object:
        try:
            return work()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result(60)


NO_SUCH_THREAD = 1094
"""MariaDB: ER_NO_SUCH_THREAD, the connection to kill does not exist."""


def cut_connections(using: str) -> None:
    """End every connection at a database server, except that of this thread."""
    with connections[using].cursor() as cursor:
        if using == "postgres":
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            return

        def others() -> set[int]:
            cursor.execute(
                "SELECT id FROM information_schema.processlist"
                " WHERE db = DATABASE() AND id <> CONNECTION_ID()"
            )
            return {pid for (pid,) in cursor.fetchall()}

        found = others()
        for pid in found:
            try:
                cursor.execute(f"KILL {pid}")
            except OperationalError as error:
                if error.args[0] != NO_SUCH_THREAD:  # the connection has ended meanwhile
                    raise
        while found & others():
            pass  # a killed connection stays in the list for a while
    connections[using].close()
