"""Real servers: resources, restarts, and ordered delivery."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connections

from django_eventsource import publish
from django_eventsource.history import get_history
from django_eventsource.protocol.frames import Decoder
from django_eventsource.publishing import apublish
from tests.support.listeners import HTTP11, Connection, Listener, reconnection_ms
from tests.support.processes import POSTGRES, ROOT, Server, environment, serve
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])

OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}


def slow(*values: Any) -> Any:
    """Return a case that does not need every version of Python and Django."""
    return pytest.param(*values, marks=pytest.mark.slow)


SERVERS = ["daphne", "uvicorn", *map(slow, ["hypercorn", "granian"])]
PLAIN = [*map(slow, ["daphne plain", "uvicorn plain"])]
"""Without the wrapper, so that Django sends the streams."""


@pytest.fixture(params=[*SERVERS, *PLAIN])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(request.param, **OPEN) as server:
        yield server


def process_of(server: Server) -> psutil.Process:
    """Return the process that sends streams; with granian it is a child process."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    return ([process, *process.children(recursive=True)])[-1]


def database_handles(server: Server) -> int:
    """Return how often the process has the test database's file open."""
    name = settings.TEST_DIR / "test.sqlite3"
    return sum(Path(file.path) == name for file in process_of(server).open_files())


async def until_idle(count: int, measure: object) -> None:
    """Wait until another thread has released what a finished request used."""
    async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
        while measure() > count:  # type: ignore[operator]
            await asyncio.sleep(0.05)


async def test_open_streams_use_no_thread_and_no_database_connection(server: Server) -> None:
    first = await Connection.open(server.address, "/events/poll/t")
    await first.read()
    threads = process_of(server).num_threads()
    streams = [
        await Connection.open(server.address, f"/events/poll/t{n % 20}") for n in range(200)
    ]
    for stream in streams:
        assert stream.status == 200
        await stream.read()
    await until_idle(threads + 2, lambda: process_of(server).num_threads())
    await until_idle(1, lambda: database_handles(server))
    await apublish("t7", "ping", "still there")
    chunk = await streams[7].read()
    assert [event.data for event in Decoder().feed(chunk)] == ["still there"]
    for stream in [first, *streams]:
        stream.close()


async def test_open_streams_use_no_postgresql_connection() -> None:
    code = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'test_eventsource'"

    def count() -> int:
        with connections["postgres"].cursor() as cursor:
            cursor.execute(code)
            return int(cursor.fetchone()[0])

    with serve("uvicorn", EVENTSOURCE_HISTORY=POSTGRES, **OPEN) as server:
        before = await sync_to_async(count)()
        streams = [await Connection.open(server.address, "/events/poll/t") for _ in range(50)]
        for stream in streams:
            await stream.read()
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            while await sync_to_async(count)() > before + 2:
                await asyncio.sleep(0.05)
        for stream in streams:
            stream.close()
    await sync_to_async(lambda: connections["postgres"].close())()


async def test_an_event_of_another_process_is_delivered(server: Server) -> None:
    """The processes share only the database."""
    connection = await Connection.open(server.address, "/events/poll/t")
    await connection.read()
    event = await apublish("t", "ping", "hello")
    assert await connection.read() == f"id: {event.id}\nevent: ping\ndata: hello\n\n".encode()
    connection.close()


async def test_head_and_options_open_no_stream(server: Server) -> None:
    for method in ("HEAD", "OPTIONS"):
        connection = await Connection.open(server.address, "/events/poll/t", method=method)
        assert connection.status == 200
        assert await connection.read() == b""
        connection.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/events/poll/a%FFb", 400),
        ("/events/poll/gr%C3%BC%C3%9Fe", 200),
        ("/events/poll/a%2Fb%0Ac", 200),
        ("/events/poll/a%00b", 400),
        ("/events/poll/", 400),
    ],
)
async def test_percent_encoded_tokens_are_accepted_and_invalid_utf_8_is_refused(
    server: Server, path: str, status: int
) -> None:
    connection = await Connection.open(server.address, path)
    assert connection.status == status
    connection.close()


async def test_a_last_event_id_of_invalid_utf_8_receives_reset(server: Server) -> None:
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(
        b"GET /events/poll/t HTTP/1.0\r\nHost: localhost\r\nLast-Event-ID: \xff\xfe\r\n\r\n"
    )
    async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.split()[1] == b"200"
        assert b"event: reset" in await reader.readuntil(b"\n\n")
    writer.transport.abort()


