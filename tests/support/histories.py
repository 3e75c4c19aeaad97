"""The histories that the contract is tested over, and short ways to fill them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.db.models import F

from django_eventsource.history import Draft, Entry, History, Kind
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.history.redis import RedisHistory
from django_eventsource.models import ProcessLease
from tests import mariadb
from tests.valkey import shared_server

HISTORIES = {
    "memory": MemoryHistory,
    "sqlite": DatabaseHistory,
    "postgres": lambda **options: DatabaseHistory(USING="postgres", **options),
    "mariadb": lambda **options: DatabaseHistory(USING="mariadb", **options),
    "redis": lambda **options: RedisHistory(HOSTS=[shared_server().url], **options),
}

MARIADB = pytest.param(
    "mariadb", marks=pytest.mark.skipif(bool(mariadb.MISSING), reason=mariadb.MISSING)
)
NAMES = [*(name for name in HISTORIES if name != "mariadb"), MARIADB]
"""The histories to run the contract over."""
SERVERS = ["postgres", MARIADB]
"""The databases where writers do not queue for one lock."""
DATABASES = ["default", *SERVERS]
"""The databases to run the database history on."""
ALIASES = ["default", "postgres", *([] if mariadb.MISSING else ["mariadb"])]
"""Those that are there."""


def make(name: str, **options: object) -> History:
    """Make a history by its name in the contract."""
    return HISTORIES[name](**options)


def draft(text: str = "x", *, own_id: str | None = None, kind: Kind = Kind.EVENT) -> Draft:
    """Make a draft with a text as its data."""
    action = {Kind.EVENT: "ping", Kind.RETRY: "retry", Kind.FINISH: "close"}[kind]
    return Draft(action=action, data=text.encode(), event_id=own_id, kind=kind)


def add(history: History, *texts: str, token: str = "t") -> list[Entry]:
    """Append one event for each text."""
    return history.append(token, [draft(text) for text in texts])


def texts(entries: Iterable[Entry]) -> list[str]:
    """Give the entries' data as texts."""
    return [entry.draft.data.decode() for entry in entries]


def age(history: History, seconds: float) -> None:
    """Make all that the history holds older by as much."""
    if isinstance(history, MemoryHistory):
        for life in history._lives.values():
            life.updated -= seconds
            life.entries = {
                seq: (at - seconds, entry) for seq, (at, entry) in life.entries.items()
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
    """Make all that a Redis server holds older by as much."""
    by = int(seconds * 1_000_000)
    for key in client.scan_iter("*"):
        if key.endswith(b":floor"):
            client.hincrby(key, "made", -by)
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
    """Run work in a thread with connections of its own, and close them."""

    def run() -> object:
        try:
            return work()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result(60)


NO_SUCH_THREAD = 1094
"""MariaDB's number of the error that a connection is not there."""


def cut_connections(using: str) -> None:
    """End every connection to a database server but this thread's own, at the server."""
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
                if error.args[0] != NO_SUCH_THREAD:  # it has ended by itself
                    raise
        while found & others():
            pass  # one that was killed is there until it notices
    connections[using].close()
