"""A hub's membership in the channel layer: its channel, its groups, and whether it hears.

A layer forgets members, and may fall deaf without a word: after a restart of the broker,
after an outage, after a message that its receiver did not like. So the hub joins its groups
again on a timer and after every failure, and sends itself a message now and then: when
nothing comes for long, it takes a new layer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from channels.layers import BaseChannelLayer

from .feeds import Feed
from .layers import LAYER_SECONDS, let_go, make_hub_layer

logger = logging.getLogger("django_eventsource.hub")

REJOIN_SECONDS = 600.0
"""Time between group joins: layers forget members, after 60 s or a day."""
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
        self._rejoin_at = time.monotonic() + REJOIN_SECONDS
        self._probed_at: float | None = None
        """When the oldest message to itself was sent that nothing has followed."""
        self._probing: asyncio.Task[None] | None = None

    async def get_channel(self) -> str:
        """Give the hub's channel, named when first asked for."""
        # Two who ask at once must not get two: one would be received on, the other joined.
        async with self._naming:
            if self.channel is None:
                self.channel = await self.layer.new_channel("eventsource")
            return self.channel

    # Groups

    def begin_join(self, feed: Feed) -> asyncio.Task[None]:
        """Join a feed's group in a task: a layer that hangs holds up nothing else."""
        if feed.joining is None or feed.joining.done():
            feed.joining = self._start(self._join(feed))
        return feed.joining

    async def _join(self, feed: Feed) -> None:
        layer = self.layer
        try:
            async with asyncio.timeout(LAYER_SECONDS), self._order:
                await layer.group_add(feed.group, await self.get_channel())
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
        """Join the groups of all feeds that are in none."""
        for feed in self._feeds.values():
            if not feed.joined:
                self.begin_join(feed)

    def forget(self) -> None:
        """Take no feed for joined any more."""
        self._rejoin_at = time.monotonic() + REJOIN_SECONDS
        for feed in self._feeds.values():
            feed.joined = False

    async def leave(self, group: str) -> None:
        """Leave a group, unless somebody listens again."""
        try:
            async with asyncio.timeout(LAYER_SECONDS), self._order:
                if group not in self._feeds:
                    await self.layer.group_discard(group, await self.get_channel())
        except Exception as error:  # noqa: BLE001
            # Messages for a group without listeners are skipped.
            self._tell(error, "leave")

    # Hearing

    def hear(self) -> None:
        """Take note that the layer brought something."""
        self._probed_at = None

    def check(self, *, shared: bool) -> bool:
        """Keep the membership alive; ``True`` when the layer is deaf and to be replaced."""
        if time.monotonic() > self._rejoin_at:
            self.forget()
        if not shared or not self._feeds:
            self.hear()
            return False
        if self._probing is None or self._probing.done():
            self._probing = self._start(self._probe())
        return self._probed_at is not None and time.monotonic() - self._probed_at > DEAF_SECONDS

    async def _probe(self) -> None:
        """Send the hub a message: whatever comes shows that it hears."""
        began = time.monotonic()
        first = self._probed_at is None
        if first:
            self._probed_at = began
        try:
            async with asyncio.timeout(LAYER_SECONDS):
                await self.layer.send(await self.get_channel(), {"type": PROBE_TYPE})
        except Exception as error:  # noqa: BLE001
            self._tell(error)
            if first and self._probed_at == began and not is_timeout(error):
                # A broker that cannot be reached says nothing about our hearing.
                self._probed_at = None

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
        self.hear()
        self.forget()
        for feed in self._feeds.values():
            feed.joining = None


def is_timeout(error: Exception) -> bool:
    """Tell whether something took too long. redis-py has a class of its own for that."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"