async def test_disconnected_listeners_use_no_resources(server: Server) -> None:
    process = process_of(server)
    for _ in range(3):
        streams = [await Connection.open(server.address, "/events/poll/t") for _ in range(30)]
        for stream in streams:
            await stream.read()
            stream.close()

    def sockets() -> int:
        return sum(one.status == "ESTABLISHED" for one in process.net_connections())

    await until_idle(0, sockets)


def exit_status(kind: str, how: signal.Signals) -> int:
    """The lines that a server logs when it ends: uvicorn sends itself SIGTERM again."""
    return -how if (kind, how) == ("uvicorn", signal.SIGTERM) else 0


async def rest_of(connection: Connection) -> bytes:
    """Read to the end of the body."""
    body = b""
    async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):  # an open stream has keepalives
        while chunk := await connection.read():
            body += chunk
    return body


async def leave(server: Server, how: signal.Signals) -> tuple[int, float]:
    """Send a signal, and return the exit status and the seconds until the end."""
    assert server.process is not None
    began = time.monotonic()
    server.process.send_signal(how)
    status = await asyncio.to_thread(server.process.wait, 8)
    return status, time.monotonic() - began


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_server_ends_with_open_streams_within_a_second_and_logs_nothing(
    kind: str, how: signal.Signals
) -> None:
    with serve(kind, **OPEN) as server:
        streams = [await Connection.open(server.address, f"/events/poll/{n}") for n in range(5)]
        # HTTP/1.1 marks the end of a complete body.
        whole = await HTTP11.open(server.address, "/events/poll/0")
        for stream in streams:
            await stream.read()
        await whole.chunk()
        await apublish("0", "ping", "x")
        assert b"data: x" in await streams[0].read()
        leaving = asyncio.create_task(leave(server, how))
        began = time.monotonic()
        bodies = [await rest_of(stream) for stream in streams]
        assert time.monotonic() - began < 1
        for body in bodies:
            assert 500 <= reconnection_ms(body) <= 5000
        body = await whole.rest()
        assert b"data: x" in body
        assert 500 <= reconnection_ms(body) <= 5000
        status, seconds = await leaving
        assert status == exit_status(kind, how)
        assert seconds < 3
        assert server.log.read_text() == ""
        for stream in streams:
            stream.close()
        whole.close()


# granian waits for a client that reads nothing, and its connection cannot be aborted: see
# docs/howto/deploy.rst.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (kind, size)
        for kind in ("daphne", "uvicorn", "hypercorn", "granian")
        for size in (30_000, 500_000)
        if (kind, size) != ("granian", 500_000)
    ],
)
async def test_a_server_ends_although_a_client_has_stalled(kind: str, size: int) -> None:
    server = Server(kind, **OPEN)
    slow = socket.socket()
    try:
        if kind != "granian":
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.start()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(PROCESS_PATIENCE_SECONDS)
        await asyncio.to_thread(slow.connect, server.address)
        slow.sendall(b"GET /events/poll/t HTTP/1.0\r\nHost: localhost\r\n\r\n")
        got = b""
        while b"\nid: " not in got:
            got += await asyncio.to_thread(slow.recv, 4096)
        other = await Connection.open(server.address, "/events/poll/t")
        await other.read()
        await apublish("t", "ping", "x" * size)
        body = b""
        while b"xxx\n\n" not in body:
            body += await other.read()
        leaving = asyncio.create_task(leave(server, signal.SIGTERM))
        assert 500 <= reconnection_ms(body + await rest_of(other)) <= 5000
        status, seconds = await leaving
        assert status == exit_status(kind, signal.SIGTERM)
        assert seconds < 4
        assert server.log.read_text() == ""
        other.close()
    finally:
        slow.close()
        server.close()


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_stream_that_ends_logs_nothing(kind: str) -> None:
    with serve(kind, **OPEN) as server:
        for token in ("a", "b"):
            ended = await Connection.open(server.address, f"/events/poll/{token}")
            gone = await Connection.open(server.address, f"/events/poll/{token}")
            await ended.read()
            await gone.read()
            gone.close()
            await apublish(token, "close", "bye")
            assert b"data: bye" in await rest_of(ended)
            ended.close()
        # Daphne checks the exceptions of its applications once per second.
        await asyncio.sleep(1.3)
        await leave(server, signal.SIGTERM)
        assert server.log.read_text() == ""


