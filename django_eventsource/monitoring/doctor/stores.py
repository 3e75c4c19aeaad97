"""Findings about the database or the Redis servers that store the events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django.db import Error, connections
from django.db.migrations.executor import MigrationExecutor

from ...history import History
from ...history.redis import RedisHistory
from .clocks import TOLERATED_SECONDS, describe, difference_seconds
from .finding import DATABASES, DOCTOR, ERROR, MACHINES, WARNING, Finding

APP = "django_eventsource"
DOCTOR_TOKEN = "eventsource-doctor"  # noqa: S105
"""The token of the canary, unless another one is passed."""
FAILED_ID = "eventsource.D002"
"""The id of the finding after which no canary can be published."""
FREE_CONNECTIONS = 10
"""The number of free connections of a database below which new processes soon find none."""
SQLITE_FULL = 2
"""``PRAGMA synchronous``: a commit waits until its data is on the disk."""
CLOCKS = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT UNIX_TIMESTAMP(NOW(6))",
}
"""The statements that return the time in seconds, by the vendor of the database."""
# Rows without a database are processes of the server itself.
POSTGRES_CONNECTIONS = """
SELECT current_setting('max_connections')::int, count(datid) FROM pg_stat_activity
"""


def unapplied_migrations(history: History) -> Iterator[Finding]:
    """Report migrations of the app that were not applied to the history's database."""
    executor = MigrationExecutor(connections[history.using])
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes(APP))
    names = [migration.name for migration, _ in plan if migration.app_label == APP]
    if names:
        yield Finding(
            ERROR,
            f"Migrations of {APP} were not applied to the database {history.using!r}: "
            f"{', '.join(names)}.",
            f"Run `manage.py migrate --database {history.using}`.",
            number=1,
            page=DATABASES,
        )


def unreadable_history(history: History) -> Iterator[Finding]:
    """Read the history, because the error of a store is a finding too."""
    history.newest(DOCTOR_TOKEN)
    return iter(())


def failed_store(history: History, error: Exception) -> Finding:
    """Return the finding for an error of the store."""
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())
    what = f"The database {history.using!r}" if isinstance(error, Error) else "A Redis server"
    return Finding(
        ERROR,
        f"{what} failed: {text.rstrip('.')}.",
        "Check that the server runs, and check DATABASES and EVENTSOURCE_HISTORY. If tables are "
        "missing, run `manage.py migrate`.",
        number=2,
        page=DATABASES if isinstance(error, Error) else MACHINES,
    )


def sqlite_without_synchronous(history: History) -> Iterator[Finding]:
    """Report a SQLite database that may lose commits at a power failure."""
    if _vendor(history) == "sqlite":
        level = _row(history, "PRAGMA synchronous")[0]
        if level < SQLITE_FULL:
            yield Finding(
                WARNING,
                f"PRAGMA synchronous is {('OFF', 'NORMAL')[level]}: a power failure may undo "
                "commits, and so events that listeners have already received.",
                "Remove `PRAGMA synchronous` from the init_command in DATABASES.",
                number=7,
                page=DATABASES,
            )


def postgresql_without_synchronous(history: History) -> Iterator[Finding]:
    """Report a PostgreSQL server that may lose commits."""
    if _vendor(history) != "postgresql":
        return
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        if _row(history, f"SHOW {name}")[0] == "off":
            yield Finding(
                WARNING,
                f"{name} of PostgreSQL is off: a crash of the server may undo commits, and so "
                "events that listeners have already received.",
                f"Set {name} to on, in postgresql.conf, for the role or in OPTIONS.",
                number=8,
                page=DATABASES,
            )


def mysql_without_flush(history: History) -> Iterator[Finding]:
    """Report a MySQL or MariaDB server that may lose commits."""
    if _vendor(history) == "mysql":
        value = _row(history, "SELECT @@innodb_flush_log_at_trx_commit")[0]
        if value not in (1, 3):
            yield Finding(
                WARNING,
                f"innodb_flush_log_at_trx_commit is {value}: a crash of the server may undo "
                "commits, and so events that listeners have already received.",
                "Set innodb_flush_log_at_trx_commit to 1.",
                number=9,
                page=DATABASES,
            )


