"""A subscriber of one token, for tests that are not about several."""

from __future__ import annotations

from typing import Any

from django_eventsource.subscribers import Subscriber


class Single(Subscriber):
    """Buffer and place in one, as most streams have them."""

    __slots__ = ("only",)

    def __init__(self, position: int, *, token: str = "t", **options: Any) -> None:
        super().__init__(**options)
        self.only = self.add(token, position)

    def __getattr__(self, name: str) -> Any:
        if name == "only":
            raise AttributeError(name)
        return getattr(self.only, name)
