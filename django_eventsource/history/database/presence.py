"""The listeners of all processes: a lease for each process and a row for each of its tokens."""

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from django.db.models import F, QuerySet
from django.db.models.functions import Now

from ...models import ProcessLease, TokenPresence
from ...protocol.tokens import token_key
from ..outbox import BATCH
from ..transaction_retries import delete, in_transaction


class DatabaseNow(Now):
    """The clock of the database, which all processes share."""

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Django uses local time here, which jumps when daylight saving time begins or ends.
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


class DatabasePresence:
    """The leases and the listeners in one database.

    :param using: the alias of the database.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._leases = ProcessLease.objects.using(using)
        self._tokens = TokenPresence.objects.using(using)

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        """Implement :meth:`History.announce`."""
        renewed = True

        def work() -> None:
            nonlocal renewed
            valid = self._renew(process, seconds)
            # A repeated attempt may find the lease that the first attempt has written.
            renewed = renewed and valid
            if changes or not valid:
                self._write(process, changes, replace=not valid)

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

    def _write(self, process: str, changes: Mapping[str, Sequence[str]], *, replace: bool) -> None:
        lease_id = self._leases.values_list("pk", flat=True).get(key=token_key(process))
        mine = self._tokens.filter(lease=lease_id)
        if replace:
            delete(mine)
        rows = [
            TokenPresence(
                lease_id=lease_id,
                key=token_key(token),
                token=token,
                listeners=len(identities),
                identities=json.dumps(Counter(identities)),
            )
            for token, identities in changes.items()
        ]
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            if not replace:
                delete(mine.filter(key__in=[row.key for row in batch]))
            self._tokens.bulk_create([row for row in batch if row.listeners])

    def present(self, token: str, exclude_process: str | None) -> list[str]:
        """Implement :meth:`History.present`."""
        rows = self._tokens.filter(key=token_key(token), lease__until__gt=DatabaseNow())
        if exclude_process is not None:
            rows = rows.exclude(lease__key=token_key(exclude_process))
        counts = [json.loads(text) for text in rows.values_list("identities", flat=True)]
        return [identity for count in counts for identity in Counter(count).elements()]

    def withdraw(self, process: str) -> None:
        """Implement :meth:`History.withdraw`."""
        self._drop_all(self._leases.filter(key=token_key(process)))

    def prune(self) -> None:
        """Remove expired leases and their listeners."""
        self._drop_all(self._leases.filter(until__lte=DatabaseNow()))

    def _drop_all(self, leases: QuerySet[ProcessLease]) -> None:
        for pk in leases.values_list("pk", flat=True):
            in_transaction(self._using, partial(self._drop, leases.filter(pk=pk), pk))

    def _drop(self, lease: QuerySet[ProcessLease], pk: int) -> None:
        # The update locks the row. A process has renewed its lease before, or finds no row.
        if lease.update(until=F("until")):
            delete(self._tokens.filter(lease=pk))
            delete(self._leases.filter(pk=pk))
