"""Back-pressure, stalled clients and shutdown with each server."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import uvicorn
from gunicorn.asgi.protocol import ASGIProtocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from django_eventsource.operations.close_requests import aclose_streams
from django_eventsource.operations.shutdown import SIGNALS, shutdown
from django_eventsource.policies import AllowAny
from django_eventsource.protocol.frames import Decoder
from django_eventsource.publishing import apublish
from django_eventsource.signals import stream_closed
from django_eventsource.streaming import transport as transport_module
from django_eventsource.streaming.transport import (
    Producer,
    abort_connection,
    find_shutdown,
    find_transport,
    register_producer,
    unsent,
    wait_drained,
)
from tests.support import waiting
from tests.support.listeners import Connection
from tests.support.processes import Server
from tests.support.waiting import PATIENCE_SECONDS, PROCESS_PATIENCE_SECONDS

SERVERS = ["daphne", "uvicorn", "hypercorn", "gunicorn", "granian"]
ABORTABLE = ["daphne", "uvicorn", "hypercorn", "gunicorn"]
"""The servers whose connections can be aborted."""


# The producer


class Registers:
    """A request that keeps its producer, as Twisted's does."""

    def __init__(self) -> None:
        self.channel: Any = self
        self.producers: list[object] = []

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: N802
        assert streaming
        self.producers.append(producer)

    def unregisterProducer(self) -> None:  # noqa: N802
        self.producers.pop()


async def test_a_registered_producer_is_ready() -> None:
    request = Registers()
    producer = Producer(request)
    await asyncio.wait_for(producer.ready.wait(), PATIENCE_SECONDS)
    assert request.producers == [producer]


@pytest.mark.parametrize("how", ["resumeProducing", "stopProducing"])
async def test_a_paused_producer_waits_until_it_is_resumed_or_stopped(how: str) -> None:
    producer = Producer(Registers())
    producer.pauseProducing()
    waiting = asyncio.ensure_future(producer.ready.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    getattr(producer, how)()
    await asyncio.wait_for(waiting, PATIENCE_SECONDS)


def test_a_released_producer_is_unregistered() -> None:
    request = Registers()
    Producer(request).release()
    assert request.producers == []


@pytest.mark.parametrize("deleted", [False, True])
def test_a_producer_of_a_lost_connection_is_not_unregistered(deleted: bool) -> None:
    request = Registers()
    producer = Producer(request)
    if deleted:
        del request.channel  # at the end of a response
    else:
        request.channel = None  # when the connection is lost
    producer.release()
    assert request.producers == [producer]


# The server's objects


class Transport:
    """A transport of asyncio and Twisted that counts its aborts."""

    def __init__(self) -> None:
        self.aborts = 0

    def abort(self) -> None:
        self.aborts += 1

    abortConnection = abort  # noqa: N815


class Channel:
    def __init__(self, transport: object) -> None:
        self.transport = transport


class Request:
    """The parts of Twisted's request that are used."""

    def __init__(self, channel: object) -> None:
        self.channel = channel

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: N802
        """Register nothing."""


async def reply(request: object, message: object) -> None:
    """Stand for daphne's handle_reply()."""


def hypercorn_send(protocol: Any, transport: Transport) -> Any:
    """Return the send of a request, made of hypercorn's own objects."""
    server = TCPServer.__new__(TCPServer)
    server.writer = Channel(transport)  # type: ignore[assignment]
    connection = protocol.__new__(protocol)
    connection.send = server.protocol_send
    if protocol is H2Protocol:
        connection.streams = {}
    stream = HTTPStream.__new__(HTTPStream)
    stream.send = connection.stream_send
    return stream.app_send


class Worker:
    """A worker of gunicorn."""

    alive = True


def gunicorn_send(transport: Transport, *, http2: bool = False) -> Any:
    """Return the send of a request, closed over the protocol of gunicorn's ASGI worker."""
    protocol = ASGIProtocol.__new__(ASGIProtocol)
    protocol.worker = Worker()
    protocol.transport = protocol.writer = transport
    protocol._h2_tasks = {"a request"} if http2 else set()

    async def send(message: object) -> None:
        if protocol._closed:
            return

    return send


def uvicorn_send(transport: Transport) -> Any:
    cycle = RequestResponseCycle.__new__(RequestResponseCycle)
    cycle.transport = transport  # type: ignore[assignment]
    return cycle.send


@pytest.mark.parametrize("server", ABORTABLE)
def test_the_transport_is_found_behind_send(server: str) -> None:
    transport = Transport()
    sends = {
        "daphne": functools.partial(reply, Request(Channel(transport))),
        "uvicorn": uvicorn_send(transport),
        "hypercorn": hypercorn_send(H11Protocol, transport),
        "gunicorn": gunicorn_send(transport),
    }
    abort_connection(find_transport(sends[server]))
    assert transport.aborts == 1


def test_the_transport_of_an_http_2_connection_is_not_returned() -> None:
    """Other requests share the connection."""
    assert find_transport(hypercorn_send(H2Protocol, Transport())) is None
    assert find_transport(gunicorn_send(Transport(), http2=True)) is None
    send = uvicorn_send(Transport())
    send.__self__.stream = SimpleNamespace(pending_bytes=0)  # of uvicorn's class for HTTP/2
    assert find_transport(send) is None


@pytest.mark.parametrize("channel", [None, Channel(None), object()])
def test_a_daphne_request_without_a_transport_is_not_used(channel: object) -> None:
    send = functools.partial(reply, Request(channel))
    assert (register_producer(send) is None) == (channel is None)
    assert find_transport(send) is None


@pytest.mark.parametrize("transport", [None, object()])
async def test_an_unknown_transport_is_neither_aborted_nor_awaited(transport: object) -> None:
    abort_connection(transport)
    await wait_drained(transport)


async def test_wait_drained_returns_when_the_buffer_is_empty() -> None:
    class Transport:
        held = [3, 2, 0]

        def get_write_buffer_size(self) -> int:
            return self.held.pop(0)

    transport = Transport()
    await wait_drained(transport)
    assert transport.held == []


async def test_unsent_bytes_decrease_while_the_client_reads() -> None:
    connected: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(
        lambda _, writer: connected.put_nowait(writer), "127.0.0.1", 0
    )
    reading, writing = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1000)
    writer = await connected.get()
    assert unsent(writer.transport) == 0
    writer.write(b"x" * 20_000_000)
    before = unsent(writer.transport)
    assert before is not None
    assert writer.transport.get_write_buffer_size() < before <= 20_000_000
    await reading.readexactly(10_000_000)
    after = unsent(writer.transport)
    assert after is not None
    assert after <= before - 5_000_000
    writing.transport.abort()
    writer.transport.abort()
    server.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert unsent(writer.transport) is None, "the connection has gone"


