"""Clients that listen to an event stream and reconnect, in sync and in async code.

Works with any server of server-sent events. Needs httpx, and no Django.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from types import AsyncGeneratorType
from typing import Self

import httpx

from .connection import (
    FAILURES,
    Auth,
    Headers,
    Target,
    aiter_raw,
    aread_excerpt,
    content_encoding,
    is_network_failure,
    media_type,
    printable,
    read_excerpt,
    refusal,
)
from .exceptions import ClientError, ReceivedEventTooLarge
from .frames import CONTENT_TYPE, MAX_EVENT_BYTES, Decoder, ServerSentEvent

MIN_WAIT_SECONDS = 0.1
"""The shortest wait before a reconnection, whatever the server asks for."""
STEADY_SECONDS = 10.0
"""A stream that was open for so long needs no back-off, even if it brought nothing new."""
MAX_BACKOFF_SECONDS = 60.0
"""The longest back-off. A longer retry time of the server is still respected."""
MAX_WAIT_SECONDS = 3600.0
"""The longest wait of all. A longer retry time or ``Retry-After`` of the server is cut to it."""
TRANSIENT_STATUSES = frozenset({429, 500, 502, 503, 504})
"""The statuses of a server that is overloaded, failing or being restarted."""
_REQUEST_HEADERS = {
    "Accept": CONTENT_TYPE,
    "Accept-Encoding": "identity",
    "Cache-Control": "no-cache",
}
_UNSENDABLE_ID = re.compile(r"[\0\r\n\v\f\ud800-\udfff]")


class _Listener:
    """What both listening clients know and decide. Their subclasses do the I/O."""

    def __init__(
        self,
        url: str,
        *,
        headers: Headers = (),
        auth: Auth | None = None,
        last_event_id: str = "",
        retry_ms: int = 3000,
        reconnect: bool = True,
        retry_statuses: Collection[int] = (),
        max_event_bytes: int = MAX_EVENT_BYTES,
        read_timeout_seconds: float | None = None,
        verify: bool | ssl.SSLContext = True,
        on_diagnostic: Callable[[str], object] | None = None,
        on_error: Callable[[ClientError], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if retry_ms < 0:
            raise ValueError(f"retry_ms must be 0 or more milliseconds, not {retry_ms}.")
        self._target = Target(url, headers, auth)
        given = self._target.headers.pop("Last-Event-ID", "")
        self.last_event_id = last_event_id or given
        """The last event id, as of the event that was taken last."""
        if _UNSENDABLE_ID.search(self.last_event_id):
            raise ValueError(_unsendable(self.last_event_id))
        self.retry_ms = retry_ms
        """The current reconnection time, milliseconds."""
        self.reconnect = reconnect
        self.retry_statuses = retry_statuses
        self._options = self._target.options(verify, read_timeout_seconds) | {
            "follow_redirects": True,
            # A kept connection may be one that the server is closing.
            "limits": httpx.Limits(max_keepalive_connections=0),
        }
        self._on_diagnostic = on_diagnostic
        self._on_error = on_error
        self._jitter = jitter
        self._max_event_bytes = max_event_bytes
        self._events: deque[ServerSentEvent] = deque()
        self._failure: ClientError | None = None
        self._decoder = self._make_decoder()
        self._fruitless = 0
        """The number of connections and attempts since the last one that brought something new."""
        self._steady_at = math.inf
        """When the open stream will have been open for long, by ``time.monotonic()``."""
        self._wait_seconds = 0.0
        self._finished = False

    def _begin(self) -> httpx.Headers:
        """Begin a connection: give the headers of its request.

        :raises ClientError: when the last event id cannot be sent, which loses events.
        """
        self._steady_at = math.inf
        self._say(f"Connecting to {self._target.name}")
        headers = httpx.Headers(_REQUEST_HEADERS)
        headers.update(self._target.headers)
        if self.last_event_id:
            if _UNSENDABLE_ID.search(self.last_event_id):
                raise ClientError(_unsendable(self.last_event_id))
            headers.update([(b"Last-Event-ID", self.last_event_id.strip(" \t").encode())])
        return headers

    def _make_decoder(self) -> Decoder:
        return Decoder(self.last_event_id, max_event_bytes=self._max_event_bytes)

    def _take(self) -> ServerSentEvent | None:
        """Return the next event that has arrived, if any.

        :raises ClientError: if no event is left before one that is too large.
        """
        if self._events:
            event = self._events.popleft()
            self.last_event_id = event.id
            return event
        self.last_event_id = self._decoder.last_event_id
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    def _connected(self, response: httpx.Response) -> None:
        self._steady_at = time.monotonic() + STEADY_SECONDS
        self._decoder = self._make_decoder()
        name = printable(response.url)
        if response.status_code == httpx.codes.NO_CONTENT:
            self._finished = True
            self._say(f"{name} answered 204 No Content: there is nothing to listen to")
        else:
            self._say(f"Connected to {name}")

    def _feed(self, chunk: bytes) -> None:
        last_event_id = self._decoder.last_event_id
        try:
            self._events.extend(self._decoder.feed(chunk))
        except ReceivedEventTooLarge as error:
            self._events.extend(error.events)
            # Not answered by reconnecting, which would receive the same event.
            self._failure = ClientError(
                f"{self._target.name} sent an event of more than {self._max_event_bytes} bytes "
                "(max_event_bytes)."
            )
        if self._events or self._decoder.last_event_id != last_event_id:
            self._fruitless = 0
        if self._decoder.retry_ms is not None:
            self.retry_ms = self._decoder.retry_ms

    def _ended(self) -> None:
        """Answer a proper end of the stream."""
        self._say("The server ended the stream")
        if self.reconnect:
            self._schedule()
        else:
            self._finished = True

    def _failed(self, error: Exception, sentence: str) -> None:
        """Answer a failure.

        :raises ClientError: the failure, unless it may pass and this client reconnects.
        """
        if self._finished:
            return  # Closed by somebody else, and it is that which failed.
        failure = self._target.failure(error, sentence)
        if not self.reconnect or not self._may_pass(error):
            raise failure
        if self._on_error is not None:
            self._on_error(failure)
        self._schedule(failure.retry_after or 0.0)

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, ClientError):
            return error.status in self.retry_statuses
        return is_network_failure(error)

    def _schedule(self, at_least_seconds: float = 0.0) -> None:
        """Decide how long to wait before connecting again.

        The retry time; exponentially longer while no event and no new last event id arrives.
        """
        if time.monotonic() >= self._steady_at:
            self._fruitless = 0
        wait = max(self.retry_ms / 1000, MIN_WAIT_SECONDS)
        if self._fruitless:
            backoff = wait * 2 ** min(self._fruitless, 16)
            wait = max(wait, min(backoff, MAX_BACKOFF_SECONDS) * (1 + self._jitter()) / 2)
        self._fruitless += 1
        self._wait_seconds = min(max(wait, at_least_seconds), MAX_WAIT_SECONDS)
        self._say(f"Reconnecting in {self._wait_seconds:.3g} s")

    def _end(self) -> None:
        self._finished = True
        self._events.clear()
        self._failure = None
        self._decoder = self._make_decoder()

    def _say(self, text: str) -> None:
        if self._on_diagnostic is not None:
            self._on_diagnostic(text)


def _is_usable(response: httpx.Response) -> bool:
    """Tell whether the response is a stream, or the answer that there is none any more."""
    if response.status_code == httpx.codes.OK:
        return media_type(response) == CONTENT_TYPE and content_encoding(response) is None
    return response.status_code == httpx.codes.NO_CONTENT


def _unsendable(event_id: str) -> str:
    return f"The last event id {event_id!r} cannot be sent: no header can hold it."


class EventSourceClient(_Listener):
    """Listen to an event stream, reconnecting with the last event id.

    Iterate over it to get :class:`~django_eventsource.frames.ServerSentEvent` objects, and
    close it, best by ``with``. As the standard says, the client reconnects when the stream ends
    and when the network fails, and any answer other than a stream is final. The iteration ends
    when the server answers 204, after :meth:`close`, and at the end of the stream unless
    ``reconnect``. You can resume an iteration that was left or that raised; no event is lost.

    :param url: the stream. A user and password in it are sent as HTTP Basic.
    :param headers: more request headers, as a mapping or as pairs. They are never changed,
        and never sent to another origin by a redirect.
    :param auth: a user and a password for HTTP Basic, or any ``httpx.Auth``. An
        ``Authorization`` in ``headers`` wins.
    :param last_event_id: the event to go on after; empty for none.
    :param retry_ms: the time before reconnecting, in milliseconds, until the server sets
        another one. The wait grows to a minute while nothing new arrives; it is at least 0.1 s
        and at most an hour.
    :param reconnect: whether to reconnect when the stream ends and when the network fails.
    :param retry_statuses: statuses that are answered by reconnecting as well, after the time
        that ``Retry-After`` asks for: ``TRANSIENT_STATUSES``, for example.
    :param max_event_bytes: the most bytes of one event. A larger one is a failure that is not
        answered by reconnecting.
    :param read_timeout_seconds: how long the stream may be silent; ``None`` for ever.
    :param verify: ``False`` to accept any certificate, or an ``ssl.SSLContext``.
    :param on_diagnostic: is given a line of text at each step.
    :param on_error: is given each failure that is answered by reconnecting.
    :param jitter: gives numbers from 0 to 1 that spread repeated reconnections.
    :raises ValueError: for an argument that cannot be used.
    :raises ClientError: (in the iteration) if the answer is not a stream, if a certificate is
        not trusted, if an event is too large, if an event id cannot be sent in a header, and
        without ``reconnect`` after any failure.
    """

    _http: httpx.Client | None = None
    _response: httpx.Response | None = None
    _chunks: Iterator[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ServerSentEvent:
        try:
            while (event := self._take()) is None:
                if self._finished:
                    self.close()
                    raise StopIteration
                self._step()
        except BaseException:
            self._disconnect()
            raise
        return event

    def close(self) -> None:
        """Close the connection and end the iteration. Closing twice is harmless."""
        self._end()
        self._disconnect()
        if self._http is not None:
            self._http.close()

    def wait(self, seconds: float) -> None:
        """Wait before reconnecting. Override it to wait in another way."""
        time.sleep(seconds)

    def _step(self) -> None:
        if self._chunks is None:
            self._connect()
        else:
            self._read(self._chunks)

    def _connect(self) -> None:
        if self._wait_seconds:
            self.wait(self._wait_seconds)
            self._wait_seconds = 0.0
            if self._finished:
                return
        headers = self._begin()
        try:
            self._response = response = self._open(headers)
            if not _is_usable(response):
                raise refusal(response, read_excerpt(response))
        except FAILURES as error:
            self._disconnect()
            self._failed(error, "Cannot connect to")
        else:
            self._chunks = response.iter_raw()
            self._connected(response)

    def _open(self, headers: httpx.Headers) -> httpx.Response:
        if self._http is None:
            self._http = httpx.Client(**self._options, event_hooks=self._target.hooks())
        request = self._http.build_request("GET", self._target.url, headers=headers)
        return self._http.send(request, stream=True)

    def _read(self, chunks: Iterator[bytes]) -> None:
        try:
            chunk = next(chunks, None)
        except FAILURES as error:
            self._disconnect()
            self._failed(error, "Lost the stream of")
        else:
            if chunk is None:
                self._disconnect()
                self._ended()
            else:
                self._feed(chunk)

    def _disconnect(self) -> None:
        response, self._response, self._chunks = self._response, None, None
        if response is not None:
            response.close()


class AsyncEventSourceClient(_Listener):
    """Listen to an event stream in asynchronous code, reconnecting with the last event id.

    Takes the arguments of :class:`EventSourceClient` and does the same, by ``async for``
    and ``async with``. A cancelled iteration closes its connection; iterating again goes
    on after the last event that was given.
    """

    _http: httpx.AsyncClient | None = None
    _response: httpx.Response | None = None
    _chunks: AsyncGeneratorType[bytes, None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ServerSentEvent:
        try:
            while (event := self._take()) is None:
                if self._finished:
                    await self.aclose()
                    raise StopAsyncIteration
                await self._step()
        except BaseException:
            await self._disconnect()
            raise
        return event

    async def aclose(self) -> None:
        """Close the connection and end the iteration. Closing twice is harmless."""
        self._end()
        await self._disconnect()
        if self._http is not None:
            await self._http.aclose()

    async def wait(self, seconds: float) -> None:
        """Wait before reconnecting. Override it to wait in another way."""
        await asyncio.sleep(seconds)

    async def _step(self) -> None:
        if self._chunks is None:
            await self._connect()
        else:
            await self._read(self._chunks)

    async def _connect(self) -> None:
        if self._wait_seconds:
            await self.wait(self._wait_seconds)
            self._wait_seconds = 0.0
            if self._finished:
                return
        headers = self._begin()
        try:
            self._response = response = await self._open(headers)
            if not _is_usable(response):
                raise refusal(response, await aread_excerpt(response))
        except FAILURES as error:
            await self._disconnect()
            self._failed(error, "Cannot connect to")
        else:
            self._chunks = aiter_raw(response)
            self._connected(response)

    async def _open(self, headers: httpx.Headers) -> httpx.Response:
        if self._http is None:
            self._http = httpx.AsyncClient(**self._options, event_hooks=self._target.async_hooks())
        request = self._http.build_request("GET", self._target.url, headers=headers)
        return await self._http.send(request, stream=True)

    async def _read(self, chunks: AsyncGeneratorType[bytes, None]) -> None:
        try:
            chunk = await anext(chunks, None)
        except FAILURES as error:
            await self._disconnect()
            self._failed(error, "Lost the stream of")
        else:
            if chunk is None:
                await self._disconnect()
                self._ended()
            else:
                self._feed(chunk)

    async def _disconnect(self) -> None:
        response, self._response = self._response, None
        chunks, self._chunks = self._chunks, None
        if response is not None:
            await response.aclose()
        # It is running when another task closes the client than the one that iterates.
        if chunks is not None and not chunks.ag_running:
            await chunks.aclose()
