"""Histograms of seconds, which the rooms keep beside their counters."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper bounds of the buckets of all histograms, in seconds."""

observers: list[Callable[[], None]] = []
"""Called after each duration that a histogram has counted. A loop with streams counts its lag each
second, and publishers their events, so they are called while anything changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The durations that a histogram has counted."""

    counts: tuple[int, ...]
    """The number of durations up to each bound of :data:`BOUNDS` and above the one before it, then
    the number above the last bound."""
    seconds: float
    """The sum of the durations."""

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self.counts)


class Histogram:
    """Counts durations in fixed buckets. Callable in any thread."""

    __slots__ = ("_counts", "_lock", "_seconds")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all counts. In a fork, another thread of the parent may have held the lock."""
        # Reentrant, because the garbage collector may run code that publishes at any time.
        self._lock = threading.RLock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration. A negative one, of two clocks that differ, counts as 0."""
        seconds = max(seconds, 0.0)
        with self._lock:
            self._counts[bisect_left(BOUNDS, seconds)] += 1
            self._seconds += seconds
        for observer in observers:
            observer()

    def distribution(self) -> Distribution:
        """Return what was counted."""
        with self._lock:
            return Distribution(counts=tuple(self._counts), seconds=self._seconds)
