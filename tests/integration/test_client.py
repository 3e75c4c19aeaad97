"""The listening clients, against a server that plays scripts on real sockets.

Each behaviour is tested with both clients: ``listen`` runs one of them to its end.
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

import httpx
import pytest
import trustme

from django_eventsource import client as client_module
from django_eventsource import connection as http
from django_eventsource.client import (
    MAX_BACKOFF_SECONDS,
    MAX_WAIT_SECONDS,
    TRANSIENT_STATUSES,
    AsyncEventSourceClient,
    EventSourceClient,
)
from django_eventsource.exceptions import ClientError
from django_eventsource.frames import ServerSentEvent
from tests.scripted import Connection, Server, Step, answer, cut, hold, redirect, stream

STOP = answer(204)

# Made once: loading the authorities takes longer than most tests.
VERIFIED = ssl.create_default_context()


class Client(EventSourceClient):
    """A client that notes how long it would have waited."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 100, "it reconnects for ever"


class AsyncClient(AsyncEventSourceClient):
    """The same, asynchronous."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.waits: list[float] = []

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 100, "it reconnects for ever"


class Result:
    """What a client did until its end."""

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
    """Give a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def failure(listen: Listen, url: str, **options: Any) -> ClientError:
    """Return the error of a client that does not reconnect."""
    return final(listen, url, reconnect=False, **options)


def final(listen: Listen, url: str, **options: Any) -> ClientError:
    """Return the error of a client, which it does not answer by reconnecting."""
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


# What is sent


def test_the_request_is_that_of_an_event_stream(listen: Listen) -> None:
    """Accept, Cache-Control, no compression, and no Last-Event-ID at first."""
    with Server(STOP) as server:
        listen(f"{server.url}poll/a%2Fb?x=1#fragment")
    request = server.requests[0]
    assert (request.method, request.path) == ("GET", "/poll/a%2Fb?x=1")
    assert request.headers["accept"] == b"text/event-stream"
    assert request.headers["cache-control"] == b"no-cache"
    assert request.headers["accept-encoding"] == b"identity"
    assert "last-event-id" not in request.headers


def test_the_callers_headers_are_sent_and_not_changed(listen: Listen) -> None:
    """Headers go with every request, as UTF-8, and the mapping stays as it was."""
    headers = {"X-Name": " é ", "Accept": "text/*"}
    before = dict(headers)
    with Server(stream(b"id: 1\ndata: a\n\n"), STOP) as server:
        listen(server.url, headers=headers)
    assert headers == before
    for request in server.requests:
        assert request.headers["x-name"] == "é".encode()
        assert request.headers["accept"] == b"text/*"


def test_headers_may_be_pairs(listen: Listen) -> None:
    """Pairs are taken too, as --header gives them."""
    with Server(STOP) as server:
        listen(server.url, headers=[("X-One", "1"), ("X-Two", "2")])
    assert server.requests[0].headers["x-one"] == b"1"
    assert server.requests[0].headers["x-two"] == b"2"


def test_the_last_event_id_of_the_headers_is_only_a_start(listen: Listen) -> None:
    """A Last-Event-ID among the headers is replaced by what the stream commits."""
    with Server(stream(b"id: 2\ndata: a\n\n"), stream(b"id:\n\n"), STOP) as server:
        listen(server.url, headers={"Last-Event-ID": "1"})
    assert [request.headers.get("last-event-id") for request in server.requests] == [
        b"1",
        b"2",
        None,
    ]


@pytest.mark.parametrize("event_id", ["7", "é✓", "a b"])
def test_the_last_event_id_goes_back_as_it_came(listen: Listen, event_id: str) -> None:
    """Reconnecting sends the last id, UTF-8 encoded."""
    with Server(stream(f"id: {event_id}\ndata: a\n\n".encode()), STOP) as server:
        result = listen(server.url, last_event_id="before")
    assert server.requests[0].headers["last-event-id"] == b"before"
    assert server.requests[1].headers["last-event-id"] == event_id.encode()
    assert result.client.last_event_id == event_id


