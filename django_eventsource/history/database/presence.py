"""Who listens, in the database: a lease for each process, a row for each of its tokens."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from django.db.models import F, QuerySet
from django.db.models.functions import Now

from ..models import ProcessLease, TokenPresence
from ..tokens import token_key
from .transactions import delete, in_transaction

BATCH = 500


class DatabaseNow(Now):
    """The database's own clock: the one that all processes share."""

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Local time, which is Django's choice, would jump with daylight saving.
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


class DatabasePresence:
    """The leases and the listeners, in Django models.

    :param using: the database's alias.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._leases = ProcessLease.objects.using(using)
        self._tokens = TokenPresence.objects.using(using)

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        """Renew a process's lease and write what changed; was the lease valid?"""
        renewed = True

        def work() -> None:
            nonlocal renewed
            valid = self._renew(process, seconds)
            # What one attempt found missing, the next one may find as that attempt left it.
            renewed = renewed and valid
            if changes or not valid:
                self._write(process, changes, afresh=not valid)

        in_transaction(self._using, work)
        return renewed

    def _renew(self, process: str, seconds: float) -> bool:
        lease = self._leases.filter(key=token_key(process))
        until = DatabaseNow() + datetime.timedelta(seconds=seconds)
        if lease.filter(until__gt=DatabaseNow()).update(until=until):
            return True
        if not lease.update(until=until):
            row = ProcessLease(key=token_key(process), process=process[:255], until=until)
            self._leases.bulk_create([row])
        return False

    def _write(self, process: str, changes: Mapping[str, Sequence[str]], *, afresh: bool) -> None:
        lease_id = self._leases.values_list("pk", flat=True).get(key=token_key(process))
        mine = self._tokens.filter(lease=lease_id)
        if afresh:
            delete(mine)
        rows = [_row(lease_id, token, identities) for token, identities in changes.items()]
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            if not afresh:
                delete(mine.filter(key__in=[row.key for row in batch]))
            self._tokens.bulk_create([row for row in batch if row.listeners])

    def present(self, token: str, elsewhere: str | None) -> list[str]:
        """Give the identities of a token's listeners in other processes with a valid lease."""
        rows = self._tokens.filter(key=token_key(token), lease__until__gt=DatabaseNow())
        if elsewhere is not None:
            rows = rows.exclude(lease__key=token_key(elsewhere))
        counts = [json.loads(text) for text in rows.values_list("identities", flat=True)]
        return [identity for count in counts for identity in Counter(count).elements()]

    def withdraw(self, process: str) -> None:
        """End a process's lease."""
        for pk in self._leases.filter(key=token_key(process)).values_list("pk", flat=True):
            self._drop(self._leases.filter(pk=pk), pk)

    def prune(self) -> None:
        """Remove what expired leases left."""
        expired = self._leases.filter(until__lte=DatabaseNow())
        for pk in expired.values_list("pk", flat=True):
            self._drop(expired.filter(pk=pk), pk)

    def _drop(self, lease: QuerySet[ProcessLease], pk: int) -> None:
        in_transaction(self._using, partial(self._drop_one, lease, pk))

    def _drop_one(self, lease: QuerySet[ProcessLease], pk: int) -> None:
        # Locks the row: a process that renews its lease was here before, or finds none.
        if lease.update(until=F("until")):
            delete(self._tokens.filter(lease=pk))
            delete(self._leases.filter(pk=pk))


def _row(lease_id: int, token: str, identities: Sequence[str]) -> TokenPresence:
    return TokenPresence(
        lease_id=lease_id,
        key=token_key(token),
        token=token,
        listeners=len(identities),
        identities=json.dumps(Counter(identities)),
    )
