"""A hub's membership in the channel layer: its channel, its groups, and whether it hears.

A layer forgets members, and may fall deaf without a word: after a restart of the broker,
after an outage, after a message that its receiver did not like. So the hub joins its groups
again on a timer and after every failure, and sends a message now and then to a group that
only it is in. When that does not come back, the layer has forgotten its members, and the hub
joins all groups again; when nothing comes for long, it takes a new layer.
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
FORGOTTEN_SECONDS = 3.0
"""How long a message of the hub to its own group may take; twice as long after each rejoin."""
DEAF_SECONDS = 20.0
"""How long the layer may bring nothing, although the hub sends itself messages."""

PROBE_TYPE = "eventsource.probe"

Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Wait:
    """Since when the hub has been waiting for something, on the monotonic clock."""

    def __init__(self) -> None:
        self.since: float | None = None

    def begin(self, now: float) -> None:
        """Wait from now on, or still."""
        if self.since is None:
            self.since = now

    def undo(self, began: float) -> None:
        """Do not wait if it began then."""
        if self.since == began:
            self.since = None

    def end(self) -> None:
        """Wait no longer."""
        self.since = None

    def lasts(self, now: float, seconds: float) -> bool:
        """Tell whether it lasts longer than that."""
        return self.since is not None and now - self.since > seconds


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
        self._rejoin_at = self._next_rejoin()
        self._group = _own_group()
        self._joined = False
        self._deaf = Wait()
        """Nothing has come since a message to itself was sent."""
        self._unanswered = Wait()
        """A message to itself has not come back."""
        self._patience = FORGOTTEN_SECONDS
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
        self._rejoin_at = self._next_rejoin()
        self._joined = False
        self._unanswered.end()
        for feed in self._feeds.values():
            feed.joined = False

    def _next_rejoin(self) -> float:
        expiry = getattr(self.layer, "group_expiry", None)
        return time.monotonic() + min(REJOIN_SECONDS, expiry / 2 if expiry else REJOIN_SECONDS)

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
        self._deaf.end()

    def answer(self) -> None:
        """Take note that the layer brought a message of the hub to its own group."""
        self._unanswered.end()
        self._patience = FORGOTTEN_SECONDS

    def check(self, *, shared: bool) -> bool:
        """Keep the membership alive; ``True`` when the layer is deaf and to be replaced."""
        now = time.monotonic()
        if now > self._rejoin_at:
            self.forget()
        if not shared or not self._feeds:
            self.hear()
            self.answer()
            return False
        if self._unanswered.lasts(now, self._patience):
            logger.warning("The channel layer seems to have forgotten its groups; joining again.")
            self.forget()
            # A layer over its capacity drops messages: joining ever again would not help it.
            self._patience *= 2
        if self._probing is None or self._probing.done():
            self._probing = self._start(self._probe())
        return self._deaf.lasts(now, DEAF_SECONDS)

    async def _probe(self) -> None:
        """Send a message to the own group: it comes back to one who hears and is a member."""
        began = time.monotonic()
        for wait in (self._deaf, self._unanswered):
            wait.begin(began)
        layer, group = self.layer, self._group
        try:
            async with asyncio.timeout(LAYER_SECONDS):
                if not self._joined:
                    await layer.group_add(group, await self.get_channel())
                    self._joined = layer is self.layer
                await layer.group_send(group, {"type": PROBE_TYPE})
        except Exception as error:  # noqa: BLE001
            self._tell(error)
            if not is_timeout(error):
                # A broker that cannot be reached says nothing about our hearing.
                for wait in (self._deaf, self._unanswered):
                    wait.undo(began)

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
        # The old layer's channel stays in the old group until that expires.
        self._group = _own_group()
        self.hear()
        self.forget()
        for feed in self._feeds.values():
            feed.joining = None


def _own_group() -> str:
    return f"eventsource.probe.{uuid.uuid4().hex}"


def is_timeout(error: Exception) -> bool:
    """Tell whether something took too long. redis-py has a class of its own for that."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"
