"""The notifier: sends durable events over the channel layer, off the path of their publishers.

The history has these events already. So the notifier may drop what it cannot send: each hub finds
the events at its next history check.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence

from channels.layers import BaseChannelLayer

from .. import _runtime
from .._logging import ThrottledLogger
from .._timing import Backoff
from ..protocol.batches import Batch, merge
from .layer import MESSAGE_BYTES, Background, background, send_batches

logger = logging.getLogger("django_eventsource.delivery")
throttled = ThrottledLogger(logger)


class Notifier:
    """Sends batches on the event loop of a thread, those of each group in their order.

    :param background: the thread.
    """

    waiting_bytes = 4 * 1024 * 1024
    """The bytes that may wait. What is added beyond them is dropped."""
    late_seconds = 5.0
    """Seconds after which it is too late to send: the history checks have found the events."""
    report_seconds = 10.0
    """Seconds between two reports that events were dropped."""
    send_seconds = 2.0
    """Seconds that the layer may take for each message."""
    flush_seconds = 2.0
    """Seconds for which the end of the process waits for what is left to send."""
    backoff_seconds: tuple[float, ...] = (0.1, 0.5, 1, 2)
    """Seconds without a send after failures that follow one another."""
    pause_seconds = 0.005
    """The least seconds between two rounds of messages, so that a burst of events is sent in few
    of them. The first event is sent at once."""
    pause_share = 8.0
    """The pause after a round, as a multiple of the time that it took. Publishers, which share the
    interpreter with the thread, get most of the time."""
    most_pause_seconds = 0.05
    """The most seconds between two rounds."""
    workers = 16
    """The number of groups that are sent to at the same time."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self.reset()

    def reset(self) -> None:
        """Drop what waits. In a fork, the thread of the parent does not exist."""
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Batch]] = {}
        self._size = 0
        self._idle = threading.Event()
        self._idle.set()
        self._reported_at = -math.inf

    def put(self, layer: BaseChannelLayer, group: str, batches: Sequence[Batch]) -> None:
        """Send batches soon. It does not wait, and any thread may call it.

        :param layer: the layer to send them on.
        """
        size = sum(len(batch.data) for batch in batches)
        with self._lock:
            fits = not self._waiting or self._size + size <= self.waiting_bytes
            must_start = fits and self._idle.is_set()
            if fits:
                self._waiting.setdefault(group, []).extend(batches)
                self._size += size
            if must_start:
                self._idle.clear()
        # Outside of the lock, because a handler of the log may publish.
        if must_start:
            self._start(layer)
        elif not fits:
            self._report_dropped()

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything is sent or dropped, and return whether it is.

        :param seconds: the most seconds to wait; :attr:`flush_seconds` if not passed.
        """
        return self._idle.wait(self.flush_seconds if seconds is None else seconds)

    def _start(self, layer: BaseChannelLayer) -> None:
        try:
            self._background.start(layer, self._send_all(layer))
        except BaseException:  # such as that no thread can be started
            self._drop_all()
            raise

    def pause_after(self, seconds: float) -> float:
        """Return the seconds to pause after a round of messages that took some seconds."""
        return min(max(self.pause_seconds, seconds * self.pause_share), self.most_pause_seconds)

    async def _send_all(self, layer: BaseChannelLayer) -> None:
        backoff = Backoff(self.backoff_seconds)
        try:
            while waiting := self._take():
                began = time.monotonic()
                deadline = began + self.late_seconds
                groups = iter(waiting.items())
                errors: list[Exception] = []
                workers = range(min(self.workers, len(waiting)))
                await asyncio.gather(
                    *[self._send_groups(layer, groups, deadline, errors) for _ in workers]
                )
                if not errors:
                    backoff.reset()
                    await asyncio.sleep(self.pause_after(time.monotonic() - began))
                    continue
                throttled.error(
                    "Sending to the channel layer failed. Listeners receive the events at the "
                    "next history check.",
                    error=errors[0],
                )
                await asyncio.sleep(backoff.next())
        except BaseException:
            self._drop_all()
            raise

    async def _send_groups(
        self,
        layer: BaseChannelLayer,
        groups: Iterator[tuple[str, list[Batch]]],
        deadline: float,
        errors: list[Exception],
    ) -> None:
        """Send to groups one after the other, and collect the errors."""
        for group, batches in groups:
            if time.monotonic() > deadline:
                self._report_dropped()
                continue
            merged = merge(batches, max_bytes=MESSAGE_BYTES, consecutive=True)
            try:
                await send_batches(layer, group, merged, self.send_seconds)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    def _drop_all(self) -> None:
        with self._lock:
            self._waiting, self._size = {}, 0
            self._idle.set()

    def _take(self) -> dict[str, list[Batch]]:
        with self._lock:
            waiting, self._waiting, self._size = self._waiting, {}, 0
            if not waiting:
                self._idle.set()
            return waiting

    def _report_dropped(self) -> None:
        now = time.monotonic()
        if now - self._reported_at >= self.report_seconds:
            self._reported_at = now
            logger.error(
                "The channel layer is slower than the publishers. Listeners receive some events "
                "at the next history check."
            )


notifier = Notifier(background)
_runtime.on_reset(notifier.reset)
# A script may end right after it has published. At the time of the functions of `atexit`, the
# thread cannot resolve the name of the broker's host any more, because the interpreter has
# already ended the pools of threads. CPython has no public function that runs before that.
getattr(threading, "_register_atexit", atexit.register)(notifier.flush)
