"""Buffers: the bytes that wait for one stream."""

from __future__ import annotations

import asyncio

import pytest

from django_eventsource.batches import Batch
from django_eventsource.buffers import Buffer, share_of
from django_eventsource.frames import KEEPALIVE


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(100, None)


def held(buffer: Buffer) -> bytes:
    return b"".join(buffer._buffer)


def test_the_buffer_is_a_part_of_what_a_stream_may_hold() -> None:
    """As much again may be on its way, and some with asyncio."""
    assert 2 * share_of(256 * 1024) + 64 * 1024 == 256 * 1024


@pytest.mark.parametrize(
    ("waiting", "in_flight", "frames", "fits"),
    [
        (0, 0, [100], True),
        (0, 0, [101], True),
        (0, 0, [50, 51], True),
        (0, 99, [2], True),
        (0, 99, [1, 1], False),
        (0, 98, [1, 1], True),
        (1, 0, [99], True),
        (1, 0, [100], False),
        (1, 0, [50, 50], False),
        (50, 50, [1], False),
    ],
)
def test_room(buffer: Buffer, waiting: int, in_flight: int, frames: list[int], fits: bool) -> None:
    """Up to the bound; over it one frame, if none waits, or one batch beside nothing else."""
    if waiting:
        buffer.write(b"w" * waiting)
    buffer.in_flight = in_flight
    batch = Batch([b"x" * size for size in frames])
    assert buffer.offer(batch.data, batch) is fits
    assert held(buffer) == b"w" * waiting + (batch.data if fits else b"")
    assert buffer._size == len(held(buffer))


@pytest.mark.parametrize("how", ["write", "offer", "wake"])
async def test_a_stream_that_waits_is_woken(buffer: Buffer, how: str) -> None:
    """Once: what comes before it runs changes nothing."""
    waiter = buffer.waiter(asyncio.get_running_loop())
    for _ in range(2):
        buffer.stirred = False
        if how == "write":
            buffer.write(b"x")
        elif how == "offer":
            assert buffer.offer(b"x", Batch([b"x"]))
        else:
            buffer.wake()
        assert buffer.stirred
    await asyncio.wait_for(waiter, 1)


def test_keepalives(buffer: Buffer) -> None:
    """Only where nothing was written since the last time, and nothing waits."""
    buffer.keep_alive()
    assert not buffer.has_frames
    buffer.keep_alive()
    assert held(buffer) == KEEPALIVE
    buffer.quiet = True
    buffer.keep_alive()
    assert held(buffer) == KEEPALIVE
    buffer._buffer.clear()
    assert buffer.offer(b"x", Batch([b"x"]))
    assert not buffer.quiet