def test_unsent_bytes_of_daphne_include_both_buffers_of_twisted() -> None:
    near, far = socket.socketpair()

    class Twisted:
        dataBuffer = b"x" * 100  # noqa: N815
        offset = 30
        _tempDataLen = 5  # noqa: N815

        def getHandle(self) -> socket.socket:  # noqa: N802
            return near

    assert unsent(Twisted()) == 75
    near.send(b"x" * 1000)
    assert (unsent(Twisted()) or 0) >= 1075, "Linux counts what a packet takes"
    far.recv(1000)
    assert unsent(Twisted()) == 75
    near.close()
    far.close()
    assert unsent(Twisted()) is None


def test_without_fcntl_only_the_buffer_of_the_transport_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "fcntl", None)
    near, far = socket.socketpair()

    class Held:
        def get_write_buffer_size(self) -> int:
            return 7

        def get_extra_info(self, name: str) -> socket.socket:
            return near

    near.send(b"x" * 1000)
    assert unsent(Held()) == 7
    near.close()
    far.close()
    assert unsent(Held()) is None


@pytest.mark.parametrize("transport", [None, object(), Transport()])
def test_unsent_bytes_of_an_unknown_transport_are_none(transport: object) -> None:
    assert unsent(transport) is None


@pytest.mark.parametrize("server", ABORTABLE)
def test_the_transport_is_found_behind_middleware(server: str) -> None:
    transport = Transport()
    send = {
        "daphne": functools.partial(reply, Request(Channel(transport))),
        "uvicorn": uvicorn_send(transport),
        "hypercorn": hypercorn_send(H11Protocol, transport),
        "gunicorn": gunicorn_send(transport),
    }[server]

    def middleware(inner: Any) -> Any:
        async def wrapped(message: object) -> None:
            await inner(message)

        return wrapped

    assert find_transport(middleware(middleware(send))) is transport


