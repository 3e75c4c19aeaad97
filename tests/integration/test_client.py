"""The listening clients, against a server that runs scripts on real sockets.

The fixture ``listen`` runs each test with both clients.
"""

from __future__ import annotations

import asyncio
import email.utils
import gc
import gzip
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
import trustme

from django_eventsource.client import _http as http
from django_eventsource.client import client as client_module
from django_eventsource.client.client import (
    MAX_BACKOFF_SECONDS,
    MAX_WAIT_SECONDS,
    TRANSIENT_STATUSES,
    AsyncEventSourceClient,
    EventSourceClient,
)
from django_eventsource.exceptions import ClientError
from django_eventsource.protocol.frames import ServerSentEvent
from tests.support.scripted import (
    Connection,
    Server,
    Step,
    basic_auth,
    cut,
    keep_open,
    redirect,
    respond,
    stream,
)

STOP = respond(204)

# Made once, because loading the authorities takes longer than most tests.
VERIFIED = ssl.create_default_context()


class Client(EventSourceClient):
    """A client that records its waits and does not wait.

    It closes itself at the wait number ``max_waits``.
    """

    def __init__(self, url: str, max_waits: int = 100, **options: Any) -> None:
        super().__init__(url, **options)
        self.max_waits = max_waits
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) == self.max_waits:
            self.close()


class AsyncClient(AsyncEventSourceClient):
    """The same, asynchronous."""

    def __init__(self, url: str, max_waits: int = 100, **options: Any) -> None:
        super().__init__(url, **options)
        self.max_waits = max_waits
        self.waits: list[float] = []

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) == self.max_waits:
            await self.aclose()


class Result:
    """The events and the waits of one client."""

    def __init__(self, client: Client | AsyncClient, seen: list[Result] | None) -> None:
        self.client = client
        self.events: list[ServerSentEvent] = []
        if seen is not None:
            seen.append(self)  # for tests whose client fails

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    @property
    def waits(self) -> list[float]:
        return self.client.waits


Listen = Callable[..., Result]


def listen_sync(url: str, seen: list[Result] | None = None, **options: Any) -> Result:
    with Client(url, **{"verify": VERIFIED} | options) as client:
        result = Result(client, seen)
        result.events.extend(client)
    return result


def listen_async(url: str, seen: list[Result] | None = None, **options: Any) -> Result:
    async def main() -> Result:
        async with AsyncClient(url, **{"verify": VERIFIED} | options) as client:
            result = Result(client, seen)
            async for event in client:
                result.events.append(event)
        return result

    return asyncio.run(main())


@pytest.fixture(params=[listen_sync, listen_async], ids=["sync", "async"])
def listen(request: pytest.FixtureRequest) -> Listen:
    """Run a client of either kind to its end."""
    return request.param


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def unused_url() -> str:
    """Return a URL to which every connection is refused."""
    return f"http://127.0.0.1:{free_port()}/"


def failure(listen: Listen, url: str, **options: Any) -> ClientError:
    """Return the error of a client that does not reconnect."""
    return final(listen, url, reconnect=False, **options)


