"""Subscribers: the bounded buffer of one stream, and its place in each of its tokens.

A :class:`Subscriber` is one stream's buffer. It has a :class:`Subscription` for each token
that the stream carries: nearly always one. A subscription is either *live* (it gets what
the token's feed passes on) or *behind* (its stream reads from the history until it has
caught up).

All of it belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Protocol

from .batches import Batch
from .buffers import Buffer
from .cursors import join_cursor, short_key
from .events import CURSOR
from .frames import encode_event, encode_id
from .history import Slice
from .history.base import cursor_at
from .resets import reset_frame


class Passes(Protocol):
    """What a subscription needs of the feed that it is in."""

    def adopt(self, subscription: Subscription) -> None:
        """Let it be live, if the feed is not ahead of it."""

    def remove(self, subscription: Subscription) -> None:
        """Pass on nothing more to it."""

    def flush(self) -> None:
        """Pass on what is held for a moment."""


class Subscription:
    """A stream's place in one token.

    :param subscriber: whose it is.
    :param token: the token.
    :param position: the sequence number from which the stream goes on.
    :param anew: did the listener open the token anew, after a close at that place?
    :param finished: has the listener seen the close at that place? Nothing follows.
    """

    __slots__ = (
        "_anew_at",
        "_held",
        "_key",
        "displaced",
        "done",
        "feed",
        "finished",
        "live",
        "position",
        "sent",
        "subscriber",
        "token",
    )

    def __init__(
        self, subscriber: Subscriber, token: str, position: int, *, anew: bool, finished: bool
    ) -> None:
        self.subscriber = subscriber
        self.token = token
        self.position = position
        """The sequence number up to which events are buffered or sent."""
        self.sent = position
        """The sequence number up to which events were taken for the socket."""
        self.feed: Passes | None = None
        self.displaced = False
        """Does its place belong to a history that was replaced?"""
        self.live = finished
        self.finished = finished
        """Has the close been buffered? Nothing comes after it."""
        self.done = finished
        """Has it been taken for the socket?"""
        self._anew_at = position if anew else None
        self._key: bytes | None = None
        self._held: Batch | None = None  # a live-only close that came while behind

    @property
    def place(self) -> tuple[bytes, int, bool]:
        """Its part of a joined cursor."""
        if self._key is None:
            self._key = short_key(self.token)
        return self._key, self.position, self.position == self._anew_at

    @property
    def cursor(self) -> str:
        """The last event id of a listener that has got all that is buffered."""
        if self.subscriber.joined:
            return join_cursor(one.place for one in self.subscriber.subscriptions)
        return cursor_at(self.position, closed=self.position == self._anew_at)

    def push(self, batch: Batch) -> None:
        """Buffer a batch; when there is no room, fall behind instead."""
        subscriber = self.subscriber
        if self.finished or subscriber.finished:
            return
        last, before = batch.last, self.position
        if last is None:
            if batch.finish and not self.live:
                # Nothing comes after a close, so what is read comes before.
                self._held = batch
            elif subscriber.offer_volatile(batch):
                self._finish(batch.finish)
        elif self.live and last > before:
            # The short way, which nearly every batch takes.
            if subscriber.joined or (batch.first or 0) <= before:
                data = self._pass(batch)
            else:
                data, self.position = batch.data, last
            if subscriber.offer(data, batch):
                if batch.finish:
                    self._finish(True)
            else:
                self.position = before
                subscriber.overflow()

    def move(
        self, position: int, *, anew: bool = False, missing: bool = False, after: int | None = None
    ) -> None:
        """Go to another place, and tell the listener.

        :param anew: is that place a close, which the listener has not seen?
        :param missing: are there events before it that the listener misses?
        :param after: the last sequence number before them.
        """
        self.subscriber.write(self._moved(position, anew=anew, missing=missing, after=after))

    def catch_up(self, slice_: Slice) -> bytes:
        """Go on by what was read from the history; become live when nothing is left.

        Gives the bytes to write, perhaps none.
        """
        chunk = b""
        if self.displaced:
            # What is there now under these numbers was never what the listener had.
            self.displaced = False
            slice_ = replace(slice_, entries=(), complete=False)
        if not slice_.complete:
            closed = slice_.closed
            chunk = self._moved(slice_.last, anew=closed, missing=True, after=self.position)
        batch = slice_.batches[0] if slice_.batches else None
        if batch is not None:
            chunk += self._pass(batch)
        self.sent = self.position
        if batch is not None and batch.finish:
            self.live = self.done = True
            self._finish(True)
            if self.subscriber.finished:
                self.subscriber.end()
        elif not slice_.more:
            # After `sent`: it may buffer what the feed has held.
            self.go_live()
        self.subscriber.quiet = self.subscriber.quiet and not chunk
        return chunk

    def go_live(self) -> None:
        """Become live, unless the feed is ahead of what was read."""
        if self.feed is not None:
            self.feed.adopt(self)
        self.subscriber.caught_up = self.subscriber.caught_up or self.live
        if self.live and self._held is not None:
            held, self._held = self._held, None
            self.push(held)

    def fall_behind(self) -> None:
        """Go on from the history: the feed does not know what comes next."""
        self.live = False
        self.subscriber.wake()

    def _moved(self, position: int, *, anew: bool, missing: bool, after: int | None) -> bytes:
        self.position = position
        self._anew_at = position if anew else None
        if not missing:
            return self.subscriber.commit(self.cursor)
        token = self.token if self.subscriber.joined else None
        return reset_frame("expired", after=str(after), resume=self.cursor, token=token)

    def _pass(self, batch: Batch) -> bytes:
        """Move past durable events; give their bytes as this stream sends them."""
        if batch.first is None or batch.first <= self.position:
            batch = batch.after(self.position)
        if not self.subscriber.joined:
            self.position = batch.last or 0
            return batch.data
        stamped = []
        for seq, frame in zip(batch.seqs or (), batch.frames, strict=True):
            self.position = seq
            # The id that resumes all tokens of the stream takes the place of its own.
            stamped.append(b"id: %s\n%s" % (self.cursor.encode(), frame.partition(b"\n")[2]))
        return b"".join(stamped)

    def _finish(self, finish: bool) -> None:
        if finish:
            self.finished = True
            if all(one.finished for one in self.subscriber.subscriptions):
                self.subscriber.finished = True


class Subscriber(Buffer):
    """The bounded buffer of one stream, and its tokens.

    :param cursor_event: send cursors as events, for a client that ignores an id without data.
    """

    __slots__ = (
        "_cursor_event",
        "_lost",
        "_volatile",
        "caught_up",
        "finished",
        "joined",
        "subscriptions",
    )

    def __init__(
        self,
        *,
        buffer_bytes: int,
        keepalive_seconds: float | None,
        joined: bool = False,
        cursor_event: bool = False,
    ) -> None:
        super().__init__(buffer_bytes, keepalive_seconds)
        self._cursor_event = cursor_event
        self.joined = joined
        """Does one cursor stand for several tokens?"""
        self.subscriptions: list[Subscription] = []
        self.finished = False
        """Has the last frame been buffered? Nothing comes after it."""
        self.caught_up = False
        """Whether one of its tokens was live at some time."""
        self._volatile = False  # does the buffer hold events that no history has?
        self._lost = False  # were such events dropped?

    def add(
        self, token: str, position: int, *, anew: bool = False, finished: bool = False
    ) -> Subscription:
        """Add a token, which is behind until the stream has caught up."""
        subscription = Subscription(self, token, position, anew=anew, finished=finished)
        self.subscriptions.append(subscription)
        return subscription

    def commit(self, cursor: str) -> bytes:
        """Encode what makes a cursor the listener's last event id."""
        if self._cursor_event:
            return encode_event(CURSOR, cursor.encode(), cursor)
        return encode_id(cursor)

    # For the feeds

    def offer_volatile(self, batch: Batch) -> bool:
        """Buffer events that no history has; ``False`` when they were dropped instead."""
        if not self.offer(batch.data, batch):
            self.overflow()
            self._lost = self._lost or not batch.finish
            if not batch.finish:
                return False
            self.write(batch.data)
        self._volatile = True
        return True

    def overflow(self) -> None:
        """Drop the buffer, not the listener: it goes on from the history."""
        self._buffer.clear()
        self._size = 0
        self._lost = self._lost or self._volatile
        self._volatile = False
        for one in self.subscriptions:
            one.position = one.sent
            one.live = one.finished = one.done
        self.wake()

    # For the stream

    def end(self) -> None:
        """Finish at once, dropping what is buffered, and wake the stream."""
        self._buffer.clear()
        self._size = 0
        self._lost = self._volatile = False
        self.finished = True
        for one in self.subscriptions:
            one.live = one.finished = one.done = True
        self.wake()

    def finish(self, frame: bytes) -> None:
        """Finish after what has come already, and this."""
        for one in self.subscriptions:
            if one.feed is not None:
                one.feed.flush()
        if not self.finished:
            self.finished = True
            for one in self.subscriptions:
                one.live = one.finished = True
            self.write(frame)

    def take_plain(self) -> bytes | None:
        """Give all that is buffered by a live stream of one token, perhaps nothing.

        The short way, which nearly every write takes; ``None``: take the long one.
        """
        one = self.subscriptions[0]
        if self._lost or self.finished or self.joined or not one.live:
            return None
        self.stirred = False
        buffer = self._buffer
        if not buffer:
            return b""
        chunk = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        buffer.clear()
        self._size = 0
        self._volatile = False
        one.sent = one.position
        return chunk

    def take(self) -> bytes:
        """Give all that is buffered, as one write."""
        chunk = b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        self._volatile = False
        for one in self.subscriptions:
            one.sent = one.position
            one.done = one.finished
        return chunk

    def take_loss(self) -> bytes:
        """Give a ``reset`` when events that no history has were dropped."""
        if not self._lost:
            return b""
        self._lost = False
        return reset_frame("overflow", after=None, resume=None)

    @property
    def behind(self) -> Subscription | None:
        """One of its tokens of which the stream has to read the history."""
        for one in self.subscriptions:
            if not one.live:
                return one
        return None

    @property
    def has_news(self) -> bool:
        """Is there anything for the stream to do?"""
        return bool(self._buffer) or self._lost or self.finished or self.behind is not None

    async def wait(self) -> None:
        """Wait until there are news."""
        if not self.has_news:
            await self.waiter(asyncio.get_running_loop())
