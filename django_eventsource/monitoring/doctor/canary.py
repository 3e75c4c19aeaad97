"""Opens a stream at the public URL, publishes canary events, and records what arrives when.

A canary is published by this process, as the project's own code publishes. If the settings keep
events in the memory of one process, canaries are posted to the server instead, each over another
connection.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx2

from ...client._http import (
    Auth,
    Target,
    aread_excerpt,
    content_encoding,
    media_type,
    response_error,
)
from ...client.sender import send
from ...conf import conf
from ...delivery.layer import background, is_process_local
from ...events import Event, StringEvent, StringIdEvent, action_error, is_durable
from ...exceptions import ClientError
from ...history import get_history
from ...protocol.frames import CONTENT_TYPE
from ...publishing import publish

CANARY = "canary"
POSTED_CANARIES = 6
"""The number of posted canaries. Some of them reach another process, if there are several."""
EXAMPLES = ("ping", "message")
"""The actions of a posted canary, for a class that allows every action."""
MARGIN_SECONDS = 10.0
"""Seconds by which a keepalive may be late on a loaded machine."""
END_TIMEOUTS = 3
"""The number of time-outs for which the doctor waits for the end of a stream."""
COMMENT = b":"
"""The first byte of a keepalive, and of no event."""
ENCODINGS = "gzip, deflate, br, zstd"


class DurableCanary(StringIdEvent):
    """The canary of a project whose default Event class is durable."""

    ACTIONS = [CANARY, StringIdEvent.FINISH]
    internal = True


class LiveCanary(StringEvent):
    """The canary of a project whose default Event class is live-only."""

    ACTIONS = [CANARY, StringEvent.FINISH]
    internal = True


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's URLs, and how the requests authenticate."""

    url: Callable[[str], str]
    """Returns the URL of an action and the canary's token."""
    listen_auth: Auth | None
    """How the requests for a stream authenticate."""
    send_auth: Callable[[str], Auth | None]
    """Returns how the POST of an action authenticates."""
    headers: Sequence[tuple[str, str]] = ()
    """Additional request headers."""
    verify: bool | ssl.SSLContext = True
    """``False`` to accept any certificate, or the trusted authorities."""


@dataclass(kw_only=True)
class Observation:
    """What the canary has measured."""

    url: str
    """The URL of the stream."""
    direct: bool
    """Whether this process has published the canary, and not the server."""
    sent: int = 0
    """The number of canaries."""
    arrived: int = 0
    """The number of canaries that arrived while the stream was open."""
    arrival_seconds: float | None = None
    """Seconds from the publication of the canaries to their arrival."""
    buffered: bool = False
    """Whether a canary arrived with the end of the stream only."""
    served_by_wsgi: bool = False
    """Whether the server responded that it serves WSGI."""
    http_version: str | None = None
    """The HTTP version of the response, such as ``HTTP/1.1``; ``None`` without a response."""
    offers_http2: bool | None = None
    """Whether the server offers HTTP/2; ``None`` if the URL has no TLS or the check failed."""
    encoding: str | None = None
    """The ``Content-Encoding`` of the stream, which was requested without one."""
    accepted_encoding: str | None = None
    """The ``Content-Encoding`` of a stream that was requested with compression."""
    delayed_if_accepted: bool = False
    """Whether no data of such a stream arrived in time."""
    requested_at: float = 0.0
    responded_at: float = 0.0
    """The times of this machine around the response, in seconds since the epoch."""
    date: str | None = None
    """The ``Date`` of the response."""
    idle_seconds: float = 0.0
    """Seconds for which the stream was watched after the canaries."""
    keepalives: int = 0
    """The number of keepalives that arrived meanwhile."""
    cut_seconds: float | None = None
    """Seconds without data after which the connection was cut; ``None`` if it was not cut."""


