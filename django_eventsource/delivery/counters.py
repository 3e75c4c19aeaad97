"""The counters of delivery, over all event loops of the process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Literal

from .. import _runtime
from .._statistics import Histogram
from ..protocol.batches import Batch
from ..protocol.tokens import CONTROL_TOKEN

Missed = Literal["unknown", "expired", "overflow"]
"""The reason of a ``reset``, as it is sent."""


class Counters:
    """Counts what is passed to streams. Callable in any thread.

    A feed counts a batch once for all its streams, because it would cost too much for each.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all counts. In a fork, another thread of the parent may have held the lock."""
        # Reentrant, because the garbage collector may run code that publishes at any time.
        self.lock = threading.RLock()
        self.events = 0
        self.bytes = 0
        self.replays = 0
        self.replayed_events = 0
        self.replayed_bytes = 0
        self.resets: Counter[Missed] = Counter()
        self.overflows = 0
        self.repairs = 0
        self.latency = Histogram()

    def count_batch(self, batch: Batch, streams: int) -> None:
        """Count a batch that so many streams have written or buffered."""
        if not streams:
            return
        with self.lock:
            self.events += streams * batch.count
            self.bytes += streams * len(batch.data)
        if batch.published is not None:
            self.latency.observe(time.time() - batch.published)

    def count_replayed(self, batch: Batch, *, first: bool) -> None:
        """Count stored events that one stream sends.

        :param first: whether the replay begins with them.
        """
        with self.lock:
            self.replays += first
            self.replayed_events += batch.count
            self.replayed_bytes += len(batch.data)

    def count_reset(self, reason: Missed) -> None:
        """Count a ``reset`` that one stream sends."""
        with self.lock:
            self.resets[reason] += 1

    def count_overflow(self) -> None:
        """Count a buffer that was dropped."""
        with self.lock:
            self.overflows += 1

    def count_repair(self) -> None:
        """Count a read of the events that were missing in a gap."""
        with self.lock:
            self.repairs += 1


counters = Counters()
_runtime.on_reset(counters.reset)
_uncounted = Counters()
_runtime.on_reset(_uncounted.reset)


def counters_of(token: str) -> Counters:
    """Return the counters for a token. The messages between processes are not counted."""
    return _uncounted if token == CONTROL_TOKEN else counters