def final(listen: Listen, url: str, **options: Any) -> ClientError:
    """Return the error of a client, after which it does not reconnect."""
    with pytest.raises(ClientError) as caught:
        listen(url, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return caught.value


@pytest.fixture(autouse=True, scope="module")
def no_leaks() -> Iterator[None]:
    """An unclosed socket is a warning, and a warning is an error."""
    yield
    gc.collect()


# Requests


def test_the_request_asks_for_an_uncompressed_event_stream(listen: Listen) -> None:
    """The first request has Accept, Cache-Control and Accept-Encoding, and no Last-Event-ID."""
    with Server(STOP) as server:
        listen(f"{server.url}poll/a%2Fb?x=1#fragment")
    request = server.requests[0]
    assert (request.method, request.path) == ("GET", "/poll/a%2Fb?x=1")
    assert request.headers["accept"] == b"text/event-stream"
    assert request.headers["cache-control"] == b"no-cache"
    assert request.headers["accept-encoding"] == b"identity"
    assert "last-event-id" not in request.headers


def test_the_callers_headers_are_sent_and_not_changed(listen: Listen) -> None:
    """Every request has the headers, in UTF-8, and the mapping is unchanged."""
    headers = {"X-Name": " é ", "Accept": "text/*"}
    before = dict(headers)
    with Server(stream(b"id: 1\ndata: a\n\n"), STOP) as server:
        listen(server.url, headers=headers)
    assert headers == before
    for request in server.requests:
        assert request.headers["x-name"] == "é".encode()
        assert request.headers["accept"] == b"text/*"


def test_headers_as_pairs_are_sent(listen: Listen) -> None:
    with Server(STOP) as server:
        listen(server.url, headers=[("X-One", "1"), ("X-Two", "2")])
    assert server.requests[0].headers["x-one"] == b"1"
    assert server.requests[0].headers["x-two"] == b"2"


def test_the_stream_replaces_the_last_event_id_of_the_headers(listen: Listen) -> None:
    """A Last-Event-ID among the headers is sent with the first request only."""
    with Server(stream(b"id: 2\ndata: a\n\n"), stream(b"id:\n\n"), STOP) as server:
        listen(server.url, headers={"Last-Event-ID": "1"})
    assert [request.headers.get("last-event-id") for request in server.requests] == [
        b"1",
        b"2",
        None,
    ]


def test_each_request_asks_for_the_rewind(listen: Listen) -> None:
    """The server ignores it if the request has a last event id."""
    with Server(stream(b"id: 2\ndata: a\n\n"), STOP) as server:
        listen(f"{server.url}?token=b%20c", rewind="30s")
    assert [request.path for request in server.requests] == ["/?token=b%20c&rewind=30s"] * 2
    with Server(STOP) as server:
        listen(server.url, rewind=10)
    assert server.requests[0].path == "/?rewind=10"


@pytest.mark.parametrize("event_id", ["7", "é✓", "a b"])
def test_a_reconnection_sends_the_last_event_id_unchanged(listen: Listen, event_id: str) -> None:
    """The id is encoded in UTF-8."""
    with Server(stream(f"id: {event_id}\ndata: a\n\n".encode()), STOP) as server:
        result = listen(server.url, last_event_id="before")
    assert server.requests[0].headers["last-event-id"] == b"before"
    assert server.requests[1].headers["last-event-id"] == event_id.encode()
    assert result.client.last_event_id == event_id


def test_an_id_without_an_event_sets_the_last_event_id(listen: Listen) -> None:
    """A complete block with an id only sets it; an incomplete block does not."""
    with Server(stream(b"id: 5\n\nid: 6\ndata: lost\n"), STOP) as server:
        result = listen(server.url)
    assert server.requests[1].headers["last-event-id"] == b"5"
    assert result.events == []


def test_an_incomplete_block_does_not_change_the_next_event(listen: Listen) -> None:
    """The first event of the next connection contains nothing of the incomplete block."""
    cut_off = stream(b"id: 1\nevent: x\ndata: lost\ndata: al")
    with Server(cut_off, stream(b"data: b\n\n"), STOP) as server:
        result = listen(server.url)
    assert result.events == [ServerSentEvent(event="message", data="b", id="")]


def test_spaces_around_an_id_are_not_sent(listen: Listen) -> None:
    """A header value has no spaces around it, as in a browser."""
    with Server(stream(b"id:  a b \ndata: a\n\n"), STOP) as server:
        assert listen(server.url).client.last_event_id == " a b "
    assert server.requests[1].headers["last-event-id"] == b"a b"


def test_an_id_that_a_header_cannot_contain_is_final(listen: Listen) -> None:
    """A reconnection without the id would lose events, so the client raises."""
    with (
        Server(stream(b"id: a\fb\ndata: x\n\n")) as server,
        pytest.raises(ClientError, match=r"'a\\x0cb' cannot be sent"),
    ):
        listen(server.url)


def test_user_and_password_are_sent_as_http_basic(listen: Listen) -> None:
    """The argument and the URL may contain them."""
    with Server(STOP, STOP) as server:
        listen(server.url, auth=("ü", "p:w"))
        listen(f"http://us%20er:secret@127.0.0.1:{server.port}/")
    assert server.requests[0].headers["authorization"] == basic_auth("ü", "p:w")
    assert server.requests[1].headers["authorization"] == basic_auth("us er", "secret")


def test_an_authorization_header_replaces_other_credentials(listen: Listen) -> None:
    """The header wins over ``auth`` and over the URL's user."""
    with Server(STOP) as server:
        listen(
            f"http://user:secret@127.0.0.1:{server.port}/",
            headers={"authorization": "Bearer x"},
            auth=("a", "b"),
        )
    assert server.requests[0].headers["authorization"] == b"Bearer x"


def test_secrets_of_the_url_are_not_logged(
    listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of httpx2 and httpcore2 has no password, grant or query, redirected or not."""
    caplog.set_level(logging.DEBUG)
    with Server(redirect("there"), redirect("/?key=other"), stream(b"data: a\n\n")) as server:
        result = listen(
            f"http://user:SECRET@127.0.0.1:{server.port}/p/here?grant=SECRET", reconnect=False
        )
    assert result.data == ["a"]
    assert [request.path for request in server.requests] == [
        "/p/here?grant=SECRET",
        "/p/there",
        "/?key=other",
    ]
    assert "SECRET" not in caplog.text
    assert f"GET http://127.0.0.1:{server.port}/p/here " in caplog.text
    assert f"GET http://127.0.0.1:{server.port}/ " in caplog.text


def test_requests_to_this_machine_use_no_proxy(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment may not reach 127.0.0.1 of this machine."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Server(stream(b"data: a\n\n"), STOP) as server:
        assert listen(server.url).data == ["a"]


def test_a_reconnection_opens_a_new_connection(listen: Listen) -> None:
    """The client closes a connection whose stream ended, because the server may be closing it."""

    def step(connection: Connection) -> None:
        stream(b"data: a\n\n")(connection)
        connection.wait_for_close()

    with Server(step, STOP) as server:
        assert listen(server.url).data == ["a"]


def test_only_connecting_has_a_timeout_by_default(listen: Listen) -> None:
    """It is 10 seconds; a read timeout is set only by ``read_timeout_seconds``."""
    timeouts: list[dict[str, float | None]] = []

    class Look(httpx2.Auth):
        def auth_flow(self, request: httpx2.Request) -> Any:
            timeouts.append(dict(request.extensions["timeout"]))
            yield request

    with Server(STOP, STOP) as server:
        listen(server.url, auth=Look())
        listen(server.url, auth=Look(), read_timeout_seconds=7)
    assert [(timeout["connect"], timeout["read"]) for timeout in timeouts] == [(10, None), (10, 7)]


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_with_the_same_headers(listen: Listen, status: int) -> None:
    with Server(redirect("/there", status), stream(b"id: 2\ndata: a\n\n"), STOP) as server:
        assert listen(server.url, headers={"X-Key": "k"}, last_event_id="1").data == ["a"]
    assert [request.path for request in server.requests] == ["/", "/there", "/"]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert server.requests[1].headers["x-key"] == b"k"


def test_headers_with_credentials_are_not_sent_to_another_origin(listen: Listen) -> None:
    """A redirect keeps only headers that contain no credentials."""
    with Server(STOP) as other, Server(redirect(other.url)) as server:
        listen(
            server.url,
            headers={"X-Api-Key": "secret", "Authorization": "secret", "User-Agent": "me"},
        )
    assert server.requests[0].headers["x-api-key"] == b"secret"
    seen = other.requests[0].headers
    assert b"secret" not in b" ".join(seen.values())
    assert seen["user-agent"] == b"me"
    assert seen["accept"] == b"text/event-stream"


def test_cookies_are_not_sent_to_another_origin(listen: Listen) -> None:
    """A cookie jar compares the hosts only, and each port of a host is another origin."""
    cookies = {"Set_Cookie": "sessionid=secret; Path=/"}
    with (
        Server(STOP) as other,
        Server(
            respond(302, Location="/there", **cookies), respond(302, Location=other.url)
        ) as server,
    ):
        listen(server.url)
    assert "cookie" not in server.requests[0].headers
    assert server.requests[1].headers["cookie"] == b"sessionid=secret"
    assert "cookie" not in other.requests[0].headers


def test_user_and_password_are_not_sent_to_another_origin(listen: Listen) -> None:
    with Server(STOP) as other, Server(redirect(other.url)) as server:
        listen(server.url, auth=("user", "secret"))
    assert "authorization" in server.requests[0].headers
    assert "authorization" not in other.requests[0].headers


def test_a_redirect_loop_raises(listen: Listen) -> None:
    with Server(*[redirect("/")] * 21) as server:
        error = failure(listen, server.url)
    assert "exceeded maximum allowed redirects" in str(error)


# Responses


def test_events_are_decoded_across_chunks(listen: Listen) -> None:
    """A chunk may end inside a line end or a character."""
    with Server(
        stream(b"\xef\xbb", b"\xbfdata: a\r", b"\ndata: \xc3", b"\xa9\n\n"), STOP
    ) as server:
        result = listen(server.url)
    assert result.events == [ServerSentEvent(event="message", data="a\né", id="")]


def test_a_stream_without_a_length_ends_with_its_connection(listen: Listen) -> None:
    """The end of the connection is not a failure."""

    def until_close(connection: Connection) -> None:
        connection.head(200, Content_Type="Text/Event-Stream; charset=utf-8")
        connection.send(b"data: a\n\n")

    with Server(until_close) as server:
        result = listen(server.url, reconnect=False)
    assert result.data == ["a"]
    assert result.waits == []


def test_204_ends_the_iteration(listen: Listen) -> None:
    """204 No Content is not an error."""
    said: list[str] = []
    with Server(STOP) as server:
        result = listen(server.url, on_diagnostic=said.append)
    assert result.events == []
    assert said[-1].startswith(f"{server.url} responded with 204 No Content")


def test_another_status_raises_with_the_first_line_of_its_text(listen: Listen) -> None:
    """The error has the status and the first line of a text body."""
    body = b"\nNo \x1b[1maccess:\tdo\xff log in.\nMore.\n"
    with Server(respond(403, body, Content_Type="text/plain; charset=utf-8")) as server:
        error = failure(listen, f"{server.url}p?grant=secret")
    assert error.status == 403
    assert str(error) == (
        f"{server.url}p responded with 403 Forbidden: No [1maccess:do\ufffd log in."
    )


@pytest.mark.parametrize(("status", "text"), [(500, "500 Internal Server Error."), (599, "599.")])
def test_the_error_of_a_status_contains_no_html(listen: Listen, status: int, text: str) -> None:
    """An unknown status has no reason phrase."""
    with Server(respond(status, b"<html>", Content_Type="text/html")) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} responded with {text}"
    assert error.status == status


def test_the_error_of_a_status_contains_its_location(listen: Listen) -> None:
    """A status that is not followed may have a Location."""
    with Server(respond(300, Location="/else")) as server:
        error = failure(listen, server.url)
    assert (
        str(error) == f"{server.url} responded with 300 Multiple Choices: the location is '/else'."
    )


def test_the_error_contains_the_beginning_of_a_long_body(listen: Listen) -> None:
    """The client reads 1,024 bytes of an endless body and quotes 200 characters."""

    def endless(connection: Connection) -> None:
        connection.head(400, Content_Type="text/plain", Transfer_Encoding="chunked")
        for _ in range(3):
            connection.chunk(b"x" * 500)
        connection.wait_for_close()

    with Server(endless) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} responded with 400 Bad Request: {'x' * 200}."


def test_an_error_body_that_stalls_is_abandoned(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read timeout of an error body is shorter than that of a stream."""
    monkeypatch.setattr(http.Target, "excerpt_seconds", 0.01)

    def stalling(connection: Connection) -> None:
        connection.head(400, Content_Type="text/plain", Content_Length="9")
        connection.send(b"no")
        connection.wait_for_close()

    with Server(stalling) as server:
        assert str(failure(listen, server.url)).endswith("400 Bad Request: no.")


@pytest.mark.parametrize(
    ("headers", "given"),
    [({"Content_Type": "text/html"}, "the content type 'text/html'"), ({}, "no content type")],
)
def test_another_content_type_raises(listen: Listen, headers: dict[str, str], given: str) -> None:
    """The error names the content type of the response."""
    with Server(respond(200, b"data: a\n\n", **headers)) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} responded with {given}, not text/event-stream."
    assert error.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP , gzip"])
def test_a_compressed_stream_raises(listen: Listen, encoding: str) -> None:
    """The client decompresses no byte, because a few bytes may become gigabytes."""
    body = gzip.compress(b"data: a\n\n")
    with Server(
        respond(200, body, Content_Type="text/event-stream", Content_Encoding=encoding)
    ) as server:
        error = failure(listen, server.url)
    assert str(error) == (
        f"{server.url} responded with Content-Encoding {encoding!r}, but the client accepts "
        "uncompressed responses only. Turn off compression for this URL."
    )
    assert error.status == 200


@pytest.mark.parametrize("encoding", ["identity", "", " Identity,"])
def test_the_content_encoding_identity_is_accepted(listen: Listen, encoding: str) -> None:

    def step(connection: Connection) -> None:
        connection.head(200, Content_Type="text/event-stream", Content_Encoding=encoding)
        connection.send(b"data: a\n\n")

    with Server(step, STOP) as server:
        assert listen(server.url).data == ["a"]


def test_the_error_contains_nothing_of_a_compressed_body(listen: Listen) -> None:
    body = gzip.compress(b"No access.")
    with Server(respond(403, body, Content_Type="text/plain", Content_Encoding="gzip")) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} responded with 403 Forbidden."


