"""When the events of a busy token are passed on. The time of the loop is set by hand."""

from __future__ import annotations

import asyncio

import pytest

from django_eventsource.delivery.coalescing import (
    FEW_REST,
    MANY,
    MANY_REST,
    MAX_HELD_BYTES,
    MOST,
    Coalescer,
)
from django_eventsource.protocol.batches import Batch
from tests.support.loops import ManualLoop

WINDOW = 0.005


class Token:
    """A token and what was passed on of it: the number of events of each write."""

    def __init__(self, loop: ManualLoop | asyncio.AbstractEventLoop) -> None:
        self.passed: list[int] = []
        self.coalescer = Coalescer(loop, self._deliver)  # type: ignore[arg-type]

    def _deliver(self, batch: Batch) -> None:
        self.passed.append(len(batch.frames))

    def add(self, events: int = 1, *, size: int = 1, closes: bool = False) -> None:
        self.coalescer.add(Batch([b"x" * size] * events, closes=closes))


@pytest.fixture
def loop(settings) -> ManualLoop:
    settings.EVENTSOURCE_COALESCE_SECONDS = WINDOW
    return ManualLoop()


@pytest.fixture
def token(loop: ManualLoop) -> Token:
    return Token(loop)


def test_an_event_of_an_idle_token_is_passed_on_at_once(token: Token, loop: ManualLoop) -> None:
    """Events with a pause between them are passed on one by one."""
    for _ in range(3):
        token.add()
        loop.write(0.001)
        loop.go_to(loop.now + 2 * WINDOW)
    assert token.passed == [1, 1, 1]
    assert loop.timers == []


def test_events_of_a_busy_token_are_passed_on_together(token: Token, loop: ManualLoop) -> None:
    """The events that arrive during a write, and in the rest after it, are one batch."""
    token.add()
    token.add()
    loop.write(0.001)
    written = loop.now
    token.add()
    assert token.passed == [1]
    loop.go_to(written + WINDOW * 0.9)
    assert token.passed == [1]
    loop.go_to(written + WINDOW)
    assert token.passed == [1, 2]
    loop.write(0.001)
    loop.go_to(loop.now + WINDOW)
    token.add()
    assert token.passed == [1, 2, 1]


@pytest.mark.parametrize(
    ("events", "rest"),
    [
        (1, WINDOW),
        (2, 0.012 * FEW_REST),
        (MANY - 1, 0.012 * FEW_REST),
        (MANY, 0.012 * MANY_REST),
        (100, 0.012 * MANY_REST),
    ],
)
def test_the_rest_grows_with_the_events_and_the_time_of_their_writes(
    token: Token, loop: ManualLoop, events: int, rest: float
) -> None:
    """After a single event the rest is the setting, however long its writes took."""
    token.add(events)
    loop.write(0.012)
    assert WINDOW <= rest < WINDOW * MOST
    assert token.coalescer._free_at - loop.now == pytest.approx(rest)


def test_the_time_of_writes_that_deliver_makes_counts(loop: ManualLoop) -> None:
    """Ready streams are written to before ``deliver`` returns."""

    def deliver(batch: Batch) -> None:
        loop.now += 0.004

    coalescer = Coalescer(loop, deliver)  # type: ignore[arg-type]
    coalescer.add(Batch([b"x"] * MANY))
    loop.write(0.001)
    assert coalescer._free_at - loop.now == pytest.approx(0.005 * MANY_REST)


@pytest.mark.parametrize(("seconds", "windows"), [(0.0, 1), (0.0001, 1), (0.02, MOST), (60, MOST)])
def test_the_rest_is_bounded(token: Token, loop: ManualLoop, seconds: float, windows: int) -> None:
    """It lasts from the setting to ten times the setting."""
    token.add(MANY)
    loop.write(seconds)
    assert token.coalescer._free_at - loop.now == pytest.approx(WINDOW * windows)


def test_an_idle_token_does_not_wait_for_a_busy_one(loop: ManualLoop) -> None:
    """Each token has its own rest."""
    busy, idle = Token(loop), Token(loop)
    busy.add()
    loop.write(0.02)
    busy.add()
    idle.add()
    assert idle.passed == [1]
    loop.write(0.0)
    idle.add()
    loop.go_to(loop.now + 0.01)
    assert (busy.passed, idle.passed) == ([1, 1], [1, 1])


def test_held_events_wait_until_the_writes_have_ended(token: Token, loop: ManualLoop) -> None:
    """The timer is started again as often as the setting says."""
    token.add()
    token.add()
    loop.go_to(loop.now + 4.5 * WINDOW)
    assert token.passed == [1]
    assert len(loop.timers) == 1
    loop.write(0.0)
    loop.go_to(loop.now + 1.0)
    assert token.passed == [1, 1]


def test_the_timer_ends_if_the_events_were_passed_on_before(
    token: Token, loop: ManualLoop
) -> None:
    """No timer runs for a token without held events."""
    token.add()
    token.add()
    token.coalescer.flush()
    assert token.passed == [1, 1]
    loop.go_to(loop.now + WINDOW)
    assert loop.timers == []


def test_a_close_is_not_held(token: Token) -> None:
    """It is passed on with the held events before it."""
    token.add()
    token.add()
    token.add(closes=True)
    assert token.passed == [1, 2]


def test_the_held_bytes_are_bounded(token: Token) -> None:
    """Events that exceed the bound are passed on at once."""
    token.add()
    token.add(size=MAX_HELD_BYTES)
    assert token.passed == [1]
    token.add()
    assert token.passed == [1, 2]


def test_every_event_is_a_write_if_the_setting_is_none(
    settings, token: Token, loop: ManualLoop
) -> None:
    """``EVENTSOURCE_COALESCE_SECONDS = None`` disables coalescing."""
    settings.EVENTSOURCE_COALESCE_SECONDS = None
    for _ in range(5):
        token.add()
    assert token.passed == [1] * 5
    assert (loop.soon, loop.timers) == ([], [])


async def test_held_events_are_passed_on_after_the_setting_changed_to_none(settings) -> None:
    """Also on a real event loop."""
    settings.EVENTSOURCE_COALESCE_SECONDS = WINDOW
    token = Token(asyncio.get_running_loop())
    token.add()
    token.add()
    settings.EVENTSOURCE_COALESCE_SECONDS = None
    async with asyncio.timeout(10):
        while token.passed != [1, 1]:
            await asyncio.sleep(0.001)
