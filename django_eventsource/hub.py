"""The hub: one per process and event loop, between the channel layer and the streams.

It has one channel, one receive task and one tending task, however many streams there
are. Each token with listeners has a :class:`Feed`; each stream has a
:class:`Subscriber`, whose bounded buffer holds the same bytes objects as all others.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import logging
import random
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar, cast

from django.core.exceptions import ImproperlyConfigured

from .background import in_forks
from .buffers import share_of
from .conf import conf
from .feeds import Feed
from .history import History, Slice, get_history
from .inbox import Inbox
from .layers import MESSAGE_TYPE, is_process_local
from .membership import PROBE_TYPE, Membership, is_timeout
from .pacing import Pace
from .reads import KEPT_SECONDS, Reads
from .subscribers import Subscriber
from .tokens import group_name
from .troubles import log_failure

logger = logging.getLogger("django_eventsource.hub")

T = TypeVar("T")
Gaps = dict[Feed, int | None]
"""The feeds in which an event is missing, and the last one before it."""

POLL_SECONDS_LOCAL = 0.5
POLL_SECONDS_SHARED = 5.0
REORDER_SECONDS = 0.02
"""How long a gap may be nothing but messages that overtook each other."""
JOIN_SECONDS = 1.0
"""How long a new stream waits for its token's group before it reads the history."""
IDLE_SECONDS = 0.05
"""A time-out that comes sooner is a failure."""
UNHEARD_CHECKS = 2
"""Head checks in a row that find what a shared layer did not bring, before joining again."""
BACK_OFF_SECONDS = (0.5, 1, 2, 5, 10)


