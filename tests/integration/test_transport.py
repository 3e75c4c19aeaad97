"""Readers that stall: what they cost, how they are cut off, and what they get in the end."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

from django_eventsource import backpressure
from django_eventsource.backpressure import (
    Producer,
    cut,
    daphne_request,
    emptied,
    find_shutdown,
    find_transport,
    unsent,
)
from django_eventsource.control import aclose_streams
from django_eventsource.frames import Decoder
from django_eventsource.policies import AllowAny
from django_eventsource.publishing import apublish
from django_eventsource.shutdown import shutdown
from django_eventsource.signals import stream_closed
from tests.listeners import Connection
from tests.processes import DEADLINE, Server

SECONDS = 10
SERVERS = ["daphne", "uvicorn", "hypercorn", "gunicorn", "granian"]
CUTTING = ["daphne", "uvicorn", "hypercorn", "gunicorn"]
"""Those whose connections can be cut."""


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


async def test_a_producer_begins_ready() -> None:
    """It is registered, and nothing has been written yet."""
    request = Registers()
    producer = Producer(request)
    await asyncio.wait_for(producer.wait(), SECONDS)
    assert request.producers == [producer]


@pytest.mark.parametrize("how", ["resumeProducing", "stopProducing"])
async def test_a_producer_waits_while_it_is_paused(how: str) -> None:
    """Until the transport wants more, or is gone: then nothing is waited for."""
    producer = Producer(Registers())
    producer.pauseProducing()
    waiting = asyncio.ensure_future(producer.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    getattr(producer, how)()
    await asyncio.wait_for(waiting, SECONDS)


def test_a_producer_is_released_once() -> None:
    """Twisted does not take it twice."""
    request = Registers()
    producer = Producer(request)
    producer.release()
    producer.release()
    assert request.producers == []


@pytest.mark.parametrize("deleted", [False, True])
def test_a_producer_of_a_connection_that_has_gone(deleted: bool) -> None:
    """There is nothing to release it from: Twisted's request has lost its channel."""
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
    """Both asyncio's and Twisted's: counts who cuts it."""

    def __init__(self) -> None:
        self.aborts = 0

    def abort(self) -> None:
        self.aborts += 1

    abortConnection = abort  # noqa: N815


class Channel:
    def __init__(self, transport: object) -> None:
        self.transport = transport


class Request:
    """What is asked of Twisted's request."""

    def __init__(self, channel: object) -> None:
        self.channel = channel

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: N802
        """Register nothing."""


async def reply(request: object, message: object) -> None:
    """Stands for Daphne's handle_reply()."""


def hypercorn_send(protocol: Any, transport: Transport) -> Any:
    """Give the send of a request, in hypercorn's own objects."""
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


@pytest.mark.parametrize("server", CUTTING)
def test_the_connection_is_found(server: str) -> None:
    """Behind the send of each server whose connections can be cut, once."""
    transport = Transport()
    sends = {
        "daphne": functools.partial(reply, Request(Channel(transport))),
        "uvicorn": uvicorn_send(transport),
        "hypercorn": hypercorn_send(H11Protocol, transport),
        "gunicorn": gunicorn_send(transport),
    }
    cut(find_transport(sends[server]))
    assert transport.aborts == 1


def test_a_connection_that_carries_other_requests_is_not_cut() -> None:
    """HTTP/2: one reader that stalls must not end the others' requests."""
    assert find_transport(hypercorn_send(H2Protocol, Transport())) is None
    assert find_transport(gunicorn_send(Transport(), http2=True)) is None


@pytest.mark.parametrize("channel", [None, Channel(None), object()])
def test_a_request_of_daphne_without_a_connection(channel: object) -> None:
    """It has gone, or is a stream within an HTTP/2 connection."""
    send = functools.partial(reply, Request(channel))
    assert (daphne_request(send) is None) == (channel is None)
    assert find_transport(send) is None


@pytest.mark.parametrize("transport", [None, object()])
async def test_a_transport_that_cannot_be_asked(transport: object) -> None:
    """Nothing is cut, and nobody waits for it."""
    cut(transport)
    await emptied(transport)


async def test_a_transport_is_waited_for_until_it_is_empty() -> None:
    """asyncio's transports say when they hold too much, not when they hold nothing."""

    class Transport:
        held = [3, 2, 0]

        def get_write_buffer_size(self) -> int:
            return self.held.pop(0)

    transport = Transport()
    await emptied(transport)
    assert transport.held == []


async def test_what_the_reader_has_not_got_yet() -> None:
    """It is in the transport and with the operating system, and becomes less as it reads."""
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


