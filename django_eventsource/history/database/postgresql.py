"""Publishing into PostgreSQL: one statement for an append, and one to settle a transaction.

Each of these statements is a whole transaction. If its connection is lost, it is not known whether
the statement was executed, because there is no separate commit.
"""

import datetime
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import Max
from django.utils import timezone

from ...protocol.tokens import token_key
from ..outbox import BATCH, Outbox
from ..records import Draft, Entry
from ..transaction_retries import in_transaction
from .prepared import PreparedStatement
from .sql import fill, is_plain, last_close, values_of
from .writer import Writer, doubtful

APPEND = """
WITH head AS (
    UPDATE {heads}
    SET {closed} = COALESCE({last} + %s::bigint, {closed}), {last} = {last} + %s,
        {end_offset} = {end_offset} + %s, {updated} = %s
    WHERE {key} = %s
    RETURNING {id}, {last}, {end_offset}
)
INSERT INTO {events} (
    {head_id}, {created}, {ref}, {seq}, {end_offset}, {action}, {data}, {event_id}, {kind}
)
SELECT {id}, %s, %s, {last} - newer, {end_offset} - following, action, data, event_id, kind
FROM head, (VALUES <drafts>) AS drafts (newer, following, action, data, event_id, kind)
RETURNING {seq}
"""
"""Raises the last number of a token and stores the events of <drafts>. Without a head it does
nothing."""
DRAFT = "(%s, %s, %s::text, %s::bytea, %s::text, %s::text)"

APPEND_ONE = """
WITH head AS (
    UPDATE {heads}
    SET {closed} = CASE $8 WHEN 'close' THEN {last} + 1 ELSE {closed} END, {last} = {last} + 1,
        {end_offset} = {end_offset} + $4, {updated} = $2
    WHERE {key} = $1
    RETURNING {id}, {last}, {end_offset}
)
INSERT INTO {events} (
    {head_id}, {created}, {ref}, {seq}, {end_offset}, {action}, {data}, {event_id}, {kind}
)
SELECT {id}, $2, $3, {last}, {end_offset}, $5, $6, $7, $8 FROM head
RETURNING {seq}
"""
"""The same as ``APPEND``, for one event."""
APPEND_ONE_TYPES = ("text", "timestamptz", "uuid", "int", "text", "bytea", "text", "text")

