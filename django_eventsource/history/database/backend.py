"""The default history: Django models, on any database that Django's ORM writes to.

Outside of a transaction, the publisher assigns the sequence number and writes the event in one
short transaction. The lock on the token's :class:`TokenHead` row orders these transactions.

Inside of a transaction, the publisher writes the event to the outbox, :class:`PendingEvent`,
without a lock. After the commit a second, short transaction *settles* it: it assigns the sequence
number and moves the event to :class:`StoredEvent`. SQLite has one writer at a time and needs no
outbox: there the event gets its sequence number inside of the transaction.

In each case events are committed in the order of their sequence numbers, and an event that
another connection can read keeps its sequence number.
"""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from math import ceil
from typing import Any, NamedTuple

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import Exists, F, Max, Min, Q, Value
from django.db.models.functions import Greatest
from django.db.utils import DatabaseError, Error
from django.utils import timezone

from ...conf import check_flag
from ...models import FLOOR_KEY, PendingEvent, StoredEvent, TokenHead, set_floor
from ...protocol.tokens import token_key
from ..base import READ_BYTES, READ_EVENTS, History, T, check_using
from ..outbox import BATCH, Outbox
from ..records import Draft, Entry, Found, Head, Kind, RowEntries, Slice, utc
from ..transaction_retries import delete, in_transaction
from ..wake_ups import WakeUps
from .mysql import MySQLWriter
from .postgresql import PostgresWriter
from .postgresql_wake_ups import PostgresWakeUps, is_psycopg3, listen_params
from .prepared import PreparedStatement
from .presence import DatabasePresence
from .sql import Statement, fill
from .sqlite import SqliteWriter
from .sqlite_wake_ups import SqliteWakeUps
from .writer import Writer

logger = logging.getLogger("django_eventsource.history")

__all__ = ["DatabaseHistory"]

COLUMNS = ("seq", "action", "data", "event_id", "kind")
ROWS = """
SELECT {seq}, {action}, {data}, {event_id}, CASE {kind} WHEN 'event' THEN NULL ELSE {kind} END
FROM {events} WHERE {head_id} = $1 AND {seq} > $2 AND {seq} <= $3 AND {end_offset} <= $4
ORDER BY {seq}
"""
HEADS = """
SELECT {key}, heads.{id}, {first}, {kept}, {last}, {closed}, {start_offset}, heads.{end_offset},
    (SELECT {end_offset} FROM {events} WHERE {head_id} = heads.{id} AND {seq} = $1)
FROM {heads} heads WHERE {key} IN ($2, $3)
"""
READS = {HEADS: ("bigint", "text", "text"), ROWS: ("bigint",) * 4}
"""The statements that read, with the types of their parameters for PostgreSQL."""
MAX_OFFSET = 2**63 - 1
SCANNED = 5 / 4
"""The events among which a read looks for a page, as a multiple of those that fit on average."""
READ_ATTEMPTS = 3
"""The most attempts to read a page whose events another connection trims during the attempt."""
CLOCK_MARGIN = datetime.timedelta(seconds=2)
"""The most by which the clocks of the publishers' machines may differ. If they differ more, only
the history checks of all tokens find an event."""
WRITERS: dict[str, type[Writer]] = {
    "mysql": MySQLWriter,
    "postgresql": PostgresWriter,
    "sqlite": SqliteWriter,
}
"""The writers by the vendor of the database. The others use the ORM."""
HEAD_CHECK_PATIENCE = 0.5
"""Seconds for which a head check repeats a transaction that settles pending events.

All streams of the process wait for the head check, and the next one tries again.
"""


class HeadRow(NamedTuple):
    """The columns of a :class:`TokenHead` that reads use."""

    pk: int
    first: int
    kept: int
    last: int
    closed: int | None
    start_offset: int
    end_offset: int
    offset: int | None
    """The offset of the end of the event after which a read begins; ``None`` if it is not kept."""


