"""Channel layers that fail, hang, drop messages or record them when a test wants it."""

from __future__ import annotations

import asyncio
from typing import Any

from channels.layers import BaseChannelLayer, InMemoryChannelLayer

from django_eventsource.delivery.hub import Hub
from django_eventsource.delivery.notifier import notifier
from tests.support.waiting import PATIENCE_SECONDS


class FaultyLayer(InMemoryChannelLayer):
    """An in-memory layer whose calls fail or hang when a test wants it."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.calls: list[tuple[str, ...]] = []
        self.fail: dict[str, int] = {}
        self.hang: asyncio.Event | None = None

    def _call(self, *call: str) -> None:
        self.calls.append(call)
        if self.fail.get(call[0], 0):
            self.fail[call[0]] -= 1
            raise ConnectionError(f"{call[0]} failed")

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        return await super().receive(channel)

    async def group_add(self, group: str, channel: str) -> None:
        self._call("group_add", group, channel)
        if self.hang is not None:
            await self.hang.wait()
        await super().group_add(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        self._call("group_discard", group, channel)
        await super().group_discard(group, channel)


class FaultySharedLayer(BaseChannelLayer):
    """A layer as processes share it. It fails, hangs or drops messages when a test wants it."""

    made: list[FaultySharedLayer] = []

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.queues: dict[str, asyncio.Queue[Any]] = {}
        self.groups: dict[str, set[str]] = {}
        self.calls: list[str] = []
        self.failing: set[str] = set()
        self.hang: asyncio.Event | None = None
        self.silent = False
        FaultySharedLayer.made.append(self)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise ConnectionError(f"{name} failed")

    async def new_channel(self, prefix: str = "specific.") -> str:
        name = f"{prefix}.{len(self.queues)}.{id(self)}"
        self.queues[name] = asyncio.Queue()
        return name

    async def receive(self, channel: str) -> Any:
        self._call("receive")
        return await self.queues[channel].get()

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        self._call("send")
        if not self.silent:
            self.queues[channel].put_nowait(message)

    async def group_add(self, group: str, channel: str) -> None:
        self._call("group_add")
        if self.hang is not None:
            await self.hang.wait()
        self.groups.setdefault(group, set()).add(channel)

    async def group_discard(self, group: str, channel: str) -> None:
        self._call("group_discard")
        self.groups.get(group, set()).discard(channel)

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self._call("group_send")
        for channel in self.groups.get(group, ()):
            await self.send(channel, message)


class RecordingLayer:
    """A layer that records what is sent. It fails or hangs when a test wants it."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.hang = False
        self._sent: list[tuple[str, dict[str, Any]]] = []
        self._tried = 0

    @property
    def sent(self) -> list[tuple[str, dict[str, Any]]]:
        """What was sent, after all publishers have sent it."""
        assert notifier.flush(PATIENCE_SECONDS)
        return self._sent

    @property
    def tried(self) -> int:
        """The number of attempts, after all publishers have made them."""
        assert notifier.flush(PATIENCE_SECONDS)
        return self._tried

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self._tried += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self._sent.append((group, message))


def layer_of(hub: Hub) -> FaultySharedLayer:
    """Return the layer of a hub."""
    assert isinstance(hub._membership.layer, FaultySharedLayer)
    return hub._membership.layer
