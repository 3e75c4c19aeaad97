"""The queue of batches on their way to the feeds.

A limited amount is passed on at a time, and the streams write it before more is passed on. So
a listener that reads all that it is sent does not count as slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context

from ..protocol.batches import Batch

TURN_BYTES = 32 * 1024
"""The bytes that are passed on before the streams get their turn."""


class MessageQueue:
    """The batches that one event loop is about to pass on.

    :param deliver: passes on a batch of a group. It must not raise.
    :param context: the context in which the queue runs.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[str, Batch], None],
        context: Context | None = None,
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._context = context
        self._waiting: deque[tuple[str, Batch]] = deque()
        self._scheduled = False
        self._turn_bytes = 0

    def put(self, group: str, batches: Iterable[Batch]) -> None:
        """Add batches of this process, from any thread."""
        self._waiting.extend((group, batch) for batch in batches)
        with contextlib.suppress(RuntimeError):  # the loop was closed just now
            self._loop.call_soon_threadsafe(self._begin, context=self._context)

    async def turn(self, batch: Batch) -> None:
        """Wait until a batch of the channel layer may be passed on."""
        if self._charge(batch):
            await asyncio.sleep(0)
            self._charge(batch)

    def _begin(self) -> None:
        if not self._scheduled:
            self._drain()

    def _drain(self) -> None:
        self._scheduled = False
        while self._waiting:
            if self._charge(self._waiting[0][1]):
                self._scheduled = True
                self._loop.call_soon(self._drain, context=self._context)
                return
            self._deliver(*self._waiting.popleft())

    def _charge(self, batch: Batch) -> bool:
        """Charge a batch to this turn; return whether it must wait for the next one."""
        size = len(batch.data)
        self._turn_bytes += size
        if size < self._turn_bytes > TURN_BYTES:
            self._turn_bytes = 0
            return True
        return False
