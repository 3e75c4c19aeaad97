"""An event loop whose time is set by the test."""

from __future__ import annotations

from typing import Any

from django_eventsource.delivery.coalescing import ROUNDS


class ManualLoop:
    """Runs callbacks and timers only if the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Any] = []
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Any, *args: Any, context: Any) -> None:
        self.soon.append(lambda: call(*args))

    def call_later(self, seconds: float, call: Any, *args: Any, context: Any) -> object:
        self.timers.append((self.now + seconds, lambda: call(*args)))
        return object()

    def write(self, seconds: float) -> None:
        """Let the writes to the listeners take some seconds."""
        self.now += seconds
        for _ in range(ROUNDS):
            soon, self.soon = self.soon, []
            for call in soon:
                call()

    def go_to(self, now: float) -> None:
        """Run the timers up to a time."""
        while due := [timer for timer in self.timers if timer[0] <= now]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = max(timer[0], self.now)
            timer[1]()
        self.now = now