def test_the_transport_is_found_behind_partials_and_methods() -> None:
    transport = Transport()
    send = functools.partial(reply, Request(Channel(transport)))

    class Cors:
        async def send(self, message: object, send: Any) -> None:
            await send(message)

    class Responder:
        def __init__(self, send: Any) -> None:
            self._send = send

        async def respond(self, message: object) -> None:
            await self._send(message)

    given = functools.partial(Cors().send, send=send)
    assert find_transport(given) is transport
    assert register_producer(given) is not None
    assert find_transport(Responder(given).respond) is transport
    assert find_transport(Responder(uvicorn_send(transport)).respond) is transport


def test_an_empty_closure_cell_does_not_stop_the_search() -> None:
    transport = Transport()
    send = functools.partial(reply, Request(Channel(transport)))

    async def wrapped(message: object) -> None:
        await send(message)
        await later(message)

    assert find_transport(wrapped) is transport
    later = send


def test_the_search_ends_if_functions_refer_to_each_other() -> None:
    async def one(message: object) -> None:
        await other(message)

    async def other(message: object) -> None:
        await one(message)

    assert find_transport(one) is None


async def unknown(message: object) -> None:
    """Stand for the send of an unknown server."""


class Cyclic:
    """An object whose send refers to itself."""

    async def send(self, message: object) -> None:
        """Send nothing."""


@pytest.mark.parametrize(
    "send", [unknown, functools.partial(unknown), functools.partial(reply, 1, 2), Cyclic().send]
)
def test_nothing_is_found_behind_an_unknown_send(send: object) -> None:
    assert register_producer(send) is None
    assert find_transport(send) is None
    assert find_shutdown(send) is None


# The server's shutdown


