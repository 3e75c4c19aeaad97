"""Attacks by the server that a client listens or sends to."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from itertools import count

import pytest

from django_eventsource.client import EventSender, EventSourceClient
from django_eventsource.client._http import _MAX_COOKIES
from django_eventsource.client.client import MAX_WAIT_SECONDS
from django_eventsource.exceptions import ClientError
from tests.support.scripted import Connection, Server, Step, redirect, respond

# Made once, because loading the authorities takes longer than a test.
VERIFIED = ssl.create_default_context()


class Client(EventSourceClient):
    """A client that records its waits and does not wait. It closes itself at the tenth one."""

    waits: tuple[float, ...] = ()

    def wait(self, seconds: float) -> None:
        self.waits += (seconds,)
        if len(self.waits) == 10:
            self.close()


def cookies_of(numbers: Iterator[int], how_many: int, status: int, body: bytes) -> Step:
    """Return a step that sets new cookies, sends a body and closes the connection."""

    def step(connection: Connection) -> None:
        lines = [f"Set-Cookie: n{next(numbers)}={'x' * 100}" for _ in range(how_many)]
        head = [f"HTTP/1.1 {status} Whatever", "Content-Type: text/event-stream", *lines]
        connection.send("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)

    return step


def test_a_server_that_sets_new_cookies_for_ever_fills_no_memory() -> None:
    """A few are sent back, as load balancers need. All are dropped if there are too many."""
    numbers = count()
    steps = [cookies_of(numbers, how_many, 200, b"data: x\n\n") for how_many in (2, *[40] * 5)]
    with Server(*steps, respond(204)) as server, Client(server.url, verify=VERIFIED) as client:
        assert len([*client]) == 6
        sent = [request.headers.get("cookie", b"").count(b"=") for request in server.requests]
    assert sent[:3] == [0, 2, 42]
    assert max(sent) <= _MAX_COOKIES
    steps = [cookies_of(numbers, 40, 200, b'{"id": "1"}') for _ in range(5)]
    with Server(*steps) as server, EventSender(server.url, verify=VERIFIED) as sender:
        for _ in range(5):
            assert sender.send("x") == "1"
        sent = [request.headers.get("cookie", b"").count(b"=") for request in server.requests]
    assert sent[1] == 40
    assert max(sent) <= _MAX_COOKIES


LOCATIONS = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "data:text/event-stream,data:x",
    "javascript:1",
    "http://[::1",
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirect_to_anything_but_http_is_an_error_of_one_line(location: str) -> None:
    """The sender follows no redirect at all."""
    with Server(redirect(location)) as server, Client(server.url, verify=VERIFIED) as client:
        with pytest.raises(ClientError) as caught:
            next(client)
        assert str(caught.value).isprintable()
    with Server(redirect(location)) as server, EventSender(server.url, verify=VERIFIED) as sender:
        with pytest.raises(ClientError, match="responded with 302") as caught:
            sender.send("x")
        assert str(caught.value).isprintable()


def endless(start: bytes, repeated: bytes, sent: list[int]) -> Step:
    """Return a step that sends bytes until the client closes the connection."""

    def step(connection: Connection) -> None:
        with contextlib.suppress(OSError):
            connection.send(start)
            while True:
                connection.send(repeated)
                sent[0] += len(repeated)

    return step


ENDLESS = {
    "status": (b"HTTP/1.1 200 ", b"x" * 4096),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 93 + b"\r\n"),
    "size of a chunk": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"0" * 4096,
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
        b"X: " + b"x" * 93 + b"\r\n",
    ),
    "body of an error": (
        b"HTTP/1.1 500 No\r\nContent-Type: text/plain\r\n\r\n",
        b"\n" * 4096,
    ),
    "comment": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n:",
        b"x" * 4096,
    ),
    "id": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nid:",
        b"x" * 4096,
    ),
    "data": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
        b"data: x\n" * 512,
    ),
}


@pytest.mark.parametrize("part", ENDLESS)
def test_a_part_of_a_response_without_an_end_is_an_error(part: str) -> None:
    """The client closes the connection after a bounded number of bytes."""
    sent = [0]
    start, repeated = ENDLESS[part]
    with (
        Server(endless(start, repeated, sent)) as server,
        Client(server.url, verify=VERIFIED, reconnect=False, max_event_bytes=100_000) as client,
        pytest.raises(ClientError) as caught,
    ):
        next(client)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    # What the client has not read is in the buffers of the sockets.
    assert sent[0] < 32 * 1024 * 1024


@pytest.mark.parametrize("seconds", ["9" * 5000, "1" + "0" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_cannot_make_a_client_wait_for_longer_than_an_hour(seconds: str) -> None:
    """It may send a reconnection time or Retry-After of any length."""
    long = b"retry: " + b"9" * 5000 + b"\ndata: x\n\n"
    steps = [
        cookies_of(count(), 0, 200, long),
        respond(503, Retry_After=seconds),
        respond(204),
    ]
    with (
        Server(*steps) as server,
        Client(server.url, verify=VERIFIED, retry_statuses={503}) as client,
    ):
        assert [event.data for event in client] == ["x"]
        assert client.waits == (MAX_WAIT_SECONDS, MAX_WAIT_SECONDS)
