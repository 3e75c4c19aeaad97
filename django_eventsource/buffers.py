"""Buffers: the bytes that wait for one stream, bounded."""

from __future__ import annotations

import asyncio

from .batches import Batch
from .frames import KEEPALIVE


def share_of(stream_bytes: int) -> int:
    """Give the part of what a stream may hold that its buffer may take.

    As much again may be with the server, which asyncio lets hold 64 KiB besides.
    """
    return stream_bytes * 3 // 8


class Buffer:
    """What waits for one stream.

    :param buffer_bytes: the most that it holds, with what the server is about to take.
        One frame is held even if it is larger, and one batch if there is nothing else.
    :param keepalive_seconds: longest silence, or ``None``.
    """

    __slots__ = (
        "_buffer",
        "_size",
        "_waiter",
        "buffer_bytes",
        "in_flight",
        "keepalive_seconds",
        "quiet",
        "stirred",
    )

    def __init__(self, buffer_bytes: int, keepalive_seconds: float | None) -> None:
        self.buffer_bytes = buffer_bytes
        self.keepalive_seconds = keepalive_seconds
        self.quiet = False
        """Was nothing written since the last keepalive tick?"""
        self.stirred = True
        """May anything have changed since all was taken?"""
        self.in_flight = 0
        """Bytes that were taken, and that the server may not have taken on yet."""
        self._buffer: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    def write(self, frame: bytes) -> None:
        """Buffer bytes and wake the stream."""
        self.quiet = False
        self._buffer.append(frame)
        self._size += len(frame)
        self.wake()

    def offer(self, data: bytes, batch: Batch) -> bool:
        """Buffer a batch and wake the stream, if there is room.

        :param data: its bytes as this stream sends them.
        """
        buffer = self._buffer
        size = self._size + len(data)
        if size + self.in_flight > self.buffer_bytes and (
            buffer or (self.in_flight and len(batch.frames) > 1)
        ):
            return False
        # As `write` does; each call less counts here.
        buffer.append(data)
        self._size = size
        self.quiet = False
        self.stirred = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        return True

    def keep_alive(self) -> None:
        """Write a keepalive if nothing was written since the last call, and nothing waits."""
        if self.quiet and not self._buffer:
            self.write(KEEPALIVE)
        else:
            self.quiet = True

    def wake(self) -> None:
        """Let the stream look for news."""
        self.stirred = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def has_frames(self) -> bool:
        """Is anything buffered?"""
        return bool(self._buffer)

    def waiter(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Give what is done at the next news: there must be none yet."""
        self._waiter = loop.create_future()
        return self._waiter