@pytest.fixture
def sigterm() -> Iterator[None]:
    """Restore the signal handlers."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    shutdown.reset()


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("taken", [False, True])
async def test_uvicorn_shuts_down_when_its_sockets_are_closed(taken: bool) -> None:
    """The server is found behind the handler of SIGTERM, also after install()."""
    server = uvicorn.Server(uvicorn.Config(unknown))
    server.servers = [await asyncio.start_server(unknown, "127.0.0.1", 0)]
    signal.signal(signal.SIGTERM, server.handle_exit)
    if taken:
        shutdown.install(asyncio.get_running_loop())
    ends = find_shutdown(uvicorn_send(Transport()))
    assert ends is not None
    assert not ends()
    assert not server.should_exit
    server.servers[0].close()
    assert ends()


async def test_hypercorn_shuts_down_when_its_worker_context_is_terminated() -> None:
    send = hypercorn_send(H11Protocol, Transport())
    context = send.__self__.context = WorkerContext(None)
    ends = find_shutdown(send)
    assert ends is not None
    assert not ends()
    await context.terminated.set()
    assert ends()


def test_gunicorn_shuts_down_when_its_worker_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = find_shutdown(gunicorn_send(Transport()))
    assert ends is not None
    assert not ends()
    monkeypatch.setattr(Worker, "alive", False)
    assert ends()


# Real servers


class PrintingPolicy(AllowAny):
    """A policy of server processes that prints why streams end to standard error."""

    def __init__(self) -> None:
        super().__init__()
        stream_closed.connect(print_reason, dispatch_uid="print_reason")


def print_reason(reason: object, **kwargs: object) -> None:
    """Print why a stream ended."""
    print(f"closed: {reason}", file=sys.stderr, flush=True)


PRINTING = {"EVENTSOURCE_POLICY": f"{__name__}.PrintingPolicy"}


@contextmanager
def narrow(kind: str, **overrides: Any) -> Iterator[Server]:
    """Run a server whose sockets have small buffers, if it accepts a socket."""
    server = Server(kind, **{**PRINTING, **overrides})
    try:
        if kind != "granian":
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.start()
        yield server
    finally:
        # The workers of granian survive if their parent process is killed.
        workers = (
            processes_of(server)[1:] if server.process and server.process.poll() is None else []
        )
        server.close()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()


SOCKETS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_sockets() -> Iterator[None]:
    """Close the sockets that a failed test leaves open."""
    yield
    while SOCKETS:
        SOCKETS.pop().close()


class Slow:
    """A client that reads on request, and whose socket has a small buffer."""

    def __init__(self, server: Server, path: str) -> None:
        self.socket = socket.socket()
        SOCKETS.append(self.socket)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(PROCESS_PATIENCE_SECONDS)
        self.socket.connect(server.address)
        self.socket.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        self.got = b""
        self.ended = False

    def read(self) -> None:
        try:
            chunk = self.socket.recv(65536)
        except ConnectionResetError:
            chunk = b""
        self.got += chunk
        self.ended = not chunk

    async def opened(self) -> None:
        """Read the first bytes of the stream."""
        while b"\r\n\r\n" not in self.got or not self.body.endswith(b"\n\n"):
            await asyncio.to_thread(self.read)
            assert not self.ended, self.got

    @property
    def body(self) -> bytes:
        return self.got.partition(b"\r\n\r\n")[2]

    def close(self) -> None:
        self.socket.close()


def processes_of(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def connections_to(server: Server) -> int:
    """Return the number of connections of the server."""
    return sum(
        one.status != psutil.CONN_LISTEN and one.laddr.port == server.port
        for process in processes_of(server)
        for one in process.net_connections("tcp")
    )


def memory_of(server: Server) -> int:
    return sum(process.memory_info().rss for process in processes_of(server))


until = functools.partial(waiting.until, seconds=PROCESS_PATIENCE_SECONDS, interval_seconds=0.02)


real = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_disconnect_is_detected_without_a_new_event(kind: str) -> None:
    """The client may have stalled before."""
    with narrow(kind, EVENTSOURCE_KEEPALIVE_SECONDS=600) as server:
        for stalls in (False, True):
            listener = Slow(server, "/events/poll/t")
            await listener.opened()
            if stalls:
                await apublish("t", "ping", "x" * 1_000_000)
                await asyncio.sleep(
                    0.7
                )  # until the history check has found the events and the server has sent them
            before = server.log.read_text()
            listener.close()
            await until(lambda before=before: server.log.read_text() != before, seconds=2)
            assert server.log.read_text() == before + "closed: client_disconnected\n"


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_stalled_client_is_disconnected_and_no_other(kind: str) -> None:
    with narrow(
        kind, EVENTSOURCE_STREAM_STALL_SECONDS=1, EVENTSOURCE_KEEPALIVE_SECONDS=0.2
    ) as server:
        stalled = Slow(server, "/events/poll/t")
        await stalled.opened()
        other = await Connection.open(server.address, "/events/poll/t")
        decoder = Decoder()
        events = decoder.feed(await other.read())

        async def read_other(count: int) -> None:
            while len(events) < count:
                chunk = await other.read()
                assert chunk, "the other client was disconnected"
                events.extend(decoder.feed(chunk))

        # Read at the same time: a client that waits for the last event has stalled before.
        reading = asyncio.create_task(read_other(40))
        for n in range(40):
            await apublish("t", "ping", f"{n} " + "x" * 100_000)
        await reading
        assert [event.data.split()[0] for event in events] == [str(n) for n in range(40)]
        await until(lambda: "closed: stalled\n" in server.log.read_text(), seconds=6)
        if kind in ABORTABLE:
            await until(lambda: connections_to(server) == 1, seconds=2)
        await apublish("t", "ping", "after")
        await read_other(41)
        assert events[-1].data == "after"
        # The body has no end, so the client detects that it was disconnected.
        while not stalled.ended:
            await asyncio.to_thread(stalled.read)
        assert len(stalled.got) < 40 * 100_000
        assert server.log.read_text() == "closed: stalled\n"
        other.close()
        stalled.close()


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, 500_000) for kind in ABORTABLE),
        # As much as asyncio's transports accept without waiting. Daphne closes it by itself.
        *((kind, 30_000) for kind in ("uvicorn", "hypercorn")),
    ],
)
async def test_a_client_that_stalls_at_the_close_is_disconnected(kind: str, size: int) -> None:
    with narrow(kind, EVENTSOURCE_STREAM_STALL_SECONDS=1) as server:
        stalled = Slow(server, "/events/poll/t")
        await stalled.opened()
        await apublish("t", "close", "x" * size)
        await until(lambda: "closed: " in server.log.read_text(), seconds=4)
        await until(lambda: connections_to(server) == 0, seconds=4)
        assert "Traceback" not in server.log.read_text()


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_client_that_reads_again_in_time_receives_everything_once(kind: str) -> None:
    with narrow(kind, EVENTSOURCE_STREAM_STALL_SECONDS=30) as server:
        slow = Slow(server, "/events/poll/t")
        await slow.opened()
        ids = []
        for n in range(120):
            event = await apublish("t", "ping", f"{n} " + "x" * 50_000)
            ids.append(str(event.id))
        await apublish("t", "close", "end")
        while not slow.ended:
            await asyncio.to_thread(slow.read)
        events = Decoder().feed(slow.body)
        assert [event.id for event in events[:-1]] == ids
        assert [event.data.split()[0] for event in events] == [*map(str, range(120)), "end"]
        await until(lambda: server.log.read_text(), seconds=3)
        assert server.log.read_text() == "closed: token_closed\n"
        slow.close()


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ABORTABLE)
async def test_a_slow_client_that_makes_progress_is_not_disconnected(kind: str) -> None:
    with narrow(
        kind, EVENTSOURCE_STREAM_STALL_SECONDS=2, EVENTSOURCE_KEEPALIVE_SECONDS=0.5
    ) as server:
        slow = Slow(server, "/events/poll/t")
        await slow.opened()
        await apublish("t", "ping", "x" * 1_000_000)
        while b"xxx\n\n" not in slow.body:
            assert not slow.ended
            await read_slowly(slow)
        await apublish("t", "close", "end")
        while not slow.ended:
            await read_slowly(slow)
        events = Decoder().feed(slow.body)
        assert [len(event.data) for event in events] == [1_000_000, 3]
        await until(lambda: server.log.read_text(), seconds=3)
        assert server.log.read_text() == "closed: token_closed\n"
        slow.close()


async def read_slowly(listener: Slow) -> None:
    """Read a few kilobytes about ten times a second."""
    await asyncio.sleep(0.1)
    for _ in range(5):
        await asyncio.to_thread(listener.read)


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ABORTABLE)
async def test_a_slow_client_is_disconnected_after_its_stream_was_ended(kind: str) -> None:
    """It misses nothing when it reconnects."""
    with narrow(kind, EVENTSOURCE_STREAM_STALL_SECONDS=1) as server:
        slow = Slow(server, "/events/poll/t")
        await slow.opened()
        event = await apublish("t", "ping", "x" * 1_000_000)
        await read_slowly(slow)
        await aclose_streams(token="t")
        while not slow.ended:
            await read_slowly(slow)
        assert len(slow.body) < 1_000_000
        await until(lambda: connections_to(server) == 0)
        assert server.log.read_text() == "closed: close_requested\n"
        decoder = Decoder()
        assert decoder.feed(slow.body) == []
        again = await Connection.open(
            server.address, "/events/poll/t", Last_Event_ID=decoder.last_event_id
        )
        events: list[Any] = []
        while not events:
            events += decoder.feed(await again.read())
        assert [one.id for one in events] == [str(event.id)]
        again.close()


STALLED = 20
EVENTS = 900
BOUND = STALLED * 256 * 1024
ALLOWANCE = 8_000_000
"""The allowance for caches and fragmentation. The events alone are 270 MB."""
HELD_BY_SERVER = {"granian": STALLED * 417_792}
"""The default of ``--http1-buffer-size`` for each connection: docs/howto/deploy.rst names it."""


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("events", "size"), [(EVENTS, 15_000), (1, 1_000_000)], ids=["many", "large"]
)
@pytest.mark.parametrize("kind", SERVERS)
async def test_the_memory_of_stalled_clients_is_bounded(kind: str, events: int, size: int) -> None:
    """Twenty clients stall, with 13.5 MB or one large event for each."""
    quick = {"EVENTSOURCE_KEEPALIVE_SECONDS": 1}
    # The time does not count in which a busy machine publishes the events.
    patient = {"EVENTSOURCE_STREAM_STALL_SECONDS": 600}
    with narrow(kind, **quick, **patient) as server:
        warm = Slow(server, "/events/poll/warm")
        await warm.opened()
        readers = [Slow(server, "/events/poll/t") for _ in range(STALLED)]
        for reader in readers:
            await reader.opened()
        before = peak = memory_of(server)
        for n in range(events):
            await apublish("t", "ping", "x" * size)
            if n % 50 == 0:
                peak = max(peak, memory_of(server))
        for _ in range(30):
            await asyncio.sleep(0.05)
            peak = max(peak, memory_of(server))
        assert connections_to(server) == STALLED + 1
        print(f"{kind}: {(peak - before) / 1e6:.1f} MB for {STALLED} stalled readers")
        assert peak - before < BOUND + HELD_BY_SERVER.get(kind, 0) + ALLOWANCE
        for reader in [warm, *readers]:
            reader.close()