def test_what_is_unsent_on_daphne() -> None:
    """Twisted's transport holds it in two places, besides the operating system."""
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


def test_an_operating_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what the transport holds is what is known."""
    monkeypatch.setattr(backpressure, "fcntl", None)
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
def test_what_is_not_known_to_be_unsent(transport: object) -> None:
    """A server that is not known says nothing of it."""
    assert unsent(transport) is None


@pytest.mark.parametrize("server", CUTTING)
def test_middleware_around_the_connection(server: str) -> None:
    """What wraps ``send`` in functions of its own is looked through."""
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


def test_middleware_of_other_forms() -> None:
    """A partial of a method that is given ``send``, and a method of what keeps it."""
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
    assert daphne_request(given) is not None
    assert find_transport(Responder(given).respond) is transport
    assert find_transport(Responder(uvicorn_send(transport)).respond) is transport


def test_middleware_with_an_empty_cell() -> None:
    """What a function is not closed over yet hides nothing else."""
    transport = Transport()
    send = functools.partial(reply, Request(Channel(transport)))

    async def wrapped(message: object) -> None:
        await send(message)
        await later(message)

    assert find_transport(wrapped) is transport
    later = send


def test_middleware_that_goes_in_a_circle() -> None:
    """The search ends."""

    async def one(message: object) -> None:
        await other(message)

    async def other(message: object) -> None:
        await one(message)

    assert find_transport(one) is None


async def unknown(message: object) -> None:
    """A send of no known server."""


class Cyclic:
    """An object whose send leads back to itself."""

    async def send(self, message: object) -> None:
        """Send nothing."""


@pytest.mark.parametrize(
    "send", [unknown, functools.partial(unknown), functools.partial(reply, 1, 2), Cyclic().send]
)
def test_a_send_of_an_unknown_server(send: object) -> None:
    """Nothing is found, and nothing breaks."""
    assert daphne_request(send) is None
    assert find_transport(send) is None
    assert find_shutdown(send) is None


# The server's shutdown


@pytest.fixture
def sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("taken", [False, True])
async def test_uvicorn_shuts_down_when_its_sockets_are_closed(taken: bool) -> None:
    """The server is found behind the handler of SIGTERM, also when the signal is taken."""
    server = uvicorn.Server(uvicorn.Config(unknown))
    server.servers = [await asyncio.start_server(unknown, "127.0.0.1", 0)]
    handler: Any = server.handle_exit
    signal.signal(
        signal.SIGTERM, functools.partial(shutdown.on_signal, handler) if taken else handler
    )
    ends = find_shutdown(uvicorn_send(Transport()))
    assert ends is not None
    assert not ends()
    assert not server.should_exit
    server.servers[0].close()
    assert ends()


async def test_hypercorn_shuts_down_when_its_worker_context_is_terminated() -> None:
    """All streams of a worker share the context."""
    send = hypercorn_send(H11Protocol, Transport())
    context = send.__self__.context = WorkerContext(None)
    ends = find_shutdown(send)
    assert ends is not None
    assert not ends()
    await context.terminated.set()
    assert ends()


def test_gunicorn_shuts_down_when_its_worker_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections of a worker share it."""
    ends = find_shutdown(gunicorn_send(Transport()))
    assert ends is not None
    assert not ends()
    monkeypatch.setattr(Worker, "alive", False)
    assert ends()


# Real servers


class Telling(AllowAny):
    """Lets everybody in, and tells on standard error why streams end: for server processes."""

    def __init__(self) -> None:
        super().__init__()
        stream_closed.connect(tell, dispatch_uid="tell")


def tell(reason: object, **kwargs: object) -> None:
    """Say why a stream ended."""
    print(f"closed: {reason}", file=sys.stderr, flush=True)


TELLING = {"EVENTSOURCE_POLICY": f"{__name__}.Telling"}


@contextmanager
def narrow(kind: str, **overrides: Any) -> Iterator[Server]:
    """Run a server whose sockets hold little, where it takes a socket of ours."""
    server = Server(kind, **{**TELLING, **overrides})
    try:
        if kind != "granian":
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.start()
        yield server
    finally:
        # granian's workers outlive their supervisor when that is killed.
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
    """Close what a test that fails leaves open."""
    yield
    while SOCKETS:
        SOCKETS.pop().close()


class Slow:
    """A listener that reads when it is told to, and whose socket holds little."""

    def __init__(self, server: Server, path: str) -> None:
        self.socket = socket.socket()
        SOCKETS.append(self.socket)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(DEADLINE)
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
        """Read up to the stream's first bytes."""
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
    """How many connections the server has."""
    return sum(
        one.status != psutil.CONN_LISTEN and one.laddr.port == server.port
        for process in processes_of(server)
        for one in process.net_connections("tcp")
    )


