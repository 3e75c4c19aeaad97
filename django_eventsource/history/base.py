"""The contract of a history: the ordered store of durable events.

A history gives each event of a token its sequence number: consecutive within a life of
the token, and higher than every number of an earlier life. A life begins with the first
event and ends when the token was idle for so long that the history forgot it.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, DatabaseError

from ..batches import Batch, Frame, gather
from ..conf import conf, number_error
from ..events import Event, check_id, encode_text, retry_ms, unify_line_ends
from ..exceptions import EventTooLarge
from ..frames import encode_event, encode_retry, event_size

T = TypeVar("T")

MAX_CURSOR_LENGTH = 255
_CURSOR = re.compile(r"([0-9]{1,18})(\+?)")


class Kind(StrEnum):
    """How listeners treat an event."""

    EVENT = "event"
    RETRY = "retry"
    FINISH = "finish"


@dataclass(slots=True, kw_only=True)
class Draft:
    """A checked event, ready to be stored or sent. Nobody changes it.

    (Nor is it frozen: that would make it take three times as long to make one.)
    """

    action: str
    data: bytes
    """UTF-8, its lines joined with LF."""
    event_id: str | None = None
    """The id of its own that a class gave it; ``None``: the sequence number."""
    kind: Kind = Kind.EVENT

    @classmethod
    def of(cls, event: Event) -> Draft:
        """Read an event once: its lines, its id, its kind.

        :raises ValueError: when the event could not be sent as it is, or is too large.
        """
        value = event.value
        texts = [value] if isinstance(value, str) else value
        text = "\n".join(texts)
        if "\r" in text:
            text = "\n".join(map(unify_line_ends, texts))
        kind = Kind.EVENT
        if event.action == event.RETRY:
            retry_ms(text.split("\n"))
            kind = Kind.RETRY
        elif event.action == event.FINISH:
            kind = Kind.FINISH
        event_id = None if event.id is None else str(event.id)
        if event_id is not None:
            check_id(event_id)
        data = encode_text("value", text)
        size, most = event_size(event.action, data), conf.max_event_bytes
        if size > most:
            raise EventTooLarge(
                f"The event has {size} bytes as it is sent; at most {most} are allowed "
                "(EVENTSOURCE_MAX_EVENT_BYTES)."
            )
        return cls(
            action=event.action,
            data=data,
            event_id=event_id,
            kind=kind,
        )

    def frame(self, seq: int | None = None) -> bytes:
        """Encode for the wire; with a sequence number it is a durable event."""
        event_id = self.event_id if seq is None else (self.event_id or str(seq))
        if self.kind == Kind.RETRY:
            return encode_retry(int(self.data), event_id)
        return encode_event(self.action, self.data, event_id)


@dataclass(slots=True, kw_only=True)
class Entry:
    """An event in its place in the history. Nobody changes it."""

    seq: int
    draft: Draft

    @property
    def id(self) -> str:
        """The id on the wire."""
        return self.draft.event_id or str(self.seq)

    @property
    def finishes(self) -> bool:
        """Does this event end the streams of its token?"""
        return self.draft.kind == Kind.FINISH

    def frame(self) -> bytes:
        """Encode for the wire."""
        return self.draft.frame(self.seq)

    @property
    def numbered(self) -> Frame:
        """What batches are made of."""
        return self.seq, self.frame(), self.finishes


def cursor_at(seq: int, *, closed: bool) -> str:
    """Give the cursor of a listener that starts at a place.

    One that starts at a close has not seen it: it opens the token anew.
    """
    return f"{seq}+" if closed else str(seq)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What a read gives: events in order, right after the place that was asked for.

    ``complete`` is ``False`` when the history cannot vouch that nothing is missing
    between that place and the first entry (or ``last``); ``last`` is the newest sequence
    number; ``more`` says that entries were left for the next read.
    """

    entries: tuple[Entry, ...] = ()
    complete: bool
    last: int
    closed: bool = False
    """Is the newest event a close?"""

    @property
    def resume(self) -> str:
        """The cursor of a listener that goes on at the newest event."""
        return cursor_at(self.last, closed=self.closed)

    @property
    def more(self) -> bool:
        """Are there entries after these?"""
        return bool(self.entries) and self.entries[-1].seq < self.last

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The entries, encoded once for all who share the slice; a close ends a batch."""
        return tuple(gather(entry.numbered for entry in self.entries))

    def after(self, place: int) -> Slice:
        """Give what follows one of its entries, which is not the last."""
        entries = tuple(entry for entry in self.entries if entry.seq > place)
        rest = replace(self, entries=entries)
        # Encoded already.
        rest.__dict__["batches"] = tuple(
            batch.after(place) for batch in self.batches if (batch.last or 0) > place
        )
        return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in a token's history, from which a stream goes on."""

    seq: int
    cursor: str
    """Its id on the wire."""
    known: bool = True
    """Is it the place that the listener asked for, with all that follows still there?"""
    closed: bool = False
    """Is the event at this place the close that ended the listener's stream?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a history finds out about a cursor."""

    last: int
    """The newest sequence number, or the floor when the token has no history."""
    closed: int | None = None
    """The sequence number of the last close."""
    seq: int | None = None
    """The place that the cursor means; ``None`` if it means none."""
    kind: Kind | None = None
    """How listeners treat the event at this place; ``None`` if it is not kept."""
    complete: bool = False
    """Whether all events after this place are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where a token's history stands."""

    seq: int
    """The newest sequence number, or the floor when the token has no history."""
    life: bool
    """Does the token have a history?"""
    epoch: str = ""
    """Changes when the store was lost: emptied or replaced."""