def endless(status: int, **headers: str) -> Callable[[Connection], None]:
    """A response whose body has no end."""

    def step(connection: Connection) -> None:
        connection.head(status, Transfer_Encoding="chunked", **headers)
        connection.chunk(gzip.compress(b"x" * 100_000))
        connection.wait_for_close()

    return step


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_the_body_of_a_redirect_is_not_read(listen: Listen, headers: dict[str, str]) -> None:
    """The client follows a redirect whose body is compressed or endless."""
    with Server(
        endless(302, Location="/there", **headers), stream(b"data: a\n\n"), STOP
    ) as server:
        assert listen(server.url).data == ["a"]


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_the_body_of_a_challenge_is_not_read(listen: Listen, headers: dict[str, str]) -> None:
    """An ``httpx2.Auth`` that repeats a request after 401 does not cause the body to be read."""

    class Again(httpx2.Auth):
        def auth_flow(self, request: httpx2.Request) -> Any:
            response = yield request
            if response.status_code == 401:
                request.headers["Authorization"] = "Again"
                yield request

    with Server(endless(401, **headers), STOP) as server:
        listen(server.url, auth=Again())
    assert server.requests[1].headers["authorization"] == b"Again"


def test_an_event_of_more_than_max_event_bytes_is_final(listen: Listen) -> None:
    """The events before it arrive. A reconnection would receive it again."""
    seen: list[Result] = []
    body = b"id: 1\ndata: a\n\nid: 2\ndata: " + b"x" * 100
    with Server(keep_open(body)) as server:
        error = final(listen, server.url, max_event_bytes=100, seen=seen)
    assert seen[0].data == ["a"]
    assert seen[0].client.last_event_id == "1"
    assert str(error) == (f"{server.url} sent an event of more than 100 bytes (max_event_bytes).")