def test_an_id_without_an_event_counts(listen: Listen) -> None:
    """A block that only commits an id moves the last event id; a cut-off one does not."""
    with Server(stream(b"id: 5\n\nid: 6\ndata: lost\n"), STOP) as server:
        result = listen(server.url)
    assert server.requests[1].headers["last-event-id"] == b"5"
    assert result.events == []


def test_a_block_that_was_cut_off_is_forgotten(listen: Listen) -> None:
    """Nothing of an unfinished block gets into the next connection's first event."""
    cut_off = stream(b"id: 1\nevent: x\ndata: lost\ndata: al")
    with Server(cut_off, stream(b"data: b\n\n"), STOP) as server:
        result = listen(server.url)
    assert result.events == [ServerSentEvent(event="message", data="b", id="")]


def test_blanks_around_an_id(listen: Listen) -> None:
    """A header has no blanks around its value, as in a browser."""
    with Server(stream(b"id:  a b \ndata: a\n\n"), STOP) as server:
        assert listen(server.url).client.last_event_id == " a b "
    assert server.requests[1].headers["last-event-id"] == b"a b"


def test_an_id_that_no_header_can_hold_is_an_error(listen: Listen) -> None:
    """Going on without the id would lose events, so even a stubborn client stops."""
    with (
        Server(stream(b"id: a\fb\ndata: x\n\n")) as server,
        pytest.raises(ClientError, match=r"'a\\x0cb' cannot be sent"),
    ):
        listen(server.url)


def test_user_and_password(listen: Listen) -> None:
    """A pair is HTTP Basic, and so are user and password in the URL."""
    with Server(STOP, STOP) as server:
        listen(server.url, auth=("ü", "p:w"))
        listen(f"http://us%20er:secret@127.0.0.1:{server.port}/")
    assert (
        server.requests[0].headers["authorization"]
        == httpx.BasicAuth("ü", "p:w")._auth_header.encode()
    )
    assert (
        server.requests[1].headers["authorization"]
        == httpx.BasicAuth("us er", "secret")._auth_header.encode()
    )


def test_an_authorization_header_wins(listen: Listen) -> None:
    """An explicit header is stronger than auth and than the URL's user."""
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
    """Neither httpx nor httpcore logs a password, a grant or another query, redirected or not."""
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


