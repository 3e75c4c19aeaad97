"""The membership of a hub in the channel layer: its channel and its groups.

A layer loses members: after a restart of the broker, after an outage, when they expire. It may
also stop to deliver without an error. So the hub joins its groups again on a timer and after
every failure. At each history check it sends a message to a group in which only the hub is. If
no such message comes back, the layer has lost its members, and the hub joins all groups again. If
the layer delivers nothing at all for a longer time, the hub replaces its instance of the layer.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from channels.layers import BaseChannelLayer

from ..protocol.messages import encode_probe
from .layer import LAYER_SECONDS, close_layer, make_hub_layer

logger = logging.getLogger("django_eventsource.delivery")

PROBES = 3
"""The probes in a row that are lost before the hub joins all groups again.

One may be lost to a wait of the core layer at the moment of redis-py's time-out.
"""
REJOIN_BACKOFF_SECONDS = 10.0
"""Least seconds from one such rejoin to the next. Doubled each time."""
LEAST_REJOIN_SECONDS = 0.5
"""Least seconds between group joins, if the ``group_expiry`` of the layer is very short."""

Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class _Group:
    """A group that the hub is to be a member of."""

    __slots__ = ("joined", "joining", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.joined = False
        """Whether the hub's channel is in the group."""
        self.joining: asyncio.Task[None] | None = None
        """The last attempt to join."""