def test_the_iteration_continues_after_an_event_that_is_too_large() -> None:
    """The next iteration reconnects."""
    too_large = b"id: 1\ndata: a\n\ndata: " + b"x" * 100
    with (
        Server(keep_open(too_large), stream(b"data: b\n\n")) as server,
        EventSourceClient(server.url, max_event_bytes=100) as client,
    ):
        assert next(client).data == "a"
        with pytest.raises(ClientError, match="more than 100 bytes"):
            next(client)
        assert next(client).data == "b"
    assert server.requests[1].headers["last-event-id"] == b"1"


# Ends and failures


def test_the_end_of_a_stream_reconnects_after_the_retry_time(listen: Listen) -> None:
    """The server sets the retry time."""
    bodies = [b"data: a\n\n", b"retry: 200\ndata: b\n\n", b"retry: x\ndata: c\n\n"]
    with Server(*map(stream, bodies), STOP) as server:
        result = listen(server.url, retry_ms=1500)
    assert result.data == ["a", "b", "c"]
    assert result.waits == [1.5, 0.2, 0.2]
    assert result.client.retry_ms == 200


def test_without_reconnect_the_iteration_ends_with_the_stream(listen: Listen) -> None:
    with Server(stream(b"data: a\n\n")) as server:
        result = listen(server.url, reconnect=False)
    assert result.data == ["a"]


