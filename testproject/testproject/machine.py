"""This machine's load and memory, published once per second."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

import psutil
from django.db import close_old_connections, connections

from django_eventsource import publish
from django_eventsource.events import JSONIdEvent
from django_eventsource.history import get_history

logger = logging.getLogger("testproject.machine")

TOKEN = "demo:machine"
PRUNE_SECONDS = 600
"""Open streams prune the history; nobody may be looking."""


class MachineEvent(JSONIdEvent):
    """One sample of this machine's figures."""

    ACTIONS = ["sample"]


class Publisher(threading.Thread):
    """Publishes a sample per interval until it is stopped, whatever the database does.

    It runs in the server's process, and so reaches the streams there at once.
    """

    def __init__(self, interval_seconds: float = 1.0) -> None:
        super().__init__(name="machine", daemon=True)
        self.interval_seconds = interval_seconds
        self.fails = False
        """Did the last attempt fail?"""
        self._quit = threading.Event()

    def run(self) -> None:
        psutil.cpu_percent()  # the next call gives the share since this one
        due = prune_at = time.monotonic()
        try:
            while True:
                due = next_due(due, time.monotonic(), self.interval_seconds)
                if self._quit.wait(due - time.monotonic()):
                    return
                self.publish()
                if due >= prune_at:
                    prune_at = due + PRUNE_SECONDS
                    self.attempt(get_history().prune)
        finally:
            connections.close_all()

    def publish(self) -> None:
        """Publish one sample."""
        self.attempt(publish, TOKEN, "sample", sample(), MachineEvent)

    def attempt(self, func: Any, *args: Any) -> None:
        """Call something that may fail: say so once, and go on."""
        try:
            func(*args)
        except Exception:
            if not self.fails:
                logger.exception("The machine's figures cannot be published; going on trying.")
            self.fails = True
            close_old_connections()
        else:
            if self.fails:
                logger.warning("The machine's figures are published again.")
            self.fails = False

    def stop(self, timeout_seconds: float = 0.5) -> None:
        """End the thread; as a daemon it keeps no process alive if it is stuck."""
        self._quit.set()
        self.join(timeout_seconds)


def next_due(due: float, now: float, interval_seconds: float) -> float:
    """Give the next moment on the grid that ``due`` is on: no drift, and no catching up."""
    return due + max(1, math.ceil((now - due) / interval_seconds)) * interval_seconds


def sample() -> dict[str, float]:
    """Measure: time in ms since the epoch, shares in percent, memory in bytes."""
    memory = psutil.virtual_memory()
    load = psutil.getloadavg()[0]
    cores = psutil.cpu_count() or 1
    return {
        "time": time.time_ns() // 1_000_000,
        "cpu": psutil.cpu_percent(),
        "load": round(load, 2),
        "cores": cores,
        "memory": memory.percent,
        "used": memory.total - memory.available,
        "total": memory.total,
    }
