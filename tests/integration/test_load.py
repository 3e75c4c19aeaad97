"""Tests of the load generator against servers that send all kinds of streams."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from benchmarks import load

TIMEOUT = 30
"""Seconds that a run gets: far more than it takes. One that needs them all fails its test."""

SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TORN = ("-DREAD_BYTES=1", "-DMAX_SAMPLES=8")
"""Every read gives one byte, so that all is cut everywhere; of many samples eight are kept."""


# ---- The programs


@pytest.fixture(scope="session")
def built() -> Path:
    """Return the generator as the benchmarks use it."""
    try:
        load.compiler()
    except load.NoCompilerError as error:
        pytest.skip(str(error))
    return load.build()


@pytest.fixture(scope="session")
def sanitizer(built: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the compiler's flags for its sanitizers, or none where they do not work."""
    program = tmp_path_factory.mktemp("sanitizer") / "nothing"
    source = program.with_suffix(".c")
    source.write_text("int main(void) { return 0; }\n")
    command = [*load.compiler(), *SANITIZE, "-o", str(program), str(source)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        return []
    works = subprocess.run([program], capture_output=True).returncode == 0
    return list(SANITIZE) if works else []


@pytest.fixture(scope="session")
def torn(sanitizer: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a generator that reads byte by byte, with sanitizers if they work."""
    return load.compile_to(tmp_path_factory.mktemp("torn") / "sseload", *TORN, *sanitizer)


@pytest.fixture(params=["built", "torn"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``load.run`` use each of the programs."""
    path: Path = request.getfixturevalue(request.param)
    monkeypatch.setattr(load, "build", lambda: path)
    return path


# ---- The server


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def token(self) -> str:
        return self.path.rpartition("/")[2]


class Client:
    """One connection to the server, and its last request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.request: Request
        self.keep_alive = True

    async def read_head(self) -> bool:
        """Read a request except for its body. Return false if the connection is closed instead."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.partition(": ") for line in lines)
        headers = {name.lower(): value for name, _, value in pairs}
        self.request = Request(method, path, headers, b"")
        return True

    async def read_body(self) -> None:
        length = int(self.request.headers.get("content-length", "0"))
        self.request.body = await self.reader.readexactly(length)

    async def send(self, *pieces: bytes) -> None:
        """Send pieces, each in a packet of its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def until_gone(self) -> None:
        """Wait until the generator has closed its side."""
        with suppress(ConnectionError):
            assert await self.reader.read() == b""

    def reset(self) -> None:
        """Close with a reset (RST), as a killed process does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Step = Callable[["Site", Client], Awaitable[None]]


class Site:
    """A server on a real socket: one function handles every GET, another one every POST."""

    def __init__(self, get: Step, post: Step | None = None, *, bodies: bool = True) -> None:
        self.get = get
        self.post = post
        self.bodies = bodies
        self.requests: list[Request] = []
        self.connections = 0
        self.streams: dict[str, list[Client]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._server.close()
        # The generator has left: all come to their end.
        async with asyncio.timeout(TIMEOUT):
            while self._tasks:
                await asyncio.wait(self._tasks)
        if kind is None and self._errors:
            raise self._errors[0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        client = Client(reader, writer)
        try:
            await self._play(client)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the generator has left
        except Exception as error:  # noqa: BLE001
            self._errors.append(error)
        finally:
            writer.close()

    async def _play(self, client: Client) -> None:
        while client.keep_alive and await client.read_head():
            self.requests.append(client.request)
            if client.request.method == "GET":
                client.keep_alive = False
                await self.get(self, client)
            else:
                if self.bodies:
                    await client.read_body()
                assert self.post is not None
                await self.post(self, client)

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.requests)


async def run(site: Site, *, timed_out: bool = False, **options: Any) -> dict[str, Any]:
    """Run the generator on a site while the site serves."""
    options = {"timeout": TIMEOUT, **options}
    result = await asyncio.to_thread(load.run, port=site.port, **options)
    assert result["timed_out"] is timed_out
    return result


# ---- What it sends

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def chunks(*pieces: bytes) -> list[bytes]:
    return [chunk(piece) for piece in pieces]


def odd_chunk(data: bytes) -> bytes:
    """Return a chunk with zeros, upper case, and an extension that looks like an event."""
    return b'%04X ; note="\ndata: T%d."\r\n%s\r\n'.replace(b"\n", b"", 1) % (
        len(data),
        time.time_ns(),
        data,
    )


def event(payload: bytes) -> bytes:
    return b"id: 7\nevent: ping\ndata: %s\n\n" % payload


def marker() -> bytes:
    return b"T%d." % time.time_ns()


def in_cr(payload: bytes) -> bytes:
    return event(payload).replace(b"\n", b"\r")


def in_crlf(payload: bytes) -> bytes:
    return event(payload).replace(b"\n", b"\r\n")


def no_data(payload: bytes) -> bytes:
    names = [b": data:", b"id:", b"xdata:", b" data:", b"Data:", b"data", b"data2:", b"dat:"]
    return b"".join(b"%s %s\n" % (name, payload) for name in names)


@dataclass(frozen=True)
class Style:
    """How a server sends its streams: the bytes on the wire for a payload."""

    wire: Callable[[bytes], Iterable[bytes]]
    head: bytes = CHUNKED


STYLES = {
    "whole": Style(lambda p: chunks(event(p))),
    "byte by byte": Style(lambda p: chunks(*(bytes([byte]) for byte in event(p)))),
    "cut in the marker": Style(
        lambda p: chunks(b"da", b"ta: T", p[1:9], p[9:20], p[20:21], p[21:] + b"\n", b"\n")
    ),
    "cut in one write": Style(
        lambda p: [b"".join(chunks(b"data", b":", p[:1], p[1:12], p[12:] + b"\n", b"\n"))]
    ),
    "crlf": Style(lambda p: chunks(in_crlf(p))),
    "crlf in two chunks": Style(lambda p: chunks(*re.split(rb"(?<=\r)", in_crlf(p)))),
    "cr": Style(lambda p: chunks(in_cr(p))),
    "cr, byte by byte": Style(lambda p: chunks(*(bytes([byte]) for byte in in_cr(p)))),
    "no data": Style(lambda p: chunks(no_data(p) + event(p))),
    "several data lines": Style(lambda p: chunks(b"data: a\ndata: %s\ndata: T1.\n\n" % p)),
    "several events": Style(lambda p: chunks(b"data: a\n\n" + event(p) + b"data: b\n\ndata: c\n")),
    "blank line comes later": Style(lambda p: chunks(b"\ndata: %s\n" % p)),
    "no space": Style(lambda p: chunks(b"data:%s\n\n" % p)),
    "json": Style(lambda p: chunks(b'data: {"at": "TT12 T%s"}\n\n' % p)),
    "odd chunks": Style(lambda p: [odd_chunk(event(p)[:30]), odd_chunk(event(p)[30:])]),
    "like chunks": Style(lambda p: chunks(b"5\r\nhello\r\n0\r\n\r\n" + event(p))),
    "until the close": Style(lambda p: [event(p)], UNTIL_CLOSE),
    "until the close, crlf": Style(lambda p: re.split(rb"(?<=\r)", in_crlf(p)), UNTIL_CLOSE),
}


def listening(head: bytes) -> Step:
    """Open a stream that lasts until the generator closes it."""

    async def step(site: Site, client: Client) -> None:
        await client.send(head)
        site.streams[client.request.token].append(client)
        await client.until_gone()

    return step


def publishing(wire: Callable[[bytes], Iterable[bytes]], answer: bytes = NO_CONTENT) -> Step:
    """Send a publication to all streams of its token, then respond to it."""

    async def step(site: Site, client: Client) -> None:
        for stream in site.streams[client.request.token]:
            await stream.send(*wire(client.request.body))
        await client.send(answer)

    return step


def site_of(style: Style, answer: bytes = NO_CONTENT) -> Site:
    return Site(listening(style.head), publishing(style.wire, answer))


def sending(*pieces: bytes, hold: bool = False) -> Step:
    """Send the same data to every stream, and end it, or leave it open."""

    async def step(site: Site, client: Client) -> None:
        await client.send(*pieces)
        if hold:
            await client.until_gone()

    return step


# ---- Deliveries


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
async def test_every_delivery_counts_once(program: Path, style: Style) -> None:
    """The stream is split anywhere, and contains other data too."""
    async with site_of(style) as site:
        result = await run(site, listen="/t", listeners=3, publish="/t", events=7)
    assert result["listeners"] == result["opened"] == 3
    assert result["statuses"] == {"200": 3}
    assert result["published"] == result["publish_ok"] == 7
    assert result["delivered"] == result["expected"] == 21
    assert (result["lost"], result["extra"]) == (0, 0)
    assert result["per_listener_min"] == result["per_listener_max"] == 7
    assert (result["closed_early"], result["malformed"]) == (0, 0)
    for name in ("latency_ms", "publish_latency_ms"):
        values = [result[name][key] for key in ("p50", "p90", "p99", "max")]
        assert 0 <= values[0] <= values[1] <= values[2] <= values[3] < TIMEOUT * 1000


NO_DELIVERIES = {
    "no data": lambda p: no_data(p) + b"\n",
    "eighteen digits": lambda p: event(b"T" + p[2:]),
    "twenty digits": lambda p: event(b"T1" + p[1:]),
    "no dot": lambda p: event(p.replace(b".", b"")),
    "another dot": lambda p: event(p.replace(b".", b",")),
    "no T": lambda p: event(p[1:]),
    "space after the T": lambda p: event(b"T " + p[1:]),
    "T in the digits": lambda p: event(p[:9] + b"T" + p[9:]),
    "letter in the digits": lambda p: event(p[:9] + b"a" + p[9:]),
    "cut by a line end": lambda p: event(p[:9] + b"\ndata: " + p[9:]),
    "cut by a line end, no space": lambda p: event(p[:9] + b"\ndata:" + p[9:]),
    "cut by a CR": lambda p: event(p[:9] + b"\r" + p[9:]),
    "no line end": lambda p: b"data: " + p,
}


@pytest.mark.parametrize("body", NO_DELIVERIES.values(), ids=NO_DELIVERIES)
async def test_data_without_a_complete_marked_line_does_not_count(
    program: Path, body: Callable[[bytes], bytes]
) -> None:
    """The run ends at its time limit."""
    async with site_of(Style(lambda p: chunks(body(p)))) as site:
        result = await run(site, listen="/t", publish="/t", quiet_seconds=0.1)
    assert result["publish_ok"] == 1
    assert result["bytes_received"] > len(CHUNKED)
    assert (result["delivered"], result["expected"], result["lost"]) == (0, 1, 1)
    assert result["latency_ms"] is None
    assert result["cpu_us_per_delivery"] is None


async def test_a_lost_and_a_repeated_event_are_counted_separately(program: Path) -> None:
    """One stream misses an event, and another one receives an event twice."""

    async def post(site: Site, client: Client) -> None:
        first, second = site.streams["t"]
        if site.count("POST") != 2:
            await first.send(chunk(event(client.request.body)))
        else:
            await second.send(chunk(event(client.request.body)))
        await second.send(chunk(event(client.request.body)))
        await client.send(NO_CONTENT)

    async with Site(listening(CHUNKED), post) as site:
        result = await run(
            site, listen="/t", listeners=2, publish="/t", events=3, quiet_seconds=0.1
        )
    assert (result["delivered"], result["expected"]) == (6, 6)
    assert (result["lost"], result["extra"]) == (1, 1)
    assert (result["per_listener_min"], result["per_listener_max"]) == (2, 4)


async def test_the_kept_latencies_represent_all_of_them(program: Path) -> None:
    """Here the few slow ones are the maximum."""

    def wire(payload: bytes) -> list[bytes]:
        count = next(counter)
        late = 40_000 if count == 77 else 20_000 if count % 2 else 10_000
        return chunks(event(b"T%d." % (time.time_ns() - late * 1_000_000)))

    counter = iter(range(100))
    async with site_of(Style(wire)) as site:
        result = await run(site, listen="/t", publish="/t", events=100)
    assert result["delivered"] == 100
    # Every kept one is a multiple of a power of two: an even one, where only eight are kept.
    usual = 10_000 if program.parent.name.startswith("torn") else 20_000
    latency = result["latency_ms"]
    assert latency["p50"] >= 10_000
    assert usual <= latency["p90"] < usual + 9_000
    assert latency["max"] >= 40_000


@pytest.mark.parametrize(
    ("listeners", "tokens", "events", "delivered", "least", "most"),
    [(6, 3, 9, 18, 3, 3), (4, 3, 5, 7, 1, 2), (2, 3, 3, 2, 1, 1), (1, 2, 1, 1, 1, 1)],
)
async def test_streams_and_publications_use_the_tokens_in_turn(
    program: Path,
    listeners: int,
    tokens: int,
    events: int,
    delivered: int,
    least: int,
    most: int,
) -> None:
    async with site_of(STYLES["whole"]) as site:
        result = await run(
            site,
            listen="/events/%d/t%d",
            publish="/%d/t%d",
            listeners=listeners,
            tokens=tokens,
            events=events,
        )
    paths = Counter((request.method, request.path) for request in site.requests)
    wanted = Counter(("GET", f"/events/{n % tokens}/t{n % tokens}") for n in range(listeners))
    wanted.update(("POST", f"/{n % tokens}/t{n % tokens}") for n in range(events))
    assert paths == wanted
    assert result["delivered"] == result["expected"] == delivered
    assert (result["lost"], result["extra"]) == (0, 0)
    assert (result["per_listener_min"], result["per_listener_max"]) == (least, most)


async def test_without_a_load_events_count_until_the_end_of_the_stay(program: Path) -> None:
    stream = [chunk(event(marker())) for _ in range(3)]
    async with Site(sending(CHUNKED, *stream, hold=True)) as site:
        result = await run(site, listen="/t", listeners=2, stay=0.3)
    assert (result["delivered"], result["expected"], result["extra"]) == (6, 0, 6)
    assert result["published"] == 0
    assert result["closed_early"] == 0
    assert result["publish_latency_ms"] is None


async def test_events_that_exceed_the_socket_buffers_are_counted(built: Path) -> None:
    """Both the publications and the deliveries are that large."""
    size = 12_000_000
    async with site_of(STYLES["whole"]) as site:
        result = await run(site, listen="/t", publish="/t", events=2, publishers=2, size=size)
    bodies = [request.body for request in site.requests if request.method == "POST"]
    assert [len(body) for body in bodies] == [size, size]
    assert all(re.fullmatch(rb"T\d{19}\.x+", body) for body in bodies)
    assert (result["delivered"], result["lost"], result["publish_failed"]) == (2, 0, 0)
    assert result["bytes_received"] > 2 * size


# ---- Replay

REPLAYED = [
    (b"data: a\n\n", 1),
    (b"data\n\n", 1),
    (b"data:\n\n", 1),
    (b"id: 1\nevent: ping\ndata: a\ndata: b\n\n", 1),
    (b"data: a\r\n\r\n", 1),
    (b"data: a\r\ndata: b\r\n\r\n", 1),
    (b"data: a\r\r", 1),
    (b": this LF is a line of its own, unless it follows the CR\n", 0),
    (b"data: a\r\n\n", 1),
    (b"data: a\n\r\n", 1),
    (b"data: a\n\r", 1),
    (b": and a CR and a CR are two\r", 0),
    (b"data: a\n: comment\n\n", 1),
    (b"data: a\n\n\n\n\r\n\r\n\r\r", 1),
    (b": the LF after a CR was no blank line of its own\ndata: a\rid: 3\r\n\n", 1),
    (b"id: 2\nevent: ping\n\n", 0),
    (b"datas: a\n\n", 0),
    (b"dat\n\n", 0),
    (b"Data: a\n\n", 0),
    (b" data: a\n\n", 0),
    (b":data: a\n\n", 0),
    (b"event: data:\n\n", 0),
    (b"retry: 1000\n\n: keepalive\n", 0),
    (b"data: T1234567890123456789.\n\n", 1),
]
BODY = b"".join(block for block, _ in REPLAYED)
TOTAL = sum(count for _, count in REPLAYED)


def random_chunks(data: bytes) -> list[bytes]:
    borders = sorted(random.Random(7).sample(range(1, len(data)), 60))
    return chunks(*(data[a:b] for a, b in zip([0, *borders], [*borders, len(data)], strict=True)))


def with_length(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


BODIES: dict[str, Callable[[bytes], list[bytes]]] = {
    "one chunk": lambda data: [CHUNKED, chunk(data)],
    "random chunks": lambda data: [CHUNKED, *random_chunks(data)],
    "random chunks in one write": lambda data: [CHUNKED + b"".join(random_chunks(data))],
    "a chunk for each byte": lambda data: [CHUNKED, *chunks(*(bytes([byte]) for byte in data))],
    "chunked and ended": lambda data: [CHUNKED, chunk(data), b"0\r\nX-A: data: b\r\n\r\n"],
    "with something behind": lambda data: [
        CHUNKED + chunk(data) + b"0\r\n\r\n" + chunk(b"data: a\n\n")
    ],
    "with something behind its length": lambda data: [with_length(data) + b"\n\ndata: a\n\n"],
    "with its length": lambda data: [with_length(data)],
    "until the close": lambda data: [UNTIL_CLOSE, data],
    "after early hints": lambda data: [
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\n" + CHUNKED,
        chunk(data),
    ],
}


@pytest.mark.parametrize("send", BODIES.values(), ids=BODIES)
async def test_a_replay_that_is_cut_off_counts_what_was_complete(
    program: Path, send: Callable[[bytes], list[bytes]]
) -> None:
    async with Site(sending(*send(BODY + b"data: cut off\n"))) as site:
        result = await run(site, listen="/t", listeners=3, expect=TOTAL + 1)
    assert (result["opened"], result["closed_early"], result["malformed"]) == (3, 3, 0)
    assert result["statuses"] == {"200": 3}
    assert result["per_listener_min"] == result["per_listener_max"] == TOTAL
    assert result["delivered"] == 3 * TOTAL
    assert (result["lost"], result["extra"]) == (3, 0)
    assert result["latency_ms"] is None


async def test_a_replay_ends_when_every_stream_has_received_it(program: Path) -> None:
    """The generator does not wait for open streams, nor for responses that are not streams."""

    async def get(site: Site, client: Client) -> None:
        if client.request.token == "1":
            await client.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif client.request.token == "2":
            await client.send(CHUNKED)
        else:
            await sending(CHUNKED, chunk(BODY), hold=True)(site, client)

    async with Site(get) as site:
        result = await run(site, listen="/%d", listeners=4, tokens=4, expect=TOTAL)
    assert (result["opened"], result["closed_early"]) == (3, 1)
    assert result["statuses"] == {"200": 3, "404": 1}
    assert (result["expected"], result["delivered"]) == (3 * TOTAL, 2 * TOTAL)
    assert (result["lost"], result["extra"]) == (TOTAL, 0)
    assert (result["per_listener_min"], result["per_listener_max"]) == (0, TOTAL)


async def test_a_complete_stream_may_close_before_the_others(program: Path) -> None:
    left = asyncio.Event()

    async def get(site: Site, client: Client) -> None:
        if client.request.token == "0":
            await client.send(*BODIES["chunked and ended"](BODY))
            await client.until_gone()
            left.set()
        else:
            await client.send(CHUNKED)
            await left.wait()
            await client.send(chunk(BODY))
            await client.until_gone()

    async with Site(get) as site:
        result = await run(site, listen="/%d", listeners=2, tokens=2, expect=TOTAL)
    assert (result["opened"], result["closed_early"]) == (2, 1)
    assert (result["delivered"], result["lost"], result["extra"]) == (2 * TOTAL, 0, 0)


async def test_events_after_the_load_do_not_count(
    torn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first such event ends the run. It is not read together with other events."""
    monkeypatch.setattr(load, "build", lambda: torn)
    async with Site(sending(CHUNKED, chunk(BODY), hold=True)) as site:
        result = await run(site, listen="/t", expect=1, stay=0.3)
    assert (result["delivered"], result["extra"]) == (1, 0)
    assert result["bytes_received"] == len(CHUNKED + chunk(BODY))


# ---- Streams that go wrong


async def test_other_statuses_are_counted_and_the_first_is_named(program: Path) -> None:
    answers = [CHUNKED, NO_CONTENT, *(b"HTTP/1.1 %d No\r\n\r\nno" % n for n in (404, 503, 404))]

    async def get(site: Site, client: Client) -> None:
        await client.send(answers[int(client.request.token)])
        if client.request.token == "0":
            site.streams["0"].append(client)
            await client.until_gone()

    async with Site(get, publishing(STYLES["whole"].wire)) as site:
        result = await run(
            site, listen="/%d", publish="/%d", tokens=5, listeners=5, events=10, at_once=1
        )
    assert result["statuses"] == {"200": 1, "204": 1, "404": 2, "503": 1}
    assert result["first_bad_status"] == 204
    assert (result["opened"], result["closed_early"]) == (1, 0)
    assert result["publish_ok"] == 10
    assert (result["expected"], result["delivered"], result["lost"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("sent", "opened"),
    [
        (b"", 0),
        (b"HTTP/1.1 200 O", 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", 0),
        (CHUNKED, 1),
        (CHUNKED + b"7", 1),
        (CHUNKED + b"7\r\ndata", 1),
        (CHUNKED + b"8\r\ndata: \n\n\r\n", 1),
        (CHUNKED + b"0\r\n\r\n", 1),
        (CHUNKED + b"0\r\n\r\nHTTP/1.1 404 No\r\n\r\n", 1),
        (UNTIL_CLOSE, 1),
        (UNTIL_CLOSE + b"data", 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ndata: \n", 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_stream_that_closes_early_is_counted_once(
    program: Path, sent: bytes, opened: int, reset: bool
) -> None:
    """The close comes at any place of the stream."""

    async def get(site: Site, client: Client) -> None:
        if client.request.token == "1":
            await listening(CHUNKED)(site, client)
        elif reset:
            client.reset()  # what was sent before would be lost now and then
        else:
            await client.send(sent)

    async with Site(get, publishing(STYLES["whole"].wire)) as site:
        result = await run(site, listen="/%d", publish="/%d", tokens=2, listeners=4, events=2)
    opened = 0 if reset else opened
    assert result["closed_early"] == 2
    assert result["opened"] == 2 + 2 * opened
    assert result["statuses"] == {"200": 2 + 2 * opened}
    assert result["malformed"] == 0
    assert (result["delivered"], result["lost"]) == (2, 2 * opened)


@pytest.mark.parametrize(
    ("sent", "opened"),
    [
        (b"220 mail.example ESMTP\r\n", 0),
        (b"HTTP/1.1 20\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\ndata: a\n\n", 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9, 9\r\n\r\ndata: a\n\n", 0),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 12_000 + b"\r\n", 0),
        (CHUNKED + b"data: a\n\n", 1),
        (CHUNKED + b"\r\ndata: a\n\n", 1),
        (CHUNKED + b"9z\r\ndata: a\n\n\r\n", 1),
        (CHUNKED + b"-9\r\ndata: a\n\n\r\n", 1),
        (CHUNKED + b"1" + b"0" * 15 + b"\r\ndata: a\n\n", 1),
        (CHUNKED + b"3\r\ndata: a\n\n\r\n", 1),
        (CHUNKED + b"3\r\n: xyz\r\n0\r\n\r\n", 1),
        (CHUNKED + b"0\r\n" + b"X: x\r\n" * 12_000, 1),
    ],
)
async def test_responses_that_are_not_http_are_counted(
    program: Path, sent: bytes, opened: int
) -> None:
    async with Site(sending(sent, hold=True)) as site:
        result = await run(site, listen="/t", listeners=2, expect=1)
    assert (result["malformed"], result["closed_early"]) == (2, 2)
    assert (result["opened"], result["delivered"]) == (2 * opened, 0)


async def test_a_server_that_does_not_run_is_an_error(built: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for path in ("listen", "publish"):
            with pytest.raises(
                load.LoadError, match=f"cannot connect to 127.0.0.1 port {port}: .* refused"
            ):
                load.run(port=port, timeout=TIMEOUT, **{path: "/t"})


# ---- Publications

ANSWERS = {
    "no content": (NO_CONTENT, False),
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length:5 \r\n\r\nhello", False),
    "no length": (
        b"HTTP/1.1 202 OK\r\nContent-Length: 0\r\n"
        b"Content-Lengthy: 7\r\nConnection-: close\r\n\r\n",
        False,
    ),
    "chunked": (
        b"HTTP/1.1 201 Created\r\ntransfer-encoding: Chunked\r\n\r\n"
        + b"".join(chunks(b"0\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"))
        + b"0\r\n\r\n",
        False,
    ),
    "trailers": (CHUNKED + chunk(b"a") + b"0;x=y\r\nX-A: b\r\nX-B: c\r\n\r\n", False),
    "continue": (b"HTTP/1.1 100 Continue\r\n\r\n" + NO_CONTENT, False),
    "old, kept alive": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na",
        False,
    ),
    "closing": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", True),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", True),
    "until the close": (b"HTTP/1.1 200 OK\r\n\r\nhello", True),
}


def closing(step: Step) -> Step:
    """Run a step, and close the connection."""

    async def closing_step(site: Site, client: Client) -> None:
        await step(site, client)
        client.keep_alive = False

    return closing_step


@pytest.mark.parametrize(("answer", "closes"), ANSWERS.values(), ids=ANSWERS)
async def test_every_kind_of_successful_response_to_a_publication_is_accepted(
    program: Path, answer: bytes, closes: bool
) -> None:
    """Connections are kept where the response allows it."""
    post = publishing(STYLES["whole"].wire, answer)
    async with Site(listening(CHUNKED), closing(post) if closes else post) as site:
        result = await run(
            site, listen="/t", listeners=2, publish="/t", events=6, publishers=2, rate=0
        )
    assert (result["published"], result["publish_ok"], result["publish_failed"]) == (6, 6, 0)
    assert site.count("POST") == 6
    assert sum(result["publish_statuses"].values()) == 6
    assert result["delivered"] == result["expected"] == 12
    if closes:
        assert site.connections >= 2 + 6
    else:
        assert site.connections == 2 + 2


FAILURES = {
    "no": (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", False),
    "no, closing": (b"HTTP/1.1 500 No\r\nConnection: close\r\n\r\nno", True),
    "elsewhere": (b"HTTP/1.1 302 No\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", False),
    "nothing": (b"", True),
    "half a head": (b"HTTP/1.1 200 OK\r\n", True),
    "half a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na", True),
    "half a chunk": (CHUNKED + b"3\r\na", True),
    "no last chunk": (CHUNKED + chunk(b"a"), True),
    "malformed": (CHUNKED + b"no size\r\n", True),
    "only to continue": (b"HTTP/1.1 100 Continue\r\n\r\n", True),
}


@pytest.mark.parametrize(("answer", "closes"), FAILURES.values(), ids=FAILURES)
async def test_a_failed_publication_is_counted_and_the_next_one_is_sent(
    program: Path, answer: bytes, closes: bool
) -> None:
    """Every second publication fails. No stream has to receive it."""

    async def post(site: Site, client: Client) -> None:
        if site.count("POST") % 2:
            await publishing(STYLES["whole"].wire)(site, client)
        else:
            await client.send(answer)
            client.keep_alive = not closes

    async with Site(listening(CHUNKED), post) as site:
        result = await run(site, listen="/t", listeners=2, publish="/t", events=6)
    assert (result["published"], result["publish_ok"], result["publish_failed"]) == (6, 3, 3)
    assert result["delivered"] == result["expected"] == 6
    assert result["malformed"] == (3 if b"no size" in answer else 0)


async def test_a_publication_that_is_refused_while_it_is_sent_has_failed(program: Path) -> None:
    """The response arrives, or the connection breaks, before the request is complete."""
    refusal = b"HTTP/1.1 413 Too Much\r\nContent-Length: 0\r\n\r\n"

    async def post(site: Site, client: Client) -> None:
        await client.send(refusal)
        client.keep_alive = False

    async with Site(listening(CHUNKED), post, bodies=False) as site:
        result = await run(site, publish="/t", events=2, size=20_000_000)
    assert (result["published"], result["publish_ok"], result["publish_failed"]) == (2, 0, 2)
    assert site.count("POST") == 2


async def test_a_connection_closed_between_publications_is_not_a_failure(program: Path) -> None:
    async with Site(listening(CHUNKED), closing(sending(NO_CONTENT))) as site:
        result = await run(site, publish="/t", events=3, rate=4)
    assert (result["publish_ok"], result["publish_failed"]) == (3, 0)
    assert site.connections >= 3


async def test_a_connection_with_data_after_the_response_is_not_used_again(built: Path) -> None:
    async with site_of(STYLES["whole"], NO_CONTENT + b"and more") as site:
        result = await run(site, listen="/t", publish="/t", events=2, rate=10)
    assert (result["publish_ok"], result["delivered"], result["malformed"]) == (2, 2, 2)
    assert site.connections == 1 + 2


async def test_the_requests_are_valid_http(program: Path) -> None:
    """The server checks each of them."""
    async with site_of(STYLES["whole"]) as site:
        await run(
            site,
            listen="/events/poll/t",
            publish="/events/ping/t",
            listeners=2,
            size=40,
            events=2,
            header=["Authorization: Bearer abc", "X-Colour: grün"],
            listen_header="Last-Event-ID: 17",
            content_type="application/json",
        )
    gets = [request for request in site.requests if request.method == "GET"]
    posts = [request for request in site.requests if request.method == "POST"]
    assert (len(gets), len(posts)) == (2, 2)
    for request in site.requests:
        assert request.headers["host"] == f"127.0.0.1:{site.port}"
        assert request.headers["authorization"] == "Bearer abc"
        assert request.headers["x-colour"] == "grün"
    for request in gets:
        assert request.headers["accept"] == "text/event-stream"
        assert request.headers["last-event-id"] == "17"
    for request in posts:
        assert "last-event-id" not in request.headers
        assert request.headers["content-type"] == "application/json"
        assert re.fullmatch(rb"T\d{19}\.x{19}", request.body)


# ---- Time


async def test_all_publications_are_made_and_the_last_not_before_its_time(program: Path) -> None:
    async with site_of(STYLES["whole"]) as site:
        result = await run(
            site, listen="/t", publish="/t", events=40, rate=200, publishers=2, listeners=2
        )
    assert (result["published"], result["publish_ok"], result["delivered"]) == (40, 40, 80)
    assert result["seconds"] >= 39 / 200
    assert result["late_ms"] >= 0


async def test_no_publication_is_made_before_it_is_due(program: Path) -> None:
    async with site_of(STYLES["whole"]) as site:
        result = await run(
            site, listen="/t", publish="/t", events=1000, rate=10, timeout=1, timed_out=True
        )
    assert 1 <= result["published"] <= 11
    assert result["published"] == site.count("POST")


async def test_overdue_publications_are_made_after_a_pause_of_the_server(program: Path) -> None:

    async def post(site: Site, client: Client) -> None:
        if site.count("POST") == 1:
            await asyncio.sleep(1)
        await client.send(NO_CONTENT)

    async with Site(listening(CHUNKED), post) as site:
        result = await run(
            site, publish="/t", events=10_000, rate=100, timeout=2.2, timed_out=True
        )
    # In the time that is left, a schedule that had shifted would come to 120 of them.
    assert 140 <= result["published"] <= 221
    assert result["late_ms"] >= 900


async def test_nothing_is_published_while_the_streams_rest(program: Path) -> None:
    async with site_of(STYLES["whole"]) as site:
        result = await run(site, listen="/t", publish="/t", idle=0.3)
    get, post = site.requests
    assert post.at - get.at >= 0.29
    assert result["delivered"] == 1


async def test_a_run_ends_at_its_time_limit(program: Path) -> None:
    """Streams never open, events never arrive, or publications are never responded to."""
    hanging = sending(hold=True)
    async with Site(hanging) as site:
        result = await run(site, listen="/t", listeners=2, timeout=0.3, timed_out=True)
        assert (result["listeners"], result["opened"], result["statuses"]) == (2, 0, {})
        assert (result["expected"], result["open_cpu_us"]) == (0, None)
    async with Site(listening(CHUNKED), hanging) as site:
        result = await run(site, listen="/t", expect=1, timeout=0.3, timed_out=True)
        assert (result["opened"], result["lost"]) == (1, 1)
        result = await run(site, listen="/t", stay=60, timeout=0.3, timed_out=True)
        assert (result["opened"], result["closed_early"]) == (1, 0)
        result = await run(site, publish="/t", publishers=3, events=9, timeout=0.3, timed_out=True)
        assert (result["published"], result["publish_ok"], result["publish_failed"]) == (3, 0, 0)


async def test_as_many_streams_as_allowed_are_opened_at_once(program: Path) -> None:
    """Not more, and not fewer while there are enough."""
    pending: list[asyncio.Event] = []
    most = 0

    async def get(site: Site, client: Client) -> None:
        nonlocal most
        answered = asyncio.Event()
        pending.append(answered)
        most = max(most, len(pending))
        if len(pending) == 3 or site.count("GET") > 5:
            pending[0].set()
        await answered.wait()
        pending.remove(answered)
        await client.send(CHUNKED)
        if site.count("GET") == 8 and pending:
            pending[0].set()
        await client.until_gone()

    async with Site(get) as site:
        result = await run(site, listen="/t", listeners=8, at_once=3)
    assert result["opened"] == 8
    assert most == 3


# ---- The server's processes


@pytest.mark.parametrize("clock", ["process", "stat"])
async def test_cpu_time_and_memory_of_the_server_are_measured(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """The server is this process. Both clocks agree within their resolution."""
    if clock == "stat":
        program = load.compile_to(tmp_path / "sseload", "-DNO_CPU_CLOCK")
        monkeypatch.setattr(load, "build", lambda: program)

    async def post(site: Site, client: Client) -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        await publishing(STYLES["whole"].wire)(site, client)

    cpu_before = time.process_time()
    async with Site(listening(CHUNKED), post) as site:
        result = await run(
            site, listen="/t", listeners=20, publish="/t", events=10, pid=os.getpid()
        )
    cpu = time.process_time() - cpu_before
    assert result["cpu_clock"] == clock
    assert result["pids_gone"] == 0
    measured = result["cpu_us_per_delivery"] * result["delivered"] / 1e6
    assert result["delivered"] == 200
    assert 0.2 - 0.03 <= measured <= cpu + 0.03
    assert result["cpu_us_per_publish"] == pytest.approx(measured / 10 * 1e6, rel=0.01)
    assert 0 <= result["open_cpu_us"] <= cpu / 20 * 1e6 + 1000
    assert result["own_cpu_seconds"] > 0
    if result["instructions_per_delivery"] is not None:  # not every machine counts them
        instructions = result["instructions_per_delivery"] * result["delivered"]
        assert 0.02 < instructions / (measured * 1e9) < 20, "in each nanosecond"
        assert result["open_instructions"] > 10_000
    for name in ("rss_before_kib", "rss_after_kib", "pss_before_kib", "pss_after_kib"):
        assert result[name] > 1000
    growth = result["rss_after_kib"] - result["rss_before_kib"]
    assert result["rss_per_stream_kib"] == pytest.approx(growth / 20, abs=0.01)
    assert result["threads_before"] >= 1
    assert result["threads_after"] >= 1
    assert result["fds"] > 20


async def test_figures_without_a_process_are_null(program: Path) -> None:
    async with site_of(STYLES["whole"]) as site:
        result = await run(site, listen="/t", publish="/t")
    for name in (
        "open_cpu_us",
        "open_instructions",
        "cpu_us_per_delivery",
        "instructions_per_delivery",
        "cpu_us_per_publish",
        "cpu_clock",
        "rss_before_kib",
        "rss_after_kib",
        "rss_per_stream_kib",
        "pss_before_kib",
        "pss_after_kib",
        "pss_per_stream_kib",
        "threads_before",
        "threads_after",
        "fds",
    ):
        assert result[name] is None


@pytest.mark.usefixtures("built")  # Skips the test where there is no compiler.
async def test_a_machine_without_an_instruction_counter_has_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load.compile_to(tmp_path / "sseload", "-DNO_INSTRUCTIONS")
    monkeypatch.setattr(load, "build", lambda: program)
    async with site_of(STYLES["whole"]) as site:
        result = await run(site, listen="/t", publish="/t", pid=os.getpid())
    assert result["instructions_per_delivery"] is None
    assert result["open_instructions"] is None
    assert result["cpu_us_per_delivery"] >= 0


async def test_a_process_that_ends_is_counted_and_the_run_continues(program: Path) -> None:
    """Its memory is null."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def get(site: Site, client: Client) -> None:
        process.kill()
        process.communicate()
        await listening(CHUNKED)(site, client)

    async with Site(get, publishing(STYLES["whole"].wire)) as site:
        result = await run(site, listen="/t", publish="/t", pid=[os.getpid(), process.pid])
    assert result["pids_gone"] == 1
    assert result["rss_before_kib"] > 1000
    assert result["rss_after_kib"] is None
    assert result["cpu_us_per_delivery"] >= 0
    assert result["delivered"] == 1


# ---- All of it


async def mixed_get(site: Site, client: Client) -> None:
    """Open a stream in the style of its number. The last three fail."""
    number = int(client.request.token)
    if number < len(STYLES):
        await listening(list(STYLES.values())[number].head)(site, client)
    elif number == len(STYLES):
        await client.send(b"HTTP/1.1 404 Not Found\r\n\r\n")
    elif number == len(STYLES) + 1:
        await client.send(CHUNKED + b"9\r\ndata: ")
    else:
        client.reset()


async def mixed_post(site: Site, client: Client) -> None:
    """Publish in the style of the streams. The responses take turns, and some are failures."""
    number = int(client.request.token)
    turn = site.count("POST")
    if turn % 7 == 0:
        client.keep_alive = False
        return
    if turn % 11 == 0:
        await client.send(FAILURES["no"][0])
        return
    answer, closes = list(ANSWERS.values())[turn % len(ANSWERS)]
    client.keep_alive = not closes
    style = list(STYLES.values())[number] if number < len(STYLES) else STYLES["whole"]
    await publishing(style.wire, answer)(site, client)


async def test_a_mixed_load_causes_no_memory_error(
    sanitizer: list[str], torn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program ends at its first memory error."""
    if not sanitizer:
        pytest.skip("the compiler has no sanitizers that work here")
    monkeypatch.setattr(load, "build", lambda: torn)
    tokens = len(STYLES) + 3
    async with Site(mixed_get, mixed_post) as site:
        result = await run(
            site,
            listen="/listen/%d",
            publish="/publish/%d",
            listeners=3 * tokens,
            tokens=tokens,
            events=8 * tokens,
            publishers=4,
            at_once=5,
            pid=os.getpid(),
        )
    posts = Counter(
        int(request.token)
        for turn, request in enumerate((r for r in site.requests if r.method == "POST"), 1)
        if turn % 7 and turn % 11
    )
    assert result["published"] == site.count("POST") == 8 * tokens
    assert result["publish_ok"] == posts.total()
    assert result["publish_failed"] == 8 * tokens - posts.total()
    assert result["opened"] == 3 * (len(STYLES) + 1)
    assert result["statuses"] == {"200": 3 * (len(STYLES) + 1), "404": 3}
    assert (result["closed_early"], result["malformed"]) == (6, 0)
    assert result["delivered"] == 3 * sum(posts[token] for token in range(len(STYLES)))
    assert (result["lost"], result["extra"]) == (3 * posts[len(STYLES) + 1], 0)


# ---- Options

RIGHT = ["--port=1", "--listen=/t"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--port"),
        (["--listen=/t"], "--port"),
        (["--port=1"], "--listen or --publish"),
        (["--port=0", "--listen=/t"], "--port: a whole number from 1 to 65535, not '0'"),
        (["--port=65536", "--listen=/t"], "--port"),
        (["--port=http", "--listen=/t"], "--port"),
        (["--port", "--listen=/t"], "--port"),
        (["--port"], "port"),
        (["--port=1", "--listen=t"], "--listen"),
        (["--port=1", "--listen=/a b"], "--listen"),
        (["--port=1", "--listen=/a\r\nX: y"], "--listen"),
        ([*RIGHT, "--listeners=-1"], "--listeners"),
        ([*RIGHT, "--listeners=1.5"], "--listeners"),
        ([*RIGHT, "--listeners=0x10"], "--listeners"),
        ([*RIGHT, "--listeners="], "--listeners"),
        ([*RIGHT, "--listeners=999999"], "open files"),
        ([*RIGHT, "--listeners=0"], "--listen or --publish"),
        ([*RIGHT, "--rate=-1"], "--rate"),
        ([*RIGHT, "--rate=nan"], "--rate"),
        ([*RIGHT, "--rate=fast"], "--rate"),
        ([*RIGHT, "--idle=1s"], "--idle"),
        ([*RIGHT, "--timeout=inf"], "--timeout"),
        ([*RIGHT, "--size=20"], "--size: a whole number from 21"),
        ([*RIGHT, "--events=0"], "--events"),
        ([*RIGHT, "--tokens=0"], "--tokens"),
        ([*RIGHT, "--tokens=2"], "--tokens needs a %d in the path '/t'"),
        ([*RIGHT, "--listen=/%d", "--publish=/t", "--tokens=2"], "path '/t'"),
        ([*RIGHT, "--publish=/t", "--expect=1"], "--expect"),
        (["--port=1", "--publish=/t", "--expect=1"], "--expect"),
        (["--port=1", "--expect=1"], "--listen"),
        ([*RIGHT, "--header=nothing"], "--header"),
        ([*RIGHT, "--header=: nothing"], "--header"),
        ([*RIGHT, "--header=A: b\nC: d"], "--header"),
        ([*RIGHT, "--listen-header=nothing"], "--listen-header"),
        ([*RIGHT, "--content-type=a\r\nb"], "--content-type"),
        ([*RIGHT, "--pid=0"], "--pid"),
        ([*RIGHT, "--pid=999999999"], "no process 999999999"),
        ([*RIGHT, *["--pid=1"] * 65], "--pid"),
        ([*RIGHT, "--host=no.such.host.invalid"], "--host"),
        ([*RIGHT, "--colour=red"], "--colour"),
        ([*RIGHT, "more"], "'more'"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line(
    program: Path, options: list[str], says: str
) -> None:
    """The program sends no request."""
    done = subprocess.run(
        [program, *options], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_help_names_every_option(program: Path) -> None:
    """The options that tests use are named, and those of test builds are not."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    named = set(re.findall(r"^  --([a-z-]+) ", done.stdout, re.MULTILINE))
    used = {"host", "port", "listen", "listeners", "tokens", "header", "listen-header"}
    used |= {"publish", "events", "rate", "publishers", "size", "content-type", "expect"}
    used |= {"idle", "stay", "pid", "at-once", "quiet-seconds", "timeout", "help"}
    assert named == used


# ---- load.py


def test_names_become_options_and_lists_repeat_them() -> None:
    """None leaves an option out."""
    given = load.arguments({"port": 1, "at_once": 2, "pid": [3, 4], "rate": 0.5, "header": None})
    assert given == ["--port=1", "--at-once=2", "--pid=3", "--pid=4", "--rate=0.5"]
    assert load.arguments({"header": ("A: b", "C: d")}) == ["--header=A: b", "--header=C: d"]
    assert load.arguments({"pid": []}) == []


def test_the_error_of_a_failed_run_contains_the_output_of_the_program(built: Path) -> None:
    with pytest.raises(load.LoadError, match=r"^sseload: --port is needed$"):
        load.run(listen="/t")


def script(path: Path, code: str) -> Path:
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return path


def test_a_program_that_prints_nothing_or_hangs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "build", lambda: script(tmp_path / "dies", "exit 9"))
    with pytest.raises(load.LoadError, match="status 9"):
        load.run(port=1)
    monkeypatch.setattr(load, "build", lambda: script(tmp_path / "hangs", "exec sleep 600"))
    monkeypatch.setattr(load, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(load.LoadError, match=r"did not end: .*--timeout=0\.1"):
        load.run(timeout=0.1)


def test_a_missing_compiler_is_an_error_that_names_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "CACHE", tmp_path / "build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(load.NoCompilerError, match=r"needs a C compiler.* cc, gcc, clang"):
        load.build()
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(load.NoCompilerError, match=r"\$CC is 'no-such-compiler'"):
        load.build()


@pytest.fixture
def small(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``load.build`` compile a tiny program; return its source."""
    source = tmp_path / "sseload.c"
    source.write_text("int main(void) { return 7; }\n")
    monkeypatch.setattr(load, "SOURCE", source)
    monkeypatch.setattr(load, "CACHE", tmp_path / "build")
    return source


def made(path: Path) -> tuple[int, int]:
    """Return what identifies a file and its version, after running it."""
    status = subprocess.run([path], check=False).returncode
    return path.stat().st_ino, status


def test_the_program_is_built_again_only_for_another_source(small: Path) -> None:
    """The other source may be older or newer."""
    program = load.build()
    first = made(program)
    assert first[1] == 7
    assert load.build() == program
    assert made(program) == first
    small.write_text("int main(void) { return 8; }\n")
    os.utime(small, (1, 1))
    assert made(load.build())[1] == 8
    assert sorted(path.name for path in program.parent.iterdir()) == [".gitignore", "sseload"]
    assert (program.parent / ".gitignore").read_text() == "*\n"


def test_a_failed_build_keeps_the_program_and_reports_the_error_of_the_compiler(
    small: Path,
) -> None:
    program = load.build()
    before = made(program)
    small.write_text("int main(void) { return no_such_thing; }\n")
    os.utime(small, (1, 1))
    with pytest.raises(load.LoadError, match="no_such_thing"):
        load.build()
    assert made(program) == before
    assert sorted(path.name for path in program.parent.iterdir()) == [".gitignore", "sseload"]


def test_parallel_builds_never_return_an_incomplete_program(small: Path) -> None:

    def build(_: int) -> int:
        return made(load.build())[1]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(build, range(8))) == [7] * 8
    names = sorted(path.name for path in (small.parent / "build").iterdir())
    assert names == [".gitignore", "sseload"]


def test_cc_may_contain_arguments(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``CC`` is the environment variable."""
    real = shutil.which(load.compiler()[0])
    wrapper = script(tmp_path / "wrapper", f'touch "{tmp_path}/asked$1"; shift; {real} "$@"')
    monkeypatch.setenv("CC", f"{wrapper} -me")
    assert made(load.build())[1] == 7
    assert (tmp_path / "asked-me").exists()


def test_the_source_compiles_without_warnings(built: Path, tmp_path: Path) -> None:
    """The compiler is run with more warnings than in a build."""
    load.compile_to(tmp_path / "sseload", "-Werror", "-Wshadow", "-Wconversion", "-pedantic")
