"""A loop that always takes the same work, to detect whether the machine was busy.

The loop runs in as many processes as the machine has processors, because a server and the load
on it need two of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from statistics import median

STEPS = 1_000_000
ROUNDS = 3
BUSY = 1.15
"""The ratio to the fastest loop from which on the machine counts as busy."""


def seconds() -> float:
    """Return the median of the seconds of several loops, each as slow as its slowest process."""
    processors = os.cpu_count() or 1
    with ProcessPoolExecutor(processors) as pool:
        list(pool.map(_loop, range(processors)))  # starts the processes
        return median(max(pool.map(_loop, range(processors))) for _ in range(ROUNDS))


def _loop(number: int) -> float:
    began = time.perf_counter()
    total = 0
    for n in range(STEPS):
        total += n
    return time.perf_counter() - began


@contextmanager
def calibrated(found: dict[str, tuple[float, float]], name: str) -> Iterator[None]:
    """Store the seconds of the loop before and after a block, under a name."""
    before = seconds()
    yield
    found[name] = before, seconds()


def warning(found: Mapping[str, tuple[float, float]]) -> str:
    """Return a text about the measurements during which the machine was busy, or ``""``.

    :param found: what :func:`calibrated` stored.
    """
    fastest = min((min(pair) for pair in found.values()), default=0.0)
    busy = {name: max(pair) / fastest for name, pair in found.items()}
    named = [f"*{name}* ({ratio - 1:.0%} slower)" for name, ratio in busy.items() if ratio > BUSY]
    if not named:
        return ""
    return (
        "The machine was busy with other work during a part of this run: a loop of constant work "
        "took longer before or after these measurements than at the best time of the run. Do not "
        f"rely on their figures: {', '.join(named)}."
    )
