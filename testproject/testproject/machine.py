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

from .hints import MACHINE_TOKEN

logger = logging.getLogger("testproject.machine")

PRUNE_SECONDS = 600
"""Seconds between two prunings. Open streams prune too, but there may be none."""


class MachineEvent(JSONIdEvent):
    """One sample of this machine's figures."""

    ACTIONS = ["sample"]


class Publisher(threading.Thread):
    """Publishes a sample per interval until it is stopped, also after database errors.

    It runs in the server's process, so that the streams there receive each sample at once.
    """

    def __init__(self, interval_seconds: float = 1.0) -> None:
        super().__init__(name="machine", daemon=True)
        self.interval_seconds = interval_seconds
        self.fails = False
        """Whether the last attempt failed."""
        self._quit = threading.Event()

    def run(self) -> None:
        psutil.cpu_percent()  # the next call returns the share since this one
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
        self.attempt(publish, MACHINE_TOKEN, "sample", sample(), MachineEvent)

    def attempt(self, func: Any, *args: Any) -> None:
        """Call a function that may fail. Log the first failure and the recovery only."""
        try:
            func(*args)
        except Exception:
            if not self.fails:
                logger.exception("Publishing this machine's figures failed; retrying.")
            self.fails = True
            close_old_connections()
        else:
            if self.fails:
                logger.warning("Publishing this machine's figures works again.")
            self.fails = False

    def stop(self, timeout_seconds: float = 0.5) -> None:
        """End the thread. As a daemon thread it does not keep the process alive if it hangs."""
        self._quit.set()
        self.join(timeout_seconds)


def next_due(due: float, now: float, interval_seconds: float) -> float:
    """Return the next time on the grid of ``due``, without drift and without catching up."""
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
