"""The outbox: events of transactions, before they have their sequence numbers.

A history *settles* a pending event: it assigns the sequence number and stores the event.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import connections
from django.db.models.functions import Length
from django.utils import timezone

from ..protocol.tokens import token_key
from .base import READ_BYTES, READ_EVENTS, T
from .records import Draft, Kind
from .transaction_retries import delete

if TYPE_CHECKING:
    from ..models import PendingEvent

BATCH = READ_EVENTS
"""The number of rows that one statement writes or reads at most."""


class Outbox:
    """The pending events in one database.

    :param using: the alias of the database.
    """

    batch_bytes = READ_BYTES
    """The bytes of events that one transaction settles at most, unless one event is larger.

    A server refuses a statement that is too large. The limit of MySQL is ``max_allowed_packet``.
    """

    def __init__(self, using: str) -> None:
        self.using = using
        # Looked up here, because a history without an outbox does not need the app's models.
        self._model = apps.get_model("django_eventsource", "PendingEvent")
        self._events = self._model._default_manager.using(using)
        self._after = ""

    def add(self, token: str, drafts: Sequence[Draft]) -> list[uuid.UUID]:
        """Write events and return a reference to each."""
        now = timezone.now()
        key = token_key(token)
        rows = [
            self._model(key=key, token=token, created=now, ref=uuid.uuid4(), **columns_of(draft))
            for draft in drafts
        ]
        self._events.bulk_create(rows, batch_size=BATCH)
        return [row.ref for row in rows]

    def tokens(self) -> list[str]:
        """Return tokens that have pending events, ``BATCH`` at most.

        If there are more, the next call returns others, so that tokens that cannot be settled do
        not prevent it. Nothing is returned only if no token has pending events.
        """
        begun, self._after = self._after, ""
        after = self._events.filter(key__gt=begun).order_by("key")
        rows = list(after.values_list("key", "token").distinct()[:BATCH])
        if begun and not rows:
            return self.tokens()  # the call before has returned the last ones
        if len(rows) == BATCH:
            self._after = rows[-1][0]
        return [token for _, token in rows]

    def has(self, token: str) -> bool:
        """Return whether a token has pending events."""
        return self._events.filter(key=token_key(token)).exists()

    def oldest(self, token: str) -> tuple[list[PendingEvent], bool]:
        """Return the oldest events of a token for one transaction, and whether it has more."""
        pending = self._events.filter(key=token_key(token)).order_by("pk")
        rows = list(pending[:2])
        if len(rows) < 2:
            return rows, False  # the usual case, in one statement
        sizes = list(pending.values_list("pk", Length("data"))[:BATCH])
        if not sizes:
            return [], False  # the caller has no lock, and another settler was faster
        until, size = sizes[0][0], 0
        for pk, bytes_ in sizes:
            size += bytes_
            if size > self.batch_bytes:
                break
            until = pk
        more = until < sizes[-1][0] or len(sizes) == BATCH
        return list(pending.filter(pk__lte=until)), more

    def remove(self, pks: Sequence[int]) -> int:
        """Delete events by their primary keys and return the number of rows deleted."""
        if connections[self.using].vendor == "mysql":
            # For a list of keys MySQL may scan the table and wait for the rows of transactions
            # that are still open.
            return sum(delete(self._events.filter(pk=pk)) for pk in pks)
        return delete(self._events.filter(pk__in=pks))


def settle_batches(
    settle_batch: Callable[[], tuple[dict[uuid.UUID, T], bool]], refs: Collection[uuid.UUID] = ()
) -> dict[uuid.UUID, T]:
    """Settle the pending events of a token, the oldest first.

    :param settle_batch: settles the oldest events. It returns the result of each by its reference,
        and whether there may be more events.
    :param refs: the references of the events after which to return; empty to settle all.
    :returns: the results by reference.
    """
    settled: dict[uuid.UUID, T] = {}
    more = True
    while more:
        batch, more = settle_batch()
        settled.update(batch)
        more = more and not (refs and settled.keys() >= set(refs))
    return settled


def columns_of(draft: Draft) -> dict[str, Any]:
    """Return the values of the columns that stored and pending events share."""
    return {
        "action": draft.action,
        "data": draft.data,
        "event_id": draft.event_id,
        "kind": draft.kind.value,
        "idempotency_key": draft.key,
    }


def draft_of(row: PendingEvent) -> Draft:
    """Return the draft that a row was written from."""
    return Draft(
        action=row.action,
        data=bytes(row.data),
        event_id=row.event_id,
        kind=Kind(row.kind),
        key=row.idempotency_key,
    )
