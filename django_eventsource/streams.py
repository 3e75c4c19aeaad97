"""Streams: what an open response iterates over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections

from .buffers import share_of
from .conf import conf
from .cursors import split_cursor
from .frames import encode_comment, encode_retry
from .history import Position
from .hub import Hub, get_hub
from .resets import reset_frame
from .subscribers import Subscriber, Subscription

logger = logging.getLogger("django_eventsource.streams")

BACK_OFF_SECONDS = (0.1, 0.5, 1, 2, 5)
COME_BACK_MS = (500, 5_000)
"""When listeners come back whose streams were ended: not all at once."""
STALE_SECONDS = 0.05
"""Pause when the history shows less than the layer has brought already."""


class Reason(StrEnum):
    """Why a stream ended."""

    FINISHED = "finished"
    """Its tokens were closed."""
    LEFT = "left"
    """The listener hung up."""
    AGE = "age"
    """It was open for ``EVENTSOURCE_STREAM_MAX_AGE_SECONDS``."""
    STALLED = "stalled"
    """Its reader took nothing for ``EVENTSOURCE_STREAM_STALL_SECONDS``."""
    CLOSED = "closed"
    """``close_streams()`` ended it, or the user logged out."""
    REFUSED = "refused"
    """The policy, asked again, said no."""
    SHUTDOWN = "shutdown"
    """The server ends."""
    FAILED = "failed"
    """An error, which is logged."""


class EventStream(AsyncIterator[bytes]):
    """The body of one open response: replay from the history, then live.

    Nothing is held before the first ``__anext__``: a response that is never iterated
    leaves nothing behind. An error ends the stream cleanly, so that the listener comes
    back: an exception that escapes would harm the server.

    :param token: the token listened to.
    :param position: where the listener goes on.
    :param asked: the last event id it sent, if any.
    :param durable: commit the position as the listener's cursor at once.
    :param keepalive_seconds: longest silence, or ``None``.
    :param others: the further tokens of the stream, and where the listener goes on there.
    :param state: the application's state, encoded, which the stream begins with.
    :param cursor_event: send cursors as events, for a client that ignores an id without data.
    """

    __slots__ = (
        "__weakref__",
        "_ending_since",
        "_failures",
        "_hub",
        "_left",
        "_opening",
        "_subscriber",
        "listener",
        "on_abort",
        "on_close",
        "reason",
        "sending_since",
        "token",
        "unsent",
    )

    def __init__(
        self,
        token: str,
        position: Position,
        *,
        asked: str | None = None,
        durable: bool = True,
        keepalive_seconds: float | None = None,
        others: Mapping[str, Position] = MappingProxyType({}),
        state: bytes = b"",
        cursor_event: bool = False,
    ) -> None:
        self.token = token
        self.reason: Reason | None = None
        """Why it ended; ``None`` while it is open."""
        self.sending_since: float | None = None
        """Since when the server has been taking the last chunk, on the monotonic clock."""
        self.listener: Any = None
        """Who listens, where that is known."""
        self.on_close: Callable[[EventStream], None] | None = None
        """Called once when it ends, in whatever thread that happens."""
        self.on_abort: Callable[[], None] | None = None
        """Called when :meth:`abort` ends it, by its event loop's thread."""
        self.unsent: Callable[[], int | None] | None = None
        """Gives the bytes that the reader has not got yet, where that is known."""
        self._left: int | None = None
        self._ending_since: float | None = None
        self._hub: Hub | None = None
        self._failures = 0
        self._subscriber = Subscriber(
            buffer_bytes=share_of(conf.stream_buffer_bytes),
            keepalive_seconds=keepalive_seconds,
            joined=bool(others),
            cursor_event=cursor_event,
        )
        positions = {token: position, **others}
        for one, place in positions.items():
            anew = place.cursor.endswith("+") and not place.closed
            self._subscriber.add(one, place.seq, anew=anew, finished=place.closed)
        self._opening: bytes | None = opening(
            self._subscriber, positions, asked=asked, durable=durable, state=state
        )

    @property
    def tokens(self) -> list[str]:
        """The tokens listened to."""
        return [one.token for one in self._subscriber.subscriptions]

    @property
    def served(self) -> bool:
        """Has it been begun to be read?"""
        return self._opening is None

    @property
    def is_open(self) -> bool:
        """Is it being served?"""
        return self._hub is not None

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        subscriber = self._subscriber
        hub = self._hub
        self.sending_since = None
        subscriber.in_flight = 0
        try:
            # The way that nearly every write takes; each call less counts here.
            chunk: bytes | None = None
            if hub is not None:
                chunk = subscriber.take_plain() if subscriber.stirred else b""
                if chunk == b"":
                    await subscriber.waiter(hub.loop)
                    chunk = subscriber.take_plain()
            if not chunk:
                chunk = await self._next()
        except BaseException as error:
            if not isinstance(error, Exception):
                self._close(Reason.LEFT)  # cancelled: the listener has gone, or the server goes
                raise
            logger.exception("A stream of token %r failed and is ended.", self.token)
            self._close(Reason.FAILED)
            raise StopAsyncIteration from None
        if not chunk:
            self._close(Reason.FINISHED)
            raise StopAsyncIteration
        subscriber.in_flight = len(chunk)
        self.sending_since = time.monotonic()
        return chunk

    def progress(self, *, begin: bool = False) -> None:
        """Take note that the server has taken something, of a chunk that it is taking.

        :param begin: take note also that it is taking one.
        """
        if begin or self.sending_since is not None:
            self.sending_since = time.monotonic()

    def stalled_for(self, now: float) -> float:
        """Give the seconds for which the reader has taken nothing that it could take.

        To be asked now and then: it is progress when there is less to take than before.
        """
        if self.sending_since is None:
            return 0.0
        left = self.unsent() if self.unsent is not None else None
        if left is not None and self._left is not None and left < self._left:
            self.sending_since = now
        self._left = left
        return now - self.sending_since

    def ending_for(self, now: float) -> float:
        """Return the seconds since the stream was told to end: by ``end()`` or a close.

        A close does not count in the replay of a closed token. A listener that reads slowly
        would otherwise be cut off at the same event whenever it reconnects.
        """
        subscriber = self._subscriber
        if self._ending_since is None and subscriber.finished and subscriber.caught_up:
            self._ending_since = now
        return 0.0 if self._ending_since is None else now - self._ending_since

    async def aclose(self) -> None:
        """End the stream. Does no harm when repeated."""
        self._close(Reason.LEFT)

    def end(self, reason: Reason, retry_ms: int | None = None) -> None:
        """End the stream after what is buffered; from its event loop's thread.

        :param retry_ms: tell the listener to come back after this time.
        """
        if self.reason is None:
            self.reason = reason
        if self._ending_since is None:
            self._ending_since = time.monotonic()
        self._subscriber.finish(b"" if retry_ms is None else encode_retry(retry_ms))

    def abort(self, reason: Reason) -> None:
        """End the stream at once, dropping what is buffered; from its event loop's thread."""
        self._close(reason)
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is not None:
            on_abort()

    def __del__(self) -> None:
        # Middleware may drop the iterator without closing it, in any thread.
        hub = getattr(self, "_hub", None)
        if hub is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                hub.loop.call_soon_threadsafe(hub.unsubscribe, self._subscriber)
        on_close = getattr(self, "on_close", None)
        if on_close is not None:
            self.reason = self.reason or Reason.LEFT
            on_close(self)

    def _close(self, reason: Reason) -> None:
        if self.reason is None:
            self.reason = reason
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.unsubscribe(self._subscriber)
        self._opening = self.sending_since = None
        self._subscriber.end()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close(self)

    async def _next(self) -> bytes:
        """Give the next bytes; none at the end."""
        if self._opening is not None:
            chunk, self._opening = self._opening, None
            await let_go()
            return chunk
        subscriber = self._subscriber
        hub = self._hub
        if hub is None:
            if subscriber.finished:
                return subscriber.take()
            hub = self._hub = get_hub()
            await hub.subscribe(subscriber)
        while True:
            chunk = subscriber.take_loss()
            behind = subscriber.behind
            if behind is None:
                chunk += subscriber.take()
            else:
                chunk += await self._catch_up(hub, behind)
            if chunk or (subscriber.finished and not subscriber.has_frames):
                return chunk
            await subscriber.wait()

    async def _catch_up(self, hub: Hub, behind: Subscription) -> bytes:
        """Read on from the history; where that fails, give what needs no history."""
        subscriber = self._subscriber
        try:
            slice_ = await hub.read(behind.token, behind.position)
        except Exception:
            logger.exception("Reading the history of %r failed; trying again.", behind.token)
            await asyncio.sleep(BACK_OFF_SECONDS[min(self._failures, len(BACK_OFF_SECONDS) - 1)])
            self._failures += 1
            return b"" if subscriber.finished else subscriber.take()
        self._failures = 0
        if behind.live:
            return b""  # ended meanwhile
        # The ids of what other tokens have buffered are from before this place moves on.
        chunk = subscriber.take() if subscriber.joined else b""
        chunk += behind.catch_up(slice_)
        if not chunk and not behind.live:
            await asyncio.sleep(STALE_SECONDS)
        return chunk