STAGE = """
INSERT INTO {pending} (
    {key}, {token}, {created}, {ref}, {action}, {data}, {event_id}, {kind}, {idempotency_key}
)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""

# The lock on the head comes first, as in every transaction that settles. Rows that another settler
# has moved since the snapshot of the statement are not deleted twice. So the number of moved rows
# counts, not that of the rows in the table.
SETTLE_ONE = """
WITH head AS (
    SELECT {id}, {key} FROM {heads} WHERE {key} = $1 FOR NO KEY UPDATE
), moved AS (
    DELETE FROM {pending} WHERE {id} = (
        SELECT max({id}) FROM {pending} WHERE {key} = (SELECT {key} FROM head)
        HAVING count(*) = 1 AND bool_and(<plain>)
    )
    RETURNING {ref}, {action}, {data}, {event_id}, {kind}
), raised AS (
    UPDATE {heads}
    SET {last} = {last} + 1, {end_offset} = {end_offset} + length({data}), {updated} = $2,
        {closed} = CASE {kind} WHEN 'close' THEN {last} + 1 ELSE {closed} END
    FROM moved WHERE {id} = (SELECT {id} FROM head)
    RETURNING {id}, {last}, {end_offset}, {ref}, {action}, {data}, {event_id}, {kind}
)
INSERT INTO {events} (
    {head_id}, {created}, {ref}, {seq}, {end_offset}, {action}, {data}, {event_id}, {kind}
)
SELECT {id}, $2, {ref}, {last}, {end_offset}, {action}, {data}, {event_id}, {kind} FROM raised
RETURNING {ref}, {seq}
"""
"""Moves the only pending event of a token, if it is plain. It takes two thirds of the time of
``SETTLE``, because it is planned faster."""
SETTLE_ONE_TYPES = ("text", "timestamptz")

SETTLE = """
WITH head AS (
    SELECT {id}, {key} FROM {heads} WHERE {key} = %s FOR NO KEY UPDATE
), moved AS (
    DELETE FROM {pending} WHERE {id} = ANY (ARRAY(
        SELECT {id} FROM (
            SELECT {id}, length({data}) AS bytes, sum(length({data})) OVER by_id AS total,
                bool_and(<plain>) OVER by_id AS plain
            FROM (
                SELECT {id}, {data}, {kind}, {idempotency_key} FROM {pending}
                WHERE {key} = (SELECT {key} FROM head) ORDER BY {id} LIMIT %s
            ) AS oldest
            WINDOW by_id AS (ORDER BY {id})
        ) AS sums
        WHERE plain AND (total <= %s OR total = bytes)
    ))
    RETURNING *
), numbered AS (
    SELECT *, row_number() OVER by_id AS n, sum(length({data})) OVER by_id AS bytes FROM moved
    WINDOW by_id AS (ORDER BY {id})
), raised AS (
    UPDATE {heads}
    SET {last} = {last} + events, {end_offset} = {end_offset} + bytes, {updated} = %s,
        {closed} = COALESCE({last} + last_close, {closed})
    FROM (
        SELECT count(*) AS events, max(bytes) AS bytes,
            max(n) FILTER (WHERE {kind} = 'close') AS last_close
        FROM numbered
    ) AS sums
    WHERE events > 0 AND {id} = (SELECT {id} FROM head)
    RETURNING {id}, {last} - events AS before, {end_offset} - bytes AS bytes_before
)
INSERT INTO {events} (
    {head_id}, {created}, {ref}, {seq}, {end_offset}, {action}, {data}, {event_id}, {kind}
)
SELECT raised.{id}, %s, {ref}, before + n, bytes_before + bytes, {action}, {data}, {event_id},
    {kind}
FROM numbered, raised
RETURNING {ref}, {seq}
"""
"""Moves the oldest pending events of a token, up to the first one that is not plain."""
PLAIN = "{idempotency_key} IS NULL AND {kind} IN ('event', 'retry', 'close')"
"""Whether an event has no key, and no kind of a newer version."""

CLOCK_TOLERANCE = datetime.timedelta(seconds=60)
"""The largest expected difference between the time in a row and the time at which it was stored.

