"""Waits between repeated attempts."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Backoff:
    """The waits after failures that follow one another.

    :param seconds: the wait after the first failure, the second and so on. The last one repeats.
    """

    __slots__ = ("_seconds", "failures")

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = seconds
        self.failures = 0

    def next(self) -> float:
        """Count a failure and return the seconds to wait."""
        seconds = self._seconds[min(self.failures, len(self._seconds) - 1)]
        self.failures += 1
        return seconds

    def reset(self) -> None:
        """Count from the first failure again, after a success."""
        self.failures = 0


def spread(lowest: float, highest: float) -> float:
    """Return a random number between two bounds, so that many waits do not end together."""
    return random.uniform(lowest, highest)  # noqa: S311
