"""A hub's membership in the channel layer: its channel, its groups, and whether it hears.

A layer forgets members, and may fall deaf without a word: after a restart of the broker,
after an outage, after a message that its receiver did not like. So the hub joins its groups
again on a timer and after every failure, and sends a message now and then to a group that
only it is in. When that does not come back, the layer has forgotten its members, and the hub
joins all groups again; when nothing at all comes for long, it takes a new layer.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from channels.layers import BaseChannelLayer

from .feeds import Feed
from .layers import LAYER_SECONDS, let_go, make_hub_layer

logger = logging.getLogger("django_eventsource.hub")

REJOIN_SECONDS = 600.0
"""Time between group joins, or less: layers forget members, after a day by default."""
PROBES = 3
"""So many messages of the hub to its own group are lost before it takes itself for forgotten.

One may be lost to a wait of the core layer that redis-py has just given up.
"""
ANSWER_SECONDS = 1.0
"""How long each may take to come back."""
PATIENCE_SECONDS = 10.0
"""Least time from one such rejoin to the next; twice as long each time."""
LEAST_REJOIN_SECONDS = 0.5
"""Time between group joins where the layer forgets members sooner than makes sense."""
DEAF_SECONDS = 20.0
"""How long the layer may bring nothing, although the hub sends itself messages."""

PROBE_TYPE = "eventsource.probe"

Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Membership:
    """What a hub is a member of.

    :param start: starts a task of the hub's own.
    :param feeds: the hub's feeds, by group.
    """

    def __init__(self, start: Start, feeds: Mapping[str, Feed]) -> None:
        self.layer: BaseChannelLayer = make_hub_layer()
        self.channel: str | None = None
        self._start = start
        self._feeds = feeds
        self._naming = asyncio.Lock()
        self._order = asyncio.Lock()
        self._failing = False
        self._unwanted: dict[str, None] = {}
        """Groups without a feed that are to be left, in this order."""
        self._leaving: asyncio.Task[None] | None = None
        self.rejoin_at = self._next_rejoin()
        """When :meth:`join_missing` joins all groups again, on the monotonic clock."""
        self.receiving = True
        """Is anybody waiting for messages?"""
        self._group = _own_group()
        self._joined = False
        self._probed_at: float | None = None
        """When the oldest message to itself was sent that nothing has followed."""
        self._probing: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[None] | None = None
        self._patience = PATIENCE_SECONDS
        self._patient_until = 0.0

    async def get_channel(self) -> str:
        """Give the hub's channel, named when first asked for."""
        return (await self._place())[1]

    async def _place(self) -> tuple[BaseChannelLayer, str]:
        """Give the layer, and the hub's channel in it."""
        while True:
            layer = self.layer
            # Two who ask at once must not get two: one would be received on, the other joined.
            async with self._naming:
                channel = self.channel or await layer.new_channel("eventsource")
            if layer is self.layer:  # or it was replaced meanwhile
                self.channel = channel
                return layer, channel

    # Groups

    def begin_join(self, feed: Feed) -> asyncio.Task[None]:
        """Join a feed's group in a task: a layer that hangs holds up nothing else."""
        if feed.joining is None or feed.joining.done():
            feed.joining = self._start(self._join(feed))
        return feed.joining

    async def _join(self, feed: Feed) -> None:
        try:
            async with asyncio.timeout(LAYER_SECONDS), self._order:
                layer, channel = await self._place()
                await layer.group_add(feed.group, channel)
        except Exception as error:  # noqa: BLE001
            # The head check brings what the layer does not; the next one joins again.
            self._tell(error)
        else:
            feed.joined = layer is self.layer
            self._failing = False

    def _tell(self, error: Exception, what: str = "join") -> None:
        if not self._failing:  # once, and not for each of many groups
            logger.error("Could not %s a channel-layer group; trying again.", what, exc_info=error)
        self._failing = True

    def join_missing(self) -> None:
        """Join the groups of all feeds that are in none, or of all feeds when it is time.

        Groups that could not be left before are left.
        """
        if time.monotonic() >= self.rejoin_at:
            self.forget()
        for feed in self._feeds.values():
            if not feed.joined:
                self.begin_join(feed)
        self._begin_leave()

    def forget(self) -> None:
        """Take no feed for joined any more."""
        self.rejoin_at = self._next_rejoin()
        self._joined = False
        for feed in self._feeds.values():
            feed.joined = False

    def _next_rejoin(self) -> float:
        expiry = getattr(self.layer, "group_expiry", None)
        seconds = max(expiry / 2, LEAST_REJOIN_SECONDS) if expiry else REJOIN_SECONDS
        return time.monotonic() + min(seconds, REJOIN_SECONDS)

    def leave(self, group: str) -> None:
        """Leave a group in a task, unless it has a feed again by then.

        After a failure :meth:`join_missing` tries again.
        """
        self._unwanted[group] = None
        self._begin_leave()

    def _begin_leave(self) -> None:
        if self._unwanted and (self._leaving is None or self._leaving.done()):
            self._leaving = self._start(self._leave_unwanted())

    async def _leave_unwanted(self) -> None:
        while self._unwanted:
            group = next(iter(self._unwanted))
            del self._unwanted[group]  # before: it may be left once more meanwhile
            try:
                async with asyncio.timeout(LAYER_SECONDS), self._order:
                    if group not in self._feeds:
                        layer, channel = await self._place()
                        await layer.group_discard(group, channel)
            except Exception as error:  # noqa: BLE001
                # Messages for a group without listeners are skipped.
                self._unwanted[group] = None
                self._tell(error, "leave")
                return

    # Hearing

    def hear(self) -> None:
        """Take note that the layer brought something."""
        self._probed_at = None

    def answer(self) -> None:
        """Take note that the layer brought a message of the hub to its own group."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        self._patience = PATIENCE_SECONDS
        self._patient_until = 0.0

    def check(self, *, shared: bool) -> bool:
        """Keep the membership alive; ``True`` when the layer is deaf and to be replaced."""
        if not shared or not self._feeds:
            self.hear()
            return False
        if self._probing is None or self._probing.done():
            self._probing = self._start(self._probe())
        return self._probed_at is not None and time.monotonic() - self._probed_at > DEAF_SECONDS

    async def _probe(self) -> None:
        """Join the groups again if the layer has forgotten that the hub is in its own."""
        began = time.monotonic()
        first = self._probed_at is None
        if first:
            self._probed_at = began
        layer = self.layer
        try:
            if not await self._is_member() and self._rejoin(layer):
                await self._is_member()  # or it is deaf
        except Exception as error:  # noqa: BLE001
            self._tell(error)
            if first and self._probed_at == began and not is_timeout(error):
                # A broker that cannot be reached says nothing about our hearing.
                self._probed_at = None

    async def _is_member(self) -> bool:
        """Send messages to the hub's own group until one comes back."""
        for _ in range(PROBES):
            answer = self._answer = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(LAYER_SECONDS):
                layer, channel = await self._place()
                group = self._group
                if not self._joined:
                    await layer.group_add(group, channel)
                    self._joined = group == self._group
                await layer.group_send(group, {"type": PROBE_TYPE})
            if (await asyncio.wait([answer], timeout=ANSWER_SECONDS))[0]:
                return True
        return False

    def _rejoin(self, layer: BaseChannelLayer) -> bool:
        """Join all groups of a layer again, unless nothing speaks for it; tell whether."""
        now = time.monotonic()
        if layer is not self.layer or not self.receiving or now < self._patient_until:
            return False
        logger.warning("The channel layer seems to have forgotten its groups; joining again.")
        # A layer over its capacity drops messages: joining ever again would not help it.
        self._patient_until = now + self._patience
        self._patience *= 2
        self.forget()
        self.join_missing()
        return True

    def replace(self) -> None:
        """Take a new layer, with a new channel, in no group yet."""
        logger.warning(
            "The channel layer has brought nothing for %.0f s; taking a new one.", DEAF_SECONDS
        )
        self._start(let_go(self.layer))
        self.layer = make_hub_layer()
        self.channel = None
        self._naming = asyncio.Lock()
        self._order = asyncio.Lock()
        # The old layer's channel stays in the old groups until they expire.
        self._unwanted.clear()
        self._group = _own_group()
        self._probing = None
        self.hear()
        self.forget()
        for feed in self._feeds.values():
            feed.joining = None


def _own_group() -> str:
    return f"eventsource.probe.{uuid.uuid4().hex}"


def is_timeout(error: Exception) -> bool:
    """Tell whether something took too long. redis-py has a class of its own for that."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"
