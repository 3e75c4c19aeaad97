"""The replay cache: what was read from the history, shared by the listeners of a token.

When many listeners of a token reconnect at once, each of them needs the same events. One read
at a time runs for a token. Its result is kept for a few seconds, in a bounded amount, and other
listeners receive their part of it: the same bytes objects.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import NamedTuple

from ..history import Slice
from .feed import Feed

ENTRY_BYTES = 300
"""The bytes that an event takes besides its data."""
MAX_EVENTS = 2000
"""The most events of one read. The buffer of a stream bounds their bytes."""

Read = Callable[[str, int, int], Awaitable[Slice]]


class CachedSlice(NamedTuple):
    """A slice that was read from the history."""

    read_at: float
    """The time of the read, on the monotonic clock."""
    resets: int
    """The resets of the feed before the read."""
    size: int
    """The bytes that the slice takes."""
    slice_: Slice


class ReplayCache:
    """The slices that were read from the history in the last seconds, for one event loop.

    A slice belongs to a feed. A feed that exists since the read has passed on the events after
    it, so that a listener does not take an old end of the history for the newest one.

    :param read: reads the events of a token after a sequence number, up to a number of events.
    """

    kept_bytes = 8 * 1024 * 1024
    """The bytes that are kept for all tokens of an event loop together."""
    kept_seconds = 5.0
    """Seconds for which a slice is kept."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._cached: OrderedDict[tuple[Feed, int], CachedSlice] = OrderedDict()
        self._starts: dict[Feed, list[int]] = {}
        """The sequence numbers after which the cached slices of a feed begin, ascending."""
        self._locks: dict[Feed, asyncio.Lock] = {}
        """Held while the history is read for the streams of a feed."""
        self._size = 0

    async def read(self, feed: Feed, after: int) -> Slice:
        """Return the events after a sequence number, from the cache or the history."""
        found = self._find(feed, after)
        if found is not None:
            # Without a read to wait for, a long replay would keep other streams from running.
            await asyncio.sleep(0)
            return found
        async with self._locks.setdefault(feed, asyncio.Lock()):
            if feed.last == after:
                # Another stream has read up to here, and the feed passes on newer events.
                return Slice(complete=True, last=after)
            found = self._find(feed, after)
            if found is None:
                resets = feed.resets
                found = await self._read(feed.token, after, self._events_to_read(feed, after))
                self._keep(feed, after, found, resets)
            return found

    def _find(self, feed: Feed, after: int) -> Slice | None:
        starts = self._starts.get(feed, ())
        at = bisect_right(starts, after)
        if not at:
            return None
        cached = self._cached[feed, starts[at - 1]]
        if time.monotonic() - cached.read_at > self.kept_seconds or cached.resets != feed.resets:
            return None
        slice_ = cached.slice_
        if starts[at - 1] == after:
            return slice_
        # Only after an event of the slice: the history never assigned other numbers.
        at = bisect_right(slice_.entries, after, key=attrgetter("seq"))
        if 0 < at < len(slice_.entries) and slice_.entries[at - 1].seq == after:
            return slice_.after(after)
        return None

    def _events_to_read(self, feed: Feed, after: int) -> int:
        """Return the number of events to read, up to the start of the next cached slice."""
        starts = self._starts.get(feed, ())
        at = bisect_right(starts, after)
        return min(MAX_EVENTS, starts[at] - after) if at < len(starts) else MAX_EVENTS

    def _keep(self, feed: Feed, after: int, slice_: Slice, resets: int) -> None:
        if not slice_.entries or not slice_.complete:
            return
        self.discard(older_than=self.kept_seconds)
        self._drop(feed, after)
        # An event is kept as it was read, and in its batch.
        size = sum(len(batch.data) + batch.memory for batch in slice_.batches)
        size += len(slice_.entries) * ENTRY_BYTES
        self._cached[feed, after] = CachedSlice(time.monotonic(), resets, size, slice_)
        self._size += size
        insort(self._starts.setdefault(feed, []), after)
        while self._size > self.kept_bytes:
            self._drop(*next(iter(self._cached)))

    def _drop(self, feed: Feed, after: int) -> None:
        cached = self._cached.pop((feed, after), None)
        if cached is not None:
            self._size -= cached.size
            self._starts[feed].remove(after)
            if not self._starts[feed]:
                del self._starts[feed]

    def discard(self, *, older_than: float = 0.0) -> None:
        """Drop the slices that were read more than some seconds ago."""
        until = time.monotonic() - older_than
        while self._cached:
            key, cached = next(iter(self._cached.items()))
            if cached.read_at > until:
                break
            self._drop(*key)

    def discard_feed(self, feed: Feed) -> None:
        """Drop the slices of a feed that is no longer used."""
        for after in list(self._starts.get(feed, ())):
            self._drop(feed, after)
        self._locks.pop(feed, None)
