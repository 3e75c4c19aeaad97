"""Publishing into MySQL and MariaDB, where an update cannot return a row.

It can return one number, like the primary key of an inserted row.
"""

from typing import Any

from .two_statements import TwoStatementWriter

# MySQL uses the new values of the columns that are assigned before, so ``closed`` comes first.
RAISE = """
UPDATE {heads}
SET {closed} = COALESCE({last} + %s, {closed}), {last} = LAST_INSERT_ID({last} + %s),
    {end_offset} = {end_offset} + %s, {updated} = %s
WHERE {key} = %s
"""


class MySQLWriter(TwoStatementWriter):
    """Stores the events of publishers in MySQL and MariaDB."""

    raise_sql = RAISE
    row_sql = """(
    (SELECT {id} FROM {heads} WHERE {key} = %s), %s, %s, %s,
    (SELECT {end_offset} FROM {heads} WHERE {key} = %s) - %s, %s, %s, %s, %s
)"""

    def _raised(self, cursor: Any, key: str) -> tuple[Any, int, Any] | None:
        return (key, cursor.lastrowid, key) if cursor.rowcount else None