def test_a_proxy_is_not_asked_for_this_machine(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy in the environment cannot reach our 127.0.0.1 and is passed by."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Server(stream(b"data: a\n\n"), STOP) as server:
        assert listen(server.url).data == ["a"]


def test_each_connection_is_a_new_one(listen: Listen) -> None:
    """A connection whose stream ended is closed: the server may be closing it as well."""

    def step(connection: Connection) -> None:
        stream(b"data: a\n\n")(connection)
        connection.wait_for_close()

    with Server(step, STOP) as server:
        assert listen(server.url).data == ["a"]


def test_how_long_things_may_take(listen: Listen) -> None:
    """Ten seconds to connect; a stream may be silent for ever, unless told otherwise."""
    timeouts: list[dict[str, float | None]] = []

    class Look(httpx.Auth):
        def auth_flow(self, request: httpx.Request) -> Any:
            timeouts.append(dict(request.extensions["timeout"]))
            yield request

    with Server(STOP, STOP) as server:
        listen(server.url, auth=Look())
        listen(server.url, auth=Look(), read_timeout_seconds=7)
    assert [(timeout["connect"], timeout["read"]) for timeout in timeouts] == [(10, None), (10, 7)]


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(listen: Listen, status: int) -> None:
    """Each kind of redirect is followed, with the same headers."""
    with Server(redirect("/there", status), stream(b"id: 2\ndata: a\n\n"), STOP) as server:
        assert listen(server.url, headers={"X-Key": "k"}, last_event_id="1").data == ["a"]
    assert [request.path for request in server.requests] == ["/", "/there", "/"]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert server.requests[1].headers["x-key"] == b"k"


def test_credentials_do_not_leave_their_origin(listen: Listen) -> None:
    """Another origin gets no credentials, whatever header holds them."""
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


def test_basic_credentials_do_not_leave_their_origin(listen: Listen) -> None:
    """Another origin does not get user and password."""
    with Server(STOP) as other, Server(redirect(other.url)) as server:
        listen(server.url, auth=("user", "secret"))
    assert "authorization" in server.requests[0].headers
    assert "authorization" not in other.requests[0].headers


def test_redirects_without_end(listen: Listen) -> None:
    """A redirect loop is an error."""
    with Server(*[redirect("/")] * 21) as server:
        error = failure(listen, server.url)
    assert "exceeded maximum allowed redirects" in str(error)


# What is answered


def test_events_of_a_stream(listen: Listen) -> None:
    """Events come as decoded, whatever the chunks."""
    with Server(
        stream(b"\xef\xbb", b"\xbfdata: a\r", b"\ndata: \xc3", b"\xa9\n\n"), STOP
    ) as server:
        result = listen(server.url)
    assert result.events == [ServerSentEvent(event="message", data="a\né", id="")]


def test_a_stream_closed_without_length_ends_properly(listen: Listen) -> None:
    """Where the body ends with the connection, the end is a proper one."""

    def until_close(connection: Connection) -> None:
        connection.head(200, Content_Type="Text/Event-Stream; charset=utf-8")
        connection.send(b"data: a\n\n")

    with Server(until_close) as server:
        result = listen(server.url, reconnect=False)
    assert result.data == ["a"]
    assert result.waits == []


def test_204_ends_the_iteration(listen: Listen) -> None:
    """204 No Content is no error and the end of everything."""
    said: list[str] = []
    with Server(STOP) as server:
        result = listen(server.url, on_diagnostic=said.append)
    assert result.events == []
    assert said[-1].startswith(f"{server.url} answered 204 No Content")


def test_another_status_is_an_error(listen: Listen) -> None:
    """The error has the status and the first line of a text body."""
    body = b"\nNo \x1b[1maccess:\tdo\xff log in.\nMore.\n"
    with Server(answer(403, body, Content_Type="text/plain; charset=utf-8")) as server:
        error = failure(listen, f"{server.url}p?grant=secret")
    assert error.status == 403
    assert str(error) == (f"{server.url}p answered 403 Forbidden: No [1maccess:do\ufffd log in.")


@pytest.mark.parametrize(("status", "text"), [(500, "500 Internal Server Error."), (599, "599.")])
def test_another_status_with_html(listen: Listen, status: int, text: str) -> None:
    """A body that is no text is left out, and so is a phrase that nobody knows."""
    with Server(answer(status, b"<html>", Content_Type="text/html")) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} answered {text}"
    assert error.status == status


def test_a_redirect_that_is_none(listen: Listen) -> None:
    """A status that is not to be followed says where it points."""
    with Server(answer(300, Location="/else")) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} answered 300 Multiple Choices: it is at '/else'."


def test_a_long_error_body_is_not_read_whole(listen: Listen) -> None:
    """An endless body is read to 1,024 bytes and quoted to 200 characters."""

    def endless(connection: Connection) -> None:
        connection.head(400, Content_Type="text/plain", Transfer_Encoding="chunked")
        for _ in range(3):
            connection.chunk(b"x" * 500)
        connection.wait_for_close()

    with Server(endless) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} answered 400 Bad Request: {'x' * 200}."


