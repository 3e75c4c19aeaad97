"""Shutdown: the productions and the streams end before the server does.

Servers wait for open responses, some of them without a limit. Therefore the first stream on the
main thread installs handlers of SIGTERM and SIGINT. They end the streams, each with a random
reconnection delay, and then call the handler that was installed before.
"""

import asyncio
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial
from types import FrameType
from typing import Any

from .. import _runtime
from ..signals import Reason
from ..streaming.registry import registry
from ..streaming.stream import reconnect_delay_ms

logger = logging.getLogger("django_eventsource.operations")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OnEnded = Callable[[], Awaitable[None]]


class Shutdown:
    """The shutdown of this process, if one has begun."""

    GRACE_SECONDS = 0.5
    """Seconds in which the streams may send their last bytes."""
    RESUME_SECONDS = 30.0
    """Seconds after which streams are opened again if the process has not ended."""
    DRAIN_STEP_SECONDS = 0.05
    """Seconds between two parts of the streams that a drain ends."""
    STEP_SECONDS = 0.01
    """Seconds between two checks whether all streams have ended."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the event loop, its server, and a shutdown or a drain that has begun."""
        self.begun = False
        """Whether a shutdown has begun. Then no stream is opened."""
        self.draining = False
        """Whether the process was requested to drain. Then no stream is opened."""
        self._drains: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._drain_deadlines: dict[asyncio.AbstractEventLoop, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_ended: OnEnded | None = None
        self._server: tuple[asyncio.AbstractEventLoop, Callable[[], bool]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._productions: set[asyncio.Task[Any]] = set()

    def install(self, loop: asyncio.AbstractEventLoop, on_ended: OnEnded | None = None) -> None:
        """Install the signal handlers, once. On other threads than the main one, do nothing.

        :param loop: the event loop whose streams end.
        :param on_ended: awaited after the streams have ended.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows signal handlers on the main thread only
        self._loop = loop
        self._on_ended = on_ended
        for number in SIGNALS:
            previous = signal.getsignal(number)
            ours = isinstance(previous, partial) and previous.func == self._on_signal
            # None: the handler was not installed by Python and cannot be called.
            if not ours and previous not in (None, signal.SIG_IGN):
                signal.signal(number, partial(self._on_signal, previous))

    def _on_signal(self, previous: Any, number: int, frame: FrameType | None) -> None:
        loop = self._loop
        idle = not self._productions and not any(registry.streams())
        if self.begun or loop is None or not loop.is_running() or idle:
            call_previous_handler(previous, number, frame)
            return
        self.begun = True
        # In an empty context, not in that of the interrupted code, where asgiref for example
        # keeps the thread that the code waits for.
        then = partial(call_previous_handler, previous, number, frame)
        loop.call_soon_threadsafe(self._start_end, loop, then, context=Context())

    def _start_end(self, loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
        self._task = loop.create_task(self.end(loop))  # the loop has only a weak reference
        self._task.add_done_callback(lambda task: then())

    def add_production(self, task: asyncio.Task[Any]) -> None:
        """Cancel the task of a production at the shutdown, before the streams end.

        If a shutdown has begun, cancel it now.

        :param task: the task, on the running event loop.
        """
        self._productions.add(task)
        task.add_done_callback(self._productions.discard)
        if self.begun:
            # After its first step, because a task that has not begun publishes no end.
            task.get_loop().call_soon(task.cancel)

    def watch_server(self, find: Callable[[], Callable[[], bool] | None]) -> None:
        """Watch the server of the running loop, unless it is watched already.

        :param find: returns a function that returns whether the server shuts down; ``None`` if
            the server is unknown.
        """
        loop = asyncio.get_running_loop()
        is_watched = self._server is not None and self._server[0] is loop
        # Another server may run in the same loop after the first one has ended.
        if (not is_watched or self.server_is_ending(loop)) and (is_ending := find()) is not None:
            self._server = loop, is_ending

    def server_is_ending(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether the server of a loop shuts down; false if that is unknown."""
        return self._server is not None and self._server[0] is loop and self._server[1]()

    async def end(self, loop: asyncio.AbstractEventLoop) -> None:
        """End all productions and the streams of a loop, and withdraw its lease.

        Open no new streams.
        """
        self.begun = True
        loop.call_later(self.RESUME_SECONDS, self._resume)
        # The streams, which end next, send the ends that the productions publish.
        await self.end_productions(self.GRACE_SECONDS)
        await self.end_streams(loop)
        if self._on_ended is not None:
            try:
                async with asyncio.timeout(self.GRACE_SECONDS):
                    await self._on_ended()
            except Exception:
                # The history drops the listeners when the lease expires.
                logger.warning("The lease could not be withdrawn.", exc_info=True)

    def start_drain(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """End the streams of a loop one after the other, and open no others in the process.

        So the clients do not reconnect together. Call it in the event loop's thread. A further
        call can only make the drain end sooner.

        :param seconds: the seconds until the last stream ends.
        """
        self.draining = True
        deadline = loop.time() + seconds
        self._drain_deadlines[loop] = min(deadline, self._drain_deadlines.get(loop, deadline))
        if loop not in self._drains:
            self._drains[loop] = loop.create_task(self._drain(loop))

    async def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        count = 0
        while streams := [one for one in registry.streams(loop) if one.reason is None]:
            rest = max(self._drain_deadlines[loop] - loop.time(), self.DRAIN_STEP_SECONDS)
            part = streams[: math.ceil(len(streams) * self.DRAIN_STEP_SECONDS / rest)]
            for stream in part:
                stream.end(Reason.SHUTDOWN, reconnect_delay_ms())
            count += len(part)
            await asyncio.sleep(self.DRAIN_STEP_SECONDS)
        logger.info("The process drains. It has ended %d streams and opens no others.", count)

    async def end_productions(self, seconds: float) -> None:
        """Cancel the productions of the process, and wait until they have published their ends.

        :param seconds: the most seconds to wait.
        """
        tasks = [task for task in list(self._productions) if task.get_loop().is_running()]
        for task in tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)
        deadline = time.monotonic() + seconds
        # The tasks may be on other loops, so this one cannot await them.
        while not all(task.done() for task in tasks) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(self.STEP_SECONDS)

    async def end_streams(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the streams of a loop after their buffers are sent, or after the grace time."""
        deadline = loop.time() + self.GRACE_SECONDS
        while any(registry.streams(loop)) and loop.time() < deadline:
            for stream in registry.streams(loop):
                if stream.reason is None:
                    stream.end(Reason.SHUTDOWN, reconnect_delay_ms())
            await asyncio.sleep(self.STEP_SECONDS)
        for stream in registry.streams(loop):
            stream.abort(Reason.SHUTDOWN)

    def _resume(self) -> None:
        self.begun = False


shutdown = Shutdown()
_runtime.on_reset(shutdown.reset)


def call_previous_handler(previous: Any, number: int, frame: FrameType | None) -> None:
    """Do what a signal did before :meth:`Shutdown.install`.

    :param previous: the handler, or ``signal.SIG_DFL``.
    """
    if callable(previous):
        previous(number, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
