"""Counters over fixed windows of time, in Django's default cache.

The count is exact where the cache's ``incr()`` is atomic: the local-memory, Redis and
Memcached backends. The file-based and database backends read, add and write.
"""

from __future__ import annotations

import math
import time

from django.core.cache import cache

from .tokens import token_key


class Window:
    """The current window of time of one sender. Its methods block.

    :param name: what is counted.
    :param sender: the client that is counted, as text.
    :param seconds: the length of the window.
    """

    def __init__(self, name: str, sender: str, seconds: float) -> None:
        now = time.time()
        number = int(now // seconds)
        self.seconds_left = math.ceil((number + 1) * seconds - now)
        """Whole seconds after which the next window begins."""
        # The clocks of processes differ a little: the key outlives its window.
        self._timeout = 2 * seconds + 1
        self._key = f"django_eventsource.{name}.{token_key(sender)}.{number}"

    def count(self) -> int:
        """Return the count."""
        return int(cache.get(self._key, 0))

    def add(self) -> int:
        """Add one and return the new count."""
        cache.add(self._key, 0, timeout=self._timeout)
        try:
            return cache.incr(self._key)
        except ValueError:
            return 1  # the cache has dropped the key since, or stores nothing