def test_an_incomplete_chunked_stream_is_a_failure(listen: Listen) -> None:
    got: list[str] = []
    with Server(cut(b"id: 1\ndata: a\n\n")) as server:
        error = failure(listen, server.url, on_diagnostic=got.append)
    assert str(error) == (
        f"Lost the connection to {server.url}: the connection was closed before the response "
        "was complete."
    )
    assert error.status is None
    assert got == [f"Connecting to {server.url}", f"Connected to {server.url}"]


def test_a_reset_connection_is_a_failure(listen: Listen) -> None:

    def step(connection: Connection) -> None:
        connection.open_stream()
        connection.reset()

    with Server(step) as server:
        error = failure(listen, server.url)
    assert str(error) == f"Lost the connection to {server.url}: connection reset by peer."


def test_a_failure_reconnects_with_the_last_event_id(listen: Listen) -> None:
    """The client continues after the last event, and calls ``on_error``."""
    errors: list[ClientError] = []
    with Server(cut(b"id: 1\ndata: a\n\nid: 2\n"), stream(b"id: 2\ndata: b\n\n"), STOP) as server:
        result = listen(server.url, on_error=errors.append)
    assert result.data == ["a", "b"]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert [str(error)[:22] for error in errors] == ["Lost the connection to"]


@pytest.mark.parametrize(
    "refusal",
    [
        *[
            respond(status)
            for status in (202, 304, 400, 401, 403, 404, 410, 429, 500, 502, 503, 504)
        ],
        respond(200, b"data: a\n\n", Content_Type="text/html"),
        respond(200, b"data: a\n\n", Content_Type="text/event-stream", Content_Encoding="gzip"),
    ],
)
def test_another_status_or_content_type_is_final(listen: Listen, refusal: Step) -> None:
    """Only 200 and 204 are accepted, and only an uncompressed event stream."""
    with Server(stream(b"data: a\n\n"), refusal) as server:
        error = final(listen, server.url)
    assert error.status is not None


@pytest.mark.parametrize("status", sorted(TRANSIENT_STATUSES))
def test_a_retry_status_reconnects(listen: Listen, status: int) -> None:
    """The client calls ``on_error`` with the status."""
    errors: list[ClientError] = []
    with Server(respond(status), stream(b"data: a\n\n"), STOP) as server:
        result = listen(server.url, retry_statuses=[status], on_error=errors.append)
    assert result.data == ["a"]
    assert [error.status for error in errors] == [status]


def test_a_status_outside_retry_statuses_is_final(listen: Listen) -> None:
    with Server(respond(503), respond(404)) as server:
        assert final(listen, server.url, retry_statuses=[503]).status == 404


