"""Pacing: when a busy token is passed on. The loop's clock is moved by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from django_eventsource.pacing import MANY, MOST, ROUNDS, Pace

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
        self.free_at = self.rest = 0.0
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
    """Where the writes take long, publishers get half of that time."""
    token.come()
    loop.write(0.04)
    assert token.free_at == pytest.approx(loop.now + 0.02)


def test_a_flood_makes_the_rest_longer_and_it_stays_bounded(token: Token, loop: Loop) -> None:
    """Twice as long after each large batch; as short as before when it is over."""
    rests = []
    for events in (1, *[MANY] * 6):
        token.pass_on(events)
        loop.write(0.0)
        rests.append(token.rest / WINDOW)
    assert rests == pytest.approx([1, 2, 4, 8, MOST, MOST, MOST])
    token.pass_on(MANY - 1)
    loop.write(0.0)
    assert token.rest == pytest.approx(WINDOW)
    token.pass_on(1)
    loop.write(60.0)
    assert token.rest == pytest.approx(WINDOW * MOST)


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
