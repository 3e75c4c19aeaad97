"""Reads of the history that listeners share.

When many listeners of a token come back at once, each needs the same events. One read
at a time runs for a token; what it gave is kept for a few seconds, in a bounded amount,
and who needs a part of it gets it from there: the same bytes objects.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from .feeds import Feed
from .history import Entry, Slice

KEPT_BYTES = 8 * 1024 * 1024
"""What is kept for all tokens of an event loop together."""
ENTRY_BYTES = 300
"""What an event costs besides its bytes."""
KEPT_SECONDS = 5.0
"""For how long it is."""
MAX_EVENTS = 500
"""The most events of one read."""

Read = Callable[[str, int, int], Awaitable[Slice]]


class Kept(NamedTuple):
    """What was read: when, at which reset of the feed, and how much it takes."""

    made: float
    resets: int
    size: int
    slice_: Slice


class Reads:
    """What was read lately from the history, for the streams of one event loop.

    It belongs to the feeds: one that has been there since the read knows what came after
    it, so that nobody takes an old end for the newest.

    :param read: reads a token's events after a place, at most as many as given.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._kept: OrderedDict[tuple[Feed, int], Kept] = OrderedDict()
        self._places: dict[Feed, list[int]] = {}
        self._size = 0

    async def read(self, feed: Feed, after: int) -> Slice:
        """Give what follows a place, read now or lately."""
        found = self._find(feed, after)
        if found is not None:
            # A long replay that needs no read still lets others have their turn.
            await asyncio.sleep(0)
            return found
        async with feed.reading:
            if feed.last == after:
                # Somebody else has read up to here, and the feed passes on what is newer.
                return Slice(complete=True, last=after)
            found = self._find(feed, after)
            if found is None:
                resets = feed.resets
                found = await self._read(feed.token, after, self._missing(feed, after))
                self._keep(feed, after, found, resets)
            return found

    def _find(self, feed: Feed, after: int) -> Slice | None:
        places = self._places.get(feed, ())
        at = bisect_right(places, after)
        if not at:
            return None
        kept = self._kept[feed, places[at - 1]]
        if time.monotonic() - kept.made > KEPT_SECONDS or kept.resets != feed.resets:
            return None
        slice_ = kept.slice_
        if places[at - 1] == after:
            return slice_
        # Only after an event that is in it: any other place may be one that never was.
        at = bisect_right(slice_.entries, after, key=_seq)
        if 0 < at < len(slice_.entries) and slice_.entries[at - 1].seq == after:
            return slice_.after(after)
        return None

    def _missing(self, feed: Feed, after: int) -> int:
        """Give how many events there are at most before what is kept already."""
        places = self._places.get(feed, ())
        at = bisect_right(places, after)
        return min(MAX_EVENTS, places[at] - after) if at < len(places) else MAX_EVENTS

    def _keep(self, feed: Feed, after: int, slice_: Slice, resets: int) -> None:
        if not slice_.entries:
            return
        self.forget(older_than=KEPT_SECONDS)
        self._drop(feed, after)
        # Each event is there up to three times: as it was read, as a frame, and in a batch.
        size = sum(
            (2 if len(batch.frames) == 1 else 3) * len(batch.data) for batch in slice_.batches
        )
        size += len(slice_.entries) * ENTRY_BYTES
        self._kept[feed, after] = Kept(time.monotonic(), resets, size, slice_)
        self._size += size
        insort(self._places.setdefault(feed, []), after)
        while self._size > KEPT_BYTES:
            self._drop(*next(iter(self._kept)))

    def _drop(self, feed: Feed, after: int) -> None:
        kept = self._kept.pop((feed, after), None)
        if kept is not None:
            self._size -= kept.size
            self._places[feed].remove(after)
            if not self._places[feed]:
                del self._places[feed]

    def forget(self, *, older_than: float = 0.0) -> None:
        """Forget what was read some seconds ago."""
        until = time.monotonic() - older_than
        while self._kept:
            key, kept = next(iter(self._kept.items()))
            if kept.made > until:
                break
            self._drop(*key)

    def forget_feed(self, feed: Feed) -> None:
        """Forget what belongs to a feed that is given up."""
        for after in list(self._places.get(feed, ())):
            self._drop(feed, after)


def _seq(entry: Entry) -> int:
    return entry.seq
