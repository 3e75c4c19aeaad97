"""Tests of the client addresses behind a proxy, on real servers."""

from __future__ import annotations

import pytest

from tests.support.listeners import Connection
from tests.support.processes import serve

OVERRIDES = {
    "EVENTSOURCE_HISTORY": {"BACKEND": "django_eventsource.history.memory.MemoryHistory"},
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_MAX_STREAMS_PER_ADDRESS": 1,
}


async def refused(address: tuple[str, int], *forwarded: str) -> list[bool]:
    """Open a stream for each X-Forwarded-For, and return whether each was over the limit."""
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
        ("uvicorn tests.support.proxied_asgi:uvicorn", ["--no-proxy-headers"]),
        ("hypercorn tests.support.proxied_asgi:hypercorn", []),
        ("granian tests.support.proxied_asgi:granian", []),
    ],
)
async def test_the_documented_server_settings_pass_the_client_address(
    kind: str, options: list[str]
) -> None:
    """The streams of two clients behind one proxy are counted separately."""
    with serve(kind, *options, **OVERRIDES) as server:
        found = await refused(server.address, "192.0.2.1", "192.0.2.2", "192.0.2.1")
    assert found == [False, False, True]