@dataclass
class StreamReader:
    """Reads one stream on the background loop, so that a caller can wait for parts of it."""

    server: Server
    accept_encoding: str = "identity"
    response: httpx2.Response | None = None
    """The response, as soon as its head has arrived."""
    body: bytes = b""
    """What was received."""
    error: ClientError | None = None
    """Why the stream could not be opened, or why it was cut."""
    ended: bool = False
    """Whether no more data can arrive."""
    requested_at: float = 0.0
    responded_at: float = 0.0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._target = Target(
            self.server.url(conf.event_class.LISTEN), self.server.headers, self.server.listen_auth
        )
        self._future = background.start(None, self._run())

    @property
    def encoding(self) -> str | None:
        """The ``Content-Encoding``, or ``None`` if the body is not encoded, or not known yet."""
        return None if self.response is None else content_encoding(self.response)

    def wait(self, condition: Callable[[], object], seconds: float) -> bool:
        """Return whether a condition became true within a number of seconds."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: condition() or self.ended, seconds))

    def close(self) -> None:
        """Close the connection."""
        self._future.cancel()
        self.wait(lambda: False, 1.0)

    async def _run(self) -> None:
        try:
            await self._read()
        except Exception as error:  # noqa: BLE001
            self.error = self._target.client_error(error, "Cannot read the stream of")
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    async def _read(self) -> None:
        headers = httpx2.Headers(
            {
                "Accept": CONTENT_TYPE,
                "Accept-Encoding": self.accept_encoding,
                "Cache-Control": "no-cache",
            }
        )
        headers.update(self._target.headers)
        options = self._target.options(self.server.verify, None)
        hooks = self._target.async_hooks()
        self.requested_at = time.time()
        async with (
            httpx2.AsyncClient(**options, event_hooks=hooks, follow_redirects=True) as http,
            http.stream("GET", self._target.url, headers=headers) as response,
        ):
            self.responded_at = time.time()
            if response.status_code != httpx2.codes.OK or media_type(response) != CONTENT_TYPE:
                excerpt = await aread_excerpt(response, self._target.excerpt_seconds)
                self.response, self.body = response, excerpt
                raise response_error(response, excerpt)
            self._note(b"", response)
            async for chunk in response.aiter_raw():
                self._note(chunk, response)

    def _note(self, chunk: bytes, response: httpx2.Response) -> None:
        with self._changed:
            self.response = response
            self.body += chunk
            self._changed.notify_all()


class Canary:
    """Sends canaries through a server, and observes one stream.

    :param server: the server.
    :param token: the token of the canaries.
    :param timeout_seconds: seconds to wait for each thing that should happen at once.
    :param idle_seconds: seconds for which to watch the stream after the canaries; ``None`` to
        watch it until the second keepalive.
    """

    seen: Observation
    """What was observed, also if :meth:`observe` did not return."""

    def __init__(
        self, server: Server, token: str, timeout_seconds: float, idle_seconds: float | None
    ) -> None:
        self._server = server
        self._token = token
        self._timeout = timeout_seconds
        self._idle_seconds = idle_seconds
        self._is_durable = is_durable(conf.event_class)
        self._is_direct = get_history().shared if self._is_durable else not is_process_local()
        # Only this run sends these values, so it ignores those of another run.
        self._values = [
            f"{CANARY}-{secrets.token_hex(16)}"
            for _ in range(1 if self._is_direct else POSTED_CANARIES)
        ]
        self.seen = Observation(url=server.url(conf.event_class.LISTEN), direct=self._is_direct)

    def observe(self) -> None:
        """Observe a stream, and change :attr:`seen`.

        :raises ClientError: if no stream can be opened, or the canaries cannot be posted.
        :raises storage_errors: if the canary cannot be published.
        """
        seen = self.seen
        reader = StreamReader(self._server)
        try:
            self._observe_stream(reader, seen)
        finally:
            reader.close()
        if seen.arrived:
            self._observe_compressed_stream(seen)
        seen.offers_http2 = offers_http2(httpx2.URL(seen.url))

    def _observe_stream(self, reader: StreamReader, seen: Observation) -> None:
        # The server has subscribed when the first bytes of the body arrive. Behind a proxy that
        # buffers, they do not arrive, and the time-out is long enough.
        reader.wait(lambda: reader.body or reader.encoding, self._timeout)
        seen.encoding = reader.encoding
        # The text of the view for a request that came through WSGI.
        seen.served_by_wsgi = reader.error is not None and b"WSGI" in reader.body
        if not seen.served_by_wsgi and seen.encoding is None:
            self._check_open(reader)
            self._send(reader, seen)
        if reader.response is not None:
            seen.http_version = reader.response.http_version
            seen.date = reader.response.headers.get("Date")
        seen.requested_at, seen.responded_at = reader.requested_at, reader.responded_at

    def _check_open(self, reader: StreamReader) -> None:
        if reader.error is not None:
            raise reader.error
        if reader.ended:
            raise ClientError(
                f"{self._server.url(conf.event_class.LISTEN)} ended the stream at once, so that "
                "the client reconnects: the server is down, starting or overloaded, or it cannot "
                "read the history. Read its log."
            )

    def _send(self, reader: StreamReader, seen: Observation) -> None:
        sent_at = time.monotonic()
        action = CANARY if self._is_direct else self._posted_action()
        for value in self._values:
            self._publish(action, value)
            seen.sent += 1
        reader.wait(lambda: self._arrived(reader) == seen.sent, self._timeout)
        seen.arrived = self._arrived(reader)
        if seen.arrived:
            seen.arrival_seconds = time.monotonic() - sent_at
            self._watch(reader, seen)
            return
        self._check_open(reader)
        # A proxy that buffers sends what it has when the stream ends. A class may have no FINISH.
        with contextlib.suppress(ClientError):
            self._publish(conf.event_class.FINISH, "end")
        reader.wait(lambda: False, END_TIMEOUTS * self._timeout)
        seen.buffered = self._arrived(reader) > 0

    def _arrived(self, reader: StreamReader) -> int:
        return sum(value.encode() in reader.body for value in self._values)

    def _publish(self, action: str, value: str) -> None:
        if self._is_direct:
            event_class: type[Event] = DurableCanary if self._is_durable else LiveCanary
            action = action if action == CANARY else event_class.FINISH
            publish(self._token, action, value, event_class)
            return
        is_json = conf.event_class.content_type == "application/json"
        send(
            self._server.url(action),
            f'"{value}"' if is_json else value,
            headers=self._server.headers,
            auth=self._server.send_auth(action),
            verify=self._server.verify,
            content_type=conf.event_class.content_type,
        )

    def _posted_action(self) -> str:
        event_class = conf.event_class
        special = (event_class.LISTEN, event_class.FINISH, event_class.RETRY)
        for action in (*event_class.ACTIONS, *EXAMPLES):
            if action not in special and action_error(event_class, action) is None:
                return action
        raise ClientError(
            f"{event_class.__name__} allows no action that a canary can have. Its ACTIONS are "
            f"{', '.join(event_class.ACTIONS) or 'empty'}: add another one."
        )

    def _watch(self, reader: StreamReader, seen: Observation) -> None:
        """Watch the stream while nothing is published to it.

        The first keepalive may come after half of the keepalive's seconds, and the second one
        comes after all of them. So only the second one shows that the proxies wait long enough.
        """
        keepalive = conf.keepalive_seconds or 0.0
        seconds = self._idle_seconds or 2 * keepalive + MARGIN_SECONDS
        began = last = time.monotonic()
        successive = 0
        while (left := began + seconds - time.monotonic()) > 0:
            size = len(reader.body)
            reader.wait(lambda size=size: len(reader.body) > size, left)  # type: ignore[misc]
            now = time.monotonic()
            seen.idle_seconds = now - began
            if reader.ended:
                # A stream that the server ends, for example because of its age, has an end.
                seen.cut_seconds = None if reader.error is None else now - last
                break
            if reader.body.startswith(COMMENT, size):
                seen.keepalives += 1
                successive += 1
                if successive == 2 and self._idle_seconds is None:
                    break
            elif len(reader.body) > size:
                successive = 0  # the canary of another run
            else:
                continue
            last = now

    def _observe_compressed_stream(self, seen: Observation) -> None:
        """Open a stream as a client that accepts compression."""
        reader = StreamReader(self._server, ENCODINGS)
        try:
            has_data = reader.wait(lambda: reader.body, self._timeout)
            seen.accepted_encoding = reader.encoding
            seen.delayed_if_accepted = not has_data
        finally:
            reader.close()


def offers_http2(url: httpx2.URL) -> bool | None:
    """Return whether a server offers HTTP/2 in its TLS handshake.

    :returns: ``None`` if the URL is not https, or if there is no direct connection.
    """
    if url.scheme != "https":
        return None
    # Nothing is sent over this connection, so the certificate does not matter.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with contextlib.suppress(OSError):
        address = (url.host, url.port or 443)
        with (
            socket.create_connection(address, Target.connect_seconds) as connection,
            context.wrap_socket(connection, server_hostname=url.host) as tls,
        ):
            return tls.selected_alpn_protocol() == "h2"
    return None
