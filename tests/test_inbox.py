"""The inbox: messages on their way to the feeds, so many at a time."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from django_eventsource.inbox import TURN_BYTES, Inbox, size_of

SIZES = [TURN_BYTES // 2, TURN_BYTES // 2, 1, 3 * TURN_BYTES, 1, TURN_BYTES]
TURNS = [[0, 1], [2], [3], [4], [5]]


def messages() -> list[dict[str, Any]]:
    return [{"number": n, "frames": [b"x" * size]} for n, size in enumerate(SIZES)]


class Taken:
    """What was passed on in each round of the loop."""

    def __init__(self) -> None:
        self.round = 0
        self.rounds: dict[int, list[int]] = {}

    def take(self, message: Any) -> None:
        self.rounds.setdefault(self.round, []).append(message["number"])

    async def go_round(self, times: int) -> list[list[int]]:
        for _ in range(times):
            await asyncio.sleep(0)
            self.round += 1
        return list(self.rounds.values())


@pytest.mark.parametrize("together", [True, False])
async def test_a_turn_at_a_time(together: bool) -> None:
    """Between two turns the loop goes round, so that streams can write; in order."""
    taken = Taken()
    inbox = Inbox(asyncio.get_running_loop(), taken.take)
    if together:
        inbox.put(messages())
    else:
        for message in messages():
            inbox.put([message])
    assert await taken.go_round(10) == TURNS


async def test_messages_of_a_layer_take_turns_too() -> None:
    """Though the layer may give one after the other without a pause."""
    taken = Taken()
    inbox = Inbox(asyncio.get_running_loop(), taken.take)

    async def receive() -> None:
        for message in messages():
            await inbox.turn(message)
            taken.take(message)

    task = asyncio.ensure_future(receive())
    assert await taken.go_round(10) == TURNS
    await task


async def test_from_any_thread() -> None:
    """All of it arrives, that of each thread in order."""
    got: list[tuple[int, int]] = []
    done = asyncio.Event()

    def take(message: Any) -> None:
        got.append(message["number"])
        if len(got) == 400:
            done.set()

    inbox = Inbox(asyncio.get_running_loop(), take)

    def put(thread: int) -> None:
        for n in range(100):
            inbox.put([{"number": (thread, n), "frames": [b"x" * 1000]}])

    threads = [threading.Thread(target=put, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(10):
        await done.wait()
    for thread in threads:
        thread.join()
    assert sorted(got) == [(thread, n) for thread in range(4) for n in range(100)]
    for thread in range(4):
        assert [n for one, n in got if one == thread] == list(range(100))


def test_a_loop_that_is_closed() -> None:
    """What comes too late is for nobody."""
    loop = asyncio.new_event_loop()
    loop.close()
    Inbox(loop, print).put([{"number": 1}])


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ({"frames": [b"abc", b"de"]}, 5),
        ({"frames": [b"abc", "de"]}, 3),
        ({"frames": b"abc"}, 0),
        ({}, 0),
        (None, 0),
    ],
)
def test_size(message: object, size: int) -> None:
    """Whatever comes over a layer has one."""
    assert size_of(message) == size
