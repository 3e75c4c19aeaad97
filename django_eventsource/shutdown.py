"""Ending well: when the server is told to end, its streams end first.

Servers wait for open responses, some of them for ever. So at the first stream, on the main
thread, SIGTERM and SIGINT are taken: the streams end, each telling its listener to come
back after a random time, and then the handler that was there before is called.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial
from types import FrameType
from typing import Any

from .listeners import registry
from .streams import COME_BACK_MS, Reason, jittered_ms

logger = logging.getLogger("django_eventsource.shutdown")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 0.5
"""How long streams may take to write their last bytes."""
STEP_SECONDS = 0.01
Farewell = Callable[[], Awaitable[None]]
RESUME_SECONDS = 30.0
"""After how long streams are opened again, where the process has not ended after all."""


class Shutdown:
    """Whether this process ends, and which event loop knows of it."""

    def __init__(self) -> None:
        self.begun = False
        """Has it begun? Then no new stream is opened."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.farewell: Farewell | None = None
        """What to do after the streams have ended."""
        self._server: tuple[asyncio.AbstractEventLoop, Callable[[], bool]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def on_signal(self, previous: Any, number: int, frame: FrameType | None) -> None:
        """Receive a signal: end the streams, then do what was done before."""
        loop = self.loop
        if self.begun or loop is None or not loop.is_running() or not any(registry.streams()):
            call(previous, number, frame)
            return
        self.begun = True
        # In no context of whatever the signal has interrupted: asgiref, for one, keeps in it
        # that a thread is being waited for.
        loop.call_soon_threadsafe(
            self._begin, loop, partial(call, previous, number, frame), context=Context()
        )

    def _begin(self, loop: asyncio.AbstractEventLoop, then: Any) -> None:
        task = loop.create_task(self.end(loop))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: then())

    def follow(self, server_ends: Callable[[], bool] | None) -> None:
        """Set the function that returns whether the server of the running loop shuts down."""
        if server_ends is not None:
            self._server = asyncio.get_running_loop(), server_ends

    def detects(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether the server of a loop shuts down, as far as that can be detected."""
        return self._server is not None and self._server[0] is loop and self._server[1]()

    async def end(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the streams of a loop and give up its lease; open no new streams."""
        self.begun = True
        loop.call_later(RESUME_SECONDS, self._resume)
        await end_streams(loop)
        if self.farewell is not None:
            try:
                async with asyncio.timeout(GRACE_SECONDS):
                    await self.farewell()
            except Exception:
                # They are no longer counted when the lease has run out.
                logger.warning("The lease could not be given up.", exc_info=True)

    def _resume(self) -> None:
        self.begun = False


shutdown = Shutdown()


def install(loop: asyncio.AbstractEventLoop, farewell: Farewell | None = None) -> None:
    """Take the signals, once, if this is the main thread: no other may.

    :param farewell: what to do after the streams have ended.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    shutdown.loop = loop
    shutdown.farewell = farewell
    for number in SIGNALS:
        previous = signal.getsignal(number)
        if previous is None or previous == signal.SIG_IGN:
            continue  # None: the handler is not Python's and could not be called afterwards
        ours = isinstance(previous, partial) and previous.func == shutdown.on_signal
        if not ours:
            signal.signal(number, partial(shutdown.on_signal, previous))


async def end_streams(loop: asyncio.AbstractEventLoop) -> None:
    """End the streams of a loop: after what is buffered, or else after the grace."""
    deadline = loop.time() + GRACE_SECONDS
    while any(registry.streams(loop)) and loop.time() < deadline:
        for stream, _ in registry.streams(loop):
            if stream.reason is None:
                stream.end(Reason.SHUTDOWN, jittered_ms(*COME_BACK_MS))
        await asyncio.sleep(STEP_SECONDS)
    for stream, _ in registry.streams(loop):
        stream.abort(Reason.SHUTDOWN)


def call(previous: Any, number: int, frame: FrameType | None) -> None:
    """Do what a signal did before it was taken.

    :param previous: the handler, or ``signal.SIG_DFL``.
    """
    if callable(previous):
        previous(number, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