def test_without_reconnect_a_retry_status_raises(listen: Listen) -> None:
    with Server(respond(503)) as server:
        assert failure(listen, server.url, retry_statuses=[503]).status == 503


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("0", 3),
        ("2", 3),
        ("999999999999999999999999", MAX_WAIT_SECONDS),
        ("9" * 5000, MAX_WAIT_SECONDS),
        ("-7", 3),
        ("7.5", 3),
        ("\u0667", 3),
        ("soon", 3),
        ("", 3),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 3),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_WAIT_SECONDS),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 3),
    ],
)
def test_retry_after_sets_the_wait(listen: Listen, value: str, seconds: float) -> None:
    """The wait is that of Retry-After, at least the retry time and at most an hour."""
    with Server(respond(503, Retry_After=value), STOP) as server:
        assert listen(server.url, retry_statuses=[503]).waits == [seconds]


def test_retry_after_may_be_a_date(listen: Listen) -> None:
    value = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    with Server(respond(429, Retry_After=value), STOP) as server:
        (wait,) = listen(server.url, retry_statuses=[429]).waits
    assert 60 < wait <= 90


def test_the_error_has_the_seconds_of_retry_after(listen: Listen) -> None:
    with Server(respond(429, Retry_After="7"), respond(429)) as server:
        assert failure(listen, server.url).retry_after == 7
        assert failure(listen, server.url).retry_after is None


def test_the_wait_doubles_until_something_new_arrives(listen: Listen) -> None:
    """The jitter shortens each wait."""
    refused = [respond(503)] * 4
    with Server(*refused, stream(b"id: 1\n\n"), respond(503), STOP) as server:
        result = listen(server.url, retry_ms=1000, retry_statuses=[503], jitter=lambda: 0.5)
    assert result.waits == [1, 1.5, 3, 6, 1, 1.5]


@pytest.mark.parametrize(
    "body",
    [b"", b":\n", b"id: 1\n\n", b"retry: 1000\n\n", b"event: x\n\n", b"data: x\n"],
    ids=repr,
)
def test_streams_without_a_new_event_or_id_back_off(listen: Listen, body: bytes) -> None:
    """Successful connections without news do not become a hot loop."""
    with Server(*[stream(body)] * 4, STOP) as server:
        result = listen(server.url, retry_ms=1000, last_event_id="1", jitter=lambda: 1.0)
    assert result.waits == [1, 2, 4, 8]


@pytest.mark.parametrize("last", [b"data: x\n\n", b"id: 2\n\n"], ids=repr)
def test_a_new_event_or_id_ends_the_back_off(listen: Listen, last: bytes) -> None:
    """The next wait is the retry time."""
    with Server(stream(), stream(), stream(last), stream(), STOP) as server:
        result = listen(server.url, retry_ms=1000, last_event_id="1", jitter=lambda: 1.0)
    assert result.waits == [1, 2, 1, 2]


