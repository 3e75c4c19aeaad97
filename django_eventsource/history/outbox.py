"""The outbox: events that their transactions wrote, before they have their numbers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from django.db import connections
from django.db.models.functions import Length
from django.utils import timezone

from ..models import PendingEvent
from ..tokens import token_key
from .base import Draft, Kind
from .transactions import delete

BATCH = 500
BATCH_BYTES = 256 * 1024
"""What is settled at once, unless a single event is larger. A server refuses a statement that
is too large: MySQL at ``max_allowed_packet``."""


class Outbox:
    """The pending events in one database."""

    def __init__(self, using: str) -> None:
        self.using = using
        self._events = PendingEvent.objects.using(using)

    def add(self, token: str, drafts: Sequence[Draft]) -> list[uuid.UUID]:
        """Write events; give what each is to be found by."""
        now = timezone.now()
        key = token_key(token)
        rows = [
            PendingEvent(key=key, token=token, created=now, ref=uuid.uuid4(), **columns_of(draft))
            for draft in drafts
        ]
        self._events.bulk_create(rows, batch_size=BATCH)
        return [row.ref for row in rows]

    def tokens(self) -> list[str]:
        """Give tokens that have pending events."""
        return list(self._events.values_list("token", flat=True).distinct()[:BATCH])

    def oldest(self, token: str) -> tuple[list[PendingEvent], bool]:
        """Give as many of a token's events as should be settled at once; are there more?"""
        pending = self._events.filter(key=token_key(token)).order_by("pk")
        rows = list(pending[:2])
        if len(rows) < 2:
            return rows, False  # mostly
        sizes = list(pending.values_list("pk", Length("data"))[:BATCH])
        until, size = sizes[0][0], 0
        for pk, bytes_ in sizes:
            size += bytes_
            if size > BATCH_BYTES:
                break
            until = pk
        more = until < sizes[-1][0] or len(sizes) == BATCH
        return list(pending.filter(pk__lte=until)), more

    def remove(self, pks: Sequence[int]) -> int:
        """Delete events; give how many there were."""
        if connections[self.using].vendor == "mysql":
            # For a list of keys it may walk through the table, and wait on its way for the
            # rows of transactions that are still open.
            return sum(delete(self._events.filter(pk=pk)) for pk in pks)
        return delete(self._events.filter(pk__in=pks))


def columns_of(draft: Draft) -> dict[str, Any]:
    """Give what the tables hold of an event."""
    return {
        "action": draft.action,
        "data": draft.data,
        "event_id": draft.event_id,
        "kind": draft.kind.value,
    }


def draft_of(row: PendingEvent) -> Draft:
    """Read an event back."""
    return Draft(
        action=row.action, data=bytes(row.data), event_id=row.event_id, kind=Kind(row.kind)
    )
