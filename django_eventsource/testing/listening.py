"""Listeners inside of the test's process, which the project's ASGI application serves."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urlencode

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient
from django.urls import NoReverseMatch, reverse
from django.utils.module_loading import import_string

from ..asgi import Application
from ..conf import conf
from ..history import Kind, get_history
from ..protocol.cursors import parse_cursors
from ..protocol.field_rules import RESERVED, RESET
from ..protocol.frames import Decoder, ServerSentEvent
from ..streaming.registry import registry
from .connection import Connection

JOIN_POLL_SECONDS = 0.001


class NotReceived(AssertionError):
    """What a test waited for was not received in time."""


class ClientStream:
    """A stream of one token as its client sees it. :func:`listen` makes it.

    ``async with`` opens the stream, and waits until every event that is published later will
    arrive. The end of the block disconnects. :meth:`next` reconnects with the last event id if
    the stream is not open.

    :param token: the token.
    :param url: the path of each request, with the query.
    :param application: the ASGI application.
    :param user: as for :func:`listen`.
    :param client: as for :func:`listen`.
    :param headers: as for :func:`listen`.
    :param last_event_id: as for :func:`listen`.
    :param timeout_seconds: as for :func:`listen`.
    """

    def __init__(
        self,
        token: str,
        url: str,
        application: Application,
        *,
        user: Any,
        client: AsyncClient | None,
        headers: Mapping[str, str],
        last_event_id: str,
        timeout_seconds: float,
    ) -> None:
        self.token = token
        """The token."""
        self.events: list[ServerSentEvent] = []
        """All events that were received, with those that :meth:`next` has not returned yet."""
        self.body = b""
        """The bytes of the body of the newest response."""
        self.last_event_id = last_event_id
        """The last event id, which the next request sends."""
        self._url = url
        self._application = application
        self._user = user
        self._client = client
        self._headers = headers
        self._timeout_seconds = timeout_seconds
        self._first_id = ""
        self._unread: deque[ServerSentEvent] = deque()
        self._durable: list[ServerSentEvent] = []
        self._decoder = Decoder()
        self._rest = b""
        self._news = asyncio.Event()
        self._connection: Connection | None = None
        self._is_open = False

    async def __aenter__(self) -> Self:
        if self._user is not None:
            self._client = AsyncClient()
            await self._client.aforce_login(self._user)
        try:
            await self.reconnect()
        except BaseException as error:
            await self.__aexit__(type(error))
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # An exception of the test is more important than one of the application.
        with nullcontext() if kind is None else suppress(Exception):
            await self.cut()

    @property
    def status(self) -> int | None:
        """The HTTP status of the newest response."""
        return None if self._connection is None else self._connection.status

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the newest response, with names in lower case."""
        return {} if self._connection is None else self._connection.headers

    @property
    def is_open(self) -> bool:
        """Whether neither the client nor the server has ended the stream."""
        return self._is_open and self._connection is not None and not self._connection.has_ended

    async def reconnect(self) -> None:
        """Disconnect if the stream is open, and connect again with the last event id.

        :raises AssertionError: if there is no response in ``timeout_seconds``, or the stream does
            not reach its newest event.
        """
        await self.cut()
        self.body = b""
        self._decoder = Decoder(self.last_event_id)
        self._rest = b""
        opened_at = time.monotonic()
        connection = self._connection = Connection(self._on_data, self._news.set)
        connection.start(self._application, self._url, self._request_headers())
        self._is_open = True
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while not (self.body or connection.has_ended):
                    await self._wait_for_news()
                # No function is called when a stream has reached its newest event.
                while not _has_joined(opened_at):  # noqa: ASYNC110
                    await asyncio.sleep(JOIN_POLL_SECONDS)
        except TimeoutError:
            what = "response" if connection.status is None else "end of the stored events"
            raise self._not_received(what) from None

    async def next(self, action: str | None = None) -> ServerSentEvent:
        """Wait for the next event, and return it. Reconnect if the stream is not open.

        Events are returned in the order in which they were received. ``reset`` and ``close`` are
        events like any other.

        :param action: the expected action; ``None`` for any.
        :raises AssertionError: if the event has another action, if there is none in
            ``timeout_seconds``, or if the stream cannot be opened again. The message contains
            what was received.
        """
        what = "event" if action is None else f"event {action!r}"
        await self._wait_until(lambda: bool(self._unread), what)
        event = self._unread.popleft()
        if action not in (None, event.event):
            raise AssertionError(
                f"Expected the {what} of {self.token!r}, and received {_shown(event)}. "
                f"{self._received()}"
            )
        return event

    async def cut(self) -> None:
        """Disconnect as a client that vanishes. What it has not read is lost.

        :raises Exception: an exception that the ASGI application has raised.
        """
        if self._is_open and self._connection is not None:
            self._is_open = False
            await self._connection.disconnect(self._timeout_seconds)

    def stall(self) -> None:
        """Stop reading. The server waits, buffers, and disconnects the client in the end.

        :raises RuntimeError: if the stream is not open.
        """
        self._open_connection().stall()

    def resume(self) -> None:
        """Read again after :meth:`stall`.

        :raises RuntimeError: if the stream is not open.
        """
        self._open_connection().resume()

    async def assert_complete(self) -> None:
        """Check that each durable event was received once and in order, since the stream began.

        The events in the history are the expected ones. Wait for those that have not arrived yet,
        and reconnect if the stream is not open.

        :raises AssertionError: if an event is missing after ``timeout_seconds``, or was received
            twice or in another order; if ``reset`` was received; if the history has dropped
            events; or if the event class is live only. The message contains the differences.
        """
        expected = await self._stored()
        with suppress(NotReceived):
            await self._wait_until(lambda: len(self._durable) >= len(expected), "event")
        received = self._durable
        problems = [f"It received {_shown(one)}." for one in self.events if one.event == RESET]
        problems += [f"Missing: {_shown(one)}." for one in expected if one not in received]
        problems += [
            f"Received more often than published: {_shown(one)}."
            for n, one in enumerate(received)
            if received[:n].count(one) >= expected.count(one)
        ]
        if received != expected and not problems:
            problems.append("The order differs.")
        if problems:
            raise AssertionError(
                f"The stream of {self.token!r} is not complete. {' '.join(problems)} "
                f"Published: {_list(expected)}. {self._received()}"
            )

    async def _stored(self) -> list[ServerSentEvent]:
        """Return the events that the history has stored since the stream began."""
        if not self._first_id:
            raise AssertionError(
                f"The stream of {self.token!r} has no event id, so its event class is live only: "
                "no event is stored with which the received ones could be compared."
            )
        history = get_history()
        found: list[ServerSentEvent] = []
        cursor = parse_cursors(self._first_id, [self.token])[self.token]
        position = await history.alocate(self.token, cursor)
        seq, more, complete = position.seq, True, position.known
        while more and complete:
            slice_ = await history.aread(self.token, seq)
            more, complete = slice_.more, slice_.complete
            for entry in slice_.entries:
                seq = entry.seq
                if entry.draft.kind is not Kind.RETRY:
                    found += Decoder().feed(entry.frame())
        if not complete:
            raise AssertionError(
                f"The history of {self.token!r} has dropped events since the stream began, so the "
                f"stream cannot be compared with it. {self._received()}"
            )
        return found

    async def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until what is received fulfils a condition.

        :param what: the thing that is missing until then.
        :raises NotReceived: if that takes longer than ``timeout_seconds``.
        :raises AssertionError: if the stream has ended and cannot be opened again.
        :raises RuntimeError: if the stream is stalled.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while not condition():
                    if not self.is_open:
                        await self._reopen()
                    elif self._open_connection().is_stalled:
                        raise RuntimeError(
                            f"The stream of {self.token!r} is stalled and receives nothing: call "
                            "resume() first."
                        )
                    else:
                        await self._wait_for_news()
        except TimeoutError:
            raise self._not_received(what) from None

    async def _reopen(self) -> None:
        await self.reconnect()
        if self.status != 200:
            text = self.body.decode(errors="replace")[:500]
            raise AssertionError(
                f"The stream of {self.token!r} cannot be opened: the response is {self.status} "
                f"{text!r}. {self._received()}"
            )

    async def _wait_for_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _open_connection(self) -> Connection:
        if not self.is_open or self._connection is None:
            raise RuntimeError(
                f"The stream of {self.token!r} is not open: call next() or reconnect() first."
            )
        return self._connection

    def _request_headers(self) -> dict[str, str]:
        headers = dict(self._headers)
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        cookies = {} if self._client is None else self._client.cookies
        if cookies:
            pairs = (f"{one.key}={one.coded_value}" for one in cookies.values())
            headers["Cookie"] = "; ".join(pairs)
        return headers

    def _on_data(self, data: bytes) -> None:
        self.body += data
        if self.status != 200:
            return
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            events = self._decoder.feed(block + b"\n\n")
            self.events += events
            self._unread += events
            # An event without an id of its own is live only.
            if b"\nid:" in b"\n" + block:
                self._durable += [event for event in events if event.event not in RESERVED]
        self.last_event_id = self._decoder.last_event_id
        # The first id is the position at which the stream begins. No event comes before it.
        self._first_id = self._first_id or self.last_event_id

    def _not_received(self, what: str) -> NotReceived:
        return NotReceived(
            f"No {what} of {self.token!r} in {self._timeout_seconds} seconds. {self._received()}"
        )

    def _received(self) -> str:
        return f"Received: {_list(self.events)}."


