"""The latency of an event of another process, without a shared channel layer.

One server process has a stream. This process publishes into the same database, at random times.
The server either is woken by the database, or relies on the history checks of its timer.

``python -m benchmarks.latency NAME ROUNDS`` prints one JSON object. NAME is ``sqlite`` or
``postgresql``.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from threading import Thread
from typing import Any

from benchmarks import contenders
from benchmarks.stores import store

NAMES = ("postgresql", "sqlite")
EVENTS = 100
"""The events of each round."""
PAUSE_SECONDS = 0.1
"""The longest pause between two events. The timer's interval is not a multiple of the pauses."""
GOAL = 0.1


class Listener(Thread):
    """Reads a stream, and stores the time of each event."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.received: dict[int, float] = {}
        self._connection = HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request("GET", "/events/poll/t")
        self._response = self._connection.getresponse()

    def run(self) -> None:
        """Read until every event has arrived."""
        while len(self.received) < EVENTS:
            line = self._response.readline()
            now = time.perf_counter()
            if found := re.fullmatch(rb"data: (\d+)\n", line):
                self.received[int(found[1])] = now
        self._connection.close()


def latencies(port: int) -> list[float]:
    """Return the milliseconds from the call of publish() to the arrival of each event."""
    from django_eventsource import publish

    listener = Listener(port)
    listener.start()
    sent = {}
    for n in range(EVENTS):
        time.sleep(random.uniform(0, PAUSE_SECONDS))
        sent[n] = time.perf_counter()
        publish("t", "ping", str(n))
    listener.join(60)
    if len(listener.received) < EVENTS:
        raise RuntimeError(f"Only {len(listener.received)} of {EVENTS} events arrived.")
    return [(listener.received[n] - sent[n]) * 1000 for n in range(EVENTS)]


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return the percentiles with the wake-up and without it, over all rounds."""
    found: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(rounds):
        for name, some in found.items():
            with contenders.run(contenders.HANDED_OVER, BENCH_WAKE_UP=name) as running:
                some += latencies(running.port)
    return {name: _percentiles(sorted(some)) for name, some in found.items()}


def _percentiles(ordered: list[float]) -> dict[str, float]:
    last = len(ordered) - 1
    return {"p50": ordered[round(last * 0.5)], "p99": ordered[round(last * 0.99)]}


def rows(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return the rows of the table of goals."""
    return [
        (
            f"latency {percentile} of an event of another process, against the timer alone: "
            f"{name}",
            result["on"][percentile] / result["off"][percentile],
            f"at most {GOAL:.2f}",
        )
        for name, result in found.items()
        for percentile in result["on"]
    ]


def main(name: str = "sqlite", rounds: str = "3") -> None:
    """Measure one database."""
    if name not in NAMES:
        sys.exit(f"{name!r}: one of {', '.join(NAMES)} is needed.")
    with store(name):
        result = measure(int(rounds))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