def redis_without_persistence(history: History) -> Iterator[Finding]:
    """Report Redis servers that lose their data when they are restarted."""
    for name, execute in _redis_servers(history):
        # A service that hides it is not reported.
        if execute("INFO", "persistence").get("aof_enabled") == 0:
            yield Finding(
                WARNING,
                f"The Redis server {name} has appendonly no: a restart loses events, and every "
                "listener receives a reset.",
                "Set `appendonly yes`.",
                number=10,
                page=MACHINES,
            )


def redis_with_eviction(history: History) -> Iterator[Finding]:
    """Report Redis servers that remove events when their memory is full."""
    for name, execute in _redis_servers(history):
        memory = execute("INFO", "memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory") and policy != "noeviction":
            yield Finding(
                WARNING,
                f"The Redis server {name} has maxmemory-policy {policy}: it "
                "removes events when its memory is full.",
                "Set `maxmemory-policy noeviction`, or use a server of its own for the history.",
                number=11,
                page=MACHINES,
            )


def different_clock(history: History) -> Iterator[Finding]:
    """Report a store whose clock differs from that of this machine."""
    clocks = [
        (f"The Redis server {name}", partial(_redis_time, execute))
        for name, execute in _redis_servers(history)
    ]
    if _vendor(history) in CLOCKS:
        clocks.append(("The database server", partial(_database_time, history)))
    for what, clock in clocks:
        before = time.time()
        seconds = difference_seconds(before, clock(), time.time())
        if abs(seconds) > TOLERATED_SECONDS:
            yield Finding(
                WARNING,
                f"{what} has a clock that is {describe(seconds)}: grants, leases and the age of "
                "events depend on the clocks.",
                "Synchronize the clocks of all machines, for example with chrony.",
                number=12,
                page=DOCTOR,
            )


def few_connections(history: History) -> Iterator[Finding]:
    """Report a database server that has few free connections."""
    vendor = _vendor(history)
    if vendor == "postgresql":
        most, used = _row(history, POSTGRES_CONNECTIONS)
    elif vendor == "mysql":
        most = _row(history, "SELECT @@max_connections")[0]
        used = int(_row(history, "SHOW GLOBAL STATUS LIKE 'Threads_connected'")[1])
    else:
        return
    if most - used < FREE_CONNECTIONS:
        yield Finding(
            WARNING,
            f"The database server has {used} of {most} connections in use.",
            "Raise max_connections, use a connection pooler, or wrap the application in Handover: "
            "without it each stream may keep a connection.",
            number=13,
            page=DATABASES,
        )


def _vendor(history: History) -> str:
    """Return the vendor of the database that stores events; ``""`` if none does."""
    return str(connections[history.using].vendor) if history.has_outbox else ""


def _row(history: History, statement: str) -> tuple[Any, ...]:
    with connections[history.using].cursor() as cursor:
        cursor.execute(statement)
        row: tuple[Any, ...] = cursor.fetchone()
        return row


def _redis_servers(history: History) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the name of each Redis server, and a function that executes a command on it."""
    for host in history.hosts if isinstance(history, RedisHistory) else ():
        for execute in host.executors():
            yield host.name, execute


def _database_time(history: History) -> float:
    return float(_row(history, CLOCKS[_vendor(history)])[0])


def _redis_time(execute: Callable[..., Any]) -> float:
    seconds, microseconds = execute("TIME")
    return float(seconds) + float(microseconds) / 1e6


FINDINGS: list[Callable[[History], Iterator[Finding]]] = [
    unapplied_migrations,
    unreadable_history,
    sqlite_without_synchronous,
    postgresql_without_synchronous,
    mysql_without_flush,
    redis_without_persistence,
    redis_with_eviction,
    different_clock,
    few_connections,
]
"""The functions, in the order in which the doctor calls them.

One that raises an error of the store is the last one: see :func:`failed_store`."""
