"""The body of an open response: stored events, then live ones."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Self

from .._timing import Backoff, spread
from ..conf import conf
from ..delivery.counters import counters_of
from ..delivery.hub import Hub, get_hub
from ..delivery.subscription import Subscriber, Subscription, share_of
from ..history import Position
from ..protocol.frames import encode_reset, encode_retry
from ..signals import Reason
from .thread_release import release_request_thread

logger = logging.getLogger("django_eventsource.streaming")


class EventStream(AsyncIterator[bytes]):
    """The body of one open response: replay from the history, then live events.

    The stream subscribes to the hub at the second ``__anext__``, so a response that is never
    iterated over leaves nothing behind. An error is logged and ends the stream cleanly, so that
    the client reconnects. An exception in the body of a response would harm some servers.

    :param token: the token of the stream, or the first one.
    :param position: where the stream starts in the history of that token.
    :param asked: the last event id that the client sent, if any.
    :param durable: whether the first bytes set the client's cursor.
    :param keepalive_seconds: seconds without data after which a keepalive comment is sent;
        ``None`` for no keepalives.
    :param others: the other tokens of the stream, with the positions where it starts.
    :param state: the application's state, encoded, which is sent before any event.
    :param own_ids: whether the events may have ids of their own.
    :param cursor_event: whether cursors are sent as events, for a client that ignores an id
        without data.
    """

    __slots__ = (
        "__weakref__",
        "_backoff",
        "_ending_since",
        "_hub",
        "_opening",
        "_subscriber",
        "reason",
        "sending_since",
        "token",
    )

    BACKOFF_SECONDS = (0.1, 0.5, 1, 2, 5)
    """The waits after reads of the history that fail one after the other."""
    STALE_SECONDS = 0.05
    """The wait if the history does not return events that the channel layer has delivered."""

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
        own_ids: bool = False,
        cursor_event: bool = False,
    ) -> None:
        self.token = token
        self.reason: Reason | None = None
        """The reason why the stream ended; ``None`` while it is open."""
        self.sending_since: float | None = None
        """The time since when the server has been sending the last chunk, on the monotonic
        clock."""
        self._ending_since: float | None = None
        self._hub: Hub | None = None
        self._backoff = Backoff(self.BACKOFF_SECONDS)
        self._subscriber = Subscriber(
            buffer_bytes=share_of(conf.stream_buffer_bytes),
            keepalive_seconds=keepalive_seconds,
            joined=bool(others),
            own_ids=own_ids,
            cursor_event=cursor_event,
        )
        positions = {token: position, **others}
        for one, place in positions.items():
            reopened = place.cursor.reopened and not place.closed
            self._subscriber.add(
                one,
                place.seq,
                reopened=reopened,
                closed=place.closed,
                rewound=place.rewound,
            )
        self._opening: bytes | None = opening(
            self._subscriber, positions, asked=asked, durable=durable, state=state
        )

    @property
    def is_begun(self) -> bool:
        """Whether the server has requested the first bytes, or the stream has ended."""
        return self._opening is None

    @property
    def is_behind(self) -> bool:
        """Whether the stream has to read events from the history."""
        return self._subscriber.behind is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        subscriber = self._subscriber
        hub = self._hub
        self.sending_since = None
        subscriber.in_flight = 0
        try:
            # Nearly every write takes this branch. It avoids calls, because it runs for each
            # listener.
            if hub is None:
                chunk: bytes | None = None
            else:
                chunk = subscriber.take_plain() if subscriber.dirty else b""
                if chunk == b"":
                    await subscriber.waiter(hub.loop)
                    chunk = subscriber.take_plain()
            if not chunk:
                chunk = await self._next()
        except BaseException as error:
            if not isinstance(error, Exception):
                # Cancelled, because the client disconnected or the server shuts down.
                self._close(Reason.CLIENT_DISCONNECTED)
                raise
            logger.exception("The stream of token %r failed and is ended.", self.token)
            self._close(Reason.FAILED)
            raise StopAsyncIteration from None
        if subscriber.in_flight:
            return b""  # the server has not accepted what the feed has written
        if not chunk:
            self._close(Reason.TOKEN_CLOSED)
            raise StopAsyncIteration
        subscriber.in_flight = len(chunk)
        self.sending_since = time.monotonic()
        return chunk

    def ending_for(self, now: float) -> float:
        """Return the seconds since :meth:`end` was called, or since the tokens were closed.

        A close does not count during the replay of a closed token. Otherwise a listener that reads
        slowly would be disconnected at the same event whenever it reconnects.
        """
        subscriber = self._subscriber
        if self._ending_since is None and subscriber.ending and subscriber.caught_up:
            self._ending_since = now
        return 0.0 if self._ending_since is None else now - self._ending_since

    async def aclose(self) -> None:
        """End the stream; further calls have no effect."""
        self._close(Reason.CLIENT_DISCONNECTED)

    def end(self, reason: Reason, retry_ms: int | None = None) -> None:
        """End the stream after the buffered data is sent. Call it in the event loop's thread.

        :param retry_ms: the reconnection delay that is sent to the client, in milliseconds.
        """
        self.reason = self.reason or reason
        if self._ending_since is None:
            self._ending_since = time.monotonic()
        if self._hub is not None:
            self._hub.flush(self._subscriber)
        self._subscriber.end(b"" if retry_ms is None else encode_retry(retry_ms))

    def __del__(self) -> None:
        # Middleware may drop the iterator without closing it. The garbage collector then calls
        # this in any thread, also if the constructor failed.
        hub = getattr(self, "_hub", None)
        if hub is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                hub.loop.call_soon_threadsafe(hub.unsubscribe, self._subscriber)

    def _close(self, reason: Reason) -> None:
        self.reason = self.reason or reason
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.unsubscribe(self._subscriber)
        self._opening = self.sending_since = None
        self._subscriber.abort()

    async def _next(self) -> bytes:
        """Return the next bytes; ``b""`` at the end, and if a write of the feed has to wait."""
        if self._opening is not None:
            chunk, self._opening = self._opening, None
            await release_request_thread()
            return chunk
        subscriber = self._subscriber
        hub = self._hub
        if hub is None:
            if subscriber.ending:
                return subscriber.take()
            hub = self._hub = get_hub()
            await hub.subscribe(subscriber)
        while not subscriber.in_flight:
            chunk = subscriber.take_overflow_reset()
            behind = subscriber.behind
            if behind is None:
                chunk += subscriber.take()
            else:
                chunk += await self._catch_up(hub, behind)
            if chunk or (subscriber.ending and not subscriber.has_frames):
                return chunk
            await subscriber.wait()
        return b""

    async def _catch_up(self, hub: Hub, behind: Subscription) -> bytes:
        """Read from the history. If that fails, return the buffered events that do not need it."""
        subscriber = self._subscriber
        try:
            slice_ = await hub.read(behind.token, behind.seq)
        except Exception:
            logger.exception("Reading the history of %r failed; retrying.", behind.token)
            await asyncio.sleep(self._backoff.next())
            return b"" if subscriber.ending else subscriber.take()
        self._backoff.reset()
        if behind.live:
            return b""  # it ended during the read
        # The buffered events of other tokens carry cursors from before this position changes.
        chunk = subscriber.take() if subscriber.joined else b""
        chunk += hub.catch_up(behind, slice_)
        if not chunk and not behind.live:
            await asyncio.sleep(self.STALE_SECONDS)
        return chunk


def opening(
    subscriber: Subscriber,
    positions: Mapping[str, Position],
    *,
    asked: str | None,
    durable: bool,
    state: bytes = b"",
) -> bytes:
    """Return the first bytes of a stream.

    They contain the reconnection time if it is set, a ``reset`` for each token that may have
    missing events, the state, and the listener's cursor. A stream of a durable class always has
    the cursor, so that a listener that has received no event resumes from where it joined. The
    cursor comes last, because a listener that is disconnected before it has not received the
    whole state.
    """
    retry = conf.retry_ms
    first = b"" if retry is None else encode_retry(retry)
    cursor = subscriber.subscriptions[0].cursor
    lost = {
        token: missing
        for token, position in positions.items()
        if (missing := position.missing) is not None
    }
    for n, (token, missing) in enumerate(lost.items(), 1):
        counters_of(token).count_reset(missing)
        first += encode_reset(
            missing,
            after=asked if missing == "expired" else None,
            resume=cursor,
            token=token if subscriber.joined else None,
            # The cursor covers all tokens, so only the last reset may set it.
            commit=not state and n == len(lost),
        )
    first += state
    if durable or asked:
        return first if lost and not state else first + subscriber.commit(cursor)
    return first + b": open\n"


def retry_body() -> bytes:
    """Return the whole body of a stream that cannot be opened now: a reconnection time.

    A browser's EventSource does not reconnect after any status but 200.
    """
    return encode_retry(round(spread(2_000, 10_000)))


def reconnect_delay_ms() -> int:
    """Return a random delay in milliseconds, so that clients do not reconnect together."""
    return round(spread(500, 5_000))
