"""A history in the memory of one process, for tests and for events that a restart may lose."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .base import READ_BYTES, READ_EVENTS, History, T
from .records import Draft, Entry, Found, Head, Kind, Slice, utc

__all__ = ["MemoryHistory"]


class _Epoch:
    """One epoch of a token. ``kept`` is the sequence number of the oldest event kept."""

    __slots__ = (
        "closed",
        "entries",
        "first",
        "kept",
        "keys",
        "last",
        "own_ids",
        "size",
        "updated",
    )

    def __init__(self, first: int) -> None:
        self.first = self.kept = first
        self.last = first - 1
        self.closed: int | None = None
        self.updated = 0.0
        self.size = 0
        self.entries: dict[int, tuple[float, Entry]] = {}
        self.own_ids: dict[str, int] = {}
        self.keys: dict[str, int] = {}

    def add(self, draft: Draft, now: float) -> Entry:
        if draft.key is not None:
            if draft.key in self.keys:
                seq = self.keys[draft.key]
                return Entry.of_stored(draft, seq, self.entries[seq][1].draft.event_id)
            self.keys[draft.key] = self.last + 1
        self.last += 1
        self.updated = now
        entry = Entry(seq=self.last, draft=draft)
        self.entries[self.last] = (now, entry)
        self.size += len(draft.data)
        if draft.event_id is not None:
            self.own_ids.setdefault(draft.event_id, self.last)
        if entry.closes:
            self.closed = self.last
        return entry

    def is_complete_after(self, seq: int, floor: int) -> bool:
        if seq == floor:
            return self.kept == self.first
        return self.kept - 1 <= seq <= self.last

    def drop_oldest(self) -> None:
        _, entry = self.entries.pop(self.kept)
        self.size -= len(entry.draft.data)
        if self.own_ids.get(entry.id) == entry.seq:
            del self.own_ids[entry.id]
        if entry.draft.key is not None:
            del self.keys[entry.draft.key]
        self.kept += 1


@dataclass(slots=True)
class _Lease:
    """The listeners of one process, by token."""

    until: float
    listeners: dict[str, list[str]] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.until > time.monotonic()


class MemoryHistory(History):
    """Durable events in a dictionary, guarded by one lock.

    They are lost when the process ends. A listener that reconnects to another process receives
    ``reset``.
    """

    blocks = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()
        self._epochs: dict[str, _Epoch] = {}
        self._leases: dict[str, _Lease] = {}
        # The ids that an earlier process assigned are lower, so a read after them is not complete.
        self._floor = time.time_ns() // 1000

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        now = time.time()
        with self._lock:
            epoch = self._epochs.get(token)
            if epoch is None:
                epoch = self._epochs[token] = _Epoch(self.first_seq(self._floor))
            entries = [epoch.add(draft, now) for draft in drafts]
            while len(epoch.entries) > self.max_events or (
                epoch.size > self.max_bytes and len(epoch.entries) > 1
            ):
                epoch.drop_oldest()
            return entries

    def read(
        self,
        token: str,
        after: int,
        *,
        max_events: int = READ_EVENTS,
        max_bytes: int = READ_BYTES,
        times: bool = False,
    ) -> Slice:
        with self._lock:
            epoch = self._epochs.get(token)
            if epoch is None:
                return Slice(complete=after == self._floor, last=self._floor)
            seq = max(after + 1, epoch.kept)
            entries: list[Entry] = []
            while seq <= epoch.last and len(entries) < max_events:
                at, entry = epoch.entries[seq]
                max_bytes -= len(entry.draft.data)
                if entries and max_bytes < 0:
                    break
                entries.append(replace(entry, created=utc(at)) if times else entry)
                seq += 1
            return Slice(
                entries=tuple(entries),
                complete=epoch.is_complete_after(after, self._floor),
                last=epoch.last,
                closed=epoch.closed == epoch.last,
            )

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        with self._lock:
            return {token: self._head(token) for token in tokens}

    def _head(self, token: str) -> Head:
        epoch = self._epochs.get(token)
        return Head(seq=epoch.last if epoch else self._floor, has_epoch=epoch is not None)

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        with self._lock:
            epoch = self._epochs.get(token)
            if epoch is None:
                return Found(last=self._floor, seq=seq, complete=seq == self._floor)
            seq = epoch.own_ids.get(cursor, seq)
            entry = epoch.entries.get(seq or 0)
            return Found(
                last=epoch.last,
                closed=epoch.closed,
                seq=seq,
                kind=entry[1].draft.kind if entry else None,
                complete=seq is not None and epoch.is_complete_after(seq, self._floor),
            )

    def newest(self, token: str) -> tuple[int, int | None]:
        with self._lock:
            epoch = self._epochs.get(token)
            return (epoch.last, epoch.closed) if epoch else (self._floor, None)

    def rewind(self, token: str, max_events: int, max_seconds: float | None) -> int | None:
        oldest = 0.0 if max_seconds is None else time.time() - max_seconds
        with self._lock:
            epoch = self._epochs.get(token)
            if epoch is None:
                return None
            before = epoch.last
            while before >= epoch.kept and epoch.last - before < max_events:
                at, entry = epoch.entries[before]
                if at < oldest or (entry.closes and before < epoch.last):
                    break
                before -= 1
                if entry.draft.kind is Kind.WHOLE:
                    break
            return before

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        with self._lock:
            lease = self._leases.get(process)
            renewed = lease is not None and lease.valid
            if lease is None or not renewed:
                lease = self._leases[process] = _Lease(0)
            lease.until = time.monotonic() + seconds
            for token, identities in changes.items():
                lease.listeners[token] = list(identities)
                if not identities:
                    del lease.listeners[token]
            return renewed

    def present(self, token: str, *, exclude_process: str | None = None) -> list[str]:
        with self._lock:
            return [
                identity
                for process, lease in self._leases.items()
                if lease.valid and process != exclude_process
                for identity in lease.listeners.get(token, ())
            ]

    def withdraw(self, process: str) -> None:
        with self._lock:
            self._leases.pop(process, None)

    def prune(self) -> int:
        now = time.time()
        removed = 0
        with self._lock:
            for token, epoch in list(self._epochs.items()):
                while epoch.entries and epoch.entries[epoch.kept][0] < now - self.max_age:
                    epoch.drop_oldest()
                    removed += 1
                if not epoch.entries and epoch.updated < now - self.token_max_age:
                    self._floor = max(self._floor, epoch.last)
                    del self._epochs[token]
            self._leases = {name: lease for name, lease in self._leases.items() if lease.valid}
        return removed

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in the event loop, because it waits only for a short lock.

        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return func(*args, **kwargs)