@pytest.mark.parametrize(
    "server", ["daphne", "uvicorn", "hypercorn", "uvicorn plain"], indirect=True
)
async def test_a_killed_server_loses_no_event(server: Server) -> None:
    listener = Listener(
        server.address, "/events/poll/t", enough=lambda self: len(self.events) >= 30
    )
    listening = asyncio.ensure_future(listener.run())
    await listener.joined.wait()
    for n in range(30):
        await apublish("t", "ping", str(n))
        if n == 10:
            server.stop(signal.SIGKILL)
        elif n == 20:
            server.start()
    async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
        await listening
    assert [event.data for event in listener.events] == [str(n) for n in range(30)]
    assert listener.connections >= 2


async def test_a_burst_of_a_thousand_events_is_delivered_in_order() -> None:
    with serve("uvicorn", EVENTSOURCE_HISTORY=POSTGRES, **OPEN) as server:
        settings.EVENTSOURCE_HISTORY = POSTGRES
        try:
            listener = Listener(
                server.address, "/events/poll/t", enough=lambda self: len(self.events) >= 400
            )
            listening = asyncio.ensure_future(listener.run())
            await listener.joined.wait()

            def work(thread: int) -> None:
                for n in range(100):
                    publish("t", "ping", f"{thread} {n}")
                connections.close_all()

            threads = [threading.Thread(target=work, args=[n]) for n in range(4)]
            for thread in threads:
                thread.start()
            async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
                await listening
            for thread in threads:
                thread.join()
        finally:
            del settings.EVENTSOURCE_HISTORY
    ids = [int(event.id) for event in listener.events]
    assert ids == list(range(ids[0], ids[0] + 400))
    assert len({event.data for event in listener.events}) == 400


LISTENERS = 50
EVENTS = 2000


@pytest.mark.slow
async def test_listeners_that_reconnect_receive_every_event_once_in_order() -> None:
    """Clients disconnect at random, and the server restarts twice."""
    seed = int(os.environ.get("SEED", "42"))
    chance = random.Random(seed)
    with serve("daphne", **OPEN) as server:
        listeners = [
            Listener(
                server.address,
                "/events/poll/t",
                enough=lambda self: len(self.events) >= EVENTS,
                drops=random.Random(chance.random()),
            )
            for _ in range(LISTENERS)
        ]
        tasks = [asyncio.ensure_future(listener.run()) for listener in listeners]
        for listener in listeners:
            await listener.joined.wait()
        sender = subprocess.Popen(
            [
                sys.executable,
                ROOT / "testproject" / "manage.py",
                "send_event",
                "t",
                "ping",
                "-",
                "--lines",
            ],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert sender.stdin is not None
        lines = [f"{n}\n" for n in range(EVENTS)]
        written = 0
        for share in (0.25, 0.6):
            # More events than the wait below needs, so that some come while the server is down.
            until = int(EVENTS * (share + 0.1))
            sender.stdin.write("".join(lines[written:until]))
            sender.stdin.flush()
            written = until
            async with asyncio.timeout(PROCESS_PATIENCE_SECONDS * 3):
                while max(len(listener.events) for listener in listeners) < EVENTS * share:
                    await asyncio.sleep(0.01)
            server.stop(signal.SIGTERM)
            server.start()
        out, _ = await asyncio.to_thread(
            sender.communicate, "".join(lines[written:]), PROCESS_PATIENCE_SECONDS * 5
        )
        assert sender.returncode == 0
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS * 3):
            await asyncio.gather(*tasks)
    assert len(out.split()) == EVENTS
    for listener in listeners:
        assert [event.data for event in listener.events] == [str(n) for n in range(EVENTS)]
        assert [event.id for event in listener.events] == out.split()
    opened = [listener.connections for listener in listeners]
    print(
        f"seed {seed}: {LISTENERS} listeners, {EVENTS} events each, "
        f"{min(opened)} to {max(opened)} connections each: missed 0, repeated 0"
    )
    assert min(opened) >= 3
    newest = await get_history().call(get_history().newest, "t")
    assert newest[0] == int(out.split()[-1])