class DatabaseHistory(History):
    """Durable events in Django models.

    :param USING: the alias of the database.
    :param WAKE_UP: whether events of other processes wake the hubs, if the database can do it.
    :param LISTEN_DSN: the parameters of the connection that waits for wake-ups of PostgreSQL, as
        libpq accepts them, in place of those in ``DATABASES``; ``None`` for the same connection.
    :param options: the options of :class:`~django_eventsource.history.History`.
    :raises ImproperlyConfigured: if an option is not acceptable.
    """

    shared = True
    has_outbox = True

    def __init__(
        self,
        *,
        USING: str = DEFAULT_DB_ALIAS,  # noqa: N803
        WAKE_UP: bool = True,  # noqa: N803
        LISTEN_DSN: str | None = None,  # noqa: N803
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.using = check_using(USING)
        self._has_wake_ups = check_flag("EVENTSOURCE_HISTORY WAKE_UP", WAKE_UP)
        self._listen_params = {} if LISTEN_DSN is None else listen_params(USING, LISTEN_DSN)
        self._heads = TokenHead.objects.using(USING)
        self._tokens = self._heads.exclude(key=FLOOR_KEY)
        self._events = StoredEvent.objects.using(USING)
        self._outbox = Outbox(USING)
        self._presence = DatabasePresence(USING)

    # Publishing

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        return self._writer.append(token, drafts)

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        return self._writer.stage(token, drafts)

    @cached_property
    def _writer(self) -> Writer:
        vendor = connections[self.using].vendor
        return WRITERS.get(vendor, Writer)(self.using, self._outbox, self.first_seq)

    # Reading

    def read(
        self,
        token: str,
        after: int,
        *,
        max_events: int = READ_EVENTS,
        max_bytes: int = READ_BYTES,
        times: bool = False,
    ) -> Slice:
        for _ in range(READ_ATTEMPTS):
            slice_ = self._read(token, after, max_events, max_bytes, times=times)
            if slice_.entries or slice_.complete:
                break
            # All events of the page may have been trimmed between the two statements.
        return slice_

    def _read(
        self, token: str, after: int, max_events: int, max_bytes: int, *, times: bool
    ) -> Slice:
        head, floor = self._head(token, after)
        if head is None:
            return Slice(complete=after == floor, last=floor)
        if after == head.last:
            return Slice(complete=True, last=head.last)
        entries = self._entries(head, after, max_events, max_bytes, times=times)
        first = entries[0].seq if entries else 0
        # Below an epoch, the floor is the only position that a listener can have.
        complete = first == after + 1 or (after == floor and first == head.first)
        return Slice(
            entries=entries,
            complete=complete,
            last=head.last,
            closed=head.closed == head.last,
        )

    def _entries(
        self, head: HeadRow, after: int, max_events: int, max_bytes: int, *, times: bool
    ) -> Sequence[Entry]:
        """Return the entries after a position, as :meth:`read` does."""
        # The numbers of an epoch are consecutive, so a range is a number of events.
        first = max(after + 1, head.kept)
        until = last = min(first + max_events - 1, head.last)
        size = head.end_offset - head.start_offset
        if size > max_bytes:
            average = (head.last - head.kept + 1) * max_bytes / size
            until = min(first - 1 + ceil(average * SCANNED), last)
        end = max_bytes + (head.start_offset if head.offset is None else head.offset)
        # The times are left out of a replay, because SQLite's are parsed one by one.
        fetch = self._rows_with_times if times else self._rows
        rows = fetch(head.pk, after, until, end)
        while rows and rows[-1][0] == until < last:  # these events are smaller than the average
            until = min(2 * until - first + 1, last)
            more = fetch(head.pk, rows[-1][0], until, end)
            if not more or more[0][0] != rows[-1][0] + 1:  # the page is full, or events are gone
                break
            rows = [*rows, *more]
        # The first event may be larger than a page.
        rows = rows or fetch(head.pk, after, min(first, last), MAX_OFFSET)
        if not times:
            return RowEntries(rows)
        return RowEntries([row[:-1] for row in rows], [_aware(row[-1]) for row in rows])

    def _rows(self, pk: int, after: int, until: int, end: int) -> Sequence[Any]:
        return self._fetch(ROWS, pk, after, until, end)

    def _rows_with_times(self, pk: int, after: int, until: int, end: int) -> Sequence[Any]:
        events = self._events.filter(head=pk, seq__gt=after, seq__lte=until, end_offset__lte=end)
        return list(events.order_by("seq").values_list(*COLUMNS, "created"))

    # SQL, because the ORM takes nearly as long for a page of a replay as the database.

    @cached_property
    def _statements(self) -> Mapping[str, Statement]:
        connection = connections[self.using]
        make = PreparedStatement if connection.vendor == "postgresql" else Statement
        return {
            sql: make(self.using, fill(connection, sql), types) for sql, types in READS.items()
        }

    def _fetch(self, sql: str, *params: Any) -> Sequence[Any]:
        return self._statements[sql].fetch(params)

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        for token in self._outbox.tokens():
            try:
                self._writer.settle(token, patience=HEAD_CHECK_PATIENCE)
            except (DatabaseError, ValueError):
                # The check of the other tokens must not fail with it. The next check tries again.
                logger.exception(
                    "Assigning sequence numbers to pending events of %r failed; retrying.", token
                )
        by_key = {token_key(token): token for token in tokens}
        keys = list(by_key)
        found: dict[str, Head] = {}
        for start in range(0, len(keys), BATCH):
            rows = self._heads.filter(key__in=keys[start : start + BATCH])
            for key, last in rows.values_list("key", "last"):
                found[by_key[key]] = Head(seq=last, has_epoch=True)
        without = Head(seq=self._floor(), has_epoch=False)
        return {token: found.get(token, without) for token in by_key.values()}

    def changes(
        self, since: datetime.datetime | None
    ) -> tuple[datetime.datetime | None, dict[str, Head] | None]:
        now = timezone.now()
        if since is None:
            return now, None
        # The clocks of the publishers differ.
        recent = self._events.filter(created__gt=since - CLOCK_MARGIN)
        pending = Exists(PendingEvent.objects.using(self.using))
        columns = ("key", "token", "last", "pending")
        changed = self._heads.filter(pk__in=recent.values("head")).annotate(pending=Value(False))
        floors = self._heads.filter(key=FLOOR_KEY).annotate(pending=pending)
        # Not OR, for which databases read all heads.
        rows = floors.values_list(*columns).union(changed.values_list(*columns), all=True)
        found = list(rows[: BATCH + 2])
        floor = [row for row in found if row[0] == FLOOR_KEY]
        if not floor or floor[0][3] or len(found) > BATCH + 1:
            return now, None  # only heads() moves what is pending
        heads = [(token, last) for key, token, last, _ in found if key != FLOOR_KEY]
        return now, {token: Head(seq=last, has_epoch=True) for token, last in heads}

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        of_token: Any = self._events.filter(head__key=token_key(token))
        rows = of_token.values_list("event_id", "seq", "kind")
        named = rows.filter(event_id=cursor)
        if seq is not None:
            # Not OR, for which databases read an index of all tokens, or all events of this one.
            named = named.union(rows.filter(seq=seq))
        found = list(named.order_by("seq"))
        # Compared again, because a database may ignore the case of ids.
        own = [(at, kind) for event_id, at, kind in found if event_id == cursor]
        at, kind = (own or [(at, kind) for _, at, kind in found if at == seq] or [(seq, None)])[0]
        # The head is read after the events, so that it is not older than they are.
        head, floor = self._head(token)
        if head is None:
            return Found(last=floor, seq=at, complete=at == floor)
        complete = at is not None and (
            head.kept - 1 <= at <= head.last or (at == floor and head.kept == head.first)
        )
        return Found(
            last=head.last,
            closed=head.closed,
            seq=at,
            kind=kind and Kind(kind),
            complete=complete,
        )

    def rewind(self, token: str, max_events: int, max_seconds: float | None) -> int | None:
        head, _ = self._head(token)
        if head is None:
            return None
        before = max(head.last - max_events, head.kept - 1)
        rows = self._events.filter(head=head.pk, seq__gt=before)
        ends = rows.aggregate(
            close=Max("seq", filter=Q(kind=Kind.CLOSE.value, seq__lt=head.last)),
            whole=Max("seq", filter=Q(kind=Kind.WHOLE.value)),
        )
        before = max(before, ends["close"] or 0, (ends["whole"] or 0) - 1)
        if max_seconds is not None:
            young = rows.filter(seq__gt=before, created__gte=_ago(max_seconds))
            before = young.aggregate(oldest=Min("seq", default=head.last + 1))["oldest"] - 1
        return int(before)

    def newest(self, token: str) -> tuple[int, int | None]:
        head, floor = self._head(token)
        return (head.last, head.closed) if head else (floor, None)

    def _head(self, token: str, after: int | None = None) -> tuple[HeadRow | None, int]:
        """Return the head of a token, if it has one, and the floor.

        :param after: the sequence number after which a read begins; ``None`` without a read.
        """
        own_key = token_key(token)
        found = self._fetch(HEADS, after, own_key, FLOOR_KEY)
        rows = {key: HeadRow(*row) for key, *row in found}
        return rows.get(own_key), rows[FLOOR_KEY].last if FLOOR_KEY in rows else 0

    def _floor(self) -> int:
        return self._heads.filter(key=FLOOR_KEY).values_list("last", flat=True).first() or 0

    # Presence

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        return self._presence.announce(process, changes, seconds)

    def present(self, token: str, *, exclude_process: str | None = None) -> list[str]:
        return self._presence.present(token, exclude_process)

    def withdraw(self, process: str) -> None:
        self._presence.withdraw(process)

    # Trimming

    def prune(self) -> int:
        old = self._events.filter(created__lt=_ago(self.max_age))
        trim_until = dict(
            old.order_by().values_list("head").annotate(Max("seq")).values_list("head", "seq__max")
        )
        full = self._tokens.filter(last__gte=F("kept") + self.max_events)
        for head_id, last in full.values_list("pk", "last"):
            trim_until[head_id] = max(trim_until.get(head_id, 0), last - self.max_events)
        oversized = self._tokens.filter(end_offset__gt=F("start_offset") + self.max_bytes)
        for head_id, last, end in oversized.values_list("pk", "last", "end_offset"):
            # The newest event is kept even if it is larger than the limit.
            events = self._events.filter(head=head_id, seq__lt=last).order_by("seq")
            enough = events.filter(end_offset__gte=end - self.max_bytes)
            until = enough.values_list("seq", flat=True).first() or last - 1
            trim_until[head_id] = max(trim_until.get(head_id, 0), until)
        removed = sum(self._trim(head_id, until) for head_id, until in trim_until.items())
        self._drop_idle_tokens(_ago(self.token_max_age))
        self._presence.prune()
        return removed

    def _trim(self, head_id: int, until: int) -> int:
        """Remove events up to a sequence number, in short transactions."""
        removed = 0
        oldest = self._heads.filter(pk=head_id).values_list("kept", flat=True).first()
        for start in range(oldest or until, until + 1, BATCH):
            end = min(start + BATCH - 1, until)
            removed += in_transaction(self.using, partial(self._trim_batch, head_id, end))
        return removed

    def _trim_batch(self, head_id: int, until: int) -> int:
        head = self._heads.filter(pk=head_id)
        # This locks the row, so that no other process removes these events at the same time.
        head.update(kept=Greatest(F("kept"), until + 1))
        events = self._events.filter(head=head_id, seq__lte=until)
        trimmed = events.order_by("-seq").values_list("end_offset", flat=True).first()
        if trimmed is not None:
            head.update(start_offset=trimmed)
        return delete(events)

    def _drop_idle_tokens(self, before: datetime.datetime) -> None:
        """End the epochs of tokens that were idle since a date, and raise the floor to them."""
        idle = self._tokens.filter(updated__lt=before, kept__gt=F("last"))
        for pk, last in idle.values_list("pk", "last"):
            in_transaction(self.using, partial(self._drop_token, pk, last, before))

    def _drop_token(self, pk: int, last: int, before: datetime.datetime) -> None:
        # If another process has appended since, the row does not match and stays.
        if delete(self._heads.filter(pk=pk, last=last, updated__lt=before)):
            floor = self._heads.filter(key=FLOOR_KEY)
            while not floor.update(last=Greatest(F("last"), last)):
                set_floor(self.using)

    # Running

    @cached_property
    def wake_ups(self) -> WakeUps | None:
        """The wake-ups of the database: PostgreSQL with psycopg 3, or SQLite with a file."""
        connection: Any = connections[self.using]
        if not self._has_wake_ups:
            return None
        if connection.vendor == "postgresql" and is_psycopg3(connection):
            return PostgresWakeUps(self.using, self._listen_params)
        if connection.vendor == "sqlite" and not connection.is_in_memory_db():
            return SqliteWakeUps(connection.settings_dict["NAME"])
        return None

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in Django's thread for synchronous work.

        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return await sync_to_async(self._call)(func, *args, **kwargs)

    def _call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            return func(*args, **kwargs)
        except Error:
            self._close_obsolete_connection()
            raise

    def _close_obsolete_connection(self) -> None:
        connections[self.using].close_if_unusable_or_obsolete()

    async def aheads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Await :meth:`heads`, then close the connection if it is older than ``CONN_MAX_AGE``.

        No request ends in this thread, so Django does not close it.
        """
        return await self.call(self._heads_and_close, list(tokens))

    def _heads_and_close(self, tokens: Sequence[str]) -> dict[str, Head]:
        heads = self.heads(tokens)
        self._close_obsolete_connection()
        return heads

    async def aprune(self) -> int:
        """Await :meth:`prune`, in a separate thread because it may take long."""
        return await sync_to_async(self._prune_and_close, thread_sensitive=False)()

    def _prune_and_close(self) -> int:
        try:
            return self.prune()
        finally:
            connections[self.using].close()


def _ago(seconds: float) -> datetime.datetime:
    """Return a time in the past, as the database stores it.

    Without ``USE_TZ`` the database stores local times. After daylight saving time has ended, the
    result is up to an hour too early, because the local times of that hour occur twice.

    :param seconds: the seconds, limited so that they can be subtracted from the current date.
    """
    seconds = min(seconds, 10**9)
    now = timezone.now()
    past = now - datetime.timedelta(seconds=seconds)
    if timezone.is_aware(now):
        return past
    local = timezone.make_naive(utc(time.time() - seconds), timezone.get_default_timezone())
    return min(past, local)


def _aware(created: datetime.datetime) -> datetime.datetime:
    """Return a time with a time zone, also without ``USE_TZ``."""
    return timezone.make_aware(created) if timezone.is_naive(created) else created
