"""The inbox: messages on their way to the feeds, so many at a time.

However much comes at once, the streams write what was passed on before more is passed on:
a reader that takes all that it is sent is not taken for a slow one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any

TURN_BYTES = 32 * 1024
"""What is passed on before the streams get their turn."""


class Inbox:
    """What one event loop is to pass on.

    :param take: passes a message on. It raises nothing.
    :param context: what it runs in.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[Any], None],
        context: Context | None = None,
    ) -> None:
        self._loop = loop
        self._take = take
        self._context = context
        self._messages: deque[dict[str, Any]] = deque()
        self._waits = False
        self._turn = 0

    def put(self, messages: Iterable[dict[str, Any]]) -> None:
        """Take messages of this process, from any thread."""
        self._messages.extend(messages)
        with contextlib.suppress(RuntimeError):  # the loop was closed just now
            self._loop.call_soon_threadsafe(self._begin, context=self._context)

    async def turn(self, message: Any) -> None:
        """Wait until a message of the channel layer may be passed on."""
        if self._is_over(message):
            await asyncio.sleep(0)
            self._is_over(message)

    def _begin(self) -> None:
        if not self._waits:
            self._go_on()

    def _go_on(self) -> None:
        self._waits = False
        while self._messages:
            if self._is_over(self._messages[0]):
                self._waits = True
                self._loop.call_soon(self._go_on, context=self._context)
                return
            self._take(self._messages.popleft())

    def _is_over(self, message: Any) -> bool:
        """Count a message. Is it more than what may still be passed on in this turn?"""
        size = size_of(message)
        self._turn += size
        if size < self._turn > TURN_BYTES:
            self._turn = 0
            return True
        return False


def size_of(message: Any) -> int:
    """Give the bytes of a message's frames; none for one that is not ours."""
    frames = message.get("frames") if isinstance(message, dict) else None
    if not isinstance(frames, list):
        return 0
    return sum(len(frame) for frame in frames if isinstance(frame, bytes))
