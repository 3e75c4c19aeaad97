"""Feeds: the hub's state of each token, without any I/O.

A :class:`Feed` keeps the events of one token in order. An event that follows the last one is
passed on. An event that arrives early is held until the events before it have arrived. The hub
reads the missing events from the history.

A feed belongs to the thread of one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context

from ..history import Head, Slice
from ..protocol.batches import Batch, merge
from .coalescing import MAX_HELD_BYTES, Coalescer
from .counters import counters_of
from .subscription import Subscription

logger = logging.getLogger("django_eventsource.delivery")

MAX_EARLY_BYTES = 256 * 1024
"""The size of the early events that a feed holds. All of them are in the history."""
MAX_EARLY_EVENTS = 5000
"""The most early events that a feed holds. Each needs some memory besides its bytes, and a forged
message may contain many events of one byte."""


class Feed:
    """The events of one token, in order, for the subscriptions of one event loop.

    :param token: the token.
    :param on_gap: called when an event is missing.
    :param loop: the event loop on which events are coalesced; ``None`` to pass on each event at
        once.
    :param context: the context in which the callbacks of the loop run.
    """

    __slots__ = (
        "_coalescer",
        "_counters",
        "_deliveries",
        "_early",
        "_early_bytes",
        "_generation",
        "_has_history",
        "_on_gap",
        "has_gap",
        "last",
        "resets",
        "subscriptions",
        "token",
    )

    def __init__(
        self,
        token: str,
        on_gap: Callable[[], None],
        loop: asyncio.AbstractEventLoop | None = None,
        context: Context | None = None,
    ) -> None:
        self.token = token
        self.last: int | None = None
        """The newest sequence number passed on or held; ``None`` before the first catch-up."""
        self.has_gap = False
        """Whether an event is held while one before it is missing."""
        self.resets = 0
        """The number of resets. What was read before a reset is not valid after it."""
        self.subscriptions: set[Subscription] = set()
        self._on_gap = on_gap
        self._has_history = False
        """Whether the token had events in the history."""
        self._generation: str | None = None
        """The marker of the history's store at the last history check."""
        self._early: dict[int, Batch] = {}
        self._early_bytes = 0
        self._deliveries: list[Batch] = []
        self._counters = counters_of(token)
        self._coalescer = None if loop is None else Coalescer(loop, self._deliver, context)

    # Subscriptions

    def add(self, subscription: Subscription) -> None:
        """Add a subscription, which is behind until its stream has caught up."""
        self.subscriptions.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Remove a subscription."""
        self.subscriptions.discard(subscription)

    def catch_up(self, subscription: Subscription, slice_: Slice) -> bytes:
        """Return the bytes to write for events that a subscription has read from the history.

        The subscription becomes live if the history contains no further events.
        """
        chunk = subscription.catch_up(slice_)
        if not subscription.live and subscription.seq >= slice_.last:
            self.try_go_live(subscription)
        return chunk

    def try_go_live(self, subscription: Subscription) -> bool:
        """Make a subscription live if it is not behind the feed. Return whether it is live.

        The first subscription sets the position of the feed.
        """
        if subscription not in self.subscriptions:
            return False
        if self.last is None:
            self.last = subscription.seq
        subscription.live = subscription.seq >= self.last
        self._pass_early()
        if self.has_gap:
            self._on_gap()
        if subscription.live:
            subscription.begin_live()
        return subscription.live

    # Events

    def receive(self, batch: Batch) -> None:
        """Pass on a batch, or hold it and report a gap if events before it are missing."""
        if batch.seqs is None:
            self._coalesce(batch)
            return
        if self.last is not None and batch.seqs[0] - 1 <= self.last:
            if batch.seqs[-1] > self.last:
                self._pass(batch.after(self.last))
                self._pass_early()
            return
        for seq, frame in zip(batch.seqs, batch.frames, strict=True):
            closes = batch.closes and seq == batch.last
            one = Batch([frame], [seq], closes=closes, published=batch.published)
            self._hold_early(seq, one)
        if self.last is not None:
            self.has_gap = True
            self._on_gap()

    def _hold_early(self, seq: int, batch: Batch) -> None:
        if (
            self._early_bytes + len(batch.data) <= MAX_EARLY_BYTES
            and len(self._early) < MAX_EARLY_EVENTS
            and seq not in self._early
        ):
            self._early[seq] = batch
            self._early_bytes += len(batch.data)

    def apply_slice(self, after: int, slice_: Slice) -> bool:
        """Pass on what was read from the history to close a gap.

        :param after: the sequence number after which the history was read.
        :returns: whether another read is needed.
        """
        if not slice_.complete:
            if after != self.last:
                return True  # events have arrived since: the slice is outdated
            self._reset(slice_.last, reopened=slice_.closed, ahead=False)
            return False
        for batch in slice_.batches:
            if (batch.last or 0) > (self.last or 0):
                new = batch.after(self.last or 0)
                # Nothing is missing before the first event of an epoch.
                if self.has_gap and new.first not in self._early:
                    self._counters.count_repair()
                self._pass(new)
        self._pass_early()
        return slice_.more and slice_.last > (self.last or 0)

    def flush(self) -> None:
        """Pass on the events that are held for a moment to be written together."""
        if self._coalescer is not None:
            self._coalescer.flush()

    # History checks

    def check(self, known: int, head: Head, *, recent: bool) -> bool:
        """Compare the feed with the head of its token in the history.

        :param known: :attr:`last` before the head was read.
        :param recent: whether no event can have been stored and dropped since the last check.
        :returns: whether the history must be read.
        """
        before, self._generation = self._generation, head.generation
        if head.has_epoch:
            self._has_history = True
            if head.seq < known:
                # An older store has replaced the history, and assigns the same numbers again.
                self._reset(head.seq, reopened=False, ahead=True)
            return head.seq > (self.last or 0)
        if before not in (None, head.generation):
            # The store was lost.
            self._reset(head.seq, reopened=False, ahead=True)
            self._has_history = False
        elif self.last is not None and head.seq > self.last:
            certain = recent and (before is not None or not head.generation)
            self._advance_to_floor(head.seq, missing=self._has_history or not certain)
        return False

    def _advance_to_floor(self, floor: int, *, missing: bool) -> None:
        if missing:
            self._reset(floor, reopened=False, ahead=False)
            self._has_history = False
        else:
            self.flush()
            self.last = floor
            for one in self._live(before=floor):
                one.move(floor)

    def _reset(self, seq: int, *, reopened: bool, ahead: bool) -> None:
        """Go to another position, and send ``reset`` to the listeners that have missed events.

        :param ahead: whether listeners with a later position have missed events too.
        """
        self.flush()
        self._early.clear()
        self._early_bytes = 0
        self.has_gap = False
        self.resets += 1
        after, self.last = self.last, seq
        if ahead:
            for one in self.subscriptions:
                one.history_replaced = one.history_replaced or not one.live
        for one in self._live(before=None if ahead else seq):
            if not ahead and after is not None and one.seq > after:
                one.fall_behind()  # its own read shows whether it has missed events
            else:
                one.move(seq, reopened=reopened, missing=True, after=after)

    def _live(self, *, before: int | None) -> list[Subscription]:
        """Return the live subscriptions of open tokens, up to a position or all."""
        return [
            one
            for one in self.subscriptions
            if one.live and not one.close_buffered and (before is None or one.seq < before)
        ]

    # Passing on

    def _pass(self, batch: Batch) -> None:
        self.last = batch.last
        self._has_history = True
        self._coalesce(batch)

    def _coalesce(self, batch: Batch) -> None:
        if self._coalescer is None:
            self._deliver(batch)
        else:
            self._coalescer.add(batch)

    def _deliver(self, batch: Batch) -> None:
        self._deliveries.append(batch)
        if len(self._deliveries) > 1:
            return  # a write has caused this delivery, which follows the one under way
        try:
            for one in self._deliveries:  # the list may grow during the loop
                streams = 0
                # A copy, because a write may end a stream.
                for subscription in list(self.subscriptions):
                    try:
                        streams += subscription.push(one)
                    except Exception:
                        logger.exception("Could not pass events of %r to a listener.", self.token)
                        subscription.subscriber.overflow()
                self._counters.count_batch(one, streams)
        finally:
            self._deliveries.clear()

    def _pass_early(self) -> None:
        """Pass on the early events that follow the last one, and drop those before it."""
        if self._early and self.last is not None:
            self._early = {seq: one for seq, one in self._early.items() if seq > self.last}
            run = []
            seq = self.last + 1
            while seq in self._early:
                run.append(self._early.pop(seq))
                seq += 1
            for batch in merge(run, max_bytes=MAX_HELD_BYTES):
                self._pass(batch)
            self._early_bytes = sum(len(one.data) for one in self._early.values())
        # Not reported again: the history has just been read and does not contain the event.
        self.has_gap = bool(self._early)