class Hub:
    """Receives from the channel layer and feeds the streams of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._feeds: dict[str, Feed] = {}
        self._by_group: dict[str, Feed] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keepalives: dict[float, set[Subscriber]] = {}
        self._pruning: asyncio.Task[None] | None = None
        self._checked_at = time.monotonic()
        self._inbox = Inbox(loop, self._take, _nobodys())
        self._membership = Membership(self.start, self._by_group)
        self._pace = Pace(loop, _nobodys())
        self._reads = Reads(self._read)
        self._receiving = self.start(self._receive())
        self.start(self._tend())

    @property
    def history(self) -> History:
        """The process's history."""
        return get_history()

    # For streams

    async def subscribe(self, subscriber: Subscriber) -> None:
        """Join the groups of the subscriber's tokens and start feeding it."""
        joins = set()
        for subscription in subscriber.subscriptions:
            if subscription.finished:
                continue
            token = subscription.token
            feed = self._feeds.get(token)
            if feed is None:
                feed = self._feeds[token] = Feed(
                    token, group_name(token), self._wake.set, self._pace
                )
                self._by_group[feed.group] = feed
            feed.add(subscription)
            if not feed.joined:
                joins.add(self._membership.begin_join(feed))
            elif feed.last is not None:
                # The feed passes on all that is newer than this: nothing needs to be read.
                subscription.go_live()
        self._keep_alive(subscriber)
        if joins:
            # A layer that hangs delays a stream, and the head check makes up for it.
            await asyncio.wait(joins, timeout=JOIN_SECONDS)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop feeding the subscriber. Does no harm when repeated."""
        for subscription in subscriber.subscriptions:
            if subscription.feed is not None:
                subscription.feed.remove(subscription)
        self._keepalives.get(subscriber.keepalive_seconds or 0, set()).discard(subscriber)

    async def read(self, token: str, after: int) -> Slice:
        """Read from the history for a stream that is subscribed."""
        return await self._reads.read(self._feeds[token], after)

    async def _read(self, token: str, after: int, max_events: int) -> Slice:
        """Read outside of any request's context.

        A request's context would give every stream a thread of its own to read in.
        """
        budget = share_of(conf.stream_buffer_bytes)
        read = self.history.aread(token, after, max_events=max_events, max_bytes=budget)
        return await self._run(read)

    # For publishers

    def listens_to(self, group: str) -> bool:
        """Whether a stream listens to the group's token. May be called in any thread.

        A stream that is not there yet reads the history after this, and finds what is in it.
        """
        return group in self._by_group

    def deliver(self, messages: Iterable[dict[str, Any]]) -> None:
        """Take messages of this process, from any thread, without a layer between."""
        self._inbox.put(messages)

    # The receive task

    async def _receive(self) -> None:
        """Receive for ever. Never cancelled to do something else: that loses messages."""
        failures = 0
        membership = self._membership
        task = cast("asyncio.Task[None]", asyncio.current_task())
        # A layer may swallow the cancellation: asyncio.wait_for does on Python 3.11 when a
        # message arrives in the same moment.
        while not task.cancelling():
            began = time.monotonic()
            membership.receiving = True
            try:
                message = await membership.layer.receive(await membership.get_channel())
            except Exception as error:
                if task.cancelling():
                    # A time-out in the same moment has taken the cancellation's place.
                    raise asyncio.CancelledError from error
                # redis-py 8 ends a wait after 5 s by default.
                if is_timeout(error) and time.monotonic() - began > IDLE_SECONDS:
                    logger.debug("The channel layer's socket_timeout ended a wait.")
                    continue
                # Once, and then every ten seconds: a broker may be away for long.
                level = logging.DEBUG if 0 < failures < len(BACK_OFF_SECONDS) else logging.ERROR
                logger.log(
                    level, "The channel layer failed to receive; trying again.", exc_info=error
                )
                membership.receiving = False
                await self._back_off(failures)
                failures += 1
                membership.forget()
                self._wake.set()
                continue
            failures = 0
            membership.hear()
            await self._inbox.turn(message)
            self._take(message, heard=True)

    def _take(self, message: Any, *, heard: bool = False) -> None:
        try:
            self._dispatch(message, heard=heard)
        except Exception:
            logger.exception("A message could not be passed on.")

    def _dispatch(self, message: Any, *, heard: bool = False) -> None:
        match message:
            case {
                "type": str(kind),
                "group": str(group),
                "seq": int() | None as seq,
                "finish": bool(finish),
                "frames": [bytes(), *_] as frames,
            } if kind == MESSAGE_TYPE and all(isinstance(frame, bytes) for frame in frames):
                feed = self._by_group.get(group)
                if feed is not None:
                    if heard and seq is not None:
                        feed.unheard = 0
                    feed.receive(seq, frames, finish)
            case {"type": str(kind)} if kind == PROBE_TYPE:
                self._membership.answer()
            case _:
                logger.warning("Skipped a channel-layer message that is not ours: %.200r", message)

    # The tending task

    async def _tend(self) -> None:
        """Check heads, close gaps, keep memberships: again and again."""
        failures = 0
        check_at = time.monotonic()
        prune_at = check_at + self._prune_seconds()
        while True:
            try:
                gaps = await self._rest(min(check_at, self._membership.rejoin_at))
                self._membership.join_missing()
                await self._close_gaps(gaps)
                now = time.monotonic()
                if now >= check_at:
                    self._check_layer()
                    await self._check_heads()
                    await self.history.arelease()
                    check_at = time.monotonic() + self._poll_seconds()
                if now >= prune_at:
                    self._begin_prune()
                    prune_at = now + self._prune_seconds()
                failures = 0
            except Exception as error:  # noqa: BLE001
                log_failure(logger, "Tending the streams failed; trying again.", error=error)
                await self._back_off(failures)
                failures += 1

    async def _rest(self, until: float) -> Gaps:
        """Wait for the next head check, or until a feed has a gap or lost its group.

        Return the gaps that were there before messages had the time to overtake each other.
        """
        timer = self.loop.call_later(until - time.monotonic(), self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()
        gaps = self._gaps()
        if gaps:
            await asyncio.sleep(REORDER_SECONDS)
        return gaps

    def _gaps(self) -> Gaps:
        return {feed: feed.last for feed in self._feeds.values() if feed.has_gap}

    def _poll_seconds(self) -> float:
        seconds = conf.poll_seconds
        if seconds is None:
            seconds = POLL_SECONDS_LOCAL if is_process_local() else POLL_SECONDS_SHARED
        return seconds

    def _check_layer(self) -> None:
        if self._membership.check(shared=not is_process_local()):
            self._receiving.cancel()
            self._membership.replace()
            self._receiving = self.start(self._receive())
            self._wake.set()

    async def _close_gaps(self, gaps: Gaps) -> None:
        for feed, last in gaps.items():
            if feed.has_gap and feed.last == last:
                await self._repair(feed)
            elif feed.has_gap:
                self._wake.set()  # it is another gap, which gets its time too

    async def _check_heads(self) -> None:
        self._leave_empty()
        self._reads.forget(older_than=KEPT_SECONDS)
        known = {feed: feed.last for feed in self._feeds.values() if feed.last is not None}
        heads = await self.history.aheads([feed.token for feed in known])
        # An event cannot have come, been trimmed and been forgotten in less time.
        recent = time.monotonic() - self._checked_at < self.history.token_max_age
        self._checked_at = time.monotonic()
        for feed, last in known.items():
            head = heads.get(feed.token)
            if head is None:
                continue  # nothing is known of it now
            before, feed.epoch = feed.epoch, head.epoch
            if head.life:
                if feed.compare(last, head.seq):
                    await self._repair(feed)
                    self._count_unheard(feed)
            elif before not in (None, head.epoch):
                feed.restart(head.seq)
            else:
                feed.raise_to(head.seq, certain=recent and (before is not None or not head.epoch))

    def _count_unheard(self, feed: Feed) -> None:
        feed.unheard += 1
        if feed.unheard >= UNHEARD_CHECKS and not is_process_local():
            feed.joined = False  # the broker may have forgotten the group
            self._wake.set()

    async def _repair(self, feed: Feed) -> None:
        """Pass on what the layer did not bring. A failure is this feed's alone."""
        more = True
        try:
            while more and feed.subscriptions and feed.last is not None:
                after = feed.last
                slice_ = await self.history.aread(
                    feed.token, after, max_bytes=share_of(conf.stream_buffer_bytes)
                )
                more = feed.pass_on(after, slice_)
                await asyncio.sleep(0)
        except Exception:
            logger.exception("Reading the history of %r failed; trying again.", feed.token)

    def _begin_prune(self) -> None:
        if self._pruning is None or self._pruning.done():
            self._pruning = self.start(self._prune())

    async def _prune(self) -> None:
        try:
            await self.history.aprune()
        except Exception as error:  # noqa: BLE001
            log_failure(logger, "Pruning the history failed; trying again.", error=error)

    def _leave_empty(self) -> None:
        for feed in [feed for feed in self._feeds.values() if not feed.subscriptions]:
            del self._feeds[feed.token], self._by_group[feed.group]
            self._reads.forget_feed(feed)
            self._membership.leave(feed.group)

    # Keepalives: one timer for all streams with the same interval

    def _keep_alive(self, subscriber: Subscriber) -> None:
        seconds = subscriber.keepalive_seconds
        if seconds is None:
            return
        members = self._keepalives.get(seconds)
        if members is None:
            members = self._keepalives[seconds] = set()
            self.loop.call_later(seconds / 2, self._tick, seconds, context=_nobodys())
        members.add(subscriber)

    def _tick(self, seconds: float) -> None:
        members = self._keepalives[seconds]
        if not members:
            del self._keepalives[seconds]
            return
        self.loop.call_later(seconds / 2, self._tick, seconds, context=_nobodys())
        for subscriber in members:
            subscriber.keep_alive()

    # Running

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task of the hub's own, in no request's context."""
        task = self.loop.create_task(work, context=_nobodys())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return await self.start(work)

    def _prune_seconds(self) -> float:
        try:
            seconds = conf.prune_seconds
        except ImproperlyConfigured:
            logger.exception("The history is not pruned.")
            seconds = None
        if seconds is None:
            return float("inf")
        # Servers that started together do not prune together.
        return seconds * random.uniform(0.5, 1.5)  # noqa: S311

    async def _back_off(self, failures: int) -> None:
        seconds = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
        await asyncio.sleep(seconds * random.uniform(0.5, 1))  # noqa: S311


def _nobodys() -> contextvars.Context:
    """Give an empty context: a request's would live on with its thread and its data."""
    return contextvars.Context()


_hubs: dict[asyncio.AbstractEventLoop, Hub] = {}
_parents: list[object] = []
"""What a fork has inherited. Kept: closing these loops would harm the parent's."""


def _leave_to_parent() -> None:
    _parents.append(dict(_hubs))
    _hubs.clear()


in_forks(_leave_to_parent)


def get_hub() -> Hub:
    """Give the hub of the running event loop, started when first asked for."""
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hubs()
        hub = _hubs[loop] = Hub(loop)
    return hub


def hubs() -> list[Hub]:
    """Give the hubs of this process, forgetting those whose loop is closed."""
    for loop in [loop for loop in list(_hubs) if loop.is_closed()]:
        # A hub's tasks hold its loop: a weak dictionary would never let go.
        _hubs.pop(loop, None)
    return list(_hubs.values())


def end_tasks() -> None:
    """End what a server left pending on a loop that it stopped and never closed.

    Daphne 4.2 does that, and CPython 3.11 crashes when it clears up such tasks at its end.
    """
    for hub in hubs():
        if not hub.loop.is_running():
            tasks = asyncio.all_tasks(hub.loop)
            for task in tasks:
                task.cancel()
            hub.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


atexit.register(end_tasks)
