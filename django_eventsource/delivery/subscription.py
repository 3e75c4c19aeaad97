"""Subscribers: the bounded buffer of one stream, and its position in each of its tokens.

A :class:`Subscriber` is the buffer of one stream. It has a :class:`Subscription` for each token
of the stream; nearly every stream has one. A subscription is either *live* (it receives what
the token's feed passes on) or *behind* (its stream reads from the history until it has caught
up).

Both belong to the thread of one event loop.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..history import Slice
from ..protocol.batches import Batch
from ..protocol.cursors import join_cursor, short_key
from ..protocol.field_rules import CURSOR
from ..protocol.frames import KEEPALIVE, encode_event, encode_id, encode_reset, replace_id
from .counters import counters_of


class Writer(Protocol):
    """Writes to the connection of a stream."""

    def write(self, batch: Batch, /) -> bool:
        """Write events now. Return whether that was possible without a wait."""
        ...


def share_of(stream_bytes: int) -> int:
    """Return the bytes of a stream's memory that its buffer may take.

    The server may hold as many bytes again, besides the 64 KiB of an asyncio transport.

    :param stream_bytes: ``EVENTSOURCE_STREAM_BUFFER_BYTES``.
    """
    return stream_bytes * 3 // 8


class Subscription:
    """The position of a stream in one token.

    :param subscriber: the buffer of the stream.
    :param token: the token.
    :param seq: the sequence number after which the stream continues.
    :param reopened: whether the listener opened the token again after a close at this position.
    :param closed: whether the listener has received the close at this position. No event
        follows.
    :param rewound: whether the position is before the oldest event of a rewind.
    """

    __slots__ = (
        "_held_close",
        "_is_replaying",
        "_key",
        "_reopened_at",
        "_rewound",
        "close_buffered",
        "close_sent",
        "history_replaced",
        "live",
        "sent",
        "seq",
        "subscriber",
        "token",
    )

    def __init__(
        self,
        subscriber: Subscriber,
        token: str,
        seq: int,
        *,
        reopened: bool,
        closed: bool,
        rewound: bool,
    ) -> None:
        self.subscriber = subscriber
        self.token = token
        self.seq = seq
        """The sequence number up to which events are buffered or sent."""
        self.sent = seq
        """The sequence number up to which events were taken for the socket."""
        self.history_replaced = False
        """Whether the position belongs to a history that was replaced."""
        self.live = closed
        """Whether the feed's events are buffered; else the stream reads the history."""
        self.close_buffered = closed
        """Whether the close is in the buffer or sent. No event is buffered after it."""
        self.close_sent = closed
        """Whether the close was taken for the socket."""
        self._reopened_at = seq if reopened else None
        self._rewound = rewound
        self._key: bytes | None = None
        self._held_close: Batch | None = None
        """A live-only close that arrived while the subscription was behind."""
        self._is_replaying = False
        """Whether stored events were sent since the subscription was live."""

    @property
    def cursor_part(self) -> tuple[bytes, int, bool]:
        """The part of a joined cursor for this token."""
        if self._key is None:
            self._key = short_key(self.token)
        return self._key, self.seq, self.seq == self._reopened_at

    @property
    def cursor(self) -> str:
        """The cursor of a listener that has received all that is buffered."""
        if self.subscriber.joined or self.subscriber.own_ids:
            return join_cursor(one.cursor_part for one in self.subscriber.subscriptions)
        return f"{self.seq}+" if self.seq == self._reopened_at else str(self.seq)

    # For the feed

    def push(self, batch: Batch) -> bool:
        """Write a batch to the socket or buffer it, or fall behind if the buffer has no room.

        Return whether the batch was written or buffered.
        """
        subscriber = self.subscriber
        if self.close_buffered or subscriber.ending:
            return False
        last, before = batch.last, self.seq
        if last is None:
            if batch.closes and not self.live:
                # No event comes after a close, so the events of the history come first.
                self._held_close = batch
                return False
            if not subscriber.offer_volatile(batch):
                return False
            if batch.closes:
                self._close()
            return True
        if self.live and last > before:
            # The fast path of nearly every batch.
            if subscriber.joined or (batch.first or 0) <= before:
                batch = self._advance(batch)
            else:
                self.seq = last
            if subscriber.write_through(batch):
                self.sent = last
                return True
            if subscriber.offer(batch):
                if batch.closes:
                    self._close()
                return True
            self.seq = before
            subscriber.overflow()
        return False

    def move(
        self,
        seq: int,
        *,
        reopened: bool = False,
        missing: bool = False,
        after: int | None = None,
    ) -> None:
        """Go to another position, and send it to the listener.

        :param reopened: whether the event at the position is a close that the listener has not
            received.
        :param missing: whether the listener has missed events before the position.
        :param after: the last sequence number before the missed events.
        """
        self.subscriber.write(self._moved(seq, reopened=reopened, missing=missing, after=after))

    def fall_behind(self) -> None:
        """Continue from the history, because the feed cannot provide the next events."""
        self.live = False
        self.subscriber.wake()

    def catch_up(self, slice_: Slice) -> bytes:
        """Return the bytes to write, perhaps none, for events read from the history."""
        chunk = b""
        follows = slice_.complete or (self._rewound and bool(slice_.entries))
        if self.history_replaced or not follows:
            # In a history that was replaced, other events have these numbers.
            chunk = self._moved(slice_.last, reopened=slice_.closed, missing=True, after=self.seq)
            slice_ = Slice(complete=True, last=slice_.last)
        self.history_replaced = self._rewound = False
        batch = slice_.batches[0] if slice_.batches else None
        if batch is not None:
            batch = self._advance(batch)
            chunk += batch.data
            counters_of(self.token).count_replayed(batch, first=not self._is_replaying)
            self._is_replaying = True
        self.sent = self.seq
        if batch is not None and batch.closes:
            self.live = self.close_sent = True
            self._close()
            if self.subscriber.ending:
                self.subscriber.abort()
        self.subscriber.quiet = self.subscriber.quiet and not chunk
        return chunk

    def begin_live(self) -> None:
        """Buffer the live-only close that arrived before the subscription was live, if any."""
        self.subscriber.caught_up = True
        self._rewound = self._is_replaying = False
        if self._held_close is not None:
            held, self._held_close = self._held_close, None
            counters_of(self.token).count_batch(held, self.push(held))

    def _moved(self, seq: int, *, reopened: bool, missing: bool, after: int | None) -> bytes:
        self.seq = seq
        self._reopened_at = seq if reopened else None
        if not missing:
            return self.subscriber.commit(self.cursor)
        counters_of(self.token).count_reset("expired")
        token = self.token if self.subscriber.joined else None
        return encode_reset("expired", after=str(after), resume=self.cursor, token=token)

    def _advance(self, batch: Batch) -> Batch:
        """Move past durable events; return them as this stream sends them."""
        if batch.first is None or batch.first <= self.seq:
            batch = batch.after(self.seq)
        if not self.subscriber.joined:
            self.seq = batch.last or 0
            return batch
        stamped = []
        for seq, frame in zip(batch.seqs or (), batch.frames, strict=True):
            self.seq = seq
            # The cursor of all tokens of the stream replaces the event's own id.
            stamped.append(replace_id(frame, self.cursor))
        return Batch(stamped, batch.seqs, closes=batch.closes)

    def _close(self) -> None:
        self.close_buffered = True
        if all(one.close_buffered for one in self.subscriber.subscriptions):
            self.subscriber.ending = True