The clocks of publishers differ, and a publisher may wait for a lock."""


class PostgresWriter(Writer):
    """Stores the events of publishers in PostgreSQL."""

    session_seconds = 5.0
    """Seconds for which an append waits for the end of a session whose connection was lost."""

    def __init__(self, using: str, outbox: Outbox, first_seq: Callable[[int], int]) -> None:
        super().__init__(using, outbox, first_seq)
        fill_in = partial(fill, connections[using])
        self._append_sql, self._stage_sql = fill_in(APPEND), fill_in(STAGE)
        settle_one_sql, self._settle_sql = (
            fill_in(sql.replace("<plain>", PLAIN)) for sql in (SETTLE_ONE, SETTLE)
        )
        self._append_one = PreparedStatement(using, fill_in(APPEND_ONE), APPEND_ONE_TYPES)
        self._settle_one = PreparedStatement(using, settle_one_sql, SETTLE_ONE_TYPES)

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        """Append with one statement, if the token has a head and no draft has a key."""
        if not is_plain(drafts):
            return super().append(token, drafts)
        connection = connections[self.using]
        now, ref = timezone.now(), uuid.uuid4()
        session = 0

        def work() -> int | None:
            nonlocal session
            session = connection.connection.info.backend_pid
            return self._append(token, drafts, now, ref)

        def resume() -> int | None:
            self._wait_for_end(session, token)
            return self._find_lost(token, now, ref) or self._append(token, drafts, now, ref)

        last = in_transaction(self.using, work, resume=resume, autocommit=True)
        if last is None:
            return super().append(token, drafts)
        first = last - len(drafts) + 1
        return [Entry(seq=seq, draft=draft) for seq, draft in enumerate(drafts, first)]

    def _append(
        self, token: str, drafts: Sequence[Draft], now: datetime.datetime, ref: uuid.UUID
    ) -> int | None:
        """Store events and return the last sequence number; ``None`` if the token has no head."""
        connection = connections[self.using]
        if len(drafts) == 1:
            (draft,) = drafts
            values = [token_key(token), now, ref, len(draft.data), *values_of(connection, draft)]
            rows = self._append_one.fetch(values)
            return int(rows[0][0]) if rows else None
        count, values = len(drafts), []
        following = size = sum(len(draft.data) for draft in drafts)
        for n, draft in enumerate(drafts, 1):
            following -= len(draft.data)
            values += [count - n, following, *values_of(connection, draft)]
        sql = self._append_sql.replace("<drafts>", ", ".join([DRAFT] * count))
        with connection.cursor() as cursor:
            cursor.execute(
                sql, [last_close(drafts), count, size, now, token_key(token), now, ref, *values]
            )
            return max((seq for (seq,) in cursor.fetchall()), default=None)

    def _wait_for_end(self, session: int, token: str) -> None:
        """Wait until a session has ended, so that it cannot execute the lost statement any more.

        :param session: the number of the session's process. Behind a connection pool it may be
            the number of no process, or of one that continues.
        :raises OperationalError: if it has not ended in time.
        """
        deadline = time.monotonic() + self.session_seconds
        with connections[self.using].cursor() as cursor:
            while True:
                cursor.execute("SELECT pg_stat_clear_snapshot()")
                # After a restart of the server this session may have the same number.
                cursor.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND pid <> pg_backend_pid()",
                    [session],
                )
                if cursor.fetchone() is None:
                    return
                if time.monotonic() > deadline:
                    raise doubtful(token)
                time.sleep(0.01)

    def _find_lost(self, token: str, since: datetime.datetime, ref: uuid.UUID) -> int | None:
        """Return the last sequence number of the events with a reference.

        :param since: the time at which the lost statement was sent.
        :returns: the number, or ``None`` if the events were certainly not stored.
        :raises OperationalError: if they may have been stored and trimmed since.
        """
        head = self._lock_after_loss(token)
        if head is None:
            return None
        events = self._events.filter(head=head)
        last: int | None = events.filter(ref=ref).aggregate(last=Max("seq"))["last"]
        if last is None and head.kept > head.first:
            oldest = events.order_by("seq").values_list("created", flat=True).first()
            if (oldest or head.updated) > since - CLOCK_TOLERANCE:
                raise doubtful(token)
        return last

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        if len(drafts) != 1:
            return super().stage(token, drafts)
        connection = connections[self.using]
        (draft,) = drafts
        ref = uuid.uuid4()
        values = [token_key(token), token, timezone.now(), ref, *values_of(connection, draft)]
        with connection.cursor() as cursor:
            cursor.execute(self._stage_sql, [*values, draft.key])
        return partial(self._settle_and_find, token, drafts, [ref])

    def _settle_batch(
        self, token: str, patience: float | None
    ) -> tuple[dict[uuid.UUID, int], bool]:
        """Settle with one statement, if the token has a head and its oldest event is plain.

        If the statement moves nothing, another connection may have settled the events.
        """
        key, now = token_key(token), timezone.now()
        if moved := self._move_with(lambda: self._settle_one.fetch([key, now]), patience):
            return moved, True
        if not self.outbox.has(token):
            return {}, False

        def settle() -> list[tuple[Any, ...]]:
            with connections[self.using].cursor() as cursor:
                bounds = [BATCH, self.outbox.batch_bytes]
                cursor.execute(self._settle_sql, [key, *bounds, now, now])
                rows: list[tuple[Any, ...]] = cursor.fetchall()
                return rows

        if moved := self._move_with(settle, patience):
            return moved, True
        return super()._settle_batch(token, patience)

    def _move_with(
        self, statement: Callable[[], Iterable[Any]], patience: float | None
    ) -> dict[uuid.UUID, int]:
        return in_transaction(
            self.using, lambda: dict(statement()), patience=patience, autocommit=True
        )
