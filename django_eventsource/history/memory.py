"""A history in the memory of one process: for tests, and where a restart may forget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .base import Draft, Entry, Found, Head, History, Slice, T


class _Life:
    """One life of a token: consecutive entries, the oldest of them at ``kept``."""

    __slots__ = ("closed", "entries", "first", "kept", "last", "own_ids", "size", "updated")

    def __init__(self, first: int) -> None:
        self.first = self.kept = first
        self.last = first - 1
        self.closed: int | None = None
        self.updated = 0.0
        self.size = 0
        self.entries: dict[int, tuple[float, Entry]] = {}
        self.own_ids: dict[str, int] = {}

    def add(self, draft: Draft, now: float) -> Entry:
        self.last += 1
        self.updated = now
        entry = Entry(seq=self.last, draft=draft)
        self.entries[self.last] = (now, entry)
        self.size += len(draft.data)
        if draft.event_id is not None:
            self.own_ids.setdefault(draft.event_id, self.last)
        if entry.finishes:
            self.closed = self.last
        return entry

    def follows(self, place: int, floor: int) -> bool:
        """Whether all events after a place are kept."""
        if place == floor:
            return self.kept == self.first
        return self.kept - 1 <= place <= self.last

    def drop_oldest(self) -> None:
        _, entry = self.entries.pop(self.kept)
        self.size -= len(entry.draft.data)
        if self.own_ids.get(entry.id) == entry.seq:
            del self.own_ids[entry.id]
        self.kept += 1


@dataclass(slots=True)
class _Lease:
    """The listeners of one process, and until when they count."""

    until: float
    listeners: dict[str, list[str]] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.until > time.monotonic()


class MemoryHistory(History):
    """Everything in a dictionary, guarded by one lock; forgotten when the process ends."""

    blocks = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()
        self._lives: dict[str, _Life] = {}
        self._leases: dict[str, _Lease] = {}
        # Ids of an earlier process are lower, and answered with reset.
        self._floor = time.time_ns() // 1000

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        now = time.time()
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                life = self._lives[token] = _Life(self.first_seq(self._floor))
            entries = [life.add(draft, now) for draft in drafts]
            while len(life.entries) > self.max_events or (
                life.size > self.max_bytes and len(life.entries) > 1
            ):
                life.drop_oldest()
            return entries

    def read(
        self, token: str, after: int, *, max_events: int = 500, max_bytes: int = 262_144
    ) -> Slice:
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                return Slice(complete=after == self._floor, last=self._floor)
            if not life.follows(after, self._floor):
                return Slice(complete=False, last=life.last, closed=life.closed == life.last)
            seq = life.first if after == self._floor else after + 1
            entries: list[Entry] = []
            while seq <= life.last and len(entries) < max_events:
                entry = life.entries[seq][1]
                max_bytes -= len(entry.draft.data)
                if entries and max_bytes < 0:
                    break
                entries.append(entry)
                seq += 1
            return Slice(entries=tuple(entries), complete=True, last=life.last)

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        with self._lock:
            return {token: self._head(token) for token in tokens}

    def _head(self, token: str) -> Head:
        life = self._lives.get(token)
        return Head(seq=life.last if life else self._floor, life=life is not None)

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                return Found(last=self._floor, seq=seq, complete=seq == self._floor)
            place = life.own_ids.get(cursor, seq)
            entry = life.entries.get(place or 0)
            return Found(
                last=life.last,
                closed=life.closed,
                seq=place,
                kind=entry[1].draft.kind if entry else None,
                complete=place is not None and life.follows(place, self._floor),
            )

    def newest(self, token: str) -> tuple[int, int | None]:
        with self._lock:
            life = self._lives.get(token)
            return (life.last, life.closed) if life else (self._floor, None)

    def oldest(self, token: str) -> int:
        with self._lock:
            life = self._lives.get(token)
            return life.kept - 1 if life else self._floor

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

    def present(self, token: str, *, elsewhere: str | None = None) -> list[str]:
        with self._lock:
            return [
                identity
                for process, lease in self._leases.items()
                if lease.valid and process != elsewhere
                for identity in lease.listeners.get(token, ())
            ]

    def withdraw(self, process: str) -> None:
        with self._lock:
            self._leases.pop(process, None)

    def prune(self) -> int:
        now = time.time()
        removed = 0
        with self._lock:
            for token, life in list(self._lives.items()):
                while life.entries and life.entries[life.kept][0] < now - self.max_age:
                    life.drop_oldest()
                    removed += 1
                if not life.entries and life.updated < now - self.token_max_age:
                    self._floor = max(self._floor, life.last)
                    del self._lives[token]
            self._leases = {name: lease for name, lease in self._leases.items() if lease.valid}
        return removed

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run at once: nothing here waits for anything but a short lock."""
        return func(*args, **kwargs)