def test_an_error_body_that_stalls(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not come is not waited for, though a stream would be."""
    monkeypatch.setattr(http, "EXCERPT_TIMEOUT_SECONDS", 0.01)

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
def test_another_content_type_is_an_error(
    listen: Listen, headers: dict[str, str], given: str
) -> None:
    """A page is no stream: the error names what came."""
    with Server(answer(200, b"data: a\n\n", **headers)) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} answered with {given}, not text/event-stream."
    assert error.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP , gzip"])
def test_a_compressed_stream_is_refused(listen: Listen, encoding: str) -> None:
    """No byte is decompressed: a few bytes could become gigabytes."""
    body = gzip.compress(b"data: a\n\n")
    with Server(
        answer(200, body, Content_Type="text/event-stream", Content_Encoding=encoding)
    ) as server:
        error = failure(listen, server.url)
    assert str(error) == (
        f"{server.url} answered with Content-Encoding {encoding!r}, though the client accepts "
        "identity only. Turn off compression for this URL."
    )
    assert error.status == 200


@pytest.mark.parametrize("encoding", ["identity", "", " Identity,"])
def test_the_content_encoding_identity_is_read(listen: Listen, encoding: str) -> None:
    """A header that names no compression is no error."""

    def step(connection: Connection) -> None:
        connection.head(200, Content_Type="text/event-stream", Content_Encoding=encoding)
        connection.send(b"data: a\n\n")

    with Server(step, STOP) as server:
        assert listen(server.url).data == ["a"]


def test_a_compressed_error_body_is_not_read(listen: Listen) -> None:
    """The excerpt of an error is what was sent as text; compressed bytes are left out."""
    body = gzip.compress(b"No access.")
    with Server(answer(403, body, Content_Type="text/plain", Content_Encoding="gzip")) as server:
        error = failure(listen, server.url)
    assert str(error) == f"{server.url} answered 403 Forbidden."


def endless(status: int, **headers: str) -> Callable[[Connection], None]:
    """A response whose body has no end."""

    def step(connection: Connection) -> None:
        connection.head(status, Transfer_Encoding="chunked", **headers)
        connection.chunk(gzip.compress(b"x" * 100_000))
        connection.wait_for_close()

    return step


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_the_body_of_a_redirect_is_not_read(listen: Listen, headers: dict[str, str]) -> None:
    """A redirect is followed by its Location, whatever its body is, or how long."""
    with Server(
        endless(302, Location="/there", **headers), stream(b"data: a\n\n"), STOP
    ) as server:
        assert listen(server.url).data == ["a"]


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_the_body_of_a_challenge_is_not_read(listen: Listen, headers: dict[str, str]) -> None:
    """An httpx.Auth that answers a 401 does not make the client read its body."""

    class Again(httpx.Auth):
        def auth_flow(self, request: httpx.Request) -> Any:
            response = yield request
            if response.status_code == 401:
                request.headers["Authorization"] = "Again"
                yield request

    with Server(endless(401, **headers), STOP) as server:
        listen(server.url, auth=Again())
    assert server.requests[1].headers["authorization"] == b"Again"


def test_an_event_of_more_than_max_event_bytes_is_final(listen: Listen) -> None:
    """The events before it arrive; then the client fails, since it would receive it again."""
    seen: list[Result] = []
    body = b"id: 1\ndata: a\n\nid: 2\ndata: " + b"x" * 100
    with Server(hold(body)) as server:
        error = final(listen, server.url, max_event_bytes=100, seen=seen)
    assert seen[0].data == ["a"]
    assert seen[0].client.last_event_id == "1"
    assert str(error) == (f"{server.url} sent an event of more than 100 bytes (max_event_bytes).")


def test_max_event_bytes_is_checked_at_once() -> None:
    """A bound that no event can keep is refused before anything is requested."""
    with pytest.raises(ValueError, match="max_event_bytes must be 1 or more, not 0"):
        EventSourceClient("http://h/", max_event_bytes=0)


def test_going_on_after_an_event_that_is_too_large() -> None:
    """The error ends the connection; the next iteration makes a new one."""
    too_large = b"id: 1\ndata: a\n\ndata: " + b"x" * 100
    with (
        Server(hold(too_large), stream(b"data: b\n\n")) as server,
        EventSourceClient(server.url, max_event_bytes=100) as client,
    ):
        assert next(client).data == "a"
        with pytest.raises(ClientError, match="more than 100 bytes"):
            next(client)
        assert next(client).data == "b"
    assert server.requests[1].headers["last-event-id"] == b"1"


# Ends and failures


def test_a_proper_end_reconnects_after_the_retry_time(listen: Listen) -> None:
    """The end of a stream is followed by a wait of the retry time, which the server sets."""
    bodies = [b"data: a\n\n", b"retry: 200\ndata: b\n\n", b"retry: x\ndata: c\n\n"]
    with Server(*map(stream, bodies), STOP) as server:
        result = listen(server.url, retry_ms=1500)
    assert result.data == ["a", "b", "c"]
    assert result.waits == [1.5, 0.2, 0.2]
    assert result.client.retry_ms == 200


def test_the_first_end_may_be_the_end(listen: Listen) -> None:
    """Without reconnect the iteration ends with the stream."""
    with Server(stream(b"data: a\n\n")) as server:
        result = listen(server.url, reconnect=False)
    assert result.data == ["a"]


def test_a_cut_stream_is_a_failure(listen: Listen) -> None:
    """A chunked body without its end is no proper end, and what came before counts."""
    got: list[str] = []
    with Server(cut(b"id: 1\ndata: a\n\n")) as server:
        error = failure(listen, server.url, on_diagnostic=got.append)
    assert str(error) == (
        f"Lost the stream of {server.url}: the connection was closed in the middle of it."
    )
    assert error.status is None
    assert got == [f"Connecting to {server.url}", f"Connected to {server.url}"]


def test_a_reset_is_a_failure(listen: Listen) -> None:
    """A connection that is reset in mid-stream is told as that."""

    def step(connection: Connection) -> None:
        connection.open_stream()
        connection.reset()

    with Server(step) as server:
        error = failure(listen, server.url)
    assert str(error) == f"Lost the stream of {server.url}: connection reset by peer."


def test_a_failure_reconnects_with_the_last_event_id(listen: Listen) -> None:
    """After a cut the client goes on from the last event it saw, and reports the failure."""
    errors: list[ClientError] = []
    with Server(cut(b"id: 1\ndata: a\n\nid: 2\n"), stream(b"id: 2\ndata: b\n\n"), STOP) as server:
        result = listen(server.url, on_error=errors.append)
    assert result.data == ["a", "b"]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert [str(error)[:18] for error in errors] == ["Lost the stream of"]


@pytest.mark.parametrize(
    "refusal",
    [
        *[
            answer(status)
            for status in (202, 304, 400, 401, 403, 404, 410, 429, 500, 502, 503, 504)
        ],
        answer(200, b"data: a\n\n", Content_Type="text/html"),
        answer(200, b"data: a\n\n", Content_Type="text/event-stream", Content_Encoding="gzip"),
    ],
)
def test_a_refusal_is_final(listen: Listen, refusal: Step) -> None:
    """A status other than 200 and 204, or another content type, is not requested again."""
    with Server(stream(b"data: a\n\n"), refusal) as server:
        error = final(listen, server.url)
    assert error.status is not None


@pytest.mark.parametrize("status", sorted(TRANSIENT_STATUSES))
def test_a_retry_status_is_requested_again(listen: Listen, status: int) -> None:
    """A status of retry_statuses is reported and answered by reconnecting."""
    errors: list[ClientError] = []
    with Server(answer(status), stream(b"data: a\n\n"), STOP) as server:
        result = listen(server.url, retry_statuses=[status], on_error=errors.append)
    assert result.data == ["a"]
    assert [error.status for error in errors] == [status]


def test_other_statuses_are_final_with_retry_statuses_too(listen: Listen) -> None:
    """Only the statuses that are named may pass."""
    with Server(answer(503), answer(404)) as server:
        assert final(listen, server.url, retry_statuses=[503]).status == 404


def test_no_status_is_requested_again_without_reconnect(listen: Listen) -> None:
    """Without reconnect every failure is raised."""
    with Server(answer(503)) as server:
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
def test_retry_after(listen: Listen, value: str, seconds: float) -> None:
    """The client waits as long as Retry-After says, at least the retry time, at most an hour."""
    with Server(answer(503, Retry_After=value), STOP) as server:
        assert listen(server.url, retry_statuses=[503]).waits == [seconds]


def test_retry_after_as_a_date(listen: Listen) -> None:
    """An HTTP date counts from now."""
    value = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    with Server(answer(429, Retry_After=value), STOP) as server:
        (wait,) = listen(server.url, retry_statuses=[429]).waits
    assert 60 < wait <= 90


def test_retry_after_of_a_refusal_is_in_the_error(listen: Listen) -> None:
    """The error of a refusal says how many seconds the server asked to wait."""
    with Server(answer(429, Retry_After="7"), answer(429)) as server:
        assert failure(listen, server.url).retry_after == 7
        assert failure(listen, server.url).retry_after is None


def test_back_off(listen: Listen) -> None:
    """Repeated failures wait twice as long each time, with jitter, until something new arrives."""
    refused = [answer(503)] * 4
    with Server(*refused, stream(b"id: 1\n\n"), answer(503), STOP) as server:
        result = listen(server.url, retry_ms=1000, retry_statuses=[503], jitter=lambda: 0.5)
    assert result.waits == [1, 1.5, 3, 6, 1, 1.5]


@pytest.mark.parametrize(
    "body",
    [b"", b":\n", b"id: 1\n\n", b"retry: 1000\n\n", b"event: x\n\n", b"data: x\n"],
    ids=repr,
)
def test_streams_that_bring_nothing_new_back_off(listen: Listen, body: bytes) -> None:
    """Successful connections without an event and a new id are no hot loop."""
    with Server(*[stream(body)] * 4, STOP) as server:
        result = listen(server.url, retry_ms=1000, last_event_id="1", jitter=lambda: 1.0)
    assert result.waits == [1, 2, 4, 8]


@pytest.mark.parametrize("last", [b"data: x\n\n", b"id: 2\n\n"], ids=repr)
def test_something_new_ends_the_back_off(listen: Listen, last: bytes) -> None:
    """After an event, or a new last event id, the wait is the retry time again."""
    with Server(stream(), stream(), stream(last), stream(), STOP) as server:
        result = listen(server.url, retry_ms=1000, last_event_id="1", jitter=lambda: 1.0)
    assert result.waits == [1, 2, 1, 2]


def test_a_stream_that_was_open_for_long_ends_the_back_off(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quiet stream that the server ends after its maximum age is not a hot loop."""
    monkeypatch.setattr(client_module, "STEADY_SECONDS", 0)
    quiet = stream(b"id: 1\n\n", b"retry: 1000\n\n")
    with Server(*[quiet] * 3, answer(503), answer(503), STOP) as server:
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
def test_back_off_is_bounded(retry_ms: int, jitter: float, longest: float) -> None:
    """It grows to a minute, never below the retry time, and never beyond an hour."""
    client = Client("http://127.0.0.1:1/", retry_ms=retry_ms, jitter=lambda: jitter)
    for _ in range(100):
        client._schedule()
    assert client._wait_seconds == longest


def test_a_retry_time_of_zero_is_no_hot_loop(listen: Listen) -> None:
    """A server that asks for no wait is connected to ten times a second at most."""
    nothing, something = stream(b"retry: 0\n\n"), stream(b"data: x\n\n")
    with Server(*[nothing] * 4, *[something] * 3, STOP) as server:
        result = listen(server.url, jitter=lambda: 1.0)
    assert result.waits == [0.1, 0.2, 0.4, 0.8, 0.1, 0.1, 0.1]


def test_the_default_jitter_spreads() -> None:
    """Clients that failed together do not come back together."""
    waits = set()
    for _ in range(10):
        client = Client("http://127.0.0.1:1/")
        client._schedule()
        client._schedule()
        waits.add(client._wait_seconds)
    assert len(waits) > 1
    assert all(3 <= wait <= 6 for wait in waits)


# Failures in words

BROKEN = [
    httpx.ConnectError("refused"),
    httpx.ConnectError("unknown name"),
    httpx.ConnectTimeout("no answer"),
    httpx.ReadTimeout(
        "silence", request=httpx.Request("GET", "/", extensions={"timeout": {"read": 1}})
    ),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("server disconnected"),
    httpx.ProxyError("503 Service Unavailable"),
]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: str(error))
def test_a_network_failure_is_answered_by_reconnecting(listen: Listen, error: Exception) -> None:
    """Whatever broke between client and server may be whole again."""
    errors: list[ClientError] = []

    class Broken(httpx.Auth):
        def auth_flow(self, request: httpx.Request) -> Any:
            if not errors:
                raise error
            yield request

    with Server(STOP) as server:
        listen(server.url, auth=Broken(), on_error=errors.append)
    assert [text.__cause__ for text in errors] == [error]