def test_a_stream_that_was_open_for_long_ends_the_back_off(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends a quiet stream at its maximum age, which is not a hot loop."""
    monkeypatch.setattr(client_module._BaseClient, "_stable_seconds", 0)
    quiet = stream(b"id: 1\n\n", b"retry: 1000\n\n")
    with Server(*[quiet] * 3, respond(503), respond(503), STOP) as server:
        result = listen(server.url, last_event_id="1", retry_statuses=[503], jitter=lambda: 1.0)
    # A failure does not count the time that the stream before it was open.
    assert result.waits == [1, 1, 1, 2, 4]


@pytest.mark.parametrize(
    ("retry_ms", "jitter", "longest"),
    [
        (3000, 1.0, MAX_BACKOFF_SECONDS),
        (3000, 0.0, MAX_BACKOFF_SECONDS / 2),
        (0, 1.0, MAX_BACKOFF_SECONDS),
        (3_600_001, 0.0, MAX_WAIT_SECONDS),
        (90_000, 0.0, 90),
        (10**15 - 1, 1.0, MAX_WAIT_SECONDS),
    ],
)
def test_the_back_off_is_bounded(
    listen: Listen, retry_ms: int, jitter: float, longest: float
) -> None:
    """It grows to a minute, is never less than the retry time, and never more than an hour."""
    result = listen(unused_url(), retry_ms=retry_ms, jitter=lambda: jitter, max_waits=12)
    assert result.waits[-1] == longest


def test_a_retry_time_of_zero_waits_a_tenth_of_a_second(listen: Listen) -> None:
    nothing, something = stream(b"retry: 0\n\n"), stream(b"data: x\n\n")
    with Server(*[nothing] * 4, *[something] * 3, STOP) as server:
        result = listen(server.url, jitter=lambda: 1.0)
    assert result.waits == [0.1, 0.2, 0.4, 0.8, 0.1, 0.1, 0.1]


def test_the_default_jitter_spreads_reconnections(listen: Listen) -> None:
    """Clients whose connections failed together reconnect at different times."""
    waits = [listen(unused_url(), max_waits=2).waits[1] for _ in range(10)]
    assert len(set(waits)) > 1
    assert all(3 <= wait <= 6 for wait in waits)


# Error messages

BROKEN = [
    httpx2.ConnectError("refused"),
    httpx2.ConnectError("unknown name"),
    httpx2.ConnectTimeout("no connection"),
    httpx2.ReadTimeout(
        "silence", request=httpx2.Request("GET", "/", extensions={"timeout": {"read": 1}})
    ),
    httpx2.ReadError("reset"),
    httpx2.RemoteProtocolError("server disconnected"),
    httpx2.ProxyError("503 Service Unavailable"),
]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: str(error))
def test_a_network_failure_reconnects(listen: Listen, error: Exception) -> None:
    errors: list[ClientError] = []

    class Broken(httpx2.Auth):
        def auth_flow(self, request: httpx2.Request) -> Any:
            if not errors:
                raise error
            yield request

    with Server(STOP) as server:
        listen(server.url, auth=Broken(), on_error=errors.append)
    assert [text.__cause__ for text in errors] == [error]


def test_a_bad_redirect_is_final(listen: Listen) -> None:
    """A redirect loop, another scheme or a damaged URL fails again at the next attempt."""
    with Server(*[redirect("/")] * 21, redirect("ftp://h/"), redirect("http://[::1")) as server:
        assert "maximum allowed redirects" in str(final(listen, server.url))
        assert "unsupported protocol" in str(final(listen, server.url))
        assert "invalid URL in location header" in str(final(listen, server.url))


def test_a_refused_connection_is_one_line(listen: Listen) -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    error = failure(listen, url)
    assert str(error) == f"Cannot connect to {url}: connection refused."
    assert error.__cause__ is not None


def test_a_refused_connection_to_several_addresses_is_one_line(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)
    assert str(failure(listen, f"http://two.test:{port}/")).endswith(": connection refused.")


def test_an_unknown_host_is_one_line(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line contains the text of the resolver."""

    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure(listen, "http://nowhere.test/")
    assert str(error) == "Cannot connect to http://nowhere.test/: name or service not known."


def test_a_host_name_that_is_too_long_is_one_line(listen: Listen) -> None:
    """The resolver raises a UnicodeError."""
    assert str(failure(listen, f"http://{'a' * 64}.test/")).startswith("Cannot connect to ")


def test_a_connection_without_a_response_is_one_line(listen: Listen) -> None:
    with Server(lambda connection: None) as server:
        error = failure(listen, server.url)
    assert str(error) == (
        f"Cannot connect to {server.url}: server disconnected without sending a response."
    )


def test_a_connect_timeout_is_one_line(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line contains the seconds."""
    monkeypatch.setattr(http.Target, "connect_seconds", 0.01)
    # With a full backlog further connections are not accepted.
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        port = listener.getsockname()[1]
        error = failure(listen, f"http://127.0.0.1:{port}/")
    assert str(error).endswith(": no connection within 0.01 s.")


def test_a_read_timeout_is_one_line(listen: Listen) -> None:
    """The line contains the seconds."""
    with Server(keep_open(b"data: a\n\n")) as server:
        error = failure(listen, server.url, read_timeout_seconds=1)
    assert str(error) == f"Lost the connection to {server.url}: no data was received for 1 s."


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that is not trusted by default."""
    return trustme.CA()


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    """A server's context with a certificate for 127.0.0.1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_an_untrusted_certificate_is_final(listen: Listen, server_context: ssl.SSLContext) -> None:
    """The error names the options for it."""
    with Server(STOP, context=server_context) as server:
        error = final(listen, server.url)
        listen(server.url, verify=False)
    assert server.failed_handshakes == 1
    assert "certificate is not trusted (unable to get local issuer certificate)" in str(error)
    assert "--cafile, or verify=" in str(error)


def test_a_certificate_of_a_trusted_authority_is_accepted(
    listen: Listen, server_context: ssl.SSLContext, authority: trustme.CA
) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with Server(stream(b"data: a\n\n"), STOP, context=server_context) as server:
        assert listen(server.url, verify=context).data == ["a"]


def test_a_server_without_tls_is_one_line(listen: Listen) -> None:

    def plain(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1000)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=plain, args=(listener,))
        thread.start()
        error = failure(listen, f"https://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()
    assert ": the TLS connection failed: " in str(error)


# Leaving and going on


def test_a_loop_that_was_left_continues_on_the_same_connection() -> None:
    """The next event is the one after the last that the loop received."""
    with Server(keep_open(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"data: c\n\n")) as server:
        with EventSourceClient(server.url) as client:
            for event in client:
                assert event.data == "a"
                break
            # The second event has arrived too, but the client has not returned it.
            assert client.last_event_id == "1"
            assert next(client).data == "b"
            assert next(client).data == "c"
        assert client.last_event_id == "2"
        assert list(client) == []
        client.close()


async def test_an_async_loop_that_was_left_continues_on_the_same_connection() -> None:
    with Server(keep_open(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"data: c\n\n")) as server:
        async with AsyncEventSourceClient(server.url) as client:
            async for event in client:
                assert event.data == "a"
                break
            assert client.last_event_id == "1"
            assert (await anext(client)).data == "b"
            assert (await anext(client)).data == "c"
        assert [event async for event in client] == []
        await client.aclose()


def test_close_keeps_the_id_of_the_last_returned_event() -> None:
    """An event that arrived but was not returned does not change it."""
    with Server(keep_open(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n")) as server:
        with EventSourceClient(server.url) as client:
            next(client)
        assert list(client) == []
    assert client.last_event_id == "1"


def test_the_iteration_after_an_error_reconnects_at_once() -> None:
    steps = [stream(b"data: a\n\n"), respond(503), stream(b"data: b\n\n")]
    with Server(*steps) as server, Client(server.url) as client:
        assert next(client).data == "a"
        with pytest.raises(ClientError):
            next(client)
        assert next(client).data == "b"
    assert client.waits == [3]


async def test_the_async_iteration_after_an_error_reconnects_at_once() -> None:
    steps = [stream(b"data: a\n\n"), respond(503), stream(b"data: b\n\n")]
    with Server(*steps) as server:
        async with AsyncClient(server.url) as client:
            assert (await anext(client)).data == "a"
            with pytest.raises(ClientError):
                await anext(client)
            assert (await anext(client)).data == "b"
    assert client.waits == [3]


def test_an_interrupted_wait_is_repeated() -> None:
    """Ctrl-C ends the wait. The next iteration waits again and loses no event."""
    waits = []

    class Interrupted(EventSourceClient):
        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 1:
                raise KeyboardInterrupt

    with (
        Server(stream(b"data: a\n\n"), stream(b"data: b\n\n")) as server,
        Interrupted(server.url) as client,
    ):
        assert next(client).data == "a"
        with pytest.raises(KeyboardInterrupt):
            next(client)
        assert next(client).data == "b"
    assert waits == [3, 3]


def test_a_callback_that_raises_closes_the_connection() -> None:
    """The exception reaches the caller."""

    def fail(text: str) -> None:
        if text.startswith("Connected"):
            raise RuntimeError(text)

    with Server(keep_open(b":\n")) as server, pytest.raises(RuntimeError, match="Connected"):
        next(EventSourceClient(server.url, on_diagnostic=fail))


async def test_a_cancelled_read_loses_no_event() -> None:
    """The connection is closed, and the next iteration reconnects at once."""
    with Server(keep_open(b"id: 1\ndata: a\n\n"), keep_open(b"id: 2\ndata: b\n\n")) as server:
        async with AsyncEventSourceClient(server.url, reconnect=False) as client:
            assert (await anext(client)).data == "a"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(client)
            assert (await anext(client)).data == "b"
    assert server.requests[1].headers["last-event-id"] == b"1"


async def test_a_wait_can_be_cancelled() -> None:
    waiting = asyncio.Event()

    def note(text: str) -> None:
        if text.startswith("Reconnecting"):
            waiting.set()

    with Server(stream(b"data: a\n\n")) as server:
        async with AsyncEventSourceClient(server.url, on_diagnostic=note) as client:
            assert (await anext(client)).data == "a"
            task = asyncio.ensure_future(anext(client))
            await waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_closing_from_another_task_ends_the_iteration() -> None:
    """The iteration ends without an error."""
    arrived = asyncio.Event()

    async def consume(client: AsyncEventSourceClient) -> list[str]:
        data = []
        async for event in client:
            data.append(event.data)
            arrived.set()
        return data

    with Server(keep_open(b"data: a\n\n")) as server:
        client = AsyncEventSourceClient(server.url, reconnect=False)
        task = asyncio.create_task(consume(client))
        await arrived.wait()
        await asyncio.sleep(0)
        await client.aclose()
        assert await task == ["a"]


def test_closing_during_a_wait_ends_the_iteration() -> None:
    """The client does not reconnect."""

    class Sync(Client):
        def wait(self, seconds: float) -> None:
            self.close()

    class Async(AsyncClient):
        async def wait(self, seconds: float) -> None:
            await self.aclose()

    with Server(stream(b"data: a\n\n")) as server:
        assert [event.data for event in Sync(server.url)] == ["a"]

    async def main() -> list[str]:
        return [event.data async for event in Async(server.url)]

    with Server(stream(b"data: a\n\n")) as server:
        assert asyncio.run(main()) == ["a"]


def test_the_clients_wait_without_an_override() -> None:
    with (
        Server(stream(b"data: a\n\n"), STOP) as server,
        EventSourceClient(server.url, retry_ms=1) as client,
    ):
        assert [event.data for event in client] == ["a"]

    async def main() -> list[str]:
        async with AsyncEventSourceClient(server.url, retry_ms=1) as client:
            return [event.data async for event in client]

    with Server(stream(b"data: a\n\n"), STOP) as server:
        assert asyncio.run(main()) == ["a"]