class History(ABC):
    """Base of all histories. The plain methods block, the ``a`` ones await.

    :param MAX_EVENTS: events kept of each token.
    :param MAX_BYTES: bytes kept of each token, counted over the values of its events. The newest
        event is kept even if it is larger.
    :param MAX_AGE: seconds for which an event is kept.
    :param TOKEN_MAX_AGE: seconds for which an idle token's place is remembered; a
        listener that comes back later is told ``reset``.
    """

    shared = False
    """Do other processes see what this one appends?"""

    failures: tuple[type[Exception], ...] = (DatabaseError,)
    """What its methods raise when the store fails, which is nobody's mistake."""

    blocks = True
    """Do its plain methods wait for anything but a short lock?"""

    using: str = DEFAULT_DB_ALIAS
    """Which database's transaction must commit before its events are published?"""

    def __init__(
        self,
        *,
        MAX_EVENTS: int = 10_000,  # noqa: N803
        MAX_BYTES: int = 64 * 1024 * 1024,  # noqa: N803
        MAX_AGE: float = 86_400,  # noqa: N803
        TOKEN_MAX_AGE: float = 30 * 86_400,  # noqa: N803
    ) -> None:
        for name, value in (
            ("MAX_EVENTS", MAX_EVENTS),
            ("MAX_BYTES", MAX_BYTES),
            ("MAX_AGE", MAX_AGE),
            ("TOKEN_MAX_AGE", TOKEN_MAX_AGE),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise number_error(f"EVENTSOURCE_HISTORY {name}", value, "a positive number")
        for name, value in (("MAX_EVENTS", MAX_EVENTS), ("MAX_BYTES", MAX_BYTES)):
            if not isinstance(value, int):
                raise number_error(f"EVENTSOURCE_HISTORY {name}", value, "a whole number")
        if TOKEN_MAX_AGE < MAX_AGE:
            raise ImproperlyConfigured(
                f"EVENTSOURCE_HISTORY TOKEN_MAX_AGE ({TOKEN_MAX_AGE!r}) must not be less than "
                f"MAX_AGE ({MAX_AGE!r})."
            )
        self.max_events = MAX_EVENTS
        self.max_bytes = MAX_BYTES
        self.max_age = MAX_AGE
        self.token_max_age = TOKEN_MAX_AGE

    # The contract

    @abstractmethod
    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        """Store events at the end, all or none, with consecutive sequence numbers."""

    @abstractmethod
    def read(
        self, token: str, after: int, *, max_events: int = 500, max_bytes: int = 262_144
    ) -> Slice:
        """Read what follows the sequence number ``after``, oldest first.

        One event is given even if it is larger than ``max_bytes``.
        """

    @abstractmethod
    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Give the heads of the tokens; of those whose store is away now, none.

        Finishes what a process that died left half done.
        """

    @abstractmethod
    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        """Find the oldest event whose own id is ``cursor``, else the place ``seq``.

        A client may send any cursor: an unknown one must not cost more than a known one.
        """

    @abstractmethod
    def newest(self, token: str) -> tuple[int, int | None]:
        """Give the newest sequence number (or the floor), and that of the last close."""

    @abstractmethod
    def oldest(self, token: str) -> int:
        """Give the place right before the oldest event kept; the newest place if none is."""

    @abstractmethod
    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        """Say who listens in a process, and renew the process's lease.

        :param process: a name that no other process has, or had.
        :param changes: for each token the identities of its listeners in this process,
            ``""`` for an anonymous one; empty when none is left. What is said of other
            tokens stays.
        :param seconds: for which the lease is valid from now on.
        :returns: ``False`` when there was no valid lease to renew. Then all that an
            expired one had left is forgotten: announce everything again.
        """

    @abstractmethod
    def present(self, token: str, *, elsewhere: str | None = None) -> list[str]:
        """Give the identities of all listeners, in all processes with a valid lease.

        :param elsewhere: but for this one.
        """

    @abstractmethod
    def withdraw(self, process: str) -> None:
        """End a process's lease, and forget its listeners."""

    @abstractmethod
    def prune(self) -> int:
        """Remove what is over the bounds; give the number of events removed.

        Removes what the leases of dead processes left, too.
        """

    # What follows from it

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        """Take events inside a transaction; give what to call after its commit.

        It gives each event's entry, or ``None`` for one that was trimmed already.
        """
        return lambda: self.append(token, drafts)

    def release(self) -> None:  # noqa: B027
        """Let go of what a burst of reads held, such as a database connection."""

    def locate(self, token: str, cursor: str | None) -> Position:
        """Find the place where a listener goes on.

        :param cursor: its last event id, or ``None`` for a fresh listener, which starts
            at the newest event. A cursor is a sequence number, with ``+`` behind it when
            the listener opened the token anew after the close there, or an event's own id.
        """
        if not cursor:
            seq, closed = self.newest(token)
            return _newest(seq, closed, known=True)
        match = _CURSOR.fullmatch(cursor)
        found = self.find(token, cursor, int(match[1]) if match else None)
        if found.seq is None or not found.complete:
            return _newest(found.last, found.closed, known=False)
        reopened = match is not None and bool(match[2])
        closes = found.closed == found.seq if found.kind is None else found.kind == Kind.FINISH
        return Position(seq=found.seq, cursor=cursor, closed=closes and not reopened)

    def first_seq(self, floor: int) -> int:
        """Give a new life's first number: the clock in microseconds, above the floor."""
        return max(time.time_ns() // 1000, floor + 1)

    # The same, awaited

    async def aread(
        self, token: str, after: int, *, max_events: int = 500, max_bytes: int = 262_144
    ) -> Slice:
        """Await :meth:`read`."""
        limits = {"max_events": max_events, "max_bytes": max_bytes}
        return await self.call_for(token, self.read, token, after, **limits)

    async def aheads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Await :meth:`heads`."""
        return await self.call(self.heads, list(tokens))

    async def alocate(self, token: str, cursor: str | None) -> Position:
        """Await :meth:`locate`."""
        return await self.call_for(token, self.locate, token, cursor)

    async def aannounce(
        self, process: str, changes: Mapping[str, Sequence[str]], seconds: float
    ) -> bool:
        """Await :meth:`announce`."""
        return await self.call(self.announce, process, changes, seconds)

    async def apresent(self, token: str, *, elsewhere: str | None = None) -> list[str]:
        """Await :meth:`present`."""
        return await self.call_for(token, self.present, token, elsewhere=elsewhere)

    async def awithdraw(self, process: str) -> None:
        """Await :meth:`withdraw`."""
        await self.call(self.withdraw, process)

    async def aprune(self) -> int:
        """Await :meth:`prune`."""
        return await self.call(self.prune)

    async def arelease(self) -> None:
        """Await :meth:`release`."""
        await self.call(self.release)

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking method off the event loop."""
        return await sync_to_async(func)(*args, **kwargs)

    async def call_for(self, token: str, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking method that needs only where one token is kept."""
        return await self.call(func, *args, **kwargs)


def _newest(seq: int, closed: int | None, *, known: bool) -> Position:
    return Position(seq=seq, cursor=cursor_at(seq, closed=closed == seq), known=known)
