"""The productions of all processes: which of them run, and the end of those whose process died.

A production is text or values that a source yields, published as events of its token. Each has
two leases in the history. One is short, and its process renews it. The other one, its record,
lasts a day, and begins when its claim of the token has won. If a production has the record alone,
its process died, and any process publishes its end.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from typing import Self

from django.db import transaction

from .._logging import ThrottledLogger
from ..conf import conf
from ..events import Event, JSONIdEvent, StringIdEvent
from ..exceptions import ProductionRunning
from ..history import History, Kind, Position, get_history
from ..protocol.tokens import PRODUCING_TOKEN, PRODUCTIONS_TOKEN
from ..publishing import publish_event
from ..streaming.registry import registry

logger = logging.getLogger("django_eventsource.operations")

INTERRUPTED = "interrupted"
"""The action of the end that another process publishes."""
LEASE_PREFIX = "\ufffdproduction:"
"""The first characters of the names of the leases."""
RECORD_SECONDS = 86_400.0
"""Seconds after which a production is forgotten. Its process is not replaced after that."""
RENEWALS = 3
"""The number of renewals that may be missed before the process of a production counts as dead."""


class ClaimEvent(JSONIdEvent):
    """The claim of a token by a production. The first one of several at the same time counts."""

    ACTIONS = ["claim"]
    internal = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Production:
    """A production that has no end yet."""

    id: str
    """A text that no other production has or had."""
    token: str
    interrupted: str
    """The data of the event with which another process ends it."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the production of a text. Ignore fields that a newer version has added."""
        fields = json.loads(text)
        return cls(id=fields["id"], token=fields["token"], interrupted=fields["interrupted"])

    @property
    def lease(self) -> str:
        """The name of the lease that its process renews."""
        return f"{LEASE_PREFIX}{self.id}"

    @property
    def record(self) -> str:
        """The name of the lease that lasts until the end."""
        return f"{LEASE_PREFIX}{self.id}:record"

    @property
    def text(self) -> str:
        """The production as text."""
        return json.dumps(asdict(self))

    def claim(self) -> Position:
        """Claim the token for this production.

        :returns: the newest position of the token.
        :raises ProductionRunning: if the token has another production.
        :raises TransactionManagementError: in a transaction.
        """
        history = get_history()
        if transaction.get_connection(history.using).in_atomic_block:
            raise transaction.TransactionManagementError(
                "A production was started in a transaction, and would begin before the commit. "
                "Call transaction.on_commit(lambda: start_production(...)). In a test, use "
                "TransactionTestCase."
            )
        # At once, unlike in interrupt_dead(), because no process may look for the dead ones: all
        # processes may be scripts.
        for one in find_dead(history):
            if one.token == self.token:
                one.interrupt()
        before, _ = history.newest(PRODUCTIONS_TOKEN)
        if any(one.token == self.token for one in unended(history)):
            raise ProductionRunning(self.token)
        try:
            self._announce()
            claim = publish_event(ClaimEvent(PRODUCTIONS_TOKEN, "claim", asdict(self)))
            # Another process may have done the same meanwhile. The first claim counts.
            entries = history.read(PRODUCTIONS_TOKEN, before).entries
            earlier = [json.loads(one.draft.data) for one in entries if one.seq < int(claim.id)]
            if any(other["token"] == self.token for other in earlier):
                raise ProductionRunning(self.token)
            position = history.locate(self.token, None)
            # Last, because a claim that has not won has no end.
            self._record()
        except BaseException:
            with contextlib.suppress(Exception):  # the short lease expires
                self.release()
            raise
        return position

    def renew(self) -> bool:
        """Renew the lease. If the history had dropped it, announce both leases again.

        :returns: whether the history had kept it. If not, another process may have published the
            end.
        """
        if get_history().announce(self.lease, {}, lease_seconds()):
            return True
        # In this order. A production with the record alone counts as dead.
        self._announce()
        self._record()
        return False

    def _announce(self) -> None:
        get_history().announce(self.lease, {PRODUCING_TOKEN: [self.text]}, lease_seconds())

    def _record(self) -> None:
        get_history().announce(self.record, {PRODUCTIONS_TOKEN: [self.text]}, RECORD_SECONDS)

    def release(self) -> None:
        """Withdraw the leases."""
        history = get_history()
        history.withdraw(self.record)
        history.withdraw(self.lease)

    def publish_end(self, event: Event, kind: Kind | None = None) -> Event:
        """Publish the end. All ends of a production have one key, so only the first is stored."""
        return publish_event(event, f"production:{self.id}", kind)

    def interrupt(self) -> None:
        """Publish the end of this production, whose process died."""
        self.publish_end(StringIdEvent(self.token, INTERRUPTED, self.interrupted))
        self.release()


def renewal_seconds() -> float:
    """Return the seconds between two renewals of a lease."""
    return conf.presence_seconds or 5.0


def lease_seconds() -> float:
    """Return the seconds after which a lease expires that is not renewed."""
    return RENEWALS * renewal_seconds()


def unended(history: History) -> Sequence[Production]:
    """Return the productions of all processes that claim a token or have no end yet."""
    texts = [*history.present(PRODUCTIONS_TOKEN), *history.present(PRODUCING_TOKEN)]
    return [Production.read(text) for text in dict.fromkeys(texts)]


def find_dead(history: History) -> Sequence[Production]:
    """Return the productions whose process died."""
    # First those without an end, and then those that are alive: if one ends in between, its end
    # is published already, and another one is not stored.
    texts = history.present(PRODUCTIONS_TOKEN)
    alive = set(history.present(PRODUCING_TOKEN)) if texts else set()
    return [Production.read(text) for text in texts if text not in alive]


def interrupt_dead(history: History, suspected: Set[str]) -> Set[str]:
    """Publish the end of each production that was found dead in this check and the one before.

    After a failure of the store, the leases of living productions have expired, too. They are
    renewed between the two checks.

    :param suspected: the ids of the productions that the check before has found dead.
    :returns: the ids of those that this check has found dead.
    """
    dead = find_dead(history)
    for one in dead:
        if one.id in suspected:
            try:
                one.interrupt()
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "A production whose process died cannot be ended; retrying.", error=error
                )
    return {one.id for one in dead}


async def interrupt_dead_forever() -> None:
    """Look for productions whose process died, as long as the event loop runs.

    An event loop without streams reads nothing. The pages that show a production have streams.
    """
    loop = asyncio.get_running_loop()
    suspected: Set[str] = set()
    while True:
        seconds = 1.0
        with contextlib.suppress(Exception):
            seconds = renewal_seconds()
        await asyncio.sleep(seconds)
        if not any(registry.streams(loop)):
            suspected = set()
            continue
        try:
            history = get_history()
            suspected = await history.call(interrupt_dead, history, suspected)
        except Exception as error:  # noqa: BLE001
            suspected = set()
            ThrottledLogger(logger).error(
                "Productions whose process died cannot be ended; retrying.", error=error
            )
