"""The queue of batches on their way to the feeds: a limited amount is passed on at a time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from django_eventsource.delivery.batch_queue import TURN_BYTES, MessageQueue
from django_eventsource.protocol.batches import Batch

SIZES = [TURN_BYTES // 2, TURN_BYTES // 2, 1, 3 * TURN_BYTES, 1, TURN_BYTES]
TURNS = [[0, 1], [2], [3], [4], [5]]


def batches() -> list[Batch]:
    return [Batch([b"x" * size], [n]) for n, size in enumerate(SIZES)]


class Delivered:
    """The batches that were passed on in each round of the loop."""

    def __init__(self) -> None:
        self.round = 0
        self.rounds: dict[int, list[int | None]] = {}

    def deliver(self, group: str, batch: Batch) -> None:
        self.rounds.setdefault(self.round, []).append(batch.first)

    async def run(self, rounds: int) -> list[list[int | None]]:
        for _ in range(rounds):
            await asyncio.sleep(0)
            self.round += 1
        return list(self.rounds.values())


@pytest.mark.parametrize("together", [True, False])
async def test_the_loop_runs_between_two_turns(together: bool) -> None:
    """The streams can write what was passed on, and the order is kept."""
    delivered = Delivered()
    queue = MessageQueue(asyncio.get_running_loop(), delivered.deliver)
    if together:
        queue.put("g", batches())
    else:
        for batch in batches():
            queue.put("g", [batch])
    assert await delivered.run(10) == TURNS


async def test_the_loop_runs_between_two_turns_of_layer_messages() -> None:
    """A layer may return one message after the other without a pause."""
    delivered = Delivered()
    queue = MessageQueue(asyncio.get_running_loop(), delivered.deliver)

    async def receive() -> None:
        for batch in batches():
            await queue.turn(batch)
            delivered.deliver("g", batch)

    task = asyncio.ensure_future(receive())
    assert await delivered.run(10) == TURNS
    await task


async def test_batches_of_any_thread_arrive_in_the_order_of_the_thread() -> None:
    """No batch is lost."""
    got: list[tuple[str, int | None]] = []
    done = asyncio.Event()

    def deliver(group: str, batch: Batch) -> None:
        got.append((group, batch.first))
        if len(got) == 400:
            done.set()

    queue = MessageQueue(asyncio.get_running_loop(), deliver)

    def put(thread: int) -> None:
        for n in range(100):
            queue.put(str(thread), [Batch([b"x" * 1000], [n])])

    threads = [threading.Thread(target=put, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(10):
        await done.wait()
    for thread in threads:
        thread.join()
    assert len(got) == 400
    for thread in range(4):
        assert [n for group, n in got if group == str(thread)] == list(range(100))


def test_a_batch_for_a_closed_loop_is_dropped() -> None:
    """The publisher receives no error."""
    loop = asyncio.new_event_loop()
    loop.close()
    MessageQueue(loop, print).put("g", [Batch([b"x"])])
