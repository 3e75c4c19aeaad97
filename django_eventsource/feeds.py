"""Feeds: the hub's state of each token, without any I/O.

A :class:`Feed` keeps one token's events in order: what comes in order is passed on, what
comes early is held, what is missing is a gap that the hub closes from the history.

All of it belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from .batches import Batch, gather, merge
from .history import Slice
from .pacing import Pace
from .subscribers import Subscription

MAX_EARLY_BYTES = 256 * 1024
"""What a feed holds while an event before is missing. The history has it all."""
MAX_HELD_BYTES = 32 * 1024
"""What a busy feed holds before it passes it on."""


class Feed:
    """One token's events, in order, for the subscribers of one event loop.

    :param token: the token.
    :param group: its group in the channel layer.
    :param on_gap: called when an event is missing.
    :param pace: says when to pass on what comes; at once if not given.
    """

    __slots__ = (
        "_early",
        "_early_size",
        "_held",
        "_held_size",
        "_on_gap",
        "_pace",
        "epoch",
        "free_at",
        "group",
        "has_gap",
        "has_life",
        "joined",
        "joining",
        "last",
        "reading",
        "resets",
        "subscriptions",
        "token",
        "unheard",
    )

    def __init__(
        self, token: str, group: str, on_gap: Callable[[], None], pace: Pace | None = None
    ) -> None:
        self.token = token
        self.group = group
        self.joined = False
        """Is the hub's channel in the group?"""
        self.joining: asyncio.Task[None] | None = None
        """The hub's last attempt to join it."""
        self.last: int | None = None
        """The newest sequence number passed on or held; ``None`` before the first catch-up."""
        self.free_at = 0.0
        self.has_gap = False
        """Is an event held while one before it is missing?"""
        self.has_life = False
        """Was the token seen to have a history?"""
        self.epoch: str | None = None
        """The history's epoch at the last head check."""
        self.subscriptions: set[Subscription] = set()
        self.reading = asyncio.Lock()
        """Held while the history is read for its streams: what one reads, all get."""
        self.resets = 0
        """How often its place was given up: what was read before counts no more."""
        self.unheard = 0
        """Head checks in a row that found what the layer had not brought."""
        self._on_gap = on_gap
        self._early: dict[int, tuple[bytes, bool]] = {}
        self._early_size = 0
        self._pace = pace
        self._held: list[Batch] = []
        self._held_size = 0

    def add(self, subscription: Subscription) -> None:
        """Feed a subscription, which is behind until its stream has caught up."""
        subscription.feed = self
        self.subscriptions.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Stop feeding a subscription."""
        self.subscriptions.discard(subscription)
        subscription.feed = None

    def receive(self, seq: int | None, frames: Sequence[bytes], finish: bool) -> None:
        """Take frames from the layer; report a gap when one before them is missing.

        :param seq: the first one's sequence number; ``None`` for live-only events.
        :param finish: does the last one end the token's streams?
        """
        if seq is None:
            self._emit(Batch(frames, finish=finish))
            return
        batch = Batch(frames, range(seq, seq + len(frames)), finish=finish)
        if self.last is not None and seq - 1 <= self.last:
            if seq + len(frames) - 1 > self.last:
                self._pass(batch.after(self.last))
                self._pass_early()
            return
        for n, frame in enumerate(frames, 1):
            self._hold_early(seq + n - 1, frame, finish and n == len(frames))
        if self.last is not None:
            self.has_gap = True
            self._on_gap()

    def _hold_early(self, seq: int, frame: bytes, finish: bool) -> None:
        if self._early_size + len(frame) <= MAX_EARLY_BYTES and seq not in self._early:
            self._early[seq] = (frame, finish)
            self._early_size += len(frame)

    def adopt(self, subscription: Subscription) -> None:
        """Let a subscription that has read up to a place be live, if the feed is not ahead.

        The first one tells the feed where the history stands.
        """
        if self.last is None:
            self.last = subscription.position
        subscription.live = subscription.position >= self.last
        self._pass_early()
        if self.has_gap:
            self._on_gap()

    def pass_on(self, after: int, slice_: Slice) -> bool:
        """Pass on what was read from the history after a place, to close a gap.

        ``True`` when another read is needed.
        """
        if not slice_.complete:
            if after != self.last:
                return True  # the layer was faster: this says nothing any more
            self._reset(slice_.last, anew=slice_.closed, ahead=False)
            return False
        for batch in slice_.batches:
            if (batch.last or 0) > (self.last or 0):
                self._pass(batch.after(self.last or 0))
        self._pass_early()
        return slice_.more and slice_.last > (self.last or 0)

    def compare(self, known: int, head: int) -> bool:
        """Compare with the history's head; ``True`` when a read is needed.

        :param known: :attr:`last` from before the head was asked for.
        """
        self.has_life = True
        if head < known:
            # The history was replaced by an older one: its numbers come again.
            self._reset(head, anew=False, ahead=True)
        return head > (self.last or 0)

    def _reset(self, position: int, *, anew: bool, ahead: bool) -> None:
        """Tell the listeners that they missed events; those ahead of them too if told."""
        self.flush()
        self._early.clear()
        self._early_size = 0
        self.has_gap = False
        self.resets += 1
        after, self.last = self.last, position
        if ahead:
            for one in self.subscriptions:
                one.displaced = one.displaced or not one.live
        for one in self._behind(position, ahead=ahead):
            if not ahead and after is not None and one.position > after:
                one.fall_behind()  # it may miss nothing, and finds out by itself
            else:
                one.move(position, anew=anew, missing=True, after=after)

    def raise_to(self, floor: int, *, certain: bool) -> None:
        """Follow the floor of a token without a history, and take the listeners along.

        :param certain: can no event have come and gone since the last time?
        """
        if self.last is None or floor <= self.last:
            return
        if self.has_life or not certain:
            self._reset(floor, anew=False, ahead=False)
            self.has_life = False
        else:
            self.flush()
            self.last = floor
            for one in self._behind(floor, ahead=False):
                one.move(floor)

    def restart(self, floor: int) -> None:
        """Tell the listeners that the history was lost, and go on at its new floor."""
        self._reset(floor, anew=False, ahead=True)
        self.has_life = False

    def _behind(self, position: int, *, ahead: bool) -> list[Subscription]:
        # Who is not live finds out by itself; who has finished does not want to know.
        live = [one for one in self.subscriptions if one.live and not one.finished]
        return live if ahead else [one for one in live if one.position < position]

    def _pass(self, batch: Batch) -> None:
        """Pass on what is next."""
        self.last = batch.last
        self.has_life = True
        self._emit(batch)

    def _emit(self, batch: Batch) -> None:
        """Pass on, or hold where that would be too often."""
        pace = self._pace
        if pace is None or (not self._held and pace.is_free(self)):
            self._deliver(batch)
            return
        self._held.append(batch)
        self._held_size += sum(map(len, batch.frames))
        if batch.finish or self._held_size > MAX_HELD_BYTES:
            self.flush()
        else:
            pace.hold(self)

    def flush(self) -> None:
        """Pass on what is held."""
        held, self._held, self._held_size = self._held, [], 0
        for batch in merge(held):
            self._deliver(batch)

    def _deliver(self, batch: Batch) -> None:
        for subscription in self.subscriptions:
            subscription.push(batch)
        if self._pace is not None:
            self._pace.begin(self, len(batch.frames))

    def _pass_early(self) -> None:
        """Pass on what was held and is next; forget what is past."""
        if self._early and self.last is not None:
            self._early = {seq: held for seq, held in self._early.items() if seq > self.last}
            run = []
            seq = self.last + 1
            while seq in self._early:
                run.append((seq, *self._early.pop(seq)))
                seq += 1
            for batch in gather(run, max_bytes=MAX_HELD_BYTES):
                self._pass(batch)
            self._early_size = sum(len(frame) for frame, _ in self._early.values())
        # Not reported again: who asked the history just now would ask in a circle.
        self.has_gap = bool(self._early)
