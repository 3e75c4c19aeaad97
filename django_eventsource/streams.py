"""Streams: what an open response iterates over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections
from django.http import StreamingHttpResponse

from .conf import conf
from .feeds import Subscriber, reset_frame
from .frames import CONTENT_TYPE, encode_comment, encode_id, encode_retry
from .history import Position
from .hub import Hub, get_hub

logger = logging.getLogger("django_eventsource.streams")

HEADERS = {
    "Content-Type": CONTENT_TYPE,
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}

BACK_OFF_SECONDS = (0.1, 0.5, 1, 2, 5)
STALE_SECONDS = 0.05
"""Pause when the history shows less than the layer has brought already."""


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
    """

    _hub: Hub | None = None
    _subscriber: Subscriber

    def __init__(
        self,
        token: str,
        position: Position,
        *,
        asked: str | None = None,
        durable: bool = True,
        keepalive_seconds: float | None = None,
    ) -> None:
        self.token = token
        self._opening: bytes | None = opening(position, asked=asked, durable=durable)
        self._subscriber = Subscriber(
            position.seq,
            buffer_bytes=conf.stream_buffer_bytes,
            keepalive_seconds=keepalive_seconds,
        )
        self._failures = 0

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._next()
        except BaseException as error:
            self._close()
            if not isinstance(error, Exception):
                raise  # cancelled: the listener has gone, or the server goes
            logger.exception("A stream of token %r failed and is ended.", self.token)
            chunk = b""
        if not chunk:
            self._close()
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the stream. Does no harm when repeated."""
        self._close()

    def __del__(self) -> None:
        # Middleware may drop the iterator without closing it, in any thread.
        hub = self._hub
        if hub is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                hub.loop.call_soon_threadsafe(hub.unsubscribe, self._subscriber)

    def _close(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.unsubscribe(self._subscriber)
        self._opening = None
        self._subscriber.end()

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
                return b""
            hub = self._hub = get_hub()
            await hub.subscribe(self.token, subscriber)
        while True:
            chunk = subscriber.take_loss()
            if not subscriber.live:
                chunk += await self._catch_up(hub)
            else:
                chunk += subscriber.take()
            if chunk or (subscriber.finished and subscriber.live):
                return chunk
            await subscriber.wait()

    async def _catch_up(self, hub: Hub) -> bytes:
        """Read on from the history; where that fails, give what needs no history."""
        subscriber = self._subscriber
        try:
            slice_ = await hub.read(self.token, subscriber.position)
        except Exception:
            logger.exception("Reading the history of %r failed; trying again.", self.token)
            await asyncio.sleep(BACK_OFF_SECONDS[min(self._failures, len(BACK_OFF_SECONDS) - 1)])
            self._failures += 1
            return b"" if subscriber.finished else subscriber.take()
        self._failures = 0
        chunk = subscriber.catch_up(slice_)
        if not chunk and not subscriber.live:
            await asyncio.sleep(STALE_SECONDS)
        return chunk


class EventStreamResponse(StreamingHttpResponse):
    """The response that carries a stream."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__(stream, headers=HEADERS)
        self._stream = stream
        self._unwrapped = self._iterator  # type: ignore[attr-defined]

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Two nested generators per chunk are most of what Django costs: skip them while
        # no middleware has put its own iterator around the stream.
        if self._iterator is self._unwrapped:  # type: ignore[attr-defined]
            return self._stream
        return super().__aiter__()


def opening(position: Position, *, asked: str | None, durable: bool) -> bytes:
    """Give the first bytes of a stream, sent at once.

    The reconnection time if one is set, ``reset`` for a listener whose events are gone,
    else for a durable class the listener's cursor, so that one that has seen nothing yet
    resumes from where it joined.
    """
    retry = conf.retry_ms
    first = b"" if retry is None else encode_retry(retry)
    if not position.known:
        reason = "expired" if asked and asked.rstrip("+").isdigit() else "unknown"
        after = asked if reason == "expired" else None
        return first + reset_frame(reason, after=after, resume=position.cursor)
    if durable or asked:
        return first + encode_id(position.cursor)
    return first + encode_comment("open")


def come_back_later() -> bytes:
    """Give the whole body of a stream that cannot be served now.

    Any status but 200 would make a browser give up for good. The jitter spreads the
    listeners that come back.
    """
    return encode_retry(random.randint(2_000, 10_000))  # noqa: S311


async def let_go() -> None:
    """Release the thread and the database connections of the running request.

    Django's handler gives each request an executor of its own, which lives as long as
    the request: as long as the stream. Both are made anew where they are needed again.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    executors = getattr(SyncToAsync, "context_to_thread_executor", None)
    if context is None or executors is None:
        return
    await sync_to_async(_close_connections)()
    executor = executors.pop(context, None)
    if executor is not None:
        executor.shutdown(wait=False)


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()
