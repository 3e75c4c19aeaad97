"""A subscriber of one token, for tests that are not about several."""

from __future__ import annotations

from typing import Any

from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.history import Slice


class Single(Subscriber):
    """A subscriber and its only subscription in one object."""

    __slots__ = ("_feed", "only")

    def __init__(self, seq: int, *, token: str = "t", **options: Any) -> None:
        super().__init__(**{"buffer_bytes": 1000, "keepalive_seconds": None} | options)
        self.only = self.add(token, seq)

    def __getattr__(self, name: str) -> Any:
        if name in ("only", "_feed"):
            raise AttributeError(name)
        return getattr(self.only, name)

    def join(self, feed: Feed) -> None:
        """Subscribe to a feed."""
        feed.add(self.only)
        self._feed = feed

    def catch_up(self, slice_: Slice) -> bytes:
        """Catch up with what was read from the history."""
        return self._feed.catch_up(self.only, slice_)
