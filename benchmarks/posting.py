"""The CPU time of a POST, against another async view of the same server process.

A POST that publishes into SQLite is compared with a view that saves one row, and a POST that
publishes into memory with a view that reads its body. The views alternate in rounds. The server
has no middleware.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection
from statistics import median
from typing import Any

from benchmarks import contenders

COUNT = 400
"""The requests of each round."""
BODY = b"x" * 64
PUBLISHES = "/events/ping/t"
BASES = {"sqlite": "/row", "memory": "/body"}
"""The view that each history is compared with."""
WHAT = {
    "sqlite": "CPU of a POST into SQLite, against an async view with ``acreate()``",
    "memory": "CPU of a POST into memory, against a bare async view",
}
GOALS = {"sqlite": 1.3, "memory": 1.25}


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the microseconds of CPU time of one request, of each view in each round."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, base in BASES.items():
        with tempfile.TemporaryDirectory() as directory:
            environment = {"BENCH_DATABASE": f"{directory}/events.sqlite3"}
            if name == "sqlite":
                environment["BENCH_HISTORY"] = "database"
            contenders.migrate(**environment)
            with contenders.run(contenders.HANDED_OVER, **environment) as running:
                for path in (PUBLISHES, base):
                    cpu_us(running, path)  # imports what it needs, and begins the token
                found[name] = [
                    {"publish": cpu_us(running, PUBLISHES), "base": cpu_us(running, base)}
                    for _ in range(rounds * 2)
                ]
        print(f"  {name}: {ratio(found[name]):.2f}", flush=True)
    return found


def cpu_us(running: contenders.Running, path: str) -> float:
    """Return the microseconds of the server's CPU time for one POST, over one connection."""
    connection = HTTPConnection("127.0.0.1", running.port)
    before = _cpu_seconds(running.pids[0])
    for _ in range(COUNT):
        connection.request("POST", path, BODY, {"Content-Type": "text/plain"})
        response = connection.getresponse()
        response.read()
        if response.status // 100 != 2:
            raise RuntimeError(f"POST {path}: {response.status}")
    used = _cpu_seconds(running.pids[0]) - before
    connection.close()
    return used / COUNT * 1e6


def _cpu_seconds(pid: int) -> float:
    # The number of the clock of another process; see the macros of Linux's posix-timers.h.
    return time.clock_gettime((~pid << 3) | 2)


def ratio(results: Sequence[Mapping[str, float]]) -> float:
    """Return the median of the ratios of each round."""
    return median(one["publish"] / one["base"] for one in results)


def rows(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return the rows of the table of goals."""
    return [
        (WHAT[name], ratio(some), f"at most {GOALS[name]:.2f}") for name, some in found.items()
    ]
