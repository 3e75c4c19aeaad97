"""Storing events with two statements: an update of the token's head, and an insert."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from django.db import connections
from django.utils import timezone

from ...models import StoredEvent
from ...protocol.tokens import token_key
from ..outbox import Outbox
from ..records import Draft, Entry
from .sql import fill, is_plain, last_close, values_of
from .writer import Writer

INSERT = """
INSERT INTO {events} (
    {head_id}, {created}, {ref}, {seq}, {end_offset}, {action}, {data}, {event_id}, {kind}
)
VALUES
"""


class TwoStatementWriter(Writer, ABC):
    """Base of the writers that store events without a key with two statements."""

    raise_sql: str
    """Updates the head. The parameters are the position of the last close among the events (NULL
    without one), the number of events, their size, the time and the token's key."""
    row_sql: str
    """The values of one inserted row. The first parameter is that of the head, the fifth that of
    the end of the head, and the sixth the number of bytes after the event."""

    def __init__(self, using: str, outbox: Outbox, first_seq: Callable[[int], int]) -> None:
        super().__init__(using, outbox, first_seq)
        connection = connections[using]
        self._raise_sql = fill(connection, self.raise_sql)
        self._insert_sql = fill(connection, INSERT)
        self._row_sql = fill(connection, self.row_sql)
        self._ref = StoredEvent._meta.get_field("ref")

    @abstractmethod
    def _raised(self, cursor: Any, key: str) -> tuple[Any, int, Any] | None:
        """Return what ``row_sql`` needs of the head, after ``raise_sql`` has raised it.

        :param cursor: the cursor that has executed ``raise_sql``.
        :param key: the key of the token.
        :returns: the parameter for the head, the last number, and the parameter for the end;
            ``None`` if the token has no head.
        """

    def _accepts(self, drafts: Sequence[Draft]) -> bool:
        """Return whether the two statements can store drafts."""
        return is_plain(drafts)

    def write(self, token: str, drafts: Sequence[Draft], refs: Sequence[uuid.UUID]) -> list[Entry]:
        if not self._accepts(drafts):
            return super().write(token, drafts, refs)
        connection = connections[self.using]
        now, key = timezone.now(), token_key(token)
        time = connection.ops.adapt_datetimefield_value(now)
        sizes = [len(draft.data) for draft in drafts]
        with connection.cursor() as cursor:
            raised = [last_close(drafts), len(drafts), sum(sizes), time, key]
            cursor.execute(self._raise_sql, raised)
            while (head := self._raised(cursor, key)) is None:
                self._create_head(token, now)
                cursor.execute(self._raise_sql, raised)
            of_head, last, of_end = head
            first = last - len(drafts) + 1
            entries = [Entry(seq=seq, draft=draft) for seq, draft in enumerate(drafts, first)]
            values: list[Any] = []
            following = sum(sizes)
            for entry, ref, size in zip(entries, refs, sizes, strict=True):
                following -= size
                stored_ref = self._ref.get_db_prep_value(ref, connection, prepared=True)
                values += [of_head, time, stored_ref, entry.seq, of_end, following]
                values += values_of(connection, entry.draft)
            rows = ", ".join([self._row_sql] * len(drafts))
            cursor.execute(f"{self._insert_sql} {rows}", values)
        return entries
