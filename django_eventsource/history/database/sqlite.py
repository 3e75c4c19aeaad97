"""Publishing into SQLite, which has one writer at a time.

An event of a transaction gets its sequence number inside of that transaction. There is no other
publisher who could wait for it longer than for the transaction itself. A savepoint that is rolled
back takes its numbers back.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from django.db import connections

from ..records import Draft, Entry
from .two_statements import TwoStatementWriter

RAISE = """
UPDATE {heads}
SET {closed} = COALESCE({last} + %s, {closed}), {last} = {last} + %s,
    {end_offset} = {end_offset} + %s, {updated} = %s
WHERE {key} = %s
RETURNING {id}, {last}, {end_offset}
"""


class SqliteWriter(TwoStatementWriter):
    """Stores the events of publishers in SQLite, without the outbox."""

    raise_sql = RAISE
    row_sql = "(%s, %s, %s, %s, %s - %s, %s, %s, %s, %s)"

    def _raised(self, cursor: Any, key: str) -> tuple[Any, int, Any] | None:
        # All rows are read, because a statement that is not finished prevents the commit.
        rows = cursor.fetchall()
        return rows[0] if rows else None

    def _accepts(self, drafts: Sequence[Draft]) -> bool:
        # SQLite returns rows of an update since 3.35.
        features = connections[self.using].features
        return features.can_return_columns_from_insert and super()._accepts(drafts)

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        entries = self.write(token, drafts, [uuid.uuid4()] * len(drafts))
        return lambda: entries
