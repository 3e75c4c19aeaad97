"""Tests of the configurations of proxies that the pages show, with real proxies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.examples import free_port
from tests.support.listeners import Connection
from tests.support.processes import serve
from tests.support.proxies import CADDY, NGINX, Proxy, every_proxy

STREAM = "text/event-stream"
OVERRIDES = {
    "EVENTSOURCE_HISTORY": {"BACKEND": "django_eventsource.history.memory.MemoryHistory"},
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_MAX_STREAMS_PER_ADDRESS": 1,
}


async def over_the_limit(address: tuple[str, int], forwarded: str) -> tuple[Connection, bool]:
    """Open a stream, and return it and whether its address has one already."""
    connection = await Connection.open(
        address, "/events/poll/t", Accept=STREAM, X_Forwarded_For=forwarded
    )
    return connection, b"retry:" in await connection.read()


@every_proxy
@pytest.mark.parametrize(("kind", "options"), [("daphne", ["--proxy-headers"]), ("uvicorn", [])])
async def test_a_client_behind_a_proxy_cannot_choose_its_address(
    tmp_path: Path, proxy: Proxy, kind: str, options: list[str]
) -> None:
    """The proxy replaces the header that the client sends, and does not buffer the stream."""
    with (
        serve(kind, *options, **OVERRIDES) as server,
        proxy.run(tmp_path, server.port) as address,
    ):
        first, refused = await over_the_limit(address, "192.0.2.1")
        assert not refused
        second, refused = await over_the_limit(address, "192.0.2.2")
        assert refused
        first.close()
        second.close()


@every_proxy
async def test_a_listener_is_asked_to_reconnect_while_the_server_is_down(
    tmp_path: Path, proxy: Proxy
) -> None:
    """A browser stops for good after a 502."""
    with proxy.run(tmp_path, free_port()) as address:
        stream = await Connection.open(address, "/events/poll/t", Accept=STREAM)
        assert stream.status == 200
        assert f"content-type: {STREAM}\r\n" in stream.head.lower()
        assert await stream.read() == b"retry: 3000\n\n"
        assert await stream.read() == b""
        stream.close()


@every_proxy
@pytest.mark.parametrize(
    ("method", "path", "accept"),
    [
        ("POST", "/events/ping/t", "*/*"),
        ("POST", "/events/ping/t", STREAM),
        ("GET", "/events/poll/t", "application/json"),
        ("GET", "/", STREAM),
    ],
)
async def test_every_other_request_fails_while_the_server_is_down(
    tmp_path: Path, proxy: Proxy, method: str, path: str, accept: str
) -> None:
    """An event is not published, and a history is not read, without an error."""
    with proxy.run(tmp_path, free_port()) as address:
        response = await Connection.open(
            address, path, method=method, Accept=accept, Content_Length="0"
        )
        assert response.status in {502, 503}
        response.close()


@pytest.mark.parametrize(
    ("proxy", "change"),
    [
        pytest.param(NGINX, ("error_page", "deny all; error_page"), id="nginx"),
        pytest.param(CADDY, ("reverse_proxy", "error 403\n\treverse_proxy"), id="caddy"),
    ],
)
async def test_a_listener_that_the_proxy_refuses_is_not_asked_to_reconnect(
    tmp_path: Path, proxy: Proxy, change: tuple[str, str]
) -> None:
    """Only the errors of a server that is down have the response with a reconnection time."""
    with proxy.run(tmp_path, free_port(), change) as address:
        stream = await Connection.open(address, "/events/poll/t", Accept=STREAM)
        assert stream.status == 403
        stream.close()
