"""Coalescing: the events of a busy token are passed on in batches.

An event of an idle token is passed on at once. While the event is written to the listeners,
and for a short rest after that, further events are held. Then they are passed on together: one
write for each listener, however many events. The rest is ``EVENTSOURCE_COALESCE_SECONDS``
after a single event. After several events it grows with the time that their writes took, up to
ten times the setting. So a flood costs less per event, and the wait stays bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context

from ..conf import conf
from ..protocol.batches import Batch, merge

FEW_REST = 0.5
"""The rest after two events, as a multiple of the time that their writes took."""
MANY = 3
"""The number of events after which the rest is longer."""
MANY_REST = 4.0
"""The rest after so many events. Publishers, which share the event loop, get most of the time."""
ROUNDS = 3
"""The rounds of the event loop until all is written. In the first, tasks hand the data to the
server. Daphne writes to the sockets in the one after the next."""
MOST = 10
"""The longest rest, as a multiple of the setting."""
MAX_HELD_BYTES = 32 * 1024
"""The size of the held events from which they are passed on without waiting."""


class Coalescer:
    """Holds the events of one token until its listeners have been written to.

    :param loop: the event loop of the listeners.
    :param deliver: passes a batch on to the listeners.
    :param context: the context in which the callbacks run.
    """

    __slots__ = (
        "_context",
        "_deliver",
        "_free_at",
        "_held",
        "_held_bytes",
        "_loop",
        "_seconds",
        "_timer",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Batch], None],
        context: Context | None = None,
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._context = context
        self._seconds = 0.0
        self._free_at = 0.0
        self._held: list[Batch] = []
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, batch: Batch) -> None:
        """Pass a batch on, or hold it if the one before it is being written."""
        if not self._held and self._free_at <= self._loop.time():
            self._pass_on(batch)
            return
        self._held.append(batch)
        self._held_bytes += len(batch.data)
        if batch.closes or self._held_bytes > MAX_HELD_BYTES:
            self.flush()
        elif self._timer is None:
            self._start_timer()

    def flush(self) -> None:
        """Pass on the held events."""
        held, self._held, self._held_bytes = self._held, [], 0
        for batch in merge(held):
            self._pass_on(batch)

    def _pass_on(self, batch: Batch) -> None:
        began = self._loop.time()  # ready streams are written to in the call
        self._deliver(batch)
        seconds = conf.coalesce_seconds
        if seconds is not None:
            self._seconds = seconds
            self._free_at = float("inf")
            events = batch.count
            share = 0.0 if events == 1 else FEW_REST if events < MANY else MANY_REST
            self._call_soon(share, began, ROUNDS)

    def _call_soon(self, share: float, began: float, rounds: int) -> None:
        self._loop.call_soon(self._rest, share, began, rounds, context=self._context)

    def _rest(self, share: float, began: float, rounds: int) -> None:
        """Wait some rounds of the event loop, then set the end of the rest."""
        if rounds > 1:
            self._call_soon(share, began, rounds - 1)
            return
        now = self._loop.time()
        rest = max(self._seconds, (now - began) * share)
        self._free_at = now + min(rest, self._seconds * MOST)

    def _start_timer(self) -> None:
        # The end of the rest may be unknown yet.
        seconds = min(max(self._free_at - self._loop.time(), 0.0), self._seconds)
        self._timer = self._loop.call_later(seconds, self._on_timer, context=self._context)

    def _on_timer(self) -> None:
        self._timer = None
        if self._free_at <= self._loop.time():
            self.flush()
        elif self._held:
            self._start_timer()
