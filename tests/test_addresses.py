"""Client addresses, and what limits count them as."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import cache
from django.test import AsyncClient, AsyncRequestFactory

from django_eventsource.addresses import address_of, network_of
from django_eventsource.exceptions import RateLimited
from django_eventsource.listeners import registry
from django_eventsource.policies import check_rate
from django_eventsource.streams import Reason
from tests.listeners import Connection
from tests.processes import DEADLINE, ROOT, serve

README = ROOT / "README.rst"


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("unix:/run/socket", "unix:/run/socket"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_address_is_counted_by_its_64_bit_prefix(address: str, network: str) -> None:
    """One client has a whole /64, so its addresses are one; any other text stays as it is."""
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("given", "address"), [("192.0.2.1", "192.0.2.1"), ("::1", "::1"), ("", ""), (None, "")]
)
def test_the_address_is_empty_where_the_server_sends_none(given: str | None, address: str) -> None:
    """A server on a Unix socket has no address to send."""
    request = AsyncRequestFactory().get("/")
    request.META["REMOTE_ADDR"] = given
    assert address_of(request) == address
    del request.META["REMOTE_ADDR"]
    assert address_of(request) == ""


def request_from(address: str) -> Any:
    request = AsyncRequestFactory().post("/")
    request.META["REMOTE_ADDR"] = address
    return request


class ClientAt(AsyncClient):
    """A client at an address."""

    address = ""

    def _base_scope(self, **request: Any) -> Any:
        return super()._base_scope(client=[self.address, 0], **request)


async def test_the_send_rate_counts_an_ipv6_client_once(settings: Any) -> None:
    """A client that changes its address within its /64 shares one count."""
    settings.EVENTSOURCE_SEND_RATE = (2, 10**6)
    cache.clear()
    for last in ("1", "2"):
        await check_rate(request_from(f"2001:db8::{last}"))
    with pytest.raises(RateLimited):
        await check_rate(request_from("2001:db8::3"))
    await check_rate(request_from("2001:db8:0:1::3"))
    cache.clear()


@pytest.mark.usefixtures("memory_history")
async def test_the_stream_limit_counts_an_ipv6_client_once(settings: Any) -> None:
    """A second stream from the same /64 is over the limit; the listener keeps its address."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_ADDRESS = 1
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    client = ClientAt()
    responses = []
    for client.address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"):
        responses.append(await client.get("/events/poll/t"))
    assert [response.streaming for response in responses] == [True, False, True]
    addresses = {listener.address for _, listener in registry.streams()}
    assert {"2001:db8::1", "2001:db8:0:1::1"} <= addresses
    for stream, _ in registry.streams():
        stream.abort(Reason.CLOSED)


OVERRIDES = {
    "EVENTSOURCE_HISTORY": {"BACKEND": "django_eventsource.history.memory.MemoryHistory"},
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_MAX_STREAMS_PER_ADDRESS": 1,
}


async def refused(address: tuple[str, int], *forwarded: str) -> list[bool]:
    """Open a stream for each X-Forwarded-For; return which were over the limit."""
    connections = [
        await Connection.open(address, "/events/poll/t", X_Forwarded_For=one) for one in forwarded
    ]
    first = [await connection.read() for connection in connections]
    for connection in connections:
        connection.close()
    return [b"retry:" in chunk for chunk in first]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("daphne", ["--proxy-headers"]),
        ("uvicorn", []),
        ("uvicorn tests.proxied_asgi:uvicorn", ["--no-proxy-headers"]),
        ("hypercorn tests.proxied_asgi:hypercorn", []),
        ("granian tests.proxied_asgi:granian", []),
    ],
)
async def test_the_documented_server_settings_reach_the_client_address(
    kind: str, options: list[str]
) -> None:
    """Streams of two clients behind one proxy are counted apart, as README's table says."""
    with serve(kind, *options, **OVERRIDES) as server:
        found = await refused(server.address, "192.0.2.1", "192.0.2.2", "192.0.2.1")
    assert found == [False, False, True]


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CONF = """
daemon off; pid nginx.pid; error_log error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen 127.0.0.1:{port}; {location} }}
}}
"""


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize(("kind", "options"), [("daphne", ["--proxy-headers"]), ("uvicorn", [])])
async def test_a_client_behind_nginx_cannot_choose_its_address(
    tmp_path: Path, kind: str, options: list[str]
) -> None:
    """README's nginx block, as printed, replaces the header that the client sends."""
    block = re.search(r"\.\. code-block:: nginx\n\n(.*?)\n\n-", README.read_text(), re.S)
    assert block is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with serve(kind, *options, **OVERRIDES) as server:
        location = block[1].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        (tmp_path / "nginx.conf").write_text(CONF.format(port=address[1], location=location))
        nginx = subprocess.Popen([str(NGINX), "-p", str(tmp_path), "-c", "nginx.conf"])
        try:
            async with asyncio.timeout(DEADLINE):
                while not accepts(address):
                    await asyncio.sleep(0.02)
            found = await refused(address, "192.0.2.1", "192.0.2.2")
        finally:
            nginx.terminate()
            nginx.wait(DEADLINE)
    assert found == [False, True]


def accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True
