"""Clients that listen to an event stream and reconnect, for sync and for async code.

They work with any server of server-sent events. The module does not import Django.
"""

import asyncio
import math
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from types import AsyncGeneratorType
from typing import Self, cast

import httpx2

from ..exceptions import ClientError, ReceivedEventTooLarge
from ..protocol.frames import CONTENT_TYPE, MAX_EVENT_BYTES, Decoder, ServerSentEvent
from ..protocol.rewind import parse_rewind
from ._http import (
    REQUEST_ERRORS,
    Auth,
    Headers,
    Target,
    aread_excerpt,
    content_encoding,
    is_network_error,
    media_type,
    printable,
    read_excerpt,
    response_error,
)

MIN_WAIT_SECONDS = 0.1
"""Seconds of the shortest wait before a reconnection, even if the server sends a shorter time."""
MAX_BACKOFF_SECONDS = 60.0
"""Seconds of the longest wait of the back-off. A longer retry time of the server still applies."""
MAX_WAIT_SECONDS = 3600.0
"""Seconds of the longest wait. It bounds the server's retry time and ``Retry-After`` too."""
TRANSIENT_STATUSES = frozenset({429, 500, 502, 503, 504})
"""The statuses of a server that is overloaded, fails or restarts."""
_REQUEST_HEADERS = {
    "Accept": CONTENT_TYPE,
    "Accept-Encoding": "identity",
    "Cache-Control": "no-cache",
}
_UNSENDABLE_ID = re.compile(r"[\0\r\n\v\f\ud800-\udfff]")