class GroupMembership:
    """The channel and the groups of a hub.

    :param start: starts a task of the hub.
    """

    rejoin_seconds = 600.0
    """The longest time between group joins. By default layers drop members after a day."""
    answer_seconds = 1.0
    """Seconds after which a probe counts as lost."""
    layer_silence_seconds = 20.0
    """Seconds for which the layer may deliver nothing although the hub sends probes."""
    layer_seconds = LAYER_SECONDS
    """Seconds that a join or a leave may take, including the wait for its turn."""

    def __init__(self, start: Start) -> None:
        self.layer: BaseChannelLayer = make_hub_layer()
        self.channel: str | None = None
        self.receiving = True
        """Whether a task of the hub waits for messages."""
        self._start = start
        self._groups: dict[str, _Group] = {}
        self._naming = asyncio.Lock()
        self._order = asyncio.Lock()
        self._failing = False
        self._unwanted: dict[str, None] = {}
        """The groups to leave, in this order."""
        self._leaving: asyncio.Task[None] | None = None
        self.rejoin_at = self._next_rejoin()
        """When :meth:`join_missing` joins all groups again, on the monotonic clock."""
        self._own_group = _make_own_group()
        self._own_group_joined = False
        self._probed_at: float | None = None
        """When the first probe was sent after the last message of the layer. An error of the layer
        removes it, because a new instance would not help."""
        self.has_delivered = False
        """Whether the layer has ever delivered a message to the hub."""
        self._silent_since: float | None = None
        """When the layer has last delivered a message, or when the probes began."""
        self._probing: asyncio.Task[None] | None = None
        self._echo: asyncio.Future[None] | None = None
        self._backoff_seconds = REJOIN_BACKOFF_SECONDS
        self._no_rejoin_until = 0.0

    async def get_channel(self) -> str:
        """Return the hub's channel. The first call creates it."""
        return (await self._layer_and_channel())[1]

    async def _layer_and_channel(self) -> tuple[BaseChannelLayer, str]:
        while True:
            layer = self.layer
            # Two tasks must not create two channels, one to receive on and one to join with.
            async with self._naming:
                channel = self.channel or await layer.new_channel("eventsource")
            if layer is self.layer:  # it may have been replaced
                self.channel = channel
                return layer, channel

    # Groups

    def join(self, group: str) -> asyncio.Task[None] | None:
        """Join a group in a task. ``None`` if the hub is in the group already."""
        one = self._groups.setdefault(group, _Group(group))
        return None if one.joined else self._begin_join(one)

    def is_joined(self, group: str) -> bool:
        """Return whether the hub is in a group that it joins."""
        return group in self._groups and self._groups[group].joined

    def _begin_join(self, group: _Group) -> asyncio.Task[None]:
        if group.joining is None or group.joining.done():
            group.joining = self._start(self._join(group))
        return group.joining

    async def _join(self, group: _Group) -> None:
        try:
            async with asyncio.timeout(self.layer_seconds), self._order:
                layer, channel = await self._layer_and_channel()
                await layer.group_add(group.name, channel)
        except Exception as error:  # noqa: BLE001
            # The history check finds the events meanwhile. `join_missing` joins again.
            self._log_failure(error)
        else:
            group.joined = layer is self.layer
            self._failing = False

    def _log_failure(self, error: Exception, what: str = "join") -> None:
        if not self._failing:  # once, and not for each of many groups
            logger.error("Could not %s a channel-layer group; retrying.", what, exc_info=error)
        self._failing = True

    def join_missing(self) -> None:
        """Join the groups that the hub is not in, or all groups if it is time.

        Also leave the groups that could not be left before.
        """
        if time.monotonic() >= self.rejoin_at:
            self.assume_lost()
        for group in self._groups.values():
            if not group.joined:
                self._begin_join(group)
        self._begin_leave()

    def assume_lost(self) -> None:
        """Assume that the layer has lost the hub's membership in all groups."""
        self.rejoin_at = self._next_rejoin()
        self._own_group_joined = False
        for group in self._groups.values():
            group.joined = False

    def _next_rejoin(self) -> float:
        expiry = getattr(self.layer, "group_expiry", None)
        seconds = max(expiry / 2, LEAST_REJOIN_SECONDS) if expiry else self.rejoin_seconds
        return time.monotonic() + min(seconds, self.rejoin_seconds)

    def leave(self, group: str) -> None:
        """Leave a group in a task, unless it has been joined again by then.

        After a failure :meth:`join_missing` tries again.
        """
        self._groups.pop(group, None)
        self._unwanted[group] = None
        self._begin_leave()

    def _begin_leave(self) -> None:
        if self._unwanted and (self._leaving is None or self._leaving.done()):
            self._leaving = self._start(self._leave_unwanted())

    async def _leave_unwanted(self) -> None:
        while self._unwanted:
            group = next(iter(self._unwanted))
            del self._unwanted[group]  # before the call: it may be added again meanwhile
            try:
                async with asyncio.timeout(self.layer_seconds), self._order:
                    if group not in self._groups:
                        layer, channel = await self._layer_and_channel()
                        await layer.group_discard(group, channel)
            except Exception as error:  # noqa: BLE001
                # The hub skips messages for a group without listeners.
                self._unwanted[group] = None
                self._log_failure(error, "leave")
                return

    # What the layer delivers

    def note_received(self) -> None:
        """Record that the layer has delivered a message."""
        self._probed_at = None
        self.has_delivered = True
        self._silent_since = time.monotonic()

    @property
    def silence_seconds(self) -> float:
        """The seconds since the layer has last delivered a message, or since the first probe.

        0 if the hub sends no probes.
        """
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def note_probe_echo(self) -> None:
        """Record that the layer has delivered a probe."""
        if self._echo is not None and not self._echo.done():
            self._echo.set_result(None)
        self._backoff_seconds = REJOIN_BACKOFF_SECONDS
        self._no_rejoin_until = 0.0

    def check(self, *, shared: bool) -> bool:
        """Send a probe in a task. Return whether the layer must be replaced.

        :param shared: whether processes share the layer. A process-local layer needs no probe.
        """
        if not shared or not self._groups:
            self._probed_at = self._silent_since = None
            return False
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        if self._probing is None or self._probing.done():
            self._probing = self._start(self._probe())
        probed_at = self._probed_at
        return probed_at is not None and (
            time.monotonic() - probed_at > self.layer_silence_seconds
        )

    async def _probe(self) -> None:
        began = time.monotonic()
        first = self._probed_at is None
        if first:
            self._probed_at = began
        layer = self.layer
        try:
            if not await self._is_member() and self._rejoin(layer):
                await self._is_member()  # if the layer delivers again, it is kept
        except Exception as error:  # noqa: BLE001
            self._log_failure(error)
            if first and self._probed_at == began and not is_timeout(error):
                # The broker cannot be reached: a new instance of the layer would not help.
                self._probed_at = None

    async def _is_member(self) -> bool:
        """Send probes to the hub's own group until one comes back; return whether one did."""
        for _ in range(PROBES):
            echo = self._echo = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(self.layer_seconds):
                layer, channel = await self._layer_and_channel()
                group = self._own_group
                if not self._own_group_joined:
                    await layer.group_add(group, channel)
                    self._own_group_joined = group == self._own_group
                await layer.group_send(group, encode_probe())
            if (await asyncio.wait([echo], timeout=self.answer_seconds))[0]:
                return True
        return False

    def _rejoin(self, layer: BaseChannelLayer) -> bool:
        """Join all groups of a layer again, if that may help; return whether it may."""
        now = time.monotonic()
        if layer is not self.layer or not self.receiving or now < self._no_rejoin_until:
            return False
        logger.warning("The channel layer has lost the membership in its groups; joining again.")
        # A layer over its capacity drops messages, which is not repaired by joining.
        self._no_rejoin_until = now + self._backoff_seconds
        self._backoff_seconds *= 2
        self.assume_lost()
        self.join_missing()
        return True

    def replace(self) -> None:
        """Replace the layer by a new instance, with a new channel that is in no group yet."""
        logger.warning(
            "The channel layer has delivered nothing for %.0f s; creating a new instance.",
            self.layer_silence_seconds,
        )
        self._start(close_layer(self.layer))
        self.layer = make_hub_layer()
        self.channel = None
        self._naming = asyncio.Lock()
        self._order = asyncio.Lock()
        # The channel of the old layer stays in the old groups until they expire.
        self._unwanted.clear()
        self._own_group = _make_own_group()
        self._probing = None
        self._probed_at = None
        self.assume_lost()
        for group in self._groups.values():
            group.joining = None


def _make_own_group() -> str:
    return f"eventsource.probe.{uuid.uuid4().hex}"


def is_timeout(error: Exception) -> bool:
    """Return whether an error is a time-out. redis-py has a class of its own for it."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"
