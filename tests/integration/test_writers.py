"""The writers with each server: one contract, and what the transport of uvicorn receives."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import pytest
import trustme
import uvicorn
from django.core.asgi import get_asgi_application

from django_eventsource.asgi import Handover
from django_eventsource.protocol.frames import Decoder
from django_eventsource.publishing import apublish
from django_eventsource.streaming.registry import registry
from django_eventsource.streaming.writer import TransportWriter
from tests.support.listeners import HTTP11, Connection, events_until
from tests.support.processes import Server, serve
from tests.support.waiting import PROCESS_PATIENCE_SECONDS, until

OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}
UVLOOP = ["--loop", "uvloop", "--http", "httptools"]

has_uvloop = find_spec("uvloop") is not None and find_spec("httptools") is not None
needs_uvloop = pytest.mark.skipif(not has_uvloop, reason="uvloop or httptools is not installed")

WAYS = [
    pytest.param("uvicorn", [], {}, id="uvicorn-h11"),
    pytest.param("uvicorn", UVLOOP, {}, id="uvicorn-uvloop", marks=needs_uvloop),
    pytest.param("uvicorn", [], {"EVENTSOURCE_WRITE_TO_TRANSPORT": False}, id="uvicorn-send"),
    pytest.param("uvicorn plain", [], {}, id="uvicorn-inside", marks=pytest.mark.slow),
    pytest.param("daphne", [], {}, id="daphne"),
    pytest.param("hypercorn", [], {}, id="hypercorn", marks=pytest.mark.slow),
    pytest.param("gunicorn", [], {}, id="gunicorn", marks=pytest.mark.slow),
    pytest.param("granian", [], {}, id="granian", marks=pytest.mark.slow),
]
"""The servers, their options, and changed settings."""

real = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind, options, overrides = request.param
    with serve(kind, *options, **OPEN, **overrides) as server:
        yield server


every_way = pytest.mark.parametrize(
    "server",
    [pytest.param(tuple(way.values), id=way.id, marks=way.marks) for way in WAYS],
    indirect=True,
)


# The contract


@real
@every_way
async def test_all_listeners_receive_all_events_once_in_order(server: Server) -> None:
    """Single events, bursts and large events, with a client that reads late."""
    fast = [await HTTP11.open(server.address, "/events/poll/t") for _ in range(5)]
    late = await HTTP11.open(server.address, "/events/poll/t", limit=1024)
    for one in [*fast, late]:
        await one.chunk()
    reading = [asyncio.create_task(events_until(one, "end")) for one in fast]
    sent = []
    for n in range(60):
        size = 100_000 if n % 20 == 10 else 10
        sent.append(f"{n} " + "x" * size)
        await apublish("t", "ping", sent[-1])
        if n % 10 < 5:
            await asyncio.sleep(0.01)
    await apublish("t", "ping", "end")
    for task in reading:
        assert await task == [*sent, "end"]
    assert await events_until(late, "end") == [*sent, "end"]
    for one in [*fast, late]:
        one.close()
    assert server.log.read_text() == ""


@real
@every_way
async def test_the_connection_is_used_again_after_its_stream_has_ended(server: Server) -> None:
    connection = await HTTP11.open(server.address, "/events/poll/a")
    await connection.chunk()
    await apublish("a", "ping", "1")
    assert await events_until(connection, "1") == ["1"]
    await apublish("a", "close", "bye")
    assert b"data: bye" in await connection.rest()
    await connection.request("/events/poll/b")
    await connection.chunk()
    await apublish("b", "ping", "2")
    assert await events_until(connection, "2") == ["2"]
    connection.close()


@real
@every_way
async def test_clients_that_disconnect_during_writes_affect_no_other(server: Server) -> None:
    steady = await HTTP11.open(server.address, "/events/poll/t")
    await steady.chunk()
    reading = asyncio.create_task(events_until(steady, "end"))
    chance = random.Random(42)
    brief: list[HTTP11] = []
    for n in range(60):
        brief.append(await HTTP11.open(server.address, "/events/poll/t"))
        await apublish("t", "ping", f"{n} " + "x" * 5_000)
        if len(brief) > 5:
            brief.pop(chance.randrange(5)).close()
    await apublish("t", "ping", "end")
    assert [event.split()[0] for event in await reading] == [*map(str, range(60)), "end"]
    for one in brief:
        one.close()
    steady.close()
    assert server.log.read_text() == ""


@real
@every_way
async def test_an_http_1_0_client_receives_the_events_as_the_server_frames_them(
    server: Server,
) -> None:
    connection = await Connection.open(server.address, "/events/poll/t")
    body = await connection.read()
    for n in range(5):
        await apublish("t", "ping", str(n))
        while f"data: {n}\n\n".encode() not in body:
            body += await connection.read()
    assert [event.data for event in Decoder().feed(body)] == [*"01234"]
    # With httptools, uvicorn (0.54) sends chunks to these clients too.
    assert (b"\r\n" in body) is ("httptools" in server.options)
    connection.close()


@real
@every_way
async def test_the_body_is_complete_at_sigterm(server: Server) -> None:
    connection = await HTTP11.open(server.address, "/events/poll/t")
    await connection.chunk()
    await apublish("t", "ping", "1")
    await events_until(connection, "1")
    assert server.process is not None
    if "plain" in server.application:
        # gunicorn's and Django's own handling are not part of this contract.
        server.process.kill()
    else:
        server.process.send_signal(signal.SIGTERM)
        assert b"retry: " in await connection.rest()
    await asyncio.to_thread(server.process.wait, PROCESS_PATIENCE_SECONDS)
    connection.close()


@real
@pytest.mark.slow
async def test_hypercorn_delivers_over_http_2() -> None:
    """Two streams on one connection."""
    with serve("hypercorn", **OPEN) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        client = h2.connection.H2Connection()
        client.initiate_connection()
        for number, token in ((1, "a"), (3, "b")):
            client.send_headers(
                number,
                [
                    (":method", "GET"),
                    (":scheme", "http"),
                    (":authority", "localhost"),
                    (":path", f"/events/poll/{token}"),
                ],
                end_stream=True,
            )
        bodies = {1: b"", 3: b""}

        async def receive(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
                while not condition():
                    writer.write(client.data_to_send())
                    for event in client.receive_data(await reader.read(65536)):
                        if isinstance(event, h2.events.DataReceived):
                            bodies[event.stream_id] += event.data
                            client.acknowledge_received_data(
                                event.flow_controlled_length, event.stream_id
                            )

        await receive(lambda: all(bodies.values()))
        for n in range(20):
            for token in "ab":
                await apublish(token, "ping", f"{token}{n}")
        await receive(lambda: all(b"19\n\n" in body for body in bodies.values()))
        for token, body in zip("ab", bodies.values(), strict=True):
            found = [event.data for event in Decoder().feed(body)]
            assert found == [f"{token}{n}" for n in range(20)]
        writer.transport.abort()


# uvicorn's transport


@contextmanager
def uvicorn_thread(
    application: Any, *, loop: str, http: str, **options: Any
) -> Iterator[tuple[str, int]]:
    """Run uvicorn in a thread of this process, so that a test can look at its streams."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            application,
            loop=loop,
            http=http,
            lifespan="off",
            log_level="warning",
            **options,  # type: ignore[arg-type]
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            thread.join(PROCESS_PATIENCE_SECONDS)
            assert not thread.is_alive()


