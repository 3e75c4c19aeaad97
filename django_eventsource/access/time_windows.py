"""Counters over fixed time windows, in Django's default cache.

The count is exact where the cache's ``incr()`` is atomic: the local-memory, Redis and
Memcached backends. The file-based and database backends read, add and write.
"""

import math
import time

from django.core.cache import cache

from ..protocol.tokens import token_key


class Window:
    """The current time window of one sender. Its methods block.

    :param name: the name of the counter.
    :param sender: the user or the address whose requests are counted.
    :param seconds: the length of the window.
    """

    def __init__(self, name: str, sender: str, seconds: float) -> None:
        now = time.time()
        number = int(now // seconds)
        self.seconds_left = math.ceil((number + 1) * seconds - now)
        """Whole seconds after which the next window begins."""
        # The clocks of processes differ a little, so the key is kept longer than its window.
        self._timeout = 2 * seconds + 1
        self._key = f"django_eventsource.{name}.{token_key(sender)}.{number}"

    def count(self) -> int:
        """Return the count of the window."""
        return int(cache.get(self._key, 0))

    def add(self) -> int:
        """Increase the count by one and return it."""
        cache.add(self._key, 0, timeout=self._timeout)
        try:
            return cache.incr(self._key)
        except ValueError:
            return 1  # the cache has dropped the key, or does not store keys