class Subscriber:
    """The bounded buffer of one stream, and its tokens.

    :param buffer_bytes: the most bytes that the buffer contains, including the bytes that the
        server is about to take. One event is accepted even if it is larger, and one batch if
        the buffer is empty.
    :param keepalive_seconds: seconds without data after which a keepalive is sent; ``None`` for
        none.
    :param joined: whether one cursor stands for several tokens.
    :param own_ids: whether the events may have ids of their own.
    :param cursor_event: whether cursors are sent as events, for a client that ignores an id
        without data.
    """

    __slots__ = (
        "_buffer",
        "_cursor_event",
        "_lost",
        "_size",
        "_volatile",
        "_waiter",
        "buffer_bytes",
        "caught_up",
        "dirty",
        "ending",
        "in_flight",
        "joined",
        "keepalive_seconds",
        "own_ids",
        "quiet",
        "subscriptions",
        "writer",
    )

    def __init__(
        self,
        *,
        buffer_bytes: int,
        keepalive_seconds: float | None,
        joined: bool = False,
        own_ids: bool = False,
        cursor_event: bool = False,
    ) -> None:
        self.buffer_bytes = buffer_bytes
        self.keepalive_seconds = keepalive_seconds
        self.joined = joined
        self.own_ids = own_ids
        """Whether events have ids of their own. Such an id may look like a sequence number."""
        self.subscriptions: list[Subscription] = []
        self.quiet = False
        """Whether no data was written since the last keepalive tick."""
        self.dirty = True
        """Whether the state may have changed since all data was taken."""
        self.in_flight = 0
        """The bytes that were taken, and that the server may not have accepted yet."""
        self.ending = False
        """Whether the last bytes of the stream are buffered. Nothing is buffered after them."""
        self.caught_up = False
        """Whether one of the tokens was live at some time."""
        self.writer: Writer | None = None
        """Writes to the connection; ``None`` if Django sends the stream."""
        self._cursor_event = cursor_event
        self._buffer: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._volatile = False
        """Whether the buffer contains live-only events."""
        self._lost = False
        """Whether live-only events were dropped."""

    def add(
        self,
        token: str,
        seq: int,
        *,
        reopened: bool = False,
        closed: bool = False,
        rewound: bool = False,
    ) -> Subscription:
        """Add a token, which is behind until the stream has caught up."""
        subscription = Subscription(
            self, token, seq, reopened=reopened, closed=closed, rewound=rewound
        )
        self.subscriptions.append(subscription)
        return subscription

    def commit(self, cursor: str) -> bytes:
        """Return the bytes that set the cursor of the listener."""
        if self._cursor_event:
            return encode_event(CURSOR, cursor.encode(), cursor)
        return encode_id(cursor)

    # For the feeds and the hub

    def write(self, data: bytes) -> None:
        """Buffer bytes and wake the stream."""
        self.quiet = False
        self._buffer.append(data)
        self._size += len(data)
        self.wake()

    def write_through(self, batch: Batch) -> bool:
        """Write a batch to the socket, if all before it was accepted. Return whether it was.

        While the stream's task waits, it has sent everything, and has nothing to read from the
        history. So no event overtakes another one. A close is left to the task, which ends.
        """
        waiter, writer = self._waiter, self.writer
        if writer is None or waiter is None or waiter.done() or batch.closes:
            return False
        if not writer.write(batch):
            return False
        self.quiet = False
        return True

    def offer(self, batch: Batch) -> bool:
        """Buffer a batch and wake the stream. Return whether there was room."""
        buffer = self._buffer
        data = batch.data
        size = self._size + len(data)
        if size + self.in_flight > self.buffer_bytes and (
            buffer or (self.in_flight and batch.count > 1)
        ):
            return False
        # The same as `write`, without a call: this is the fast path.
        buffer.append(data)
        self._size = size
        self.quiet = False
        self.dirty = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        return True

    def offer_volatile(self, batch: Batch) -> bool:
        """Write or buffer live-only events. Return whether there was room.

        A close is always buffered.
        """
        if self.write_through(batch):
            return True
        if not self.offer(batch):
            self.overflow()
            self._lost = self._lost or not batch.closes
            if not batch.closes:
                return False
            self.write(batch.data)
        self._volatile = True
        return True

    def overflow(self) -> None:
        """Drop the buffer, not the listener: the stream continues from the history."""
        counters_of(self.subscriptions[0].token).count_overflow()
        self._clear()
        self._lost = self._lost or self._volatile
        self._volatile = False
        for one in self.subscriptions:
            one.seq = one.sent
            one.live = one.close_buffered = one.close_sent
        self.wake()

    def keep_alive(self) -> None:
        """Buffer a keepalive if no data was written since the last call, and none waits."""
        if self.quiet and not self._buffer:
            self.write(KEEPALIVE)
        else:
            self.quiet = True

    def wake(self) -> None:
        """Wake the stream."""
        self.dirty = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For the stream

    def end(self, last: bytes) -> None:
        """End the stream after the buffered data and these bytes."""
        if not self.ending:
            self.ending = True
            for one in self.subscriptions:
                one.live = one.close_buffered = True
            self.write(last)

    def abort(self) -> None:
        """Drop the buffer, end the stream at once and wake it."""
        self._clear()
        self._lost = self._volatile = False
        self.ending = True
        for one in self.subscriptions:
            one.live = one.close_buffered = one.close_sent = True
        self.wake()

    def take_plain(self) -> bytes | None:
        """Return all that is buffered for a live stream of one token, perhaps nothing.

        This is the fast path of nearly every write. ``None`` if it cannot be used.
        """
        one = self.subscriptions[0]
        if self._lost or self.ending or self.joined or self.in_flight or not one.live:
            return None
        self.dirty = False
        buffer = self._buffer
        if not buffer:
            return b""
        chunk = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        buffer.clear()
        self._size = 0
        self._volatile = False
        one.sent = one.seq
        return chunk

    def take(self) -> bytes:
        """Return all that is buffered, as one write."""
        chunk = b"".join(self._buffer)
        self._clear()
        self._volatile = False
        for one in self.subscriptions:
            one.sent = one.seq
            one.close_sent = one.close_buffered
        return chunk

    def take_overflow_reset(self) -> bytes:
        """Return a ``reset`` if live-only events were dropped, otherwise nothing."""
        if not self._lost:
            return b""
        self._lost = False
        counters_of(self.subscriptions[0].token).count_reset("overflow")
        return encode_reset("overflow", after=None, resume=None)

    def _clear(self) -> None:
        self._buffer.clear()
        self._size = 0

    @property
    def behind(self) -> Subscription | None:
        """The first subscription for which the stream must read the history."""
        for one in self.subscriptions:
            if not one.live:
                return one
        return None

    @property
    def has_frames(self) -> bool:
        """Whether the buffer contains data."""
        return bool(self._buffer)

    @property
    def is_ready(self) -> bool:
        """Whether the stream has something to do."""
        return bool(self._buffer) or self._lost or self.ending or self.behind is not None

    def waiter(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return a future that is done when the stream is woken. Nothing may be ready yet."""
        self._waiter = loop.create_future()
        return self._waiter

    async def wait(self) -> None:
        """Wait until the stream has something to do."""
        if not self.is_ready:
            await self.waiter(asyncio.get_running_loop())
