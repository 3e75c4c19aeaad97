"""The database history's short transactions: again while others are in the way, and again
on a fresh connection when theirs was lost."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet
from django.db.utils import InterfaceError, OperationalError

from .base import T

CONTENTION_SECONDS = 60.0
"""How long a short transaction is tried again when others hold what it needs."""

# SQLite lets one writer in at a time and does not queue the others: threads of one
# process queue here, so that only processes contend.
# Reentrant, since a commit hook may publish.
_sqlite_queues: dict[str, threading.RLock] = defaultdict(threading.RLock)


class Overtaken(OperationalError):
    """Others did the same work while this transaction looked at what was before."""


def in_transaction(
    using: str,
    work: Callable[[], T],
    *,
    patience: float | None = None,
    doubtful: Callable[[], T] | None = None,
) -> T:
    """Run short work in a transaction, again while others hold what it needs.

    When the connection turns out to be lost before the commit was sent, nothing was
    done, and the work is done on a fresh one: once, since a second loss is no accident.

    :param patience: seconds for which it is tried; ``CONTENTION_SECONDS`` if not given.
    :param doubtful: what to do when the connection was lost while the commit was under
        way, and nobody knows whether it arrived; ``work`` again if not given.
    """
    connection = connections[using]
    deadline = time.monotonic() + (CONTENTION_SECONDS if patience is None else patience)
    replaced = False
    while True:
        used, committing = connection.connection, False
        try:
            with _sqlite_queue(connection), transaction.atomic(using=using):
                used = connection.connection
                result = work()
                committing = True
            return result
        except (OperationalError, InterfaceError) as error:
            if connection.in_atomic_block:
                raise
            if not is_contention(error):
                if not _was_lost(connection, used) or replaced:
                    raise
                replaced = True
                if committing:
                    work = doubtful or work
                continue
            if time.monotonic() > deadline:
                raise
        # Contenders that retried in step would collide again.
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311


@contextmanager
def _sqlite_queue(connection: BaseDatabaseWrapper) -> Iterator[None]:
    if connection.vendor != "sqlite" or connection.in_atomic_block:
        yield
        return
    with _sqlite_queues[connection.alias]:
        yield


def _was_lost(connection: BaseDatabaseWrapper, used: Any) -> bool:
    """Tell whether the driver's connection is gone, and let go of what is left of it."""
    # Where the rollback failed as well, atomic() has replaced it by now.
    if used is not None and connection.connection is used and connection.is_usable():
        return False
    connection.close()
    return True


def is_contention(error: Exception) -> bool:
    """Tell "someone else was first" from a failure: the transaction left no trace.

    SQLite says "locked"; PostgreSQL 40001 (serialization) and 40P01 (deadlock); MySQL
    1205 (lock wait) and 1213 (deadlock), MariaDB 1020 (changed since the snapshot).
    """
    cause = error.__cause__
    return (
        isinstance(error, Overtaken)
        or "locked" in str(error)
        or getattr(cause, "sqlstate", None) in ("40001", "40P01")
        or (bool(error.args) and error.args[0] in (1020, 1205, 1213))
    )


def delete(rows: QuerySet[Any]) -> int:
    """Delete rows without signals: nobody's receiver runs in our short transactions."""
    return rows._raw_delete(rows.db)
