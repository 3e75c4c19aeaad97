"""Pacing: a busy token is passed on in batches.

An event of an idle token is passed on at once. While that is being written to its
listeners, and for a short rest after it, further events are held, and then they are passed
on together: one write for each listener, however many events. The rest is
``EVENTSOURCE_COALESCE_SECONDS`` after a single event. After several it is as long as fits what
writing them took, up to ten times the setting: so the more there is of a flood, the less it
costs per event, and the wait stays bounded.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Protocol

from .conf import conf

FEW_REST = 0.5
"""The rest after two events, as a part of the time that their writes took."""
MANY = 3
"""Events held at once that make the rest longer."""
MANY_REST = 4.0
"""The rest after so many: publishers, who are served by the same loop, get most of the time."""
ROUNDS = 3
"""Rounds of the loop until all is written: in the first, tasks hand it to the server, and
Daphne writes to the sockets in the one after the next."""
MOST = 10
"""The longest rest, as a multiple of the setting."""


class Paced(Protocol):
    """What is passed on in batches."""

    free_at: float
    """When it may be passed on again, on the loop's clock."""

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
            share = 0.0 if events == 1 else FEW_REST if events < MANY else MANY_REST
            began = self._loop.time()
            self._loop.call_soon(self._wait, one, share, began, ROUNDS, context=self._context)

    def _wait(self, one: Paced, share: float, began: float, rounds: int) -> None:
        """Let the loop go round until all is written."""
        if rounds > 1:
            again = share, began, rounds - 1
            self._loop.call_soon(self._wait, one, *again, context=self._context)
            return
        now = self._loop.time()
        rest = max(self._seconds, (now - began) * share)
        one.free_at = now + min(rest, self._seconds * MOST)

    def hold(self, one: Paced) -> None:
        """Pass on what it holds as soon as that may be."""
        self._holding.add(one)
        if self._timer is None:
            self._start()

    def _start(self) -> None:
        """Look again when the first may be passed on, or after a while: it may be unknown yet."""
        seconds = min(one.free_at for one in self._holding) - self._loop.time()
        seconds = min(max(seconds, 0.0), self._seconds)
        self._timer = self._loop.call_later(seconds, self._flush, context=self._context)

    def _flush(self) -> None:
        self._timer = None
        for one in [one for one in self._holding if self.is_free(one)]:
            self._holding.discard(one)
            one.flush()
        if self._holding:
            self._start()
