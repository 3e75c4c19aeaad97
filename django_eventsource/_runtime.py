"""Process-wide state and its reset.

A room that keeps state for the whole process registers a function that resets it. A fork calls
all of them, because threads, event loops and sockets of the parent must not be used there. The
tests call them before each test.
"""

from __future__ import annotations

import os
from collections.abc import Callable

_resets: list[Callable[[], None]] = []
_kept: list[object] = []
_in_fork = False


def on_reset(reset: Callable[[], None]) -> Callable[[], None]:
    """Register a function that resets the state of a room. Also usable as a decorator.

    :param reset: drops the state. It closes what it drops unless :func:`keep_in_fork` keeps it.
    """
    _resets.append(reset)
    return reset


def reset_all() -> None:
    """Reset the process-wide state of all rooms, in the order of their registration."""
    for reset in _resets:
        reset()


def keep_in_fork(state: object) -> bool:
    """Keep what a reset drops, and return ``True``, if the process has just been forked.

    The parent still uses the loops and connections. The garbage collector must not close them.
    """
    if _in_fork:
        _kept.append(state)
    return _in_fork


def _after_fork() -> None:
    global _in_fork
    _in_fork = True
    reset_all()
    _in_fork = False


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows does not fork)
    os.register_at_fork(after_in_child=_after_fork)
