"""Sending events by HTTP POST, to a server that plays scripts."""

from __future__ import annotations

import gzip
import logging
import socket
from typing import Any

import httpx
import pytest

from django_eventsource.exceptions import ClientError
from django_eventsource.sender import EventSender, send
from tests.scripted import Connection, Server, answer, redirect


def published(event_id: str = '"7"') -> Any:
    """The answer to an event that was published."""
    return answer(200, b'{"id": %s}' % event_id.encode(), Content_Type="application/json")


def failure(url: str, **options: Any) -> ClientError:
    """Give the error of sending."""
    with pytest.raises(ClientError) as caught:
        send(url, "x", **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("value", ["é\n✓", "é\n✓".encode()])
def test_a_value_is_posted_as_utf8(value: str | bytes) -> None:
    """The body is the value, and the id of the answer is given back."""
    headers = {"X-A": "1", "Content-Type": "text/x"}
    with Server(published()) as server:
        assert send(f"{server.url}ping/42", value, headers=headers, auth=("u", "p")) == "7"
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/ping/42")
    assert request.body == "é\n✓".encode()
    assert request.headers["x-a"] == b"1"
    assert request.headers["content-type"] == b"text/x"
    assert request.headers["authorization"] == httpx.BasicAuth("u", "p")._auth_header.encode()


def test_an_event_without_id() -> None:
    """A live-only event has no id, and its value may be empty."""
    with Server(published("null")) as server:
        assert send(server.url, "", content_type="application/json") is None
    assert server.requests[0].body == b""
    assert server.requests[0].headers["content-type"] == b"application/json"


def test_several_events_share_a_connection() -> None:
    """A sender keeps its connection between events."""

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


def test_a_refusal_says_what_the_server_said() -> None:
    """Status and first line of the text are in the error."""
    with Server(answer(404, b"Unknown action 'x'.\n", Content_Type="text/plain")) as server:
        error = failure(server.url)
    assert str(error) == f"{server.url} answered 404 Not Found: Unknown action 'x'."
    assert error.status == 404


def test_a_redirect_is_not_followed() -> None:
    """A redirected POST could become a GET: the error says where to send instead."""
    with Server(redirect("https://there/", 301)) as server:
        error = failure(server.url)
    assert str(error) == (
        f"{server.url} answered 301 Moved Permanently: it is at 'https://there/'."
    )


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"id": 7}', b"[" * 70_000, b"\xff"]
)
def test_an_answer_that_is_none(body: bytes) -> None:
    """A server that answers 200 with something else has published nothing."""
    with Server(answer(200, body)) as server:
        error = failure(server.url)
    assert str(error) == (
        f"{server.url} did not answer with the id of an event: it publishes no events."
    )
    assert error.status == 200


def test_an_endless_answer_is_not_read_on() -> None:
    """An answer is read to 64 KiB."""

    def step(connection: Connection) -> None:
        connection.head(200, Transfer_Encoding="chunked")
        connection.chunk(b'{"id": "7"}' + b" " * 65_536)
        connection.wait_for_close()

    with Server(step) as server:
        assert send(server.url, "x") == "7"


def test_no_compression_is_accepted() -> None:
    """The sender asks for an uncompressed response, and refuses any other."""
    body = gzip.compress(b'{"id": "7"}')
    with Server(answer(200, body, Content_Encoding="gzip")) as server:
        error = failure(server.url)
    assert server.requests[0].headers["accept-encoding"] == b"identity"
    assert str(error) == (
        f"{server.url} answered with Content-Encoding 'gzip', though the client accepts "
        "identity only. Turn off compression for this URL."
    )
    assert error.status == 200


def test_the_body_of_a_refusal_is_cut() -> None:
    """An endless text is read to 1,024 bytes, and a compressed one not at all."""

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
    """Neither httpx nor httpcore logs a password or a grant, nor does the error of a redirect."""
    caplog.set_level(logging.DEBUG)
    with Server(published(), answer(301, Location="https://h/@x?grant=SECRET")) as server:
        url = f"http://user:SECRET@127.0.0.1:{server.port}/?grant=SECRET"
        assert send(url, "x") == "7"
        assert "SECRET" not in caplog.text
        error = failure(url)
    assert server.requests[0].path == "/?grant=SECRET"
    assert f"POST {server.url} " in caplog.text
    assert str(error) == f"{server.url} answered 301 Moved Permanently: it is at 'https://h/@x'."


def test_nobody_there() -> None:
    """A refused connection is one line, with its cause behind it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = failure(f"http://127.0.0.1:{port}/")
    assert str(error) == f"Cannot send to http://127.0.0.1:{port}/: connection refused."
    assert isinstance(error.__cause__, httpx.ConnectError)


def test_no_answer() -> None:
    """A server that does not answer is given up."""
    with Server(lambda connection: connection.wait_for_close()) as server:
        error = failure(server.url, timeout_seconds=0.05)
    assert str(error) == f"Cannot send to {server.url}: nothing was received for 0.05 s."


def test_bad_arguments() -> None:
    """What cannot be sent is refused at once."""
    with pytest.raises(ValueError, match="not a valid http:// or https:// URL"):
        EventSender("ftp://h/")
    with pytest.raises(ValueError, match="header"):
        EventSender("http://h/", headers={"a b": "x"})
