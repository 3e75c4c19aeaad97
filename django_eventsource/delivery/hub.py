"""The hub: one per process and event loop, between the channel layer and the streams.

A hub has one channel, one receive task and one maintenance task, however many streams there
are. Each token with listeners has a :class:`Feed`. Each stream has a :class:`Subscriber`, whose
bounded buffer contains the same bytes objects as all others.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import logging
import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

from django.core.exceptions import ImproperlyConfigured

from .. import _runtime
from .._logging import ThrottledLogger
from .._timing import Backoff, spread
from ..conf import conf
from ..history import History, Slice, get_history
from ..history.wake_ups import Groups
from ..protocol import messages
from ..protocol.batches import Batch
from ..protocol.tokens import CONTROL_TOKEN
from .batch_queue import MessageQueue
from .feed import Feed
from .group_membership import GroupMembership, is_timeout
from .layer import LAYER_SECONDS, close_layer, group_name, is_process_local
from .replay_cache import MAX_EVENTS, ReplayCache
from .subscription import Subscriber, Subscription, share_of
from .wake_ups import News, watcher

logger = logging.getLogger("django_eventsource.delivery")

T = TypeVar("T")
Gaps = dict[Feed, int | None]
"""The feeds in which an event is missing, and the sequence number before it."""

IDLE_SECONDS = 0.05
"""A time-out of the layer that comes sooner is a failure."""


class Hub:
    """Receives from the channel layer and feeds the streams of one event loop.

    :param loop: the event loop. :meth:`start` starts the tasks of the hub on it.
    """

    local_poll_seconds = 0.5
    """Seconds between history checks with a process-local layer."""
    shared_poll_seconds = 5.0
    """Seconds between history checks with a layer that processes share."""
    full_check_seconds = 5.0
    """Seconds between two checks of all tokens. The checks between them look for tokens that have
    changed, if the history knows them."""
    full_check_every = 10
    """The number of history checks of which the last one is a check of all tokens."""
    reorder_seconds = 0.02
    """Seconds for which a gap may be due to messages that have overtaken each other."""
    join_seconds = 1.0
    """Seconds for which a new stream waits for its token's group before it reads the history."""
    backoff_seconds: tuple[float, ...] = (0.5, 1, 2, 5, 10)
    """Seconds between attempts after failures that follow one another."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._context = empty_context()
        self._feeds: dict[str, Feed] = {}
        self._by_group: dict[str, Feed] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keepalives: dict[float, set[Subscriber]] = {}
        self._pruning: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[None]
        self._maintaining: asyncio.Task[None]
        self._checked_at = time.monotonic()
        """The time of the last check of all tokens."""
        self._checks = 0
        """The number of checks since then."""
        self._changes_since: Any = None
        self._news = News()
        self._unread: set[str] = set()
        """The groups of wake-ups during the first read of a feed. They are checked after it."""
        self._queue = MessageQueue(loop, self._deliver, self._context)
        self._membership = GroupMembership(self.start_task)
        self._replays = ReplayCache(self._read)

    def start(self) -> None:
        """Start to receive from the channel layer and to check the history."""
        self._receiving = self.start_task(self._receive())
        self._maintaining = self.start_task(self._maintenance_loop())

    async def end(self) -> None:
        """Leave the groups, end the tasks and close the layer. Call it after the last stream."""
        self._drop_idle_feeds()
        self._receiving.cancel()
        self._maintaining.cancel()
        await asyncio.wait(self._tasks, timeout=LAYER_SECONDS)
        await close_layer(self._membership.layer)

    @property
    def history(self) -> History:
        """The history of the process."""
        return get_history()

    @property
    def layer_silence_seconds(self) -> float:
        """The seconds since the layer has last delivered a message; 0 if it is process-local.

        The hub sends itself a message at each history check.
        """
        return self._membership.silence_seconds

    @property
    def layer_delivers(self) -> bool:
        """Whether the layer has delivered a message lately; true if it is process-local."""
        if is_process_local():
            return True
        most_seconds = 2 * self._poll_seconds() + LAYER_SECONDS
        membership = self._membership
        return membership.has_delivered and membership.silence_seconds < most_seconds

    # For streams

    async def subscribe(self, subscriber: Subscriber) -> None:
        """Join the groups of the subscriber's tokens and start to feed it."""
        joins = set()
        for subscription in subscriber.subscriptions:
            if subscription.close_buffered:
                continue
            token = subscription.token
            group = group_name(token)
            feed = self._feeds.get(token)
            if feed is None:
                feed = Feed(token, self._wake.set, self.loop, self._context)
                self._feeds[token] = self._by_group[group] = feed
                self._watch()
            feed.add(subscription)
            joining = self._membership.join(group)
            if joining is not None:
                joins.add(joining)
            elif feed.last is not None:
                # The feed passes on all newer events: nothing needs to be read.
                feed.try_go_live(subscription)
        self._keep_alive(subscriber)
        if joins:
            # A layer that hangs must not delay the stream: the history check finds the events.
            await asyncio.wait(joins, timeout=self.join_seconds)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop feeding the subscriber. Can be repeated."""
        for subscription in subscriber.subscriptions:
            feed = self._feeds.get(subscription.token)
            if feed is not None:
                feed.remove(subscription)
        self._keepalives.get(subscriber.keepalive_seconds or 0, set()).discard(subscriber)

    async def read(self, token: str, after: int) -> Slice:
        """Read the history of a token for a stream that is subscribed to it.

        :param after: the sequence number after which events are read.
        :raises Exception: whatever the history raises.
        """
        return await self._replays.read(self._feeds[token], after)

    def catch_up(self, subscription: Subscription, slice_: Slice) -> bytes:
        """Return the bytes to write for what :meth:`read` returned; go live if that was all."""
        feed = self._feeds[subscription.token]
        chunk = feed.catch_up(subscription, slice_)
        if self._unread and feed.last is not None:
            group = group_name(feed.token)
            if group in self._unread:
                self._unread.discard(group)
                self._add_news([group])
        return chunk

    def flush(self, subscriber: Subscriber) -> None:
        """Buffer the events that are held for a moment to be written together."""
        for subscription in subscriber.subscriptions:
            feed = self._feeds.get(subscription.token)
            if feed is not None:
                feed.flush()

    async def _read(
        self, token: str, after: int, max_events: int = MAX_EVENTS, *, times: bool = False
    ) -> Slice:
        """Read outside of the context of a request, which has a thread of its own to read in."""
        budget = share_of(conf.stream_buffer_bytes)
        return await self.start_task(
            self.history.aread(token, after, max_events=max_events, max_bytes=budget, times=times)
        )

    # For publishers

    def listens_to(self, group: str) -> bool:
        """Return whether a stream listens to the token of a group. Callable in any thread.

        A stream that subscribes later reads the history after that, and finds the event there.
        """
        return group in self._by_group

    def deliver(self, group: str, batches: Sequence[Batch]) -> None:
        """Deliver batches of this process without the layer, if a stream listens to the group.

        Callable in any thread.
        """
        if batches and self.listens_to(group):
            self._queue.put(group, batches)

    def _deliver(self, group: str, batch: Batch) -> None:
        feed = self._by_group.get(group)
        if feed is not None:
            try:
                feed.receive(batch)
            except Exception:
                logger.exception("Could not deliver events of token %r.", feed.token)

    # Wake-ups

    def wake(self, groups: Groups) -> None:
        """Check soon for events that other processes have published. Callable in any thread.

        :param groups: the groups of their tokens, or ``None`` if it can be any token.
        :raises RuntimeError: if the event loop is closed.
        """
        if groups is not None:
            groups = [group for group in groups if self.listens_to(group)]
        if groups is None or groups:
            self.loop.call_soon_threadsafe(self._add_news, groups, context=self._context)

    def _add_news(self, groups: Groups) -> None:
        is_first = self._news.due_at == math.inf
        self._news.add(groups)
        if is_first:
            self._wake.set()

    def _watch(self) -> None:
        """Watch for wake-ups while there are streams, except that of the control token."""
        if len(self._feeds) > (CONTROL_TOKEN in self._feeds):
            watcher.add(self)
        else:
            watcher.discard(self)

    # The receive task

    async def _receive(self) -> None:
        """Receive forever. Cancelling the receive task to do something else loses messages."""
        backoff = Backoff(self.backoff_seconds)
        membership = self._membership
        task = cast("asyncio.Task[None]", asyncio.current_task())
        # A layer may swallow the cancellation: on Python 3.11, asyncio.wait_for() does so if a
        # message arrives at the same moment.
        while not task.cancelling():
            began = time.monotonic()
            membership.receiving = True
            try:
                message = await membership.layer.receive(await membership.get_channel())
            except Exception as error:
                if task.cancelling():
                    # A time-out at the same moment has replaced the cancellation.
                    raise asyncio.CancelledError from error
                # redis-py 8 ends a wait after 5 s by default.
                if is_timeout(error) and time.monotonic() - began > IDLE_SECONDS:
                    logger.debug("The channel layer's socket_timeout ended a wait.")
                    continue
                # A broker may be away for long: the first failure is an error in the log, and
                # each one after the waits have reached their longest.
                failures = backoff.failures
                quiet = 0 < failures < len(self.backoff_seconds)
                logger.log(
                    logging.DEBUG if quiet else logging.ERROR,
                    "Receiving from the channel layer failed; retrying.",
                    exc_info=error,
                )
                membership.receiving = False
                await asyncio.sleep(backoff.next() * spread(0.5, 1))
                membership.assume_lost()
                self._wake.set()
                continue
            backoff.reset()
            await self._accept(message)

    async def _accept(self, message: Any) -> None:
        """Deliver the events of a channel-layer message."""
        self._membership.note_received()
        try:
            decoded = messages.decode(message)
        except ValueError as error:
            logger.warning("Skipped a channel-layer message: %s", error)
            return
        if decoded is None:
            self._membership.note_probe_echo()
            return
        group, batch = decoded
        await self._queue.turn(batch)
        self._deliver(group, batch)

    # The maintenance task

    async def _maintenance_loop(self) -> None:
        """Close gaps, join groups, check and prune the history."""
        backoff = Backoff(self.backoff_seconds)
        check_at = time.monotonic()
        prune_at = check_at + self._prune_seconds()
        while True:
            try:
                gaps = await self._wait_for_work(
                    min(check_at, self._membership.rejoin_at, self._news.due_at)
                )
                self._membership.join_missing()
                await self._close_gaps(gaps)
                now = time.monotonic()
                if now >= check_at:
                    self._check_layer()
                    await self._check_history()
                    check_at = time.monotonic() + self._poll_seconds()
                if now >= self._news.due_at:
                    await self._check_news()
                if now >= prune_at:
                    self._begin_prune()
                    prune_at = now + self._prune_seconds()
                backoff.reset()
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "The maintenance of the hub failed; retrying.", error=error
                )
                await asyncio.sleep(backoff.next() * spread(0.5, 1))

    async def _wait_for_work(self, until: float) -> Gaps:
        """Wait until a time, or until a feed has a gap or has lost its group.

        Return the gaps that existed before messages had time to overtake each other.
        """
        timer = self.loop.call_later(until - time.monotonic(), self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()
        gaps = self._gaps()
        if gaps:
            await asyncio.sleep(self.reorder_seconds)
        return gaps

    def _gaps(self) -> Gaps:
        return {feed: feed.last for feed in self._feeds.values() if feed.has_gap}

    def _poll_seconds(self) -> float:
        seconds = conf.poll_seconds
        if seconds is None:
            seconds = self.local_poll_seconds if is_process_local() else self.shared_poll_seconds
        return seconds

    def _check_layer(self) -> None:
        if self._membership.check(shared=not is_process_local()):
            self._receiving.cancel()
            self._membership.replace()
            self._receiving = self.start_task(self._receive())
            self._wake.set()

    async def _close_gaps(self, gaps: Gaps) -> None:
        for feed, last in gaps.items():
            if feed.has_gap and feed.last == last:
                await self._repair(feed)
            elif feed.has_gap:
                self._wake.set()  # another gap, for which reorder_seconds have not passed

    async def _check_news(self) -> None:
        """Pass on the events that wake-ups have reported."""
        began = time.monotonic()
        groups = self._news.take()
        names = self._by_group.keys() if groups is None else self._by_group.keys() & groups
        feeds = {group: self._by_group[group] for group in names}
        # The first read of a feed may have begun before the event was stored.
        self._unread.update(group for group, feed in feeds.items() if feed.last is None)
        if groups is None:
            await self._check_history(woken=True)
        else:
            # To read the events of these tokens takes fewer statements than a check before it.
            for feed in feeds.values():
                await self._repair(feed)
        self._news.checked(began)

    async def _check_history(self, *, woken: bool = False) -> None:
        """Pass on what the layer has not delivered. A check of all tokens is the authority.

        :param woken: whether a wake-up has caused the check. There may be many, so they do not
            make a check of all tokens due.
        """
        self._drop_idle_feeds()
        self._replays.discard(older_than=self._replays.kept_seconds)
        known = {feed: feed.last for feed in self._feeds.values() if feed.last is not None}
        self._changes_since, heads = await self.history.achanges(self._changes_since)
        age = time.monotonic() - self._checked_at
        if not woken:
            self._checks += 1
        due = self._checks >= self.full_check_every or age >= self.full_check_seconds
        if heads is None or (due and not woken):
            heads = await self.history.aheads([feed.token for feed in known])
            self._checked_at = time.monotonic()
            self._checks = 0
        # In less time an event cannot have been stored, trimmed and dropped with its token.
        recent = age < self.history.token_max_age
        for feed, last in known.items():
            head = heads.get(feed.token)
            # Without a head, the store of the token cannot be reached now.
            if head is not None and feed.check(last, head, recent=recent):
                await self._repair(feed)

    async def _repair(self, feed: Feed) -> None:
        """Pass on what the layer has not delivered. A failure affects no other feed."""
        more = True
        try:
            while more and feed.subscriptions and feed.last is not None:
                after = feed.last
                found = await self._read(feed.token, after, times=True)
                more = feed.apply_slice(after, found)
                await asyncio.sleep(0)
        except Exception:
            logger.exception("Reading the history of %r failed; retrying.", feed.token)

    def _begin_prune(self) -> None:
        if self._pruning is None or self._pruning.done():
            self._pruning = self.start_task(self._prune())

    async def _prune(self) -> None:
        try:
            await self.history.aprune()
        except Exception as error:  # noqa: BLE001
            ThrottledLogger(logger).error("Pruning the history failed; retrying.", error=error)

    def _drop_idle_feeds(self) -> None:
        for feed in [feed for feed in self._feeds.values() if not feed.subscriptions]:
            group = group_name(feed.token)
            del self._feeds[feed.token], self._by_group[group]
            self._replays.discard_feed(feed)
            self._membership.leave(group)
            self._unread.discard(group)
        self._watch()

    # Keepalives: one timer for all streams with the same interval

    def _keep_alive(self, subscriber: Subscriber) -> None:
        seconds = subscriber.keepalive_seconds
        if seconds is None:
            return
        members = self._keepalives.get(seconds)
        if members is None:
            members = self._keepalives[seconds] = set()
            self._schedule_tick(seconds)
        members.add(subscriber)

    def _schedule_tick(self, seconds: float) -> None:
        self.loop.call_later(seconds / 2, self._tick, seconds, context=self._context)

    def _tick(self, seconds: float) -> None:
        members = self._keepalives[seconds]
        if not members:
            del self._keepalives[seconds]
            return
        self._schedule_tick(seconds)
        for subscriber in members:
            subscriber.keep_alive()

    # Running

    def start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task of the hub, in an empty context."""
        task = self.loop.create_task(work, context=empty_context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _prune_seconds(self) -> float:
        try:
            seconds = conf.prune_seconds
        except ImproperlyConfigured:
            logger.exception("The history is not pruned.")
            seconds = None
        if seconds is None:
            return float("inf")
        # Servers that started together do not prune together.
        return seconds * spread(0.5, 1.5)


def empty_context() -> contextvars.Context:
    """Return an empty context. The context of a request would keep its thread and its data."""
    return contextvars.Context()


_hubs: dict[asyncio.AbstractEventLoop, Hub] = {}


@_runtime.on_reset
def _drop_hubs() -> None:
    _runtime.keep_in_fork(dict(_hubs))
    _hubs.clear()


def get_hub() -> Hub:
    """Return the hub of the running event loop. The first call starts it.

    :raises RuntimeError: if no event loop runs in this thread.
    """
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hubs()
        hub = _hubs[loop] = Hub(loop)
        hub.start()
    return hub


async def end_hub() -> None:
    """End the hub of the running event loop, if it has one. :func:`get_hub` starts another one."""
    hub = _hubs.pop(asyncio.get_running_loop(), None)
    if hub is not None:
        await hub.end()


def hubs() -> list[Hub]:
    """Return the hubs of this process, except those whose event loop is closed."""
    for loop in [loop for loop in list(_hubs) if loop.is_closed()]:
        # A weak dictionary would never drop a hub: its tasks refer to the loop.
        _hubs.pop(loop, None)
    return list(_hubs.values())


def end_tasks() -> None:
    """Cancel the tasks on event loops that a server has stopped and not closed.

    Daphne 4.2 does not close its loop, and CPython 3.11 crashes at exit if tasks are pending.
    """
    for hub in hubs():
        if not hub.loop.is_running():
            tasks = asyncio.all_tasks(hub.loop)
            for task in tasks:
                task.cancel()
            hub.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


atexit.register(end_tasks)
