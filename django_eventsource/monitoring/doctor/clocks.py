"""Comparing the clock of this machine with another one."""

from __future__ import annotations

TOLERATED_SECONDS = 2.0
"""Seconds by which two clocks may differ. The history checks assume the same margin."""


def difference_seconds(before: float, other: float, after: float) -> float:
    """Return by how many seconds another clock is ahead at least; negative if it is behind.

    :param before: the time of this machine before the other clock was read.
    :param other: the time of the other clock.
    :param after: the time of this machine after the other clock was read.
    """
    return max(other - after, 0.0) or min(other - before, 0.0)


def describe(seconds: float) -> str:
    """Return the difference as text, for a finding."""
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's clock"
