"""The scenarios of delivery with thousands of sockets."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Iterator

import pytest

from django_eventsource import apublish
from tests.support.listeners import HTTP11, events_until
from tests.support.processes import serve

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])

LISTENERS = 3000
EVENTS = [f"{number} {'x' * 10_000}" for number in range(40)]
STREAM_BYTES = 100_000
SEND_BYTES = 16 * 1024
TRANSPORT_BYTES = 64 * 1024
"""What an asyncio transport accepts."""

AT_ONCE = 100
"""The connections that are opened at the same time; fewer than the server's backlog."""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Allow as many open files as each of two processes needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = LISTENERS + 1000
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"The test needs {needed} open files, and the limit is {hard}.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def connect(address: tuple[str, int], *, slow: bool) -> HTTP11:
    """Open a stream, up to its first chunk. The receive buffer of a slow client is small."""
    connection = socket.socket()
    connection.setblocking(False)
    if slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(connection, address)
    listener = HTTP11(
        *await asyncio.open_connection(sock=connection, limit=2048 if slow else 65536)
    )
    await listener.request("/events/poll/t")
    await listener.chunk()
    return listener


@pytest.mark.usefixtures("many_files")
async def test_a_third_of_three_thousand_listeners_is_slow() -> None:
    """The others do not wait for them. The slow ones receive everything when they read again."""
    with serve(
        "uvicorn",
        EVENTSOURCE_POLICY="django_eventsource.policies.AllowAny",
        EVENTSOURCE_STREAM_BUFFER_BYTES=STREAM_BYTES,
        EVENTSOURCE_STREAM_STALL_SECONDS=600,
    ) as server:
        # The connections inherit it. By default the kernel would keep all events for each client.
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listeners: list[HTTP11] = []
        while len(listeners) < LISTENERS:
            numbers = range(len(listeners), min(len(listeners) + AT_ONCE, LISTENERS))
            opening = [connect(server.address, slow=number % 3 == 0) for number in numbers]
            listeners += await asyncio.gather(*opening)
        slow, fast = listeners[::3], [*listeners[1::3], *listeners[2::3]]
        buffers = (server.socket, socket.SO_SNDBUF), (slow[0].socket, socket.SO_RCVBUF)
        in_kernel = sum(one.getsockopt(socket.SOL_SOCKET, option) for one, option in buffers)
        # So no slow client has its events before it reads, and the server has to read them again.
        assert in_kernel + TRANSPORT_BYTES + STREAM_BYTES < sum(map(len, EVENTS))
        reading = [asyncio.ensure_future(events_until(one, EVENTS[-1])) for one in fast]
        for event in EVENTS:
            await apublish("t", "ping", event)
        assert all(events == EVENTS for events in await asyncio.gather(*reading))
        for one in slow:
            assert await events_until(one, EVENTS[-1]) == EVENTS
        for one in listeners:
            one.close()
