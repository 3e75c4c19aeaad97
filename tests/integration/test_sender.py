"""Sending events by HTTP POST, to a server that runs scripts."""

from __future__ import annotations

import gzip
import logging
import socket
from typing import Any

import httpx2
import pytest

from django_eventsource.client.sender import EventSender, send
from django_eventsource.exceptions import ClientError
from tests.support.scripted import Connection, Server, basic_auth, redirect, respond


def published(event_id: str = '"7"') -> Any:
    """Return a step that responds with the id of a published event."""
    return respond(200, b'{"id": %s}' % event_id.encode(), Content_Type="application/json")


def failure(url: str, **options: Any) -> ClientError:
    """Return the error of send()."""
    with pytest.raises(ClientError) as caught:
        send(url, "x", **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("value", ["é\n✓", "é\n✓".encode()])
def test_a_value_is_posted_as_utf8(value: str | bytes) -> None:
    """The body is the value, and send() returns the id of the response."""
    headers = {"X-A": "1", "Content-Type": "text/x"}
    with Server(published()) as server:
        assert send(f"{server.url}ping/42", value, headers=headers, auth=("u", "p")) == "7"
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/ping/42")
    assert request.body == "é\n✓".encode()
    assert request.headers["x-a"] == b"1"
    assert request.headers["content-type"] == b"text/x"
    assert request.headers["authorization"] == basic_auth("u", "p")


def test_an_event_without_an_id_returns_none() -> None:
    """A live-only event has no id, and its value may be empty."""
    with Server(published("null")) as server:
        assert send(server.url, "", content_type="application/json") is None
    assert server.requests[0].body == b""
    assert server.requests[0].headers["content-type"] == b"application/json"


def test_several_events_share_a_connection() -> None:

    def step(connection: Connection) -> None:
        published()(connection)
        request = connection.read_request()
        assert request is not None
        server.requests.append(request)
        published("null")(connection)

    with Server(step) as server, EventSender(server.url) as sender:
        assert sender.send("a") == "7"
        assert sender.send("b") is None
    assert [request.body for request in server.requests] == [b"a", b"b"]


@pytest.mark.parametrize("key", ["order 5", '"quoted"; x', "é", "x" * 255])
def test_a_key_is_sent_as_a_header(key: str) -> None:
    """Only the event with the key has the header."""
    with Server(published()) as server:
        assert send(server.url, "x", key=key) == "7"
    assert server.requests[0].headers["idempotency-key"] == key.encode()

    def step(connection: Connection) -> None:
        published()(connection)
        request = connection.read_request()
        assert request is not None
        server.requests.append(request)
        published()(connection)

    with Server(step) as server, EventSender(server.url, headers={"X-A": "1"}) as sender:
        sender.send("a", key)
        sender.send("b")
    first, second = (request.headers for request in server.requests)
    assert (first["idempotency-key"], first["x-a"]) == (key.encode(), b"1")
    assert ("idempotency-key" in second, second["x-a"]) == (False, b"1")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0", "\ud800"], ids=ascii)
def test_a_key_that_is_not_valid_is_not_sent(key: str) -> None:
    with Server() as server, pytest.raises(ValueError, match="1 to 255 characters"):
        send(server.url, "x", key=key)
    assert server.requests == []


@pytest.mark.parametrize("key", ["a\nX-A: 1", " k", "k "], ids=ascii)
def test_a_key_that_a_header_cannot_contain_is_not_sent(key: str) -> None:
    """A server would receive another key."""
    with Server() as server, pytest.raises(ValueError, match="cannot be sent in a header"):
        send(server.url, "x", key=key)
    assert server.requests == []


def test_the_error_has_the_status_and_the_first_line_of_the_text() -> None:
    with Server(respond(404, b"Unknown action 'x'.\n", Content_Type="text/plain")) as server:
        error = failure(server.url)
    assert str(error) == f"{server.url} responded with 404 Not Found: Unknown action 'x'."
    assert error.status == 404


def test_a_redirect_is_not_followed() -> None:
    """The error contains the location, because a redirected POST may become a GET."""
    with Server(redirect("https://there/", 301)) as server:
        error = failure(server.url)
    assert str(error) == (
        f"{server.url} responded with 301 Moved Permanently: the location is 'https://there/'."
    )


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"id": 7}', b"[" * 70_000, b"\xff"]
)
def test_a_response_without_an_event_id_raises(body: bytes) -> None:
    """A server that responds 200 with other content has published nothing."""
    with Server(respond(200, body)) as server:
        error = failure(server.url)
    assert str(error) == (f"{server.url} responded without an event id, so it published no event.")
    assert error.status == 200


def test_a_response_is_read_to_64_kib() -> None:

    def step(connection: Connection) -> None:
        connection.head(200, Transfer_Encoding="chunked")
        connection.chunk(b'{"id": "7"}' + b" " * 65_536)
        connection.wait_for_close()

    with Server(step) as server:
        assert send(server.url, "x") == "7"


def test_a_compressed_response_raises() -> None:
    """The request asks for an uncompressed response."""
    body = gzip.compress(b'{"id": "7"}')
    with Server(respond(200, body, Content_Encoding="gzip")) as server:
        error = failure(server.url)
    assert server.requests[0].headers["accept-encoding"] == b"identity"
    assert str(error) == (
        f"{server.url} responded with Content-Encoding 'gzip', but the client accepts "
        "uncompressed responses only. Turn off compression for this URL."
    )
    assert error.status == 200


def test_the_error_contains_the_beginning_of_an_endless_body() -> None:
    """The sender reads 1,024 bytes of a text, and nothing of a compressed body."""

    def endless(body: bytes, **headers: str) -> Any:
        def step(connection: Connection) -> None:
            connection.head(400, Content_Type="text/plain", **headers)
            connection.send(body)
            connection.wait_for_close()

        return step

    text = b"x" * 1024
    with Server(endless(text), endless(gzip.compress(text), Content_Encoding="gzip")) as server:
        assert str(failure(server.url)).endswith(f"400 Bad Request: {'x' * 200}.")
        assert str(failure(server.url)).endswith("400 Bad Request.")


def test_secrets_of_the_url_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log and the error of a redirect contain no password and no grant."""
    caplog.set_level(logging.DEBUG)
    with Server(published(), respond(301, Location="https://h/@x?grant=SECRET")) as server:
        url = f"http://user:SECRET@127.0.0.1:{server.port}/?grant=SECRET"
        assert send(url, "x") == "7"
        assert "SECRET" not in caplog.text
        error = failure(url)
    assert server.requests[0].path == "/?grant=SECRET"
    assert f"POST {server.url} " in caplog.text
    assert (
        str(error)
        == f"{server.url} responded with 301 Moved Permanently: the location is 'https://h/@x'."
    )


def test_a_refused_connection_is_one_line() -> None:
    """The error has its cause."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = failure(f"http://127.0.0.1:{port}/")
    assert str(error) == f"Cannot send to http://127.0.0.1:{port}/: connection refused."
    assert isinstance(error.__cause__, httpx2.ConnectError)


def test_a_server_that_does_not_respond_is_a_failure() -> None:
    with Server(lambda connection: connection.wait_for_close()) as server:
        error = failure(server.url, timeout_seconds=0.05)
    assert str(error) == f"Cannot send to {server.url}: no data was received for 0.05 s."
