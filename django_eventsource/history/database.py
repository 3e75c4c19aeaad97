"""The default history: Django models, on any database that Django's ORM writes to.

A publisher outside a transaction takes its sequence number and writes its event in one
short transaction, ordered by the lock on the token's :class:`TokenHead` row. Inside a
transaction the event goes to the outbox, :class:`PendingEvent`, without a lock; after
the commit a short transaction of its own moves it to its place. Either way the history
is written in the order of its numbers, and a number that is visible stays.
"""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import F, Max, Q, Sum, Window
from django.db.models.functions import Greatest
from django.db.utils import DatabaseError, Error, OperationalError
from django.utils import timezone

from ..models import FLOOR_KEY, StoredEvent, TokenHead, set_floor
from ..tokens import token_key
from .base import Draft, Entry, Found, Head, History, Kind, Slice, T
from .outbox import BATCH, Outbox, columns_of, draft_of
from .presence import DatabasePresence
from .transactions import Overtaken, delete, in_transaction

logger = logging.getLogger("django_eventsource.history")

COLUMNS = ("seq", "action", "data", "event_id", "kind")
KINDS = {kind.value: kind for kind in Kind}
HEAD_CHECK_PATIENCE = 0.5
"""Seconds for which a head check tries to get its turn: others wait for it, and it comes
again."""


