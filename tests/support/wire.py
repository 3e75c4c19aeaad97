"""One connection of a server that sends chunked bodies, as uvicorn does, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

from django_eventsource.protocol.frames import Decoder

HIGH_WATER_BYTES = 64 * 1024


class Transport:
    """A transport that keeps what is written, and whose client reads or has stalled."""

    def __init__(self) -> None:
        self.data = b""
        self.buffered = 0
        self.reads = True
        """Whether the client reads."""
        self.closing = False
        self.error: Exception | None = None
        """Raised by the next write."""
        self.writable = asyncio.Event()
        self.writable.set()

    def write(self, data: bytes) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.data += data
        if not self.reads:
            self.buffered += len(data)
            if self.buffered > HIGH_WATER_BYTES:
                self.writable.clear()

    def stall(self) -> None:
        """Let the client stop to read, with a full buffer of the operating system."""
        self.reads = False

    def resume(self) -> None:
        """Let the client read everything."""
        self.reads = True
        self.buffered = 0
        self.writable.set()

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True
        self.writable.set()


class Cycle:
    """The parts of uvicorn's request-response cycle that are used."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.response_complete = False
        self.chunked = True
        """Whether the body is framed in chunks."""
        self.sends = 0
        """The number of calls of :meth:`send`."""
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def receive(self) -> dict[str, Any]:
        await self.gone
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sends += 1
        await self.transport.writable.wait()
        if message["type"] != "http.response.body" or self.transport.closing:
            return
        body = message["body"]
        if self.chunked:
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if body else b"0\r\n\r\n")
        else:
            self.transport.write(body)
        self.response_complete = not message["more_body"]

    def hang_up(self) -> None:
        """Let the client disconnect."""
        self.transport.abort()
        if not self.gone.done():
            self.gone.set_result(None)

    @property
    def body(self) -> bytes:
        """The body that the client has received. It fails if the chunks are not valid."""
        if not self.chunked:
            return self.transport.data
        body, rest = b"", self.transport.data
        while rest:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            assert rest[size : size + 2] == b"\r\n", (line, rest[:80])
            body, rest = body + rest[:size], rest[size + 2 :]
        return body

    @property
    def events(self) -> list[str]:
        """The data of the events that the client has received."""
        return [event.data for event in Decoder().feed(self.body)]


Cycle.send.__module__ = "uvicorn.protocols.http.h11_impl"
