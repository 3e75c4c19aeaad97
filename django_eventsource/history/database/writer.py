"""Publishing into the tables with Django's ORM, on any database.

The modules that are named after a database do the same in fewer statements.
"""

import datetime
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from django.db.models import F, QuerySet
from django.db.utils import OperationalError
from django.utils import timezone

from ...models import FLOOR_KEY, StoredEvent, TokenHead
from ...protocol.tokens import token_key
from ..outbox import BATCH, Outbox, columns_of, draft_of, settle_batches
from ..records import Draft, Entry
from ..transaction_retries import OutboxConflict, in_transaction
from .sql import end_offsets


class Writer:
    """Stores the events of publishers.

    :param using: the alias of the database.
    :param outbox: the events of transactions.
    :param first_seq: the function :meth:`History.first_seq`.
    """

    def __init__(self, using: str, outbox: Outbox, first_seq: Callable[[int], int]) -> None:
        self.using = using
        self.outbox = outbox
        self.first_seq = first_seq
        self._heads = TokenHead.objects.using(using)
        self._events = StoredEvent.objects.using(using)

    # Outside of a transaction

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        """Implement :meth:`History.append`."""
        ref = uuid.uuid4()
        entries: list[Entry] = []

        def work() -> list[Entry]:
            entries[:] = self.write(token, drafts, [ref] * len(drafts))
            return entries

        def resume() -> list[Entry]:
            stored = [entry.seq for entry in entries if not entry.repeated]
            if stored and self._was_committed(token, stored[-1], ref):
                return entries
            return work()

        return in_transaction(self.using, work, resume=resume)

    def write(self, token: str, drafts: Sequence[Draft], refs: Sequence[uuid.UUID]) -> list[Entry]:
        """Store events inside of a transaction and return their entries.

        :param token: the token of the events.
        :param drafts: the events.
        :param refs: a reference for each event, by which its publisher finds it.
        """
        now = timezone.now()
        size = sum(len(draft.data) for draft in drafts)
        head_id, last, end_offset = self._advance(token, len(drafts), now, size=size)
        entries = self._number(head_id, last - len(drafts) + 1, drafts)
        stored = [pair for pair in zip(entries, refs, strict=True) if not pair[0].repeated]
        repeated = [entry for entry in entries if entry.repeated]
        if repeated:
            unused = sum(len(entry.draft.data) for entry in repeated)
            row = self._heads.filter(pk=head_id)
            row.update(last=F("last") - len(repeated), end_offset=F("end_offset") - unused)
            end_offset -= unused
        ends = end_offsets(end_offset, [entry.draft for entry, _ in stored])
        self._events.bulk_create(
            [
                StoredEvent(
                    head_id=head_id,
                    seq=entry.seq,
                    end_offset=end,
                    created=now,
                    ref=ref,
                    **columns_of(entry.draft),
                )
                for (entry, ref), end in zip(stored, ends, strict=True)
            ],
            batch_size=BATCH,
        )
        closes = [entry.seq for entry, _ in stored if entry.closes]
        if closes:
            self._heads.filter(pk=head_id).update(closed=closes[-1])
        return entries

    def _number(self, head_id: int, seq: int, drafts: Sequence[Draft]) -> list[Entry]:
        """Return the entries of drafts: numbered from ``seq``, or repeated because of their key.

        The caller has locked the head, so no other connection stores an event with such a key.
        """
        known = find_keys(self._events.filter(head=head_id), drafts)
        entries = []
        for draft in drafts:
            if draft.key in known:
                entries.append(Entry.of_stored(draft, *known[draft.key]))
                continue
            entries.append(Entry(seq=seq, draft=draft))
            if draft.key is not None:
                known[draft.key] = seq, draft.event_id
            seq += 1
        return entries

    def _lock(self, token: str, now: datetime.datetime) -> None:
        """Lock the token's head."""
        while not self._heads.filter(key=token_key(token)).update(updated=now):
            self._create_head(token, now)

    def _advance(
        self, token: str, count: int, now: datetime.datetime, *, size: int = 0
    ) -> tuple[int, int, int]:
        """Lock the token's head and raise its last number and its end.

        Return its primary key and both.

        The first statement writes, because a transaction that began with a read cannot wait for
        the lock on SQLite.
        """
        row = self._heads.filter(key=token_key(token))
        raised = {"last": F("last") + count, "end_offset": F("end_offset") + size}
        while not row.update(**raised, updated=now):
            self._create_head(token, now)
        return row.values_list("pk", "last", "end_offset").get()

    def _create_head(self, token: str, now: datetime.datetime) -> None:
        """Begin the epoch of a token, unless another connection has begun it."""
        self._heads.filter(key=FLOOR_KEY).update(updated=now)
        floor = self._heads.filter(key=FLOOR_KEY).values_list("last", flat=True).first()
        first = self.first_seq(floor or 0)
        head = TokenHead(
            key=token_key(token),
            token=token,
            first=first,
            kept=first,
            last=first - 1,
            updated=now,
        )
        self._heads.bulk_create([head], ignore_conflicts=True)

    def _was_committed(self, token: str, seq: int, ref: uuid.UUID) -> bool:
        """Return whether the commit during which the connection was lost reached the database.

        :raises OperationalError: if the event is not stored any more, so the outcome is unknown.
        """
        head = self._lock_after_loss(token)
        if head is None or not head.first <= seq <= head.last:
            return False
        found = self._events.filter(head=head, seq=seq).values_list("ref", flat=True).first()
        if found is None:
            raise doubtful(token)
        return found == ref

    def _lock_after_loss(self, token: str) -> TokenHead | None:
        """Lock the head and return it, or ``None`` if there is none.

        The first statement waits for the locks of the lost connection, whose work may still be
        running.
        """
        row = self._heads.filter(key=token_key(token))
        if not row.update(last=F("last")):
            self._heads.filter(key=FLOOR_KEY).update(last=F("last"))
            if not row.update(last=F("last")):
                return None
        return row.get()

    # Inside of a transaction

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        """Implement :meth:`History.stage`."""
        refs = self.outbox.add(token, drafts)
        return partial(self._settle_and_find, token, drafts, refs)

    def _settle_and_find(
        self, token: str, drafts: Sequence[Draft], refs: Sequence[uuid.UUID]
    ) -> list[Entry | None]:
        """Settle staged events and return their entries, also if another process settled them."""
        seqs = self.settle(token, refs)
        known: dict[str | None, tuple[int, str | None]] = {}
        missing = [ref for ref in refs if ref not in seqs]
        if missing:
            events = self._events.filter(head__key=token_key(token))
            for start in range(0, len(missing), BATCH):
                rows = events.filter(ref__in=missing[start : start + BATCH])
                seqs.update((ref, seq) for ref, seq in rows.values_list("ref", "seq") if ref)
            staged = zip(refs, drafts, strict=True)
            known = find_keys(events, [draft for ref, draft in staged if ref not in seqs])
        entries: list[Entry | None] = []
        for ref, draft in zip(refs, drafts, strict=True):
            if ref in seqs:
                entries.append(Entry(seq=seqs[ref], draft=draft))
            elif draft.key in known:
                entries.append(Entry.of_stored(draft, *known[draft.key]))
            else:
                entries.append(None)
        return entries

    def settle(
        self, token: str, refs: Sequence[uuid.UUID] = (), *, patience: float | None = None
    ) -> dict[uuid.UUID, int]:
        """Settle the pending events of a token, the oldest first.

        :param token: the token of the events.
        :param refs: the references of the events after which the call may return; empty to settle
            all pending events.
        :param patience: as in :func:`in_transaction`.
        :returns: the sequence numbers of the events that this call stored, by reference.
        """
        return settle_batches(partial(self._settle_batch, token, patience), refs)

    def _settle_batch(
        self, token: str, patience: float | None
    ) -> tuple[dict[uuid.UUID, int], bool]:
        """Settle the oldest pending events; return them, and whether there may be more."""
        return in_transaction(self.using, partial(self._move, token), patience=patience)

    def _move(self, token: str) -> tuple[dict[uuid.UUID, int], bool]:
        """Implement :meth:`_settle_batch` inside of a transaction."""
        self._lock(token, timezone.now())
        rows, more = self.outbox.oldest(token)
        if not rows:
            return {}, False
        refs = [row.ref for row in rows]
        entries = self.write(token, [draft_of(row) for row in rows], refs)
        if self.outbox.remove([row.pk for row in rows]) < len(rows):
            # For a token's first event, MySQL's REPEATABLE READ takes the snapshot before the
            # lock, so it may contain events that another process has settled since.
            raise OutboxConflict(f"Another process settled pending events of {token!r}.")
        stored = zip(refs, entries, strict=True)
        return {ref: entry.seq for ref, entry in stored if not entry.repeated}, more


def find_keys(
    rows: QuerySet[StoredEvent], drafts: Sequence[Draft]
) -> dict[str | None, tuple[int, str | None]]:
    """Return the sequence number and the own id of the events with the keys of drafts, by key.

    Without a key there is no statement.
    """
    found: dict[str | None, tuple[int, str | None]] = {}
    keys = list({draft.key for draft in drafts if draft.key is not None})
    for start in range(0, len(keys), BATCH):
        some = rows.filter(idempotency_key__in=keys[start : start + BATCH])
        for key, seq, event_id in some.values_list("idempotency_key", "seq", "event_id"):
            found[key] = seq, event_id
    return found


def doubtful(token: str) -> OperationalError:
    """Return the error of an event of which it is not known whether it was published."""
    return OperationalError(
        f"The connection was lost during the commit of an event of {token!r}. The event "
        "was either not published, or published and trimmed since. Publish it again if "
        "listeners may receive it twice."
    )
