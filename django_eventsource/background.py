"""An event loop in a thread of its own, where synchronous code sends on the channel layer.

A loop for each send would cost a new connection to the broker each time, which takes many
times as long as the send.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from channels.layers import BaseChannelLayer

from .layers import let_go

T = TypeVar("T")

END_SECONDS = 1.0
"""How long the end of the process may wait for what closes connections."""


def in_forks(call: Callable[[], None]) -> None:
    """Have something called in each fork of this process first, where processes fork."""
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)


class Background:
    """The loop of this process, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._inherited: list[object] = []
        self._layers: list[BaseChannelLayer] = []

    def run(self, layer: BaseChannelLayer, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and wait for what it gives. Never from the loop itself.

        :param layer: what it uses, whose connections are closed at the end.
        """
        loop = self._running()
        if layer not in self._layers:
            self._layers.append(layer)
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            # Threads do not live on in a fork.
            if self._loop is None or self._pid != os.getpid():
                # Nor may they be closed there: the parent works with the same sockets.
                self._inherited += [self._loop, self._layers]
                self._pid = os.getpid()
                self._layers = []
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="eventsource-background", daemon=True
                )
                self._thread.start()
            return self._loop

    def forked(self) -> None:
        """Begin anew in a fork: the lock may have been held by a thread that is not here."""
        self._lock = threading.Lock()

    def end(self) -> None:
        """Close what is open, and stop the loop."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._pid != os.getpid():
            return
        self._loop = None
        layers, self._layers = self._layers, []
        ends = [asyncio.run_coroutine_threadsafe(let_go(layer), loop) for layer in layers]
        for one in ends:
            with suppress(Exception):
                one.result(END_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(END_SECONDS)
        if not thread.is_alive():
            loop.close()


background = Background()
in_forks(background.forked)
atexit.register(background.end)
