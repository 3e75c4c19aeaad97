"""Pacing: when a busy token is passed on. The loop's clock is moved by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from django_eventsource.pacing import FEW_REST, MANY, MANY_REST, MOST, ROUNDS, Pace

WINDOW = 0.005


class Loop:
    """An event loop whose time is told: a real one's cannot be."""

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
        """Let the writes take so long."""
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


class Token:
    """What a feed is to the pace."""

    def __init__(self, pace: Pace) -> None:
        self.free_at = 0.0
        self.pace = pace
        self.held = 0
        self.passed: list[int] = []

    def come(self, events: int = 1) -> None:
        """What a feed does with events."""
        if self.held or not self.pace.is_free(self):
            self.held += events
            self.pace.hold(self)
        else:
            self.pass_on(events)

    def flush(self) -> None:
        held, self.held = self.held, 0
        self.pass_on(held)

    def pass_on(self, events: int) -> None:
        self.passed.append(events)
        self.pace.begin(self, events)


@pytest.fixture
def loop(settings) -> Loop:
    settings.EVENTSOURCE_COALESCE_SECONDS = WINDOW
    return Loop()


@pytest.fixture
def pace(loop: Loop) -> Pace:
    return Pace(loop)  # type: ignore[arg-type]


@pytest.fixture
def token(pace: Pace) -> Token:
    return Token(pace)


def test_an_idle_token_is_passed_on_at_once(token: Token, loop: Loop) -> None:
    """Each event by itself, when there is time between them."""
    for _ in range(3):
        token.come()
        loop.write(0.001)
        loop.go_to(loop.now + 2 * WINDOW)
    assert token.passed == [1, 1, 1]
    assert loop.timers == []


def test_a_busy_token_is_passed_on_together(token: Token, loop: Loop) -> None:
    """What comes while an event is written, and in the rest after it, is one batch."""
    token.come()
    token.come()
    loop.write(0.001)
    written = loop.now
    token.come()
    assert token.passed == [1]
    loop.go_to(written + WINDOW * 0.9)
    assert token.passed == [1]
    loop.go_to(written + WINDOW)
    assert token.passed == [1, 2]
    loop.write(0.001)
    loop.go_to(loop.now + WINDOW)
    token.come()
    assert token.passed == [1, 2, 1]


def test_the_rest_follows_the_writes(token: Token, loop: Loop) -> None:
    """The more was held, the longer publishers get; an event alone delays no other."""
    rests = []
    for events in (1, 2, MANY - 1, MANY, 100, 1):
        token.pass_on(events)
        loop.write(0.012)
        rests.append(token.free_at - loop.now)
    few, many = 0.012 * FEW_REST, 0.012 * MANY_REST
    assert WINDOW < few < many < WINDOW * MOST
    assert rests == pytest.approx([WINDOW, few, few, many, many, WINDOW])


@pytest.mark.parametrize(("seconds", "windows"), [(0.0, 1), (0.0001, 1), (0.02, MOST), (60, MOST)])
def test_the_rest_is_bounded(token: Token, loop: Loop, seconds: float, windows: int) -> None:
    """However little, or much, is written."""
    token.pass_on(MANY)
    loop.write(seconds)
    assert token.free_at - loop.now == pytest.approx(WINDOW * windows)


def test_tokens_do_not_wait_for_each_other(pace: Pace, loop: Loop) -> None:
    """A flood of one leaves another one idle; both are served by one timer."""
    busy, idle = Token(pace), Token(pace)
    busy.come()
    loop.write(0.02)
    busy.come()
    idle.come()
    assert idle.passed == [1]
    loop.write(0.0)
    idle.come()
    assert len(loop.timers) == 1
    loop.go_to(loop.now + 0.01)
    assert (busy.passed, idle.passed) == ([1, 1], [1, 1])


def test_writes_that_have_not_ended_are_waited_for(token: Token, loop: Loop) -> None:
    """The timer looks again, as often as the setting says."""
    token.come()
    token.come()
    loop.go_to(loop.now + 4.5 * WINDOW)
    assert token.passed == [1]
    assert len(loop.timers) == 1
    loop.write(0.0)
    loop.go_to(loop.now + 1.0)
    assert token.passed == [1, 1]


def test_it_can_be_turned_off(settings, token: Token, loop: Loop) -> None:
    """Then every event is a write."""
    settings.EVENTSOURCE_COALESCE_SECONDS = None
    for _ in range(5):
        token.come()
    assert token.passed == [1] * 5
    assert (loop.soon, loop.timers) == ([], [])


async def test_turned_off_while_events_are_held(settings) -> None:
    """They are passed on all the same, on a real loop."""
    settings.EVENTSOURCE_COALESCE_SECONDS = WINDOW
    token = Token(Pace(asyncio.get_running_loop()))
    token.come()
    token.come()
    settings.EVENTSOURCE_COALESCE_SECONDS = None
    async with asyncio.timeout(10):
        while token.passed != [1, 1]:
            await asyncio.sleep(0.001)