def opening(
    subscriber: Subscriber,
    positions: Mapping[str, Position],
    *,
    asked: str | None,
    durable: bool,
    state: bytes = b"",
) -> bytes:
    """Give the first bytes of a stream, sent at once.

    The reconnection time if one is set, ``reset`` for each token whose events are gone for
    the listener, the state, and the listener's cursor: for a durable class, so that one
    that has seen nothing yet resumes from where it joined. The cursor comes last: who was
    cut off before it has not got the state.
    """
    retry = conf.retry_ms
    first = b"" if retry is None else encode_retry(retry)
    cursor = subscriber.subscriptions[0].cursor
    cursors = split_cursor(asked, list(positions))
    lost = [token for token, position in positions.items() if not position.known]
    for token in lost:
        own = cursors[token]
        expired = own is not None and own.rstrip("+").isdigit()
        first += reset_frame(
            "expired" if expired else "unknown",
            after=asked if expired else None,
            resume=cursor,
            token=token if subscriber.joined else None,
            # The cursor is that of all tokens: who was cut off before has not been told.
            commit=not state and token == lost[-1],
        )
    first += state
    if durable or asked:
        return first if lost and not state else first + subscriber.commit(cursor)
    return first + encode_comment("open")


def come_back_later() -> bytes:
    """Give the whole body of a stream that cannot be served now.

    Any status but 200 would make a browser give up for good. The jitter spreads the
    listeners that come back.
    """
    return encode_retry(jittered_ms(2_000, 10_000))


def jittered_ms(least: int, most: int) -> int:
    """Give a random time, so that listeners do not all come back at once."""
    return random.randint(least, most)  # noqa: S311


async def let_go() -> None:
    """Release the thread and the database connections of the running request.

    Django's handler gives each request an executor of its own, which lives as long as
    the request: as long as the stream. Both are made anew where they are needed again.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    if context is None or getattr(SyncToAsync, "context_to_thread_executor", None) is None:
        return
    await sync_to_async(_close_connections)()
    leave_thread()


def leave_thread() -> None:
    """Let go of the thread for synchronous work of this context, also if it is stuck.

    The end of the context would wait for it.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    executors: Any = getattr(SyncToAsync, "context_to_thread_executor", {})
    executor = executors.pop(context, None)
    if executor is not None:
        executor.shutdown(wait=False)


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()
