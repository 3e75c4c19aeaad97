"""Writers: pass the bytes of one stream to the server.

The task of a stream sends through its writer and waits for a slow client. While the task waits
for events, the feed calls :meth:`SendWriter.write` instead, which writes an event to the socket
without a switch to the task.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from types import MethodType
from typing import Any, cast

from ..conf import conf
from ..protocol.batches import Batch, encode_chunk
from .open_stream import OpenStream
from .transport import register_producer

PIECE_BYTES = 64 * 1024
"""The largest number of bytes that are sent at once, so that a client that stalls costs the
server less than an event."""
SMALL_PIECE_BYTES = 8 * 1024
"""The same for an unknown server, which may buffer several pieces of any size."""
NEARLY_EMPTY_BYTES = 16 * 1024
"""The bytes in a transport's buffer up to which its client counts as one that reads."""
UVICORN = "uvicorn.protocols.http."
"""The modules that contain uvicorn's request-response cycles."""

# Only an eager task runs to its end, or to its first wait, before the feed continues.
EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}

Send = Callable[[dict[str, Any]], Awaitable[None]]


def make_writer(stream: OpenStream, send: Send) -> "SendWriter":
    """Return the fastest writer that the server allows, and let the feed use it.

    :param stream: the stream, whose transport was looked up.
    :param send: the ``send`` of the server, or of middleware.
    """
    cycle = uvicorn_cycle(send) if conf.write_to_transport else None
    writer = SendWriter(stream, send) if cycle is None else TransportWriter(stream, send, cycle)
    if EAGER or cycle is not None:
        stream.write_with(writer)
    return writer


def uvicorn_cycle(send: Any) -> Any:
    """Return uvicorn's request-response cycle if ``send`` is its own method.

    ``None`` for other servers, and if middleware or a patch replaces ``send``, because it has to
    receive every message.
    """
    if type(send) is not MethodType:
        return None
    cycle, function = send.__self__, send.__func__
    if not function.__module__.startswith(UVICORN) or hasattr(function, "__wrapped__"):
        return None
    is_known = hasattr(cycle, "transport") and hasattr(cycle, "response_complete")
    return cycle if is_known else None


class SendWriter:
    """Writes through the ``send`` of any ASGI server.

    A write of the feed runs ``send`` in an eager task (Python 3.12 and newer). If ``send`` has to
    wait, the stream's task waits for that task. On Python 3.11 the stream's task calls ``send``.

    :param stream: the stream that is sent.
    :param send: ASGI's ``send``.
    """

    __slots__ = (
        "_context",
        "_is_writing",
        "_pending",
        "_producer",
        "_send",
        "_stream",
        "piece_bytes",
    )

    def __init__(self, stream: OpenStream, send: Send) -> None:
        self.piece_bytes = SMALL_PIECE_BYTES if stream.transport is None else PIECE_BYTES
        """The largest number of bytes for :meth:`send`."""
        self._stream = stream
        self._send = send
        self._producer = register_producer(send)
        self._pending: asyncio.Future[None] | None = None
        self._context: Context | None = None
        self._is_writing = False
        """Whether a write of the feed runs now. ``send`` may cause another delivery."""

    # For the stream's task

    async def send(self, data: bytes) -> None:
        """Send bytes and wait until the server accepts more.

        :raises Exception: whatever the server's ``send`` raises.
        """
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        if self._producer is not None:
            await self._producer.ready.wait()
        if self._context is None:
            # A copy, because a context cannot be entered twice. Not made before the first bytes,
            # with which the stream releases its request.
            self._context = copy_context()

    async def drain(self) -> None:
        """Wait for the write of the feed that :meth:`write` has reported to the stream.

        :raises Exception: whatever the server raised in that write.
        """
        pending, self._pending = cast("asyncio.Future[None]", self._pending), None
        await pending

    def close(self) -> None:
        """Cancel a write that has not ended. Use it when the stream has ended."""
        pending = self._pending
        if pending is not None and not pending.cancel() and not pending.cancelled():
            pending.exception()  # asyncio logs an exception that is not retrieved
        if self._producer is not None:
            self._producer.release()

    # For the feed

    def write(self, batch: Batch) -> bool:
        """Pass events to the server now; return whether it accepts them without a wait.

        If not, nothing was written. A write that begins and has to wait, or fails, counts as
        accepted: the stream's task is woken, and calls :meth:`drain`.
        """
        if not EAGER or self._is_writing or len(batch.data) > self.piece_bytes:
            return False
        loop = asyncio.get_running_loop()
        self._is_writing = True
        task = asyncio.Task(self.send(batch.data), loop=loop, context=self._context, **EAGER)
        self._is_writing = False
        # Without eager tasks it is never done.
        if not task.done() or task.cancelled() or task.exception():  # pragma: no branch
            self._wait_for(task, batch)
        return True

    def _wait_for(self, pending: asyncio.Future[None], batch: Batch) -> None:
        self._pending = pending
        self._stream.note_pending_write(len(batch.data))


class TransportWriter(SendWriter):
    """Writes HTTP chunks to the transport of uvicorn, without uvicorn's code.

    What the stream's task sends passes through uvicorn, and the writer compares the bytes that
    uvicorn writes with one HTTP chunk of the data. As long as they are the same, the feed's events
    are written as such chunks, which are encoded once for all streams. Otherwise, for example with
    HTTP/1.0 and HTTP/2, the writer does the same as :class:`SendWriter` from then on.

    :param cycle: uvicorn's request-response cycle.
    """

    __slots__ = ("_cycle", "_is_chunked", "_transport")

    def __init__(self, stream: OpenStream, send: Send, cycle: Any) -> None:
        super().__init__(stream, send)
        self._cycle = cycle
        self._transport = cycle.transport
        self._is_chunked: bool | None = None
        """Whether uvicorn writes each body as one HTTP chunk; ``None`` before the first one."""

    async def send(self, data: bytes) -> None:
        """Send bytes through uvicorn, and check how it writes them."""
        if self._is_chunked is False or self._cycle.transport is not self._transport:
            self._is_chunked = False
            await super().send(data)
            return
        recorder = self._cycle.transport = Recorder(self._transport)
        try:
            await super().send(data)
        finally:
            self._cycle.transport = self._transport
        self._is_chunked = recorder.written == [encode_chunk(data)]

    def write(self, batch: Batch) -> bool:
        """Write the chunk of a batch to the transport, unless its buffer has to become empty."""
        if not self._is_chunked:
            return super().write(batch)
        transport = self._transport
        try:
            if (
                self._cycle.response_complete
                or transport.is_closing()
                or transport.get_write_buffer_size() > NEARLY_EMPTY_BYTES
                or len(batch.data) > PIECE_BYTES
            ):
                return False
            transport.write(batch.chunk)
        except Exception as error:  # noqa: BLE001 (the stream's task raises it)
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            self._wait_for(failed, batch)
        return True


class Recorder:
    """A transport that keeps what is written to it, and passes everything on."""

    def __init__(self, transport: Any) -> None:
        self.written: list[bytes] = []
        self._transport = transport

    def write(self, data: bytes) -> None:
        """Write to the transport."""
        self.written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
