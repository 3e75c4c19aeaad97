"""The contract of a history: the ordered store of durable events.

A history assigns each event of a token its sequence number. Within an *epoch* of the token the
numbers are consecutive. An epoch begins with the token's first event. It ends when the history
drops the token, because nothing was published to it for ``TOKEN_MAX_AGE`` seconds. The numbers
of an epoch are higher than those of every earlier epoch.

The *floor* is the sequence number above which every new epoch begins. It is the position of a
listener that opens a token without an epoch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections

from ..conf import check_count, check_positive
from ..protocol.cursors import UNKNOWN, Cursor
from ..protocol.rewind import Rewind
from .records import Draft, Entry, Found, Head, Kind, Missing, Position, Slice
from .wake_ups import WakeUps

__all__ = ["READ_BYTES", "READ_EVENTS", "History"]

T = TypeVar("T")

READ_EVENTS = 500
"""The number of events that one read returns at most, unless the caller passes another bound."""
READ_BYTES = 256 * 1024
"""The bytes of values that one read returns at most, unless the caller passes another bound."""


class History(ABC):
    """Base class of all histories.

    The methods without the prefix ``a`` block the calling thread; their counterparts with the
    prefix are awaited. All of them may be called from several threads at once. All of them raise
    one of :attr:`storage_errors` if the store fails.

    :param MAX_EVENTS: the number of events to keep of each token.
    :param MAX_BYTES: the bytes to keep of each token, counted over the values of its events. The
        newest event is kept even if it is larger.
    :param MAX_AGE: seconds for which to keep an event.
    :param TOKEN_MAX_AGE: seconds after which to drop a token to which nothing was published. A
        listener that reconnects later receives ``reset``.
    :raises ImproperlyConfigured: if an option is not a positive number, or ``TOKEN_MAX_AGE`` is
        less than ``MAX_AGE``.
    """

    shared = False
    """Whether other processes can read the events that this process appends."""

    storage_errors: tuple[type[Exception], ...] = (DatabaseError,)
    """The exceptions that the methods raise if the store fails."""

    blocks = True
    """Whether the methods without the prefix ``a`` wait for more than a short lock."""

    using: str = DEFAULT_DB_ALIAS
    """The alias of the database whose transaction must commit before events are published."""

    has_outbox = False
    """Whether the history stores the pending events of the database :attr:`using`."""

    def __init__(
        self,
        *,
        MAX_EVENTS: int = 10_000,  # noqa: N803
        MAX_BYTES: int = 64 * 1024 * 1024,  # noqa: N803
        MAX_AGE: float = 86_400,  # noqa: N803
        TOKEN_MAX_AGE: float = 30 * 86_400,  # noqa: N803
    ) -> None:
        for name, count in (("MAX_EVENTS", MAX_EVENTS), ("MAX_BYTES", MAX_BYTES)):
            check_count(f"EVENTSOURCE_HISTORY {name}", count)
        for name, value in (("MAX_AGE", MAX_AGE), ("TOKEN_MAX_AGE", TOKEN_MAX_AGE)):
            check_positive(f"EVENTSOURCE_HISTORY {name}", value)
        if TOKEN_MAX_AGE < MAX_AGE:
            raise ImproperlyConfigured(
                f"EVENTSOURCE_HISTORY TOKEN_MAX_AGE ({TOKEN_MAX_AGE!r}) must not be less than "
                f"MAX_AGE ({MAX_AGE!r})."
            )
        self.max_events = MAX_EVENTS
        self.max_bytes = MAX_BYTES
        self.max_age = MAX_AGE
        self.token_max_age = TOKEN_MAX_AGE

    # The contract: a backend implements these methods

    @abstractmethod
    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        """Store all events after the newest event of a token, or none of them.

        A draft with a key is passed alone. It is not stored if the token has an event with the
        same key, also if several processes append the two at the same time.

        :param token: the token of the events.
        :param drafts: the events, in the order in which listeners receive them.
        :returns: the stored events, with consecutive sequence numbers. If the token has an event
            with the key of the draft, an entry with :attr:`Entry.repeated` and the sequence
            number and id of that event.
        :raises storage_errors: if the store fails. No event was stored then, unless the text of
            the error states that this is not known.
        """

    @abstractmethod
    def read(
        self,
        token: str,
        after: int,
        *,
        max_events: int = READ_EVENTS,
        max_bytes: int = READ_BYTES,
        times: bool = False,
    ) -> Slice:
        """Read the events after a position, the oldest first.

        :param token: the token of the events.
        :param after: the sequence number before that of the first event to read.
        :param max_events: the number of events to return at most.
        :param max_bytes: the bytes of values to return at most. The first event is returned even
            if it is larger.
        :param times: whether to set the ``created`` of the entries.
        :returns: the events, and whether any are missing between ``after`` and the first one.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Return the newest position of each token.

        Before that, store the events that a committed transaction of a process that has ended
        left in the outbox, if the history has one.

        :param tokens: the tokens to look up.
        :returns: the heads by token. A token is left out while the server that stores it cannot be
            reached, if other servers can.
        :raises storage_errors: if the whole store fails.
        """

    @abstractmethod
    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        """Find the event that a cursor names.

        A client may send any cursor, so the search for an unknown one must not take longer than
        for a known one.

        :param token: the token of the event.
        :param cursor: the cursor's text. If it is the own id of several events, the oldest of them
            is found.
        :param seq: the sequence number that the cursor contains, which counts if no event has the
            text as its own id; ``None`` if it contains none.
        :returns: the position, and whether all events after it are kept.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def newest(self, token: str) -> tuple[int, int | None]:
        """Return the newest position of a token and that of its last close.

        :param token: the token to look up.
        :returns: the newest sequence number, or the floor if the token has no epoch; and the
            sequence number of the last event with the close action, or ``None``.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def rewind(self, token: str, max_events: int, max_seconds: float | None) -> int | None:
        """Return the position before the oldest of the newest events of a token.

        Streams end at a close, so these events do not include a close and the events before it,
        unless the close is the newest event. They do not include the events before one of the
        kind ``WHOLE``, which replaces them.

        :param token: the token of the events.
        :param max_events: the number of events at most.
        :param max_seconds: the age of the oldest event at most; ``None`` for any.
        :returns: the position, which is the newest one if the history keeps no such event;
            ``None`` if the token has no epoch.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        """Store the listeners of a process and renew its lease.

        :param process: the name of the process, which no other process has or had.
        :param changes: for each token the identities of its listeners in this process, ``""`` for
            an anonymous one, or an empty sequence if it has none. Other tokens are not changed.
        :param seconds: the seconds until the lease expires.
        :returns: whether the process had a valid lease. If not, the listeners that it announced
            before have been removed, and the caller must announce all of them again.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def present(self, token: str, *, exclude_process: str | None = None) -> list[str]:
        """Return the identities of the listeners in all processes with a valid lease.

        :param token: the token of the listeners.
        :param exclude_process: the name of a process whose listeners are left out, or ``None``.
        :returns: one identity for each listener, ``""`` for an anonymous one, in any order.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def withdraw(self, process: str) -> None:
        """End the lease of a process and remove its listeners.

        :param process: the name of the process. One without a lease is ignored.
        :raises storage_errors: if the store fails.
        """

    @abstractmethod
    def prune(self) -> int:
        """Remove the events beyond the bounds, and the listeners of expired leases.

        :returns: the number of events removed.
        :raises storage_errors: if the store fails.
        """

    # Methods that a backend may replace

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        """Accept events inside a transaction, to be stored with its commit or after it.

        :param token: the token of the events.
        :param drafts: the events, in the order in which listeners receive them.
        :returns: a function to call after the commit. It returns what :meth:`append` returns, with
            ``None`` in place of an event that was stored and trimmed already. If it raises, the
            events are lost, unless the history has an outbox.
        :raises storage_errors: if the store fails.
        """
        return lambda: self.append(token, drafts)

    def locate(self, token: str, cursor: Cursor | None, rewind: Rewind | None = None) -> Position:
        """Return the position from which a stream continues.

        :param token: the token of the stream.
        :param cursor: the client's cursor, or ``None`` for a client without one.
        :param rewind: the stored events with which a client without a cursor starts; ``None`` to
            start at the newest event.
        :returns: the position of the cursor, or the newest one if events after it are missing.
        :raises storage_errors: if the store fails.
        """
        if cursor is None:
            last, closed = self.newest(token)
            before = None if rewind is None else self._before(token, rewind)
            if before is None or before >= last:
                return _newest(last, closed)
            # The client has not received the event at this position, which may be a close.
            cursor = Cursor.at(before, reopened=True)
            return Position(seq=before, cursor=cursor, rewound=True)
        if cursor is UNKNOWN:
            return _newest(*self.newest(token), missing="unknown")
        found = self.find(token, cursor.text, cursor.seq)
        if found.seq is None or not found.complete:
            missing: Missing = "unknown" if cursor.seq is None else "expired"
            return _newest(found.last, found.closed, missing=missing)
        closes = found.closed == found.seq if found.kind is None else found.kind == Kind.CLOSE
        return Position(seq=found.seq, cursor=cursor, closed=closes and not cursor.reopened)

    def _before(self, token: str, rewind: Rewind) -> int | None:
        most = rewind.max_events
        if most == 0:
            return None
        most = self.max_events if most is None else min(most, self.max_events)
        return self.rewind(token, most, rewind.max_seconds)

    def changes(self, since: Any) -> tuple[Any, dict[str, Head] | None]:
        """Return the heads that have changed since an earlier call, whatever the number of tokens.

        The caller finds news sooner with it. It still calls :meth:`heads` for all tokens from
        time to time, because a change can become visible later than this method assumes.

        :param since: what the earlier call returned first; ``None`` in the first call.
        :returns: a value for the next call, and the heads by token, or ``None`` if the caller must
            call :meth:`heads` now.
        :raises storage_errors: if the store fails.
        """
        return None, None

    @property
    def wake_ups(self) -> WakeUps | None:
        """The wake-ups of the store; ``None`` if it has none or they are disabled."""
        return None

    def first_seq(self, floor: int) -> int:
        """Return the first sequence number of a new epoch.

        :param floor: the highest sequence number of all earlier epochs.
        :returns: the clock in microseconds, or the next number if the clock is not above the
            floor.
        """
        return max(time.time_ns() // 1000, floor + 1)

    # The awaited counterparts

    async def aread(self, token: str, after: int, **options: Any) -> Slice:
        """Await :meth:`read`. The events are encoded too, outside of the event loop."""
        return await self.call_for(token, self._read_and_encode, token, after, **options)

    def _read_and_encode(self, token: str, after: int, **options: Any) -> Slice:
        slice_ = self.read(token, after, **options)
        _ = slice_.batches
        return slice_

    async def aheads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Await :meth:`heads`."""
        return await self.call(self.heads, list(tokens))

    async def achanges(self, since: Any) -> tuple[Any, dict[str, Head] | None]:
        """Await :meth:`changes`."""
        return await self.call(self.changes, since)

    async def alocate(
        self, token: str, cursor: Cursor | None, rewind: Rewind | None = None
    ) -> Position:
        """Await :meth:`locate`."""
        return await self.call_for(token, self.locate, token, cursor, rewind)

    async def aannounce(
        self, process: str, changes: Mapping[str, Sequence[str]], seconds: float
    ) -> bool:
        """Await :meth:`announce`."""
        return await self.call(self.announce, process, changes, seconds)

    async def apresent(self, token: str, *, exclude_process: str | None = None) -> list[str]:
        """Await :meth:`present`."""
        return await self.call_for(token, self.present, token, exclude_process=exclude_process)

    async def awithdraw(self, process: str) -> None:
        """Await :meth:`withdraw`."""
        await self.call(self.withdraw, process)

    async def aprune(self) -> int:
        """Await :meth:`prune`."""
        return await self.call(self.prune)

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Await a function that may block, outside of the event loop.

        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return await sync_to_async(func)(*args, **kwargs)

    async def call_for(self, token: str, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Await a function that may block and needs only the server that stores one token.

        :param token: the token.
        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return await self.call(func, *args, **kwargs)


def check_using(using: str) -> str:
    """Return the option ``USING`` if it is the alias of a database.

    :raises ImproperlyConfigured: if it is not.
    """
    if using not in connections:
        raise ImproperlyConfigured(
            f"EVENTSOURCE_HISTORY USING must be an alias in DATABASES, not {using!r}."
        )
    return using


def _newest(seq: int, closed: int | None, missing: Missing | None = None) -> Position:
    # A client that starts at a close has not received it, so it opens the token again.
    cursor = Cursor.at(seq, reopened=closed == seq)
    return Position(seq=seq, cursor=cursor, missing=missing)
