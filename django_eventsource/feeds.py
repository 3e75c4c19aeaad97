"""Feeds and subscribers: the hub's state, without any I/O.

A :class:`Feed` keeps one token's events in order: what comes in order is passed on, what
comes early is held, what is missing is a gap that the hub closes from the history. A
:class:`Subscriber` is one stream's bounded buffer. It is either *live* (it gets what the
feed passes on) or *behind* (its stream reads from the history until it has caught up).

All of it belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from .events import RESET
from .frames import KEEPALIVE, encode_event, encode_id
from .history import Slice

MAX_EARLY_BYTES = 256 * 1024
"""What a feed holds while an event before is missing. The history has it all."""


def reset_frame(reason: str, *, after: str | None, resume: str | None) -> bytes:
    """Encode the event that tells a listener that it missed events.

    :param reason: ``unknown`` (an id never given out), ``expired`` (events after it are
        gone) or ``overflow`` (live-only events came faster than they were read).
    :param after: the last event id before what is missing, if it is known.
    :param resume: the id from which the stream goes on, if it moves the listener there.
    """
    data = json.dumps({"reason": reason, "after": after, "resume": resume})
    return encode_event(RESET, data.encode(), resume)


class Subscriber:
    """The bounded buffer of one stream.

    :param position: the sequence number from which the stream goes on.
    :param buffer_bytes: the most it holds. One frame is held even if it is larger.
    :param keepalive_seconds: longest silence, or ``None``.
    """

    __slots__ = (
        "_buffer",
        "_lost",
        "_size",
        "_volatile",
        "_waiter",
        "buffer_bytes",
        "feed",
        "finished",
        "keepalive_seconds",
        "live",
        "position",
        "quiet",
        "sent",
    )

    def __init__(
        self, position: int, *, buffer_bytes: int, keepalive_seconds: float | None
    ) -> None:
        self.position = position
        """The sequence number up to which events are buffered or sent."""
        self.sent = position
        """The sequence number up to which events were taken for the socket."""
        self.buffer_bytes = buffer_bytes
        self.keepalive_seconds = keepalive_seconds
        self.feed: Feed | None = None
        self.live = False
        self.finished = False
        """Has the close been buffered? Nothing comes after it."""
        self.quiet = False
        """Was nothing written since the last keepalive tick?"""
        self._buffer: list[bytes] = []
        self._size = 0
        self._volatile = False  # does the buffer hold events that no history has?
        self._lost = False  # were such events dropped?
        self._waiter: asyncio.Future[None] | None = None

    # For the feed

    def push(self, seq: int | None, frame: bytes, finish: bool) -> None:
        """Buffer a frame; when there is no room, fall behind instead."""
        if self.finished:
            return
        if seq is None:
            self._push_volatile(frame, finish)
        elif self.live and seq > self.position:
            if self._has_room(frame):
                self.position = seq
                self.finished = finish
                self.write(frame)
            else:
                self._overflow()

    def _push_volatile(self, frame: bytes, finish: bool) -> None:
        if not self._has_room(frame):
            self._overflow()
            self._lost = self._lost or not finish
            if not finish:
                return
        self._volatile = True
        self.finished = finish
        self.write(frame)

    def write(self, frame: bytes) -> None:
        """Buffer bytes and wake the stream."""
        self.quiet = False
        self._buffer.append(frame)
        self._size += len(frame)
        self._wake()

    def keep_alive(self) -> None:
        """Write a keepalive if nothing was written since the last call, and nothing waits."""
        if self.quiet and not self._buffer:
            self.write(KEEPALIVE)
        else:
            self.quiet = True

    def _has_room(self, frame: bytes) -> bool:
        return not self._buffer or self._size + len(frame) <= self.buffer_bytes

    def _overflow(self) -> None:
        """Drop the buffer, not the listener: it goes on from the history."""
        self._buffer.clear()
        self._size = 0
        self._lost = self._lost or self._volatile
        self._volatile = False
        self.position = self.sent
        self.live = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For the stream

    def end(self) -> None:
        """Finish at once, dropping what is buffered, and wake the stream."""
        self._buffer.clear()
        self._size = 0
        self._lost = self._volatile = False
        self.finished = self.live = True
        self._wake()

    def take(self) -> bytes:
        """Give all that is buffered, as one write."""
        chunk = b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        self._volatile = False
        self.sent = self.position
        return chunk

    def take_loss(self) -> bytes:
        """Give a ``reset`` when events that no history has were dropped."""
        if not self._lost:
            return b""
        self._lost = False
        return reset_frame("overflow", after=None, resume=None)

    @property
    def has_news(self) -> bool:
        """Is there anything for the stream to do?"""
        return bool(self._buffer) or not self.live or self._lost or self.finished

    async def wait(self) -> None:
        """Wait until there are news."""
        if self.has_news:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def catch_up(self, slice_: Slice) -> bytes:
        """Go on by what was read from the history; become live when nothing is left.

        Gives the bytes to write, perhaps none.
        """
        frames = []
        if not slice_.complete:
            frames.append(reset_frame("expired", after=str(self.position), resume=slice_.resume))
            self.position = self.sent = slice_.last
        for entry in slice_.entries:
            frames.append(entry.frame())
            self.position = self.sent = entry.seq
            if entry.finishes:
                self.end()
                return b"".join(frames)
        if not slice_.more:
            self.go_live()
        self.quiet = self.quiet and not frames
        return b"".join(frames)

    def go_live(self) -> None:
        """Become live, unless the feed is ahead of what was read."""
        if self.feed is not None:
            self.feed.adopt(self)


class Feed:
    """One token's events, in order, for the subscribers of one event loop."""

    __slots__ = (
        "_early",
        "_early_size",
        "_on_gap",
        "group",
        "has_gap",
        "has_life",
        "joined",
        "joining",
        "last",
        "subscribers",
        "token",
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
        self.subscribers: set[Subscriber] = set()
        self._on_gap = on_gap
        self._early: dict[int, tuple[bytes, bool]] = {}
        self._early_size = 0

    def add(self, subscriber: Subscriber) -> None:
        """Feed a subscriber, which is behind until its stream has caught up."""
        subscriber.feed = self
        self.subscribers.add(subscriber)

    def remove(self, subscriber: Subscriber) -> None:
        """Stop feeding a subscriber."""
        self.subscribers.discard(subscriber)
        subscriber.feed = None

    def receive(self, seq: int | None, frame: bytes, finish: bool) -> None:
        """Take a frame from the layer; report a gap when one before it is missing."""
        if seq is None:
            for subscriber in self.subscribers:
                subscriber.push(None, frame, finish)
        elif seq - 1 == self.last:
            self._pass(seq, frame, finish)
            self._pass_early()
        elif self.last is None or seq > self.last:
            if self._early_size + len(frame) <= MAX_EARLY_BYTES and seq not in self._early:
                self._early[seq] = (frame, finish)
                self._early_size += len(frame)
            if self.last is not None:
                self.has_gap = True
                self._on_gap()

    def adopt(self, subscriber: Subscriber) -> None:
        """Let a subscriber that has read up to a place be live, if the feed is not ahead.

        The first one tells the feed where the history stands.
        """
        if self.last is None:
            self.last = subscriber.position
        subscriber.live = subscriber.position >= self.last
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
            self._reset(slice_.last, slice_.resume, ahead=False)
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
            self._reset(head, str(head), ahead=True)
        return head > (self.last or 0)

    def _reset(self, position: int, resume: str, *, ahead: bool) -> None:
        """Tell the listeners that they missed events; those ahead of them too if told."""
        self._early.clear()
        self._early_size = 0
        self.has_gap = False
        after, self.last = self.last, position
        frame = reset_frame("expired", after=str(after), resume=resume)
        self._move(position, frame, ahead=ahead)

    def raise_to(self, floor: int, *, certain: bool) -> None:
        """Follow the floor of a token without a history, and take the listeners along.

        :param certain: can no event have come and gone since the last time?
        """
        if self.last is None or floor <= self.last:
            return
        if self.has_life or not certain:
            self._reset(floor, str(floor), ahead=False)
            self.has_life = False
        else:
            self.last = floor
            self._move(floor, encode_id(str(floor)), ahead=False)

    def _move(self, position: int, frame: bytes, *, ahead: bool) -> None:
        for subscriber in self.subscribers:
            if not subscriber.live or subscriber.finished:
                continue  # it finds out by itself, or does not want to know
            if ahead or subscriber.position < position:
                subscriber.position = position
                subscriber.write(frame)

    def _pass(self, seq: int, frame: bytes, finish: bool) -> None:
        self.last = seq
        self.has_life = True
        for subscriber in self.subscribers:
            subscriber.push(seq, frame, finish)

    def _pass_early(self) -> None:
        """Pass on what was held and is next; forget what is past."""
        if self._early and self.last is not None:
            self._early = {seq: held for seq, held in self._early.items() if seq > self.last}
            while self.last + 1 in self._early:
                self._pass(self.last + 1, *self._early.pop(self.last + 1))
            self._early_size = sum(len(frame) for frame, _ in self._early.values())
        # Not reported again: who asked the history just now would ask in a circle.
        self.has_gap = bool(self._early)