def _shown(event: ServerSentEvent) -> str:
    return f"{event.event} {event.data[:100]!r}" + (f" (id {event.id})" if event.id else "")


def _list(events: Sequence[ServerSentEvent]) -> str:
    return "; ".join(map(_shown, events)) or "nothing"


def _has_joined(since: float) -> bool:
    """Return whether the streams opened since a time receive all that is published from now on."""
    loop = asyncio.get_running_loop()
    return all(
        stream.is_begun and all(one.live for one in stream._subscriber.subscriptions)
        for stream in registry.streams(loop)
        if stream.admitted_at >= since
    )


def listen(
    token: str,
    *,
    user: Any = None,
    client: AsyncClient | None = None,
    grant: str | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
    last_event_id: str = "",
    url: str | None = None,
    application: Application | None = None,
    timeout_seconds: float = 10.0,
) -> ClientStream:
    """Return a listener inside of the process of the test, for use with ``async with``.

    The project's ASGI application serves the stream, with its middleware and the wrapper
    ``Handover``, and without a server or a socket. The work that it does in threads is done in
    the test's thread, so it sees the transaction of a ``TestCase``.

    :param token: the token.
    :param user: log in this user with a session, as the test client's ``force_login()`` does;
        ``None`` for no login.
    :param client: send the cookies of this test client, for example those of its session.
    :param grant: send this grant.
    :param headers: further headers of each request.
    :param last_event_id: the last event id of the first request.
    :param url: the path of the stream, with a query or without; that of
        ``django_eventsource.urls`` if not passed.
    :param application: the ASGI application; that of ``ASGI_APPLICATION`` if not passed, which
        Django has made once. A test that overrides ``MIDDLEWARE`` passes
        ``Handover(get_asgi_application())``.
    :param timeout_seconds: the most seconds for which each call waits.
    :raises ValueError: if both ``user`` and ``client`` are passed.
    :raises ImproperlyConfigured: if neither ``application`` nor ``ASGI_APPLICATION`` is set.
    :raises NoReverseMatch: if the project's URLs do not include ``django_eventsource.urls``.
    """
    if user is not None and client is not None:
        raise ValueError("Pass user or client, not both: the client has the session of its user.")
    if url is None:
        url = _url_of(token)
    if grant is not None:
        url += f"{'&' if '?' in url else '?'}{urlencode({'grant': grant})}"
    return ClientStream(
        token,
        url,
        _project_application() if application is None else application,
        user=user,
        client=client,
        headers=headers,
        last_event_id=last_event_id,
        timeout_seconds=timeout_seconds,
    )


def _url_of(token: str) -> str:
    try:
        action = conf.event_class.LISTEN
        return reverse("eventsource:event", kwargs={"action": action, "token": token})
    except NoReverseMatch as error:
        raise NoReverseMatch(
            'The project\'s URLs do not include "django_eventsource.urls": pass the path of the '
            "stream as url=."
        ) from error


def _project_application() -> Application:
    path = getattr(settings, "ASGI_APPLICATION", None)
    if path is None:
        raise ImproperlyConfigured(
            "listen() serves the application that ASGI_APPLICATION names, and it is not set. Set "
            "it, or pass application=."
        )
    application: Application = import_string(path)
    return application
