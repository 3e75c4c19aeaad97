"""Pacing: a busy token is passed on in batches.

An event of an idle token is passed on at once. While that is being written to its
listeners, and for a short rest after it, further events are held, and then they are passed
on together: one write for each listener, however many events. Where many are held again
and again, the rest becomes longer, up to ten times ``EVENTSOURCE_COALESCE_SECONDS``. So the
more there is of a flood, the less it costs per event, and the wait stays bounded.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Protocol

from .conf import conf

REST = 0.5
"""The shortest rest, as a part of the time that the writes took: publishers, who are served
by the same loop, get their turn."""
MANY = 4
"""Events held at once that make the rest longer."""
ROUNDS = 3
"""Rounds of the loop until all is written: in the first, tasks hand it to the server, and
Daphne writes to the sockets in the one after the next."""
MOST = 10
"""The longest rest, as a multiple of the setting."""


class Paced(Protocol):
    """What is passed on in batches."""

    free_at: float
    """When it may be passed on again, on the loop's clock."""
    rest: float
    """The rest after it was passed on last, in seconds."""

    def flush(self) -> None:
        """Pass on what is held."""


class Pace:
    """Tells the feeds of one event loop when to pass on what they hold.

    :param context: what its callbacks run in.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, context: Context | None = None) -> None:
        self._loop = loop
        self._context = context
        self._seconds = 0.0
        self._holding: set[Paced] = set()
        self._timer: asyncio.TimerHandle | None = None

    def is_free(self, one: Paced) -> bool:
        """May it be passed on at once?"""
        return one.free_at <= self._loop.time()

    def begin(self, one: Paced, events: int) -> None:
        """Take note that events are passed on: the tasks that write them are about to run."""
        seconds = conf.coalesce_seconds
        if seconds is not None:
            self._seconds = seconds
            one.free_at = float("inf")
            one.rest = one.rest * 2 if events >= MANY else 0.0
            self._loop.call_soon(self._wait, one, self._loop.time(), ROUNDS, context=self._context)

    def _wait(self, one: Paced, began: float, rounds: int) -> None:
        """Let the loop go round until all is written."""
        if rounds > 1:
            self._loop.call_soon(self._wait, one, began, rounds - 1, context=self._context)
            return
        now = self._loop.time()
        rest = max(self._seconds, (now - began) * REST, one.rest)
        one.rest = min(rest, self._seconds * MOST)
        one.free_at = now + one.rest

    def hold(self, one: Paced) -> None:
        """Pass on what it holds as soon as that may be."""
        self._holding.add(one)
        if self._timer is None:
            self._start(self._seconds)

    def _start(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._flush, context=self._context)

    def _flush(self) -> None:
        self._timer = None
        for one in [one for one in self._holding if self.is_free(one)]:
            self._holding.discard(one)
            one.flush()
        if self._holding:
            now = self._loop.time()
            soonest = min(one.free_at for one in self._holding) - now
            self._start(min(max(soonest, 0.0), self._seconds))