def memory_of(server: Server) -> int:
    return sum(process.memory_info().rss for process in processes_of(server))


async def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


real = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_listener_that_hangs_up_is_noticed_at_once(kind: str) -> None:
    """Also one that had stalled: nothing needs to be published for that."""
    with narrow(kind, EVENTSOURCE_KEEPALIVE_SECONDS=600) as server:
        for stalls in (False, True):
            listener = Slow(server, "/events/poll/t")
            await listener.opened()
            if stalls:
                await apublish("t", "ping", "x" * 1_000_000)
                await asyncio.sleep(0.7)  # let the head check find it, and the server send
            before = server.log.read_text()
            listener.close()
            await until(lambda before=before: server.log.read_text() != before, 2)
            assert server.log.read_text() == before + "closed: left\n"


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_reader_that_stalls_is_cut_off(kind: str) -> None:
    """After the time that is set, and nobody else: others get everything meanwhile."""
    with narrow(
        kind, EVENTSOURCE_STREAM_STALL_SECONDS=1, EVENTSOURCE_KEEPALIVE_SECONDS=0.2
    ) as server:
        stalled = Slow(server, "/events/poll/t")
        await stalled.opened()
        other = await Connection.open(server.address, "/events/poll/t")
        decoder = Decoder()
        events = decoder.feed(await other.read())
        for n in range(40):
            await apublish("t", "ping", f"{n} " + "x" * 100_000)
        while len(events) < 40:
            events += decoder.feed(await other.read())
        assert [event.data.split()[0] for event in events] == [str(n) for n in range(40)]
        await until(lambda: "closed: stalled\n" in server.log.read_text(), 6)
        if kind in CUTTING:
            await until(lambda: connections_to(server) == 1, 2)
        await apublish("t", "ping", "after")
        while events[-1].data != "after":
            events += decoder.feed(await other.read())
        # Whoever was cut off can tell: nothing pretends to be a whole response.
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
        *((kind, 500_000) for kind in CUTTING),
        # As much as asyncio's transports take on without waiting; Daphne drops it by itself.
        *((kind, 30_000) for kind in ("uvicorn", "hypercorn")),
    ],
)
async def test_a_reader_that_stalls_on_a_close_is_cut_off(kind: str, size: int) -> None:
    """The stream has ended, its bytes have not been taken: the connection must go too."""
    with narrow(kind, EVENTSOURCE_STREAM_STALL_SECONDS=1) as server:
        stalled = Slow(server, "/events/poll/t")
        await stalled.opened()
        await apublish("t", "close", "x" * size)
        await until(lambda: "closed: " in server.log.read_text(), 4)
        await until(lambda: connections_to(server) == 0, 4)
        assert "Traceback" not in server.log.read_text()


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_slow_reader_gets_everything(kind: str) -> None:
    """Whoever reads again before it is cut off has missed nothing, and gets nothing twice."""
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
        await until(lambda: server.log.read_text(), 3)
        assert server.log.read_text() == "closed: finished\n"
        slow.close()


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", CUTTING)
async def test_a_reader_that_is_slow_all_the_time_is_not_cut_off(kind: str) -> None:
    """One large event takes it far longer than a stalled reader has, and it gets it whole."""
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
        await until(lambda: server.log.read_text(), 3)
        assert server.log.read_text() == "closed: finished\n"
        slow.close()


async def read_slowly(listener: Slow) -> None:
    """Read a few kilobytes, some ten times a second."""
    await asyncio.sleep(0.1)
    for _ in range(5):
        await asyncio.to_thread(listener.read)


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", CUTTING)
async def test_a_slow_reader_is_cut_off_when_its_stream_was_told_to_end(kind: str) -> None:
    """It keeps the connection no longer than one that stalls, and misses nothing."""
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
        assert server.log.read_text() == "closed: closed\n"
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
"""What the server's caches and fragmentation may add: the events alone are 270 MB."""
HELD_BY_SERVER = {"granian": STALLED * 417_792}
"""Its ``--http1-buffer-size`` for each connection, by default: docs/guarantees.rst names it."""


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("events", "size"), [(EVENTS, 15_000), (1, 1_000_000)], ids=["many", "large"]
)
@pytest.mark.parametrize("kind", SERVERS)
async def test_readers_that_stall_cost_bounded_memory(kind: str, events: int, size: int) -> None:
    """Twenty of them, and 13.5 MB for each, or one large event.

    The server holds a little, and no more.
    """
    quick = {"EVENTSOURCE_KEEPALIVE_SECONDS": 1}
    # However long a busy machine takes to publish so much.
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
