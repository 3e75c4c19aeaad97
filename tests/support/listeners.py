"""Listeners on real sockets, several in one event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django_eventsource.protocol.frames import Decoder, ServerSentEvent
from tests.support.waiting import PROCESS_PATIENCE_SECONDS


class Connection:
    """One open stream over HTTP/1.0, so that the body is what the server writes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, head: str
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.status = status
        self.head = head

    @classmethod
    async def open(
        cls, address: tuple[str, int], path: str, *, method: str = "GET", **headers: str
    ) -> Connection:
        reader, writer = await asyncio.open_connection(*address)
        lines = [f"{method} {path} HTTP/1.0", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except BaseException:
            writer.transport.abort()
            raise
        return cls(reader, writer, int(head.split()[1]), head)

    async def read(self) -> bytes:
        """Return the next bytes; nothing at the end."""
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            return await self.reader.read(65536)

    async def read_until(self, text: bytes) -> bytes:
        """Read up to a text. A keepalive may come before it."""
        body = b""
        while text not in body:
            data = await self.read()
            assert data, body
            body += data
        return body

    async def rest(self) -> bytes:
        """Read up to the end."""
        body = b""
        while data := await self.read():
            body += data
        return body

    def close(self) -> None:
        self.writer.transport.abort()


class HTTP11:
    """One open stream over HTTP/1.1, whose body has a marked end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: tuple[str, int], path: str, **options: Any) -> HTTP11:
        connection = cls(*await asyncio.open_connection(*address, **options))
        await connection.request(path)
        return connection

    @property
    def socket(self) -> Any:
        """The socket of the connection."""
        return self.writer.get_extra_info("socket")

    async def chunk(self) -> bytes:
        """Read one chunk; the last one is empty."""
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size)
            assert await self.reader.readline() == b"\r\n"
        return data

    async def rest(self) -> bytes:
        """Read all chunks, up to the last one, which is empty."""
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return body

    async def request(self, path: str) -> None:
        """Send a request, and read the head of a stream in response."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.split()[1] == b"200"
        assert b"transfer-encoding: chunked" in head.lower()

    def close(self) -> None:
        self.writer.transport.abort()


async def events_until(connection: HTTP11, data: str) -> list[str]:
    """Read events, up to one with these data."""
    decoder, found = Decoder(), []
    while data not in found:
        chunk = await connection.chunk()
        assert chunk, "the body has ended"
        found += [event.data for event in decoder.feed(chunk)]
    return found


def reconnection_ms(body: bytes) -> int:
    """Return the reconnection time at the end of a body."""
    field, _, value = body.rstrip(b"\n").rpartition(b"\n")[2].partition(b": ")
    assert (field, body[-2:]) == (b"retry", b"\n\n")
    return int(value)


class Listener:
    """Listens to one path, and reconnects with its last event id until it has enough."""

    def __init__(
        self,
        address: tuple[str, int],
        path: str,
        *,
        enough: Callable[[Listener], bool],
        drops: random.Random | None = None,
    ) -> None:
        self.address = address
        self.path = path
        self.enough = enough
        self.drops = drops
        self.events: list[ServerSentEvent] = []
        self.last_event_id = ""
        self.connections = 0
        self.joined = asyncio.Event()

    async def run(self) -> None:
        while not self.enough(self):
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._listen()

    async def _listen(self) -> None:
        headers = {"Last_Event_ID": self.last_event_id} if self.last_event_id else {}
        connection = await Connection.open(self.address, self.path, **headers)
        if connection.status != 200:
            raise AssertionError(connection.head)
        self.connections += 1
        patience = self.drops.randint(1, 900) if self.drops else 10**9
        decoder = Decoder(self.last_event_id)
        try:
            while not self.enough(self):
                chunk = await connection.read()
                if not chunk:
                    return
                got = decoder.feed(chunk)
                self.last_event_id = decoder.last_event_id
                self.joined.set()
                self.events += got
                patience -= len(got)
                if patience <= 0:
                    return
        finally:
            connection.close()