def test_a_failure_that_cannot_pass_is_final(listen: Listen) -> None:
    """Redirects without end and to another scheme are not tried again."""
    with Server(*[redirect("/")] * 21, redirect("ftp://h/")) as server:
        assert "maximum allowed redirects" in str(final(listen, server.url))
        assert "unsupported protocol" in str(final(listen, server.url))


def test_refused(listen: Listen) -> None:
    """Nobody there: one clear line."""
    url = f"http://127.0.0.1:{free_port()}/"
    error = failure(listen, url)
    assert str(error) == f"Cannot connect to {url}: connection refused."
    assert error.__cause__ is not None


def test_refused_on_several_addresses(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with several addresses says no more than one with one."""
    port = free_port()
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)
    assert str(failure(listen, f"http://two.test:{port}/")).endswith(": connection refused.")


def test_unknown_host(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not exist is told in the resolver's words."""

    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure(listen, "http://nowhere.test/")
    assert str(error) == "Cannot connect to http://nowhere.test/: name or service not known."


def test_a_host_name_that_is_too_long(listen: Listen) -> None:
    """What the resolver cannot even encode is one line, too."""
    assert str(failure(listen, f"http://{'a' * 64}.test/")).startswith("Cannot connect to ")


def test_a_server_that_says_nothing(listen: Listen) -> None:
    """A connection that is closed before any answer."""
    with Server(lambda connection: None) as server:
        error = failure(listen, server.url)
    assert str(error) == (
        f"Cannot connect to {server.url}: server disconnected without sending a response."
    )


def test_connect_timeout(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is not answered is given up after ten seconds, and says so."""
    monkeypatch.setattr(http, "CONNECT_TIMEOUT_SECONDS", 0.01)
    # A full backlog leaves further connections unanswered.
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        port = listener.getsockname()[1]
        error = failure(listen, f"http://127.0.0.1:{port}/")
    assert str(error).endswith(": no connection within 0.01 s.")


def test_read_timeout(listen: Listen) -> None:
    """A silence longer than the read timeout is a failure that says how long it was."""
    with Server(hold(b"data: a\n\n")) as server:
        error = failure(listen, server.url, read_timeout_seconds=1)
    assert str(error) == f"Lost the stream of {server.url}: nothing was received for 1 s."


def test_bad_arguments() -> None:
    """A negative time and an id with a line end are refused at once."""
    with pytest.raises(ValueError, match="not -1"):
        EventSourceClient("http://h/", retry_ms=-1)
    with pytest.raises(ValueError, match="cannot be sent"):
        EventSourceClient("http://h/", last_event_id="a\nb")


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that nobody trusts by default."""
    return trustme.CA()


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    """A server's context with a certificate for 127.0.0.1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_an_untrusted_certificate(listen: Listen, server_context: ssl.SSLContext) -> None:
    """A certificate of an unknown authority is a final failure, with the way out."""
    with Server(STOP, context=server_context) as server:
        error = final(listen, server.url)
        listen(server.url, verify=False)
    assert server.failed_handshakes == 1
    assert "certificate is not trusted (unable to get local issuer certificate)" in str(error)
    assert "--cafile, or verify=" in str(error)


def test_a_trusted_certificate(
    listen: Listen, server_context: ssl.SSLContext, authority: trustme.CA
) -> None:
    """A context that knows the authority verifies the certificate."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with Server(stream(b"data: a\n\n"), STOP, context=server_context) as server:
        assert listen(server.url, verify=context).data == ["a"]


def test_a_server_without_tls(listen: Listen) -> None:
    """https to a port that speaks http is told as that."""

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
    assert ": no TLS connection: " in str(error)


# Leaving and going on


def test_leaving_the_loop_and_going_on() -> None:
    """A loop that was left goes on with the next event, on the same connection."""
    with Server(hold(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"data: c\n\n")) as server:
        with EventSourceClient(server.url) as client:
            for event in client:
                assert event.data == "a"
                break
            # The second one arrived as well, but was not given out.
            assert client.last_event_id == "1"
            assert next(client).data == "b"
            assert next(client).data == "c"
        assert client.last_event_id == "2"
        assert list(client) == []
        client.close()


async def test_leaving_the_loop_and_going_on_async() -> None:
    """The asynchronous client does the same."""
    with Server(hold(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"data: c\n\n")) as server:
        async with AsyncEventSourceClient(server.url) as client:
            async for event in client:
                assert event.data == "a"
                break
            assert client.last_event_id == "1"
            assert (await anext(client)).data == "b"
            assert (await anext(client)).data == "c"
        assert [event async for event in client] == []
        await client.aclose()


def test_close_keeps_the_last_event_id() -> None:
    """What arrived but was not taken does not count as seen."""
    with Server(hold(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n")) as server:
        with EventSourceClient(server.url) as client:
            next(client)
        assert list(client) == []
    assert client.last_event_id == "1"


def test_a_client_that_was_never_used_closes() -> None:
    """Closing needs no connection, and ends an iteration before it began."""
    client = EventSourceClient("http://127.0.0.1:1/")
    client.close()
    assert list(client) == []


async def test_an_async_client_that_was_never_used_closes() -> None:
    """The asynchronous client does the same."""
    client = AsyncEventSourceClient("http://127.0.0.1:1/")
    await client.aclose()
    assert [event async for event in client] == []


def test_an_error_may_be_followed_by_another_try() -> None:
    """After an error the iteration goes on with a new connection, without another wait."""
    steps = [stream(b"data: a\n\n"), answer(503), stream(b"data: b\n\n")]
    with Server(*steps) as server, Client(server.url) as client:
        assert next(client).data == "a"
        with pytest.raises(ClientError):
            next(client)
        assert next(client).data == "b"
    assert client.waits == [3]


async def test_an_error_may_be_followed_by_another_try_async() -> None:
    """The asynchronous client does the same."""
    steps = [stream(b"data: a\n\n"), answer(503), stream(b"data: b\n\n")]
    with Server(*steps) as server:
        async with AsyncClient(server.url) as client:
            assert (await anext(client)).data == "a"
            with pytest.raises(ClientError):
                await anext(client)
            assert (await anext(client)).data == "b"
    assert client.waits == [3]


def test_an_interrupted_wait_is_waited_for_again() -> None:
    """Ctrl-C gets through the wait; going on waits anew and loses nothing."""
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


def test_a_failing_callback_closes_the_connection() -> None:
    """An exception of the caller's own comes out, and the connection does not leak."""

    def fail(text: str) -> None:
        if text.startswith("Connected"):
            raise RuntimeError(text)

    with Server(hold(b":\n")) as server, pytest.raises(RuntimeError, match="Connected"):
        next(EventSourceClient(server.url, on_diagnostic=fail))


async def test_a_cancelled_read_closes_the_connection_and_goes_on() -> None:
    """A timeout around the iteration loses nothing: the next try reconnects at once."""
    with Server(hold(b"id: 1\ndata: a\n\n"), hold(b"id: 2\ndata: b\n\n")) as server:
        async with AsyncEventSourceClient(server.url, reconnect=False) as client:
            assert (await anext(client)).data == "a"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(client)
            assert (await anext(client)).data == "b"
    assert server.requests[1].headers["last-event-id"] == b"1"


async def test_a_cancelled_wait() -> None:
    """Cancelling gets through the wait before a reconnection."""
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
    """A client that is closed while it is read from ends its iteration, without an error."""
    arrived = asyncio.Event()

    async def consume(client: AsyncEventSourceClient) -> list[str]:
        data = []
        async for event in client:
            data.append(event.data)
            arrived.set()
        return data

    with Server(hold(b"data: a\n\n")) as server:
        client = AsyncEventSourceClient(server.url, reconnect=False)
        task = asyncio.create_task(consume(client))
        await arrived.wait()
        await asyncio.sleep(0)
        await client.aclose()
        assert await task == ["a"]


def test_closing_during_a_wait_ends_the_iteration() -> None:
    """A client that is closed while it waits connects no more."""

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


def test_real_waits() -> None:
    """Without an override the clients wait by themselves."""
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
