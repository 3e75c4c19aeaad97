"""Feeds: the hub's state of each token, without any I/O.

A :class:`Feed` keeps one token's events in order: what comes in order is passed on, what
comes early is held, what is missing is a gap that the hub closes from the history.

All of it belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .history import Slice
from .subscribers import Subscription

MAX_EARLY_BYTES = 256 * 1024
"""What a feed holds while an event before is missing. The history has it all."""


class Feed:
    """One token's events, in order, for the subscribers of one event loop."""

    __slots__ = (
        "_early",
        "_early_size",
        "_on_gap",
        "epoch",
        "group",
        "has_gap",
        "has_life",
        "joined",
        "joining",
        "last",
        "subscriptions",
        "token",
        "unheard",
    )

    def __init__(self, token: str, group: str, on_gap: Callable[[], None]) -> None:
        self.token = token
        self.group = group
        self.joined = False
        """Is the hub's channel in the group?"""
        self.joining: asyncio.Task[None] | None = None
        """The hub's last attempt to join it."""
        self.last: int | None = None
        """The newest sequence number passed on; ``None`` before the first catch-up."""
        self.has_gap = False
        """Is an event held while one before it is missing?"""
        self.has_life = False
        """Was the token seen to have a history?"""
        self.epoch: str | None = None
        """The history's epoch at the last head check."""
        self.subscriptions: set[Subscription] = set()
        self.unheard = 0
        """Head checks in a row that found what the layer had not brought."""
        self._on_gap = on_gap
        self._early: dict[int, tuple[bytes, bool]] = {}
        self._early_size = 0

    def add(self, subscription: Subscription) -> None:
        """Feed a subscription, which is behind until its stream has caught up."""
        subscription.feed = self
        self.subscriptions.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Stop feeding a subscription."""
        self.subscriptions.discard(subscription)
        subscription.feed = None

    def receive(self, seq: int | None, frame: bytes, finish: bool) -> None:
        """Take a frame from the layer; report a gap when one before it is missing."""
        if seq is None:
            for subscription in self.subscriptions:
                subscription.push(None, frame, finish)
            return
        self.unheard = 0
        if seq - 1 == self.last:
            self._pass(seq, frame, finish)
            self._pass_early()
        elif self.last is None or seq > self.last:
            if self._early_size + len(frame) <= MAX_EARLY_BYTES and seq not in self._early:
                self._early[seq] = (frame, finish)
                self._early_size += len(frame)
            if self.last is not None:
                self.has_gap = True
                self._on_gap()

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
        for entry in slice_.entries:
            if entry.seq > (self.last or 0):
                self._pass(entry.seq, entry.frame(), entry.finishes)
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
        self._early.clear()
        self._early_size = 0
        self.has_gap = False
        after, self.last = self.last, position
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

    def _pass(self, seq: int, frame: bytes, finish: bool) -> None:
        self.last = seq
        self.has_life = True
        for subscription in self.subscriptions:
            subscription.push(seq, frame, finish)

    def _pass_early(self) -> None:
        """Pass on what was held and is next; forget what is past."""
        if self._early and self.last is not None:
            self._early = {seq: held for seq, held in self._early.items() if seq > self.last}
            while self.last + 1 in self._early:
                self._pass(self.last + 1, *self._early.pop(self.last + 1))
            self._early_size = sum(len(frame) for frame, _ in self._early.values())
        # Not reported again: who asked the history just now would ask in a circle.
        self.has_gap = bool(self._early)