class _BaseClient:
    """The state and the decisions of both listening clients. The subclasses do the I/O."""

    _stable_seconds = 10.0
    """Seconds after which an open stream ends the back-off, even if it contained no new event."""

    def __init__(
        self,
        url: str,
        *,
        headers: Headers = (),
        auth: Auth | None = None,
        last_event_id: str = "",
        rewind: str | int | None = None,
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
        if rewind is not None:
            parse_rewind(rewind)
            self._target.add_to_query(f"rewind={rewind}")
        header = self._target.headers.pop("Last-Event-ID", "")
        self.last_event_id = last_event_id or header
        """The last event id: that of the event that the iteration returned last."""
        if _UNSENDABLE_ID.search(self.last_event_id):
            raise ValueError(_unsendable_message(self.last_event_id))
        self.retry_ms = retry_ms
        """The milliseconds before a reconnection."""
        self.reconnect = reconnect
        """Whether the client reconnects when the stream ends and when the network fails."""
        self.retry_statuses = retry_statuses
        """The statuses after which the client reconnects as well."""
        self._options = self._target.options(verify, read_timeout_seconds) | {
            "follow_redirects": True,
            # The server may be closing a connection that is kept.
            "limits": httpx2.Limits(max_keepalive_connections=0),
        }
        self._on_diagnostic = on_diagnostic
        self._on_error = on_error
        self._jitter = jitter
        self._max_event_bytes = max_event_bytes
        self._events: deque[ServerSentEvent] = deque()
        self._failure: ClientError | None = None
        self._decoder = self._make_decoder()
        self._fruitless_attempts = 0
        """The number of reconnections since the last new event or id."""
        self._stable_at = math.inf
        """The ``time.monotonic()`` at which the open stream counts as stable."""
        self._wait_seconds = 0.0
        self._ended = False
        """Whether the iteration ends after the received events."""

    def _make_decoder(self) -> Decoder:
        return Decoder(self.last_event_id, max_event_bytes=self._max_event_bytes)

    def _next_event(self) -> ServerSentEvent | None:
        """Return the next received event, or ``None`` if there is none.

        :raises ClientError: if the next event is too large.
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

    def _begin_connection(self) -> httpx2.Headers:
        """Return the headers of the request.

        :raises ClientError: if the last event id cannot be sent. Without it events would be lost.
        """
        self._stable_at = math.inf
        self._diagnose(f"Connecting to {self._target.name}")
        headers = httpx2.Headers(_REQUEST_HEADERS)
        headers.update(self._target.headers)
        if self.last_event_id:
            if _UNSENDABLE_ID.search(self.last_event_id):
                raise ClientError(_unsendable_message(self.last_event_id))
            headers.update([(b"Last-Event-ID", self.last_event_id.strip(" \t").encode())])
        return headers

    def _handle_response(self, response: httpx2.Response) -> None:
        self._stable_at = time.monotonic() + self._stable_seconds
        self._decoder = self._make_decoder()
        name = printable(response.url)
        if response.status_code == httpx2.codes.NO_CONTENT:
            self._ended = True
            self._diagnose(f"{name} responded with 204 No Content: there are no more events")
        else:
            self._diagnose(f"Connected to {name}")

    def _handle_chunk(self, chunk: bytes) -> None:
        last_event_id = self._decoder.last_event_id
        try:
            self._events.extend(self._decoder.feed(chunk))
        except ReceivedEventTooLarge as error:
            self._events.extend(error.events)
            # The client does not reconnect, because it would receive the same event again.
            self._failure = ClientError(
                f"{self._target.name} sent an event of more than {self._max_event_bytes} bytes "
                "(max_event_bytes)."
            )
        if self._events or self._decoder.last_event_id != last_event_id:
            self._fruitless_attempts = 0
        if self._decoder.retry_ms is not None:
            self.retry_ms = self._decoder.retry_ms

    def _handle_end(self) -> None:
        self._diagnose("The server ended the stream")
        if self.reconnect:
            self._schedule_reconnection()
        else:
            self._ended = True

    def _handle_failure(self, error: Exception, sentence: str) -> None:
        """Schedule a reconnection.

        :raises ClientError: the failure, if it is permanent or this client does not reconnect.
        """
        if self._ended:
            return  # Another task closed the client, which broke the connection.
        failure = self._target.client_error(error, sentence)
        if isinstance(error, ClientError):
            is_transient = error.status in self.retry_statuses
        else:
            is_transient = is_network_error(error)
        if not self.reconnect or not is_transient:
            raise failure
        if self._on_error is not None:
            self._on_error(failure)
        self._schedule_reconnection(failure.retry_after or 0.0)

    def _schedule_reconnection(self, at_least_seconds: float = 0.0) -> None:
        """Set the wait to the retry time, or to a multiple of it after fruitless attempts."""
        if time.monotonic() >= self._stable_at:
            self._fruitless_attempts = 0
        wait = max(self.retry_ms / 1000, MIN_WAIT_SECONDS)
        if self._fruitless_attempts:
            backoff = wait * 2 ** min(self._fruitless_attempts, 16)
            wait = max(wait, min(backoff, MAX_BACKOFF_SECONDS) * (1 + self._jitter()) / 2)
        self._fruitless_attempts += 1
        self._wait_seconds = min(max(wait, at_least_seconds), MAX_WAIT_SECONDS)
        self._diagnose(f"Reconnecting in {self._wait_seconds:.3g} s")

    def _stop(self) -> None:
        self._ended = True
        self._events.clear()
        self._failure = None
        self._decoder = self._make_decoder()

    def _diagnose(self, text: str) -> None:
        if self._on_diagnostic is not None:
            self._on_diagnostic(text)


def _is_usable(response: httpx2.Response) -> bool:
    """Whether the response is an event stream, or the status that ends one."""
    if response.status_code == httpx2.codes.OK:
        return media_type(response) == CONTENT_TYPE and content_encoding(response) is None
    return response.status_code == httpx2.codes.NO_CONTENT


def _unsendable_message(event_id: str) -> str:
    return f"The last event id {event_id!r} cannot be sent: a header cannot contain it."


class EventSourceClient(_BaseClient):
    """Listen to an event stream, and reconnect with the last event id.

    Iterate over the client to receive :class:`~django_eventsource.client.ServerSentEvent`
    objects. Close it, preferably with ``with``. As the HTML standard requires, the client
    reconnects when the stream ends and when the network fails, and every response other than a
    stream is final. The iteration ends when the server responds with 204, after :meth:`close`,
    and, without ``reconnect``, at the end of the stream. You can resume an iteration that you
    left or that raised; no event is lost.

    :param url: the URL of the stream. A user and password in it are sent as HTTP Basic.
    :param headers: more request headers, as a mapping or as pairs. They are never changed,
        and a redirect to another origin removes them.
    :param auth: a user and a password for HTTP Basic, or any ``httpx2.Auth``. An
        ``Authorization`` in ``headers`` wins.
    :param last_event_id: the id of the event after which the stream starts; empty for none.
    :param rewind: the stored events with which the stream starts if there is no last event id: a
        number (``10``), an age (``"30s"``, ``"5m"``, ``"2h"``) or ``"all"``. Servers other than
        django-eventsource may ignore it.
    :param retry_ms: the milliseconds before a reconnection, until the server sets another time.
        The wait grows to a minute while nothing new arrives. It is at least 0.1 seconds and at
        most an hour.
    :param reconnect: whether to reconnect when the stream ends and when the network fails.
    :param retry_statuses: the statuses after which the client reconnects as well, for example
        ``TRANSIENT_STATUSES``. It waits for the time of ``Retry-After`` at least.
    :param max_event_bytes: the greatest number of bytes of one event. After a larger event the
        client raises and does not reconnect.
    :param read_timeout_seconds: the seconds without data after which the stream has failed.
        ``None`` sets no limit.
    :param verify: ``False`` to accept any certificate, or an ``ssl.SSLContext``.
    :param on_diagnostic: a function that is called with a line of text at each step.
    :param on_error: a function that is called with each failure after which the client
        reconnects.
    :param jitter: a function that returns numbers from 0 to 1, which spread the reconnections.
    :raises ValueError: if an argument is not valid.
    :raises ClientError: (in the iteration) if the response is not a stream, if a certificate is
        not trusted, if an event is too large, if an event id cannot be sent in a header, and
        without ``reconnect`` after any failure.
    """

    _http: httpx2.Client | None = None
    _response: httpx2.Response | None = None
    _chunks: Iterator[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ServerSentEvent:
        try:
            while (event := self._next_event()) is None:
                if self._ended:
                    self.close()
                    raise StopIteration
                if self._chunks is not None:
                    self._read(self._chunks)
                elif self._wait_seconds:
                    self.wait(self._wait_seconds)
                    self._wait_seconds = 0.0
                else:
                    self._connect()
        except BaseException:
            self._disconnect()
            raise
        return event

    def close(self) -> None:
        """Close the connection and end the iteration. You can call it twice."""
        self._stop()
        self._disconnect()
        if self._http is not None:
            self._http.close()

    def wait(self, seconds: float) -> None:
        """Wait before a reconnection. Override it to wait differently.

        :param seconds: the seconds to wait.
        """
        time.sleep(seconds)

    def _connect(self) -> None:
        headers = self._begin_connection()
        try:
            if self._http is None:
                self._http = httpx2.Client(**self._options, event_hooks=self._target.hooks())
            request = self._http.build_request("GET", self._target.url, headers=headers)
            self._response = response = self._http.send(request, stream=True)
            if not _is_usable(response):
                raise response_error(
                    response, read_excerpt(response, self._target.excerpt_seconds)
                )
        except REQUEST_ERRORS as error:
            self._disconnect()
            self._handle_failure(error, "Cannot connect to")
        else:
            self._chunks = response.iter_raw()
            self._handle_response(response)

    def _read(self, chunks: Iterator[bytes]) -> None:
        try:
            chunk = next(chunks, None)
        except REQUEST_ERRORS as error:
            self._disconnect()
            self._handle_failure(error, "Lost the connection to")
        else:
            if chunk is None:
                self._disconnect()
                self._handle_end()
            else:
                self._handle_chunk(chunk)

    def _disconnect(self) -> None:
        response, self._response, self._chunks = self._response, None, None
        if response is not None:
            response.close()


class AsyncEventSourceClient(_BaseClient):
    """Listen to an event stream in asynchronous code, and reconnect with the last event id.

    The arguments and the behaviour are those of :class:`EventSourceClient`, with ``async for``
    and ``async with``. A cancelled iteration closes its connection. If you iterate again, the
    client continues after the last event that it returned.
    """

    _http: httpx2.AsyncClient | None = None
    _response: httpx2.Response | None = None
    _chunks: AsyncGeneratorType[bytes, None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ServerSentEvent:
        try:
            while (event := self._next_event()) is None:
                if self._ended:
                    await self.aclose()
                    raise StopAsyncIteration
                if self._chunks is not None:
                    await self._read(self._chunks)
                elif self._wait_seconds:
                    await self.wait(self._wait_seconds)
                    self._wait_seconds = 0.0
                else:
                    await self._connect()
        except BaseException:
            await self._disconnect()
            raise
        return event

    async def aclose(self) -> None:
        """Close the connection and end the iteration. You can call it twice."""
        self._stop()
        await self._disconnect()
        if self._http is not None:
            await self._http.aclose()

    async def wait(self, seconds: float) -> None:
        """Wait before a reconnection. Override it to wait differently.

        :param seconds: the seconds to wait.
        """
        await asyncio.sleep(seconds)

    async def _connect(self) -> None:
        headers = self._begin_connection()
        try:
            if self._http is None:
                self._http = httpx2.AsyncClient(
                    **self._options, event_hooks=self._target.async_hooks()
                )
            request = self._http.build_request("GET", self._target.url, headers=headers)
            self._response = response = await self._http.send(request, stream=True)
            if not _is_usable(response):
                raise response_error(
                    response, await aread_excerpt(response, self._target.excerpt_seconds)
                )
        except REQUEST_ERRORS as error:
            await self._disconnect()
            self._handle_failure(error, "Cannot connect to")
        else:
            # httpx2 does not declare that this is a generator.
            self._chunks = cast("AsyncGeneratorType[bytes, None]", response.aiter_raw())
            self._handle_response(response)

    async def _read(self, chunks: AsyncGeneratorType[bytes, None]) -> None:
        try:
            chunk = await anext(chunks, None)
        except REQUEST_ERRORS as error:
            await self._disconnect()
            self._handle_failure(error, "Lost the connection to")
        else:
            if chunk is None:
                await self._disconnect()
                self._handle_end()
            else:
                self._handle_chunk(chunk)

    async def _disconnect(self) -> None:
        response, self._response = self._response, None
        chunks, self._chunks = self._chunks, None
        if response is not None:
            await response.aclose()
        # The generator is running if another task than the iterating one closes the client.
        if chunks is not None and not chunks.ag_running:
            await chunks.aclose()
