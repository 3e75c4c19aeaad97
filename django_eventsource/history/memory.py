"""A history in the memory of one process: for tests, and where a restart may forget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .base import Draft, Entry, History, Kind, Slice, T


class _Life:
    """One life of a token: consecutive entries, the oldest of them at ``kept``."""

    __slots__ = ("closed", "entries", "first", "kept", "last", "own_ids", "updated")

    def __init__(self, first: int) -> None:
        self.first = self.kept = first
        self.last = first - 1
        self.closed: int | None = None
        self.updated = 0.0
        self.entries: dict[int, tuple[float, Entry]] = {}
        self.own_ids: dict[str, int] = {}

    def add(self, draft: Draft, now: float) -> Entry:
        self.last += 1
        self.updated = now
        entry = Entry(seq=self.last, draft=draft)
        self.entries[self.last] = (now, entry)
        if draft.event_id is not None:
            self.own_ids.setdefault(draft.event_id, self.last)
        if entry.finishes:
            self.closed = self.last
        return entry

    def drop_oldest(self) -> None:
        _, entry = self.entries.pop(self.kept)
        if self.own_ids.get(entry.id) == entry.seq:
            del self.own_ids[entry.id]
        self.kept += 1


class MemoryHistory(History):
    """Everything in a dictionary, guarded by one lock; forgotten when the process ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()
        self._lives: dict[str, _Life] = {}
        # Ids of an earlier process are lower, and answered with reset.
        self._floor = time.time_ns() // 1000

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        now = time.time()
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                life = self._lives[token] = _Life(self.first_seq(self._floor))
            entries = [life.add(draft, now) for draft in drafts]
            while len(life.entries) > self.max_events:
                life.drop_oldest()
            return entries

    def read(
        self, token: str, after: int, *, max_events: int = 500, max_bytes: int = 262_144
    ) -> Slice:
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                return Slice(complete=after == self._floor, last=self._floor)
            seq = after + 1
            if after == self._floor:
                seq = life.first
            if not life.kept <= seq <= life.last + 1:
                return Slice(complete=False, last=life.last, closed=life.closed == life.last)
            entries: list[Entry] = []
            while seq <= life.last and len(entries) < max_events:
                entry = life.entries[seq][1]
                max_bytes -= len(entry.draft.data)
                if entries and max_bytes < 0:
                    break
                entries.append(entry)
                seq += 1
            return Slice(entries=tuple(entries), complete=True, last=life.last)

    def heads(self, tokens: Iterable[str]) -> tuple[dict[str, int], int]:
        with self._lock:
            lives = ((token, self._lives.get(token)) for token in tokens)
            return {token: life.last for token, life in lives if life}, self._floor

    def find(self, token: str, cursor: str, seq: int | None) -> tuple[int, Kind] | None:
        with self._lock:
            life = self._lives.get(token)
            if life is None:
                return None
            place = life.own_ids.get(cursor, seq)
            if place not in life.entries:
                return None
            return place, life.entries[place][1].draft.kind

    def newest(self, token: str) -> tuple[int, int | None]:
        with self._lock:
            life = self._lives.get(token)
            return (life.last, life.closed) if life else (self._floor, None)

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
        return removed

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run at once: nothing here waits for anything but a short lock."""
        return func(*args, **kwargs)
