"""The clocks of the test's process, which a test can move."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from django.utils import timezone

_monotonic = time.monotonic
_moved_seconds = 0.0


def _moved_monotonic() -> float:
    return _monotonic() + _moved_seconds


@contextmanager
def move_time(seconds: float) -> Iterator[None]:
    """Move the clocks of this process forward, and what waits for them.

    Inside the block, ``time.time()`` and ``django.utils.timezone.now()`` are ahead, so grants,
    sessions and stored events are older. ``time.monotonic()``, which is also the clock of asyncio,
    moves too and is not moved back after the block. So each timer that is due fires once, such as
    the history check, the maximum age of a stream and the recheck of its policy.

    Blocks can be nested, and then their seconds add up. The clocks of a database, of Redis and of
    other processes are not moved.

    :param seconds: the seconds by which to move the clocks.
    :raises ValueError: if the number is not positive.
    """
    global _moved_seconds
    if not seconds > 0:
        raise ValueError(f"move_time() requires a positive number of seconds, not {seconds!r}.")
    # A monotonic clock must not go back: what was timed inside the block would wait too long.
    _moved_seconds += seconds
    time.monotonic = _moved_monotonic
    wall, now, ahead = time.time, timezone.now, datetime.timedelta(seconds=seconds)
    with (
        patch.object(time, "time", lambda: wall() + seconds),
        patch.object(timezone, "now", lambda: now() + ahead),
    ):
        yield
