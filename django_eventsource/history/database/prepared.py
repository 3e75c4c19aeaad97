"""Statements that a session of PostgreSQL plans once, if it executes them often.

To plan a short statement takes longer than to execute it.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from django.db.utils import Error

from .sql import Statement

UNKNOWN_STATEMENT = "26000"
"""The SQLSTATE of EXECUTE in a session that has not prepared the statement."""
STALE_PLAN = "0A000"
"""The SQLSTATE of EXECUTE after a column has changed its type."""
ALREADY_PREPARED = "42P05"
NEVER = -(2**60)


class PreparedStatement(Statement):
    """A statement that a session of PostgreSQL prepares before its fifth execution.

    Inside of a transaction it is executed as text, because an error would abort the transaction.

    :param using: the alias of the database.
    :param sql: the statement, with the parameters ``$1``, ``$2`` and so on.
    :param types: the type of each parameter.
    """

    prepare_at = 5
    """The execution at which a session prepares the statement. A session that ends with its
    request rarely executes it as often."""

    def __init__(self, using: str, sql: str, types: Sequence[str]) -> None:
        super().__init__(using, sql, types)
        self._text = re.sub(r"\$(\d+)", lambda found: f"%s::{types[int(found[1]) - 1]}", sql)
        # The same name in every process, because processes behind a pooler share sessions.
        digest = hashlib.blake2b(f"{types} {sql}".encode(), digest_size=10).hexdigest()
        name = f"eventsource_{digest}"
        self._prepare = f"PREPARE {name} ({', '.join(types)}) AS {sql}"
        self._execute = f"EXECUTE {name} ({', '.join(['%s'] * len(types))})"
        self._executions: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def _run(self, connection: Any, cursor: Any, params: Sequence[Any]) -> None:
        if not self._execute_prepared(connection, cursor, params):
            super()._run(connection, cursor, params)

    def _execute_prepared(self, connection: Any, cursor: Any, params: Sequence[Any]) -> bool:
        """Execute the statement if the session has prepared it; return whether it has."""
        if not self._is_prepared(connection, cursor):
            return False
        try:
            cursor.execute(self._execute, params)
        except Error as error:
            if _sqlstate(error) not in (UNKNOWN_STATEMENT, STALE_PLAN):
                raise
            # A pooler has passed it to another session, or has reset the session.
            self._executions[connection.connection] = NEVER
            return False
        return True

    def _is_prepared(self, connection: Any, cursor: Any) -> bool:
        """Count an execution, and return whether the session has prepared the statement."""
        if not connection.autocommit or connection.features.uses_server_side_binding:
            return False
        session = connection.connection
        count = self._executions[session] = self._executions.get(session, 0) + 1
        if count == self.prepare_at:
            try:
                cursor.execute(self._prepare)
            except Error as error:
                if _sqlstate(error) != ALREADY_PREPARED:
                    raise
        return count >= self.prepare_at


def _sqlstate(error: Exception) -> str | None:
    # psycopg 3 and psycopg 2 have different names for it.
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
