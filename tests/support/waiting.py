"""Waiting in tests: how long a wait may take, and waiting for a condition."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

PATIENCE_SECONDS = 10
"""Seconds after which a wait inside the test's process fails the test."""

PROCESS_PATIENCE_SECONDS = 60.0
"""Seconds after which a wait for another process fails the test."""


async def until(
    condition: Callable[[], object],
    *,
    seconds: float = PATIENCE_SECONDS,
    interval_seconds: float = 0.001,
) -> None:
    """Wait until a condition, a function or a coroutine function, returns a true value.

    :param seconds: after so many seconds ``TimeoutError`` is raised.
    :param interval_seconds: seconds between two checks of the condition.
    """
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if inspect.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(interval_seconds)
