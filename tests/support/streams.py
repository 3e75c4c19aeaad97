"""Streams that tests consume."""

from __future__ import annotations

import asyncio

from django_eventsource.history import get_history
from django_eventsource.streaming.stream import EventStream
from tests.support.waiting import until


class StreamTask:
    """Consumes a stream in a task, so that a test can look at its body at any time."""

    def __init__(self, token: str = "t") -> None:
        self.stream = EventStream(token, get_history().locate(token, None))
        self.body = b""
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self.stream:
            self.body += chunk

    async def live(self) -> StreamTask:
        await until(lambda: self.stream._subscriber.subscriptions[0].live)
        return self

    async def close(self) -> None:
        await self.stream.aclose()
        await self.task
