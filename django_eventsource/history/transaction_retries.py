"""Short transactions of the database history.

A transaction that was rolled back because of another one is repeated. If its connection was
lost, it is repeated on a new connection.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet
from django.db.utils import InterfaceError, OperationalError

from .._runtime import on_reset
from .._timing import spread
from .base import T

CONTENTION_SECONDS = 60.0
"""Seconds for which a transaction is repeated while other transactions hold its locks."""

# SQLite allows one writer at a time and does not queue the others. The threads of a process
# queue here, so that only processes contend. The locks are reentrant because a function that
# runs on commit may publish.
_sqlite_queues: dict[str, threading.RLock] = defaultdict(threading.RLock)
on_reset(_sqlite_queues.clear)


class OutboxConflict(OperationalError):
    """Another transaction stored the pending events that this one had read."""


def in_transaction(
    using: str,
    work: Callable[[], T],
    *,
    patience: float | None = None,
    resume: Callable[[], T] | None = None,
    autocommit: bool = False,
) -> T:
    """Run short work in a transaction and repeat it while other transactions hold its locks.

    If the connection is lost before the commit was sent, nothing was stored, and the work runs
    on a new connection: once, because a second loss points to a lasting failure.

    :param using: the alias of the database.
    :param work: the work, which may run several times.
    :param patience: seconds after which it is not repeated any more; ``None`` for
        ``CONTENTION_SECONDS``.
    :param resume: replaces the work if the connection was lost during the commit, so that it is
        not known whether the transaction was committed; ``None`` to repeat the work.
    :param autocommit: whether the work is one statement, which is a transaction without another
        statement. Then a connection that is lost is always lost during the commit. ``resume``
        runs in a transaction with several statements.
    :returns: what the work returns.
    :raises DatabaseError: if the transaction failed permanently.
    """
    connection = connections[using]
    deadline = time.monotonic() + (CONTENTION_SECONDS if patience is None else patience)
    replaced = False
    while True:
        used, committing = connection.connection, False
        try:
            with _sqlite_queue(connection), _transaction(connection, autocommit):
                used, committing = connection.connection, autocommit
                result = work()
                committing = True
            return result
        except (OperationalError, InterfaceError) as error:
            if connection.in_atomic_block:
                raise
            if not is_contention(error):
                if not _close_if_lost(connection, used) or replaced:
                    raise
                replaced = True
                if committing and resume is not None:
                    work, autocommit = resume, False
                continue
            if time.monotonic() > deadline:
                raise
        # Transactions that are repeated at the same time would conflict again.
        time.sleep(spread(0.001, 0.02))


def _sqlite_queue(connection: BaseDatabaseWrapper) -> AbstractContextManager[object]:
    if connection.vendor == "sqlite" and not connection.in_atomic_block:
        return _sqlite_queues[connection.alias]
    return nullcontext()


def _transaction(
    connection: BaseDatabaseWrapper, autocommit: bool
) -> AbstractContextManager[object]:
    if autocommit:
        connection.ensure_connection()
        return nullcontext()
    return transaction.atomic(using=connection.alias)


def _close_if_lost(connection: BaseDatabaseWrapper, used: Any) -> bool:
    # If the rollback failed too, atomic() has replaced the driver's connection already.
    if used is not None and connection.connection is used and connection.is_usable():
        return False
    connection.close()
    return True


def is_contention(error: Exception) -> bool:
    """Return whether a transaction was rolled back because of another transaction.

    SQLite reports "locked"; PostgreSQL 40001 (serialization_failure) and 40P01
    (deadlock_detected); MySQL 1205 (ER_LOCK_WAIT_TIMEOUT) and 1213 (ER_LOCK_DEADLOCK); MariaDB
    1020 (ER_CHECKREAD).
    """
    return (
        isinstance(error, OutboxConflict)
        or "locked" in str(error)
        or getattr(error.__cause__, "sqlstate", None) in ("40001", "40P01")
        or (bool(error.args) and error.args[0] in (1020, 1205, 1213))
    )


def delete(rows: QuerySet[Any]) -> int:
    """Delete rows without signals, so that no receiver runs in a short transaction."""
    return rows._raw_delete(rows.db)