def is_chunked(token: str) -> bool | None:
    """Return whether the writer of the stream of a token writes chunks to the transport."""
    (stream,) = [stream for stream in registry.streams() if stream.token == token]
    writer = stream._subscriber.writer
    return isinstance(writer, TransportWriter) and writer._is_chunked


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """Return uvicorn's options for TLS, and the context of a client."""
    authority = trustme.CA()
    pem = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"ssl_certfile": str(pem), "ssl_keyfile": str(pem)}, context


@pytest.mark.usefixtures("memory_history")
@pytest.mark.django_db(databases="__all__")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize(
    ("loop", "http"),
    [("asyncio", "h11"), pytest.param("uvloop", "httptools", marks=needs_uvloop)],
)
async def test_events_are_written_to_the_transport_of_uvicorn(
    loop: str, http: str, tls: bool, settings: Any, certificate: Any
) -> None:
    settings.EVENTSOURCE_POLICY = OPEN["EVENTSOURCE_POLICY"]
    options, context = certificate if tls else ({}, None)
    application = Handover(get_asgi_application())
    with uvicorn_thread(application, loop=loop, http=http, **options) as address:
        connection = await HTTP11.open(address, "/events/poll/t", ssl=context)
        await connection.chunk()
        await until(lambda: is_chunked("t") is not None)
        assert is_chunked("t")
        for n in range(50):
            await apublish("t", "ping", f"{n} " + "x" * 10_000)
        await apublish("t", "ping", "end")
        found = await events_until(connection, "end")
        assert [event.split()[0] for event in found] == [*map(str, range(50)), "end"]
        assert is_chunked("t")
        connection.close()
        await until(lambda: not list(registry.streams()))


@pytest.mark.usefixtures("memory_history")
@pytest.mark.django_db(databases="__all__")
async def test_http_1_0_and_middleware_receive_nothing_from_the_transport_writer(
    settings: Any,
) -> None:
    settings.EVENTSOURCE_POLICY = OPEN["EVENTSOURCE_POLICY"]
    inner = Handover(get_asgi_application())
    messages: list[bytes] = []

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            messages.append(message.get("body", b""))
            await send(message)

        await inner(scope, receive, counting if scope["path"].endswith("wrapped") else send)

    with uvicorn_thread(middleware, loop="asyncio", http="h11") as address:
        old = await Connection.open(address, "/events/poll/old")
        await old.read()
        wrapped = await HTTP11.open(address, "/events/poll/wrapped")
        await wrapped.chunk()
        await until(lambda: is_chunked("old") is not None)
        assert not is_chunked("old")
        assert not is_chunked("wrapped")
        await apublish("old", "ping", "1")
        await apublish("wrapped", "ping", "2")
        assert b"data: 1\n\n" in await old.read()
        assert await events_until(wrapped, "2") == ["2"]
        assert b"data: 2\n\n" in messages[-1]
        old.close()
        wrapped.close()
        await until(lambda: not list(registry.streams()))