class DatabaseHistory(History):
    """Durable events in Django models.

    :param USING: the database's alias.
    """

    shared = True

    def __init__(self, *, USING: str = DEFAULT_DB_ALIAS, **options: Any) -> None:  # noqa: N803
        super().__init__(**options)
        if USING not in connections:
            raise ImproperlyConfigured(
                f"EVENTSOURCE_HISTORY USING must be an alias in DATABASES, not {USING!r}."
            )
        self.using: str = USING
        self._heads = TokenHead.objects.using(USING)
        self._tokens = self._heads.exclude(key=FLOOR_KEY)
        self._events = StoredEvent.objects.using(USING)
        self._outbox = Outbox(USING)
        self._presence = DatabasePresence(USING)

    # Publishing

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        ref = uuid.uuid4()
        entries: list[Entry] = []

        def work() -> list[Entry]:
            entries[:] = self._append(token, drafts, ref=[ref] * len(drafts))
            return entries

        def doubtful() -> list[Entry]:
            if entries and self._has(token, entries[-1].seq, ref):
                return entries
            return work()

        return self._in_transaction(work, doubtful=doubtful)

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        return partial(self._settled, token, self._outbox.add(token, drafts))

    def _append(self, token: str, drafts: Sequence[Draft], **extra: Sequence[Any]) -> list[Entry]:
        now = timezone.now()
        size = sum(len(draft.data) for draft in drafts)
        head_id, last = self._advance(token, len(drafts), now, size=size)
        first = last - len(drafts) + 1
        entries = [Entry(seq=first + n, draft=draft) for n, draft in enumerate(drafts)]
        self._events.bulk_create(
            [
                StoredEvent(
                    head_id=head_id,
                    seq=entry.seq,
                    size=len(entry.draft.data),
                    created=now,
                    **columns_of(entry.draft),
                    **{name: values[n] for name, values in extra.items()},
                )
                for n, entry in enumerate(entries)
            ],
            batch_size=BATCH,
        )
        closes = [entry.seq for entry in entries if entry.finishes]
        if closes:
            self._heads.filter(pk=head_id).update(closed=closes[-1])
        return entries

    def _advance(
        self, token: str, count: int, now: datetime.datetime, *, size: int = 0
    ) -> tuple[int, int]:
        """Lock the token's head and move it; give its key and its new last number.

        The first statement writes: a transaction that began with a read could not wait
        for the lock on SQLite.
        """
        row = self._heads.filter(key=token_key(token))
        while not row.update(last=F("last") + count, size=F("size") + size, updated=now):
            self._heads.filter(key=FLOOR_KEY).update(updated=now)
            first = self.first_seq(self._floor())
            head = TokenHead(
                key=token_key(token),
                token=token,
                first=first,
                kept=first,
                last=first - 1,
                updated=now,
            )
            self._heads.bulk_create([head], ignore_conflicts=True)
        return row.values_list("pk", "last").get()

    def _has(self, token: str, seq: int, ref: uuid.UUID) -> bool:
        """Tell whether a commit whose connection was lost did arrive.

        First it takes the locks that the commit holds if it is still under way.

        :raises OperationalError: when nobody can tell any more.
        """
        row = self._heads.filter(key=token_key(token))
        if not row.update(last=F("last")):
            self._heads.filter(key=FLOOR_KEY).update(last=F("last"))
            if not row.update(last=F("last")):
                return False
        head = row.get()
        if not head.first <= seq <= head.last:
            return False
        found = self._events.filter(head=head, seq=seq).values_list("ref", flat=True).first()
        if found is None:
            raise OperationalError(
                f"The connection was lost while an event of {token!r} was committed. It may have "
                "been published, and trimmed since: publish it again if that does no harm."
            )
        return found == ref

    def _settled(self, token: str, refs: Sequence[uuid.UUID]) -> list[Entry | None]:
        """Give staged events their place, or find the place that others gave them."""
        settled = self._settle(token)
        missing = [ref for ref in refs if ref not in settled]
        for start in range(0, len(missing), BATCH):
            rows = self._rows(token).filter(ref__in=missing[start : start + BATCH])
            settled.update({ref: _entry(*row) for ref, *row in rows.values_list("ref", *COLUMNS)})
        return [settled.get(ref) for ref in refs]

    def _settle(self, token: str, *, patience: float | None = None) -> dict[uuid.UUID, Entry]:
        """Give every pending event of the token its sequence number."""
        settled: dict[uuid.UUID, Entry] = {}
        more = True
        while more:
            batch, more = self._in_transaction(partial(self._settle_batch, token), patience)
            settled.update(batch)
        return settled

    def _settle_batch(self, token: str) -> tuple[dict[uuid.UUID, Entry], bool]:
        """Settle the oldest ones; tell whether there may be more."""
        self._advance(token, 0, timezone.now())
        rows, more = self._outbox.oldest(token)
        if not rows:
            return {}, False
        refs = [row.ref for row in rows]
        entries = self._append(token, [draft_of(row) for row in rows], ref=refs)
        if self._outbox.remove([row.pk for row in rows]) < len(rows):
            # MySQL's REPEATABLE READ: the snapshot of a token's first event is older than
            # its lock, and shows what was settled in between.
            raise Overtaken(f"Pending events of {token!r} were settled by others.")
        return dict(zip(refs, entries, strict=True)), more

    # Reading

    def read(
        self, token: str, after: int, *, max_events: int = BATCH, max_bytes: int = 262_144
    ) -> Slice:
        head, floor = self._head(token)
        if head is None:
            return Slice(complete=after == floor, last=floor)
        if after == head.last:
            return Slice(complete=True, last=head.last)
        rows = self._events.filter(head=head, seq__gt=after).order_by("seq")
        until, size = 0, 0
        for seq, bytes_ in rows.values_list("seq", "size")[:max_events]:
            size += bytes_
            if until and size > max_bytes:
                break
            until = seq
        # Tuples: making a model's instance takes longer than all the rest.
        entries = tuple(_entry(*row) for row in rows.filter(seq__lte=until).values_list(*COLUMNS))
        first = entries[0].seq if entries else 0
        # The floor is the only number below a life that listeners were given.
        complete = first == after + 1 or (after == floor and first == head.first)
        return Slice(
            entries=entries if complete else (),
            complete=complete,
            last=head.last,
            closed=head.closed == head.last,
        )

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        for token in self._outbox.tokens():
            try:
                self._settle(token, patience=HEAD_CHECK_PATIENCE)
            except (DatabaseError, ValueError):
                # The others must not wait for one; the next head check tries again.
                logger.exception("Pending events of %r could not be settled.", token)
        by_key = {token_key(token): token for token in tokens}
        keys = list(by_key)
        found: dict[str, Head] = {}
        for start in range(0, len(keys), BATCH):
            rows = self._heads.filter(key__in=keys[start : start + BATCH])
            lasts = rows.values_list("key", "last")
            found.update({by_key[key]: Head(seq=last, life=True) for key, last in lasts})
        without = Head(seq=self._floor(), life=False)
        return {token: found.get(token, without) for token in by_key.values()}

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        rows = self._rows(token).filter(Q(event_id=cursor) | Q(seq=seq)).order_by("seq")
        found = list(rows.values_list("event_id", "seq", "kind"))
        own = [(place, kind) for event_id, place, kind in found if event_id == cursor]
        place, kind = (own or [(place, kind) for _, place, kind in found] or [(seq, None)])[0]
        # After the events: a head that was read before them may be older than they are.
        head, floor = self._head(token)
        if head is None:
            return Found(last=floor, seq=place, complete=place == floor)
        complete = place is not None and (
            head.kept - 1 <= place <= head.last or (place == floor and head.kept == head.first)
        )
        return Found(
            last=head.last,
            closed=head.closed,
            seq=place,
            kind=kind and Kind(kind),
            complete=complete,
        )

    def newest(self, token: str) -> tuple[int, int | None]:
        head, floor = self._head(token)
        return (head.last, head.closed) if head else (floor, None)

    def oldest(self, token: str) -> int:
        head, floor = self._head(token)
        return head.kept - 1 if head else floor

    def _head(self, token: str) -> tuple[TokenHead | None, int]:
        key = token_key(token)
        rows = {row.key: row for row in self._heads.filter(key__in=[key, FLOOR_KEY])}
        return rows.get(key), rows[FLOOR_KEY].last if FLOOR_KEY in rows else 0

    def _floor(self) -> int:
        return self._heads.filter(key=FLOOR_KEY).values_list("last", flat=True).first() or 0

    def _rows(self, token: str) -> Any:
        return self._events.filter(head__key=token_key(token))

    # Presence

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        return self._presence.announce(process, changes, seconds)

    def present(self, token: str, *, elsewhere: str | None = None) -> list[str]:
        return self._presence.present(token, elsewhere)

    def withdraw(self, process: str) -> None:
        self._presence.withdraw(process)

    # Trimming

    def prune(self) -> int:
        now = timezone.now()
        old = self._events.filter(created__lt=now - _seconds(self.max_age))
        cuts = dict(
            old.order_by().values_list("head").annotate(Max("seq")).values_list("head", "seq__max")
        )
        full = self._tokens.filter(last__gte=F("kept") + self.max_events)
        for head_id, last in full.values_list("pk", "last"):
            cuts[head_id] = max(cuts.get(head_id, 0), last - self.max_events)
        heavy = self._tokens.filter(size__gt=self.max_bytes)
        for head_id, last in heavy.values_list("pk", "last"):
            cuts[head_id] = max(cuts.get(head_id, 0), self._heavy_until(head_id, last))
        removed = sum(self._cut(head_id, until) for head_id, until in cuts.items())
        self._forget(now - _seconds(self.token_max_age))
        self._presence.prune()
        return removed

    def _heavy_until(self, head_id: int, last: int) -> int:
        """Return the number of the newest event that is over MAX_BYTES, before the last event."""
        rows = self._events.filter(head=head_id)
        total = Window(Sum("size"), order_by=F("seq").desc())
        over = rows.annotate(total=total).filter(total__gt=self.max_bytes).order_by("-seq")
        return min(over.values_list("seq", flat=True).first() or 0, last - 1)

    def _cut(self, head_id: int, until: int) -> int:
        """Remove a head's events up to a number, in short transactions."""
        removed = 0
        oldest = self._heads.filter(pk=head_id).values_list("kept", flat=True).first()
        for start in range(oldest or until, until + 1, BATCH):
            end = min(start + BATCH - 1, until)
            removed += self._in_transaction(partial(self._cut_batch, head_id, end))
        return removed

    def _cut_batch(self, head_id: int, until: int) -> int:
        head = self._heads.filter(pk=head_id)
        # Locks the row: what follows is of events that no other process removes meanwhile.
        head.update(kept=Greatest(F("kept"), until + 1))
        events = self._events.filter(head=head_id, seq__lte=until)
        size = events.aggregate(size=Sum("size", default=0))["size"]
        head.update(size=F("size") - size)
        return delete(events)

    def _forget(self, before: datetime.datetime) -> None:
        """Forget tokens that were idle for long, and raise the floor above them."""
        idle = self._tokens.filter(updated__lt=before, kept__gt=F("last"))
        for pk, last in idle.values_list("pk", "last"):
            self._in_transaction(partial(self._forget_one, pk, last, before))

    def _forget_one(self, pk: int, last: int, before: datetime.datetime) -> None:
        # An append that came first has moved the head: then it stays.
        if not delete(self._heads.filter(pk=pk, last=last, updated__lt=before)):
            return
        row = self._heads.filter(key=FLOOR_KEY)
        while not row.update(last=Greatest(F("last"), last)):
            set_floor(self.using)

    # Running

    def _in_transaction(
        self,
        work: Callable[[], T],
        patience: float | None = None,
        doubtful: Callable[[], T] | None = None,
    ) -> T:
        return in_transaction(self.using, work, patience=patience, doubtful=doubtful)

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run in Django's thread for synchronous work."""
        return await sync_to_async(self._call)(func, *args, **kwargs)

    def _call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            return func(*args, **kwargs)
        except Error:
            self.release()
            raise

    def release(self) -> None:
        connections[self.using].close_if_unusable_or_obsolete()

    async def aprune(self) -> int:
        """Await :meth:`prune`, in a thread of its own: it may take long."""
        return await sync_to_async(self._prune_apart, thread_sensitive=False)()

    def _prune_apart(self) -> int:
        try:
            return self.prune()
        finally:
            connections[self.using].close()


def _seconds(seconds: float) -> datetime.timedelta:
    """Give a time span that can be taken off any date of today."""
    return datetime.timedelta(seconds=min(seconds, 10**9))


def _entry(seq: int, action: str, data: bytes, event_id: str | None, kind: str) -> Entry:
    draft = Draft(action=action, data=bytes(data), event_id=event_id, kind=KINDS[kind])
    return Entry(seq=seq, draft=draft)
