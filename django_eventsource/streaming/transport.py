"""What ASGI does not offer: waiting for a slow reader on Daphne, cutting a connection, and
detecting that the server shuts down.

All need the server's own objects, found through the ``send`` that it gives. A server that
is not known is left to what ASGI says: its ``send`` waits, and ends with the response.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

try:
    import fcntl
    import termios
except ImportError:  # pragma: no cover (Windows tells nothing of what is on its way)
    fcntl = termios = None  # type: ignore[assignment]

STEP_SECONDS = 0.02
MOST_FUNCTIONS = 20


class Producer:
    """A Twisted push producer that tells whether the transport wants more.

    https://docs.twisted.org/en/stable/core/howto/producers.html
    """

    def __init__(self, request: Any) -> None:
        self._ready = asyncio.Event()
        self._ready.set()
        self._request = request
        request.registerProducer(self, True)

    def release(self) -> None:
        """Be no producer any more, which must be before the response ends."""
        request, self._request = self._request, None
        if getattr(request, "channel", None) is not None:
            request.unregisterProducer()

    def pauseProducing(self) -> None:  # noqa: N802
        """Receive: the transport has as much as it wants to hold."""
        self._ready.clear()

    def resumeProducing(self) -> None:  # noqa: N802
        """Receive: it wants more."""
        self._ready.set()

    def stopProducing(self) -> None:  # noqa: N802
        """Receive: it has gone."""
        self._ready.set()

    @property
    def ready(self) -> bool:
        """Does it want more?"""
        return self._ready.is_set()

    async def wait(self) -> None:
        """Wait until it wants more."""
        await self._ready.wait()


def daphne_request(send: Any) -> Any:
    """Give the Twisted request behind Daphne's ``send``, or ``None``."""
    for function in _behind(send):
        for one in getattr(function, "args", ()):
            if hasattr(one, "registerProducer") and getattr(one, "channel", None) is not None:
                return one
    return None


def _behind(send: Any) -> Iterator[Any]:
    """Give a ``send``, and the functions that it calls: middleware wraps it in its own."""
    found, seen = [send], 0
    while found and seen < MOST_FUNCTIONS:
        one = found.pop(0)
        seen += 1
        yield one
        found += [other for other in _held_by(one) if callable(other)]


def _held_by(function: Any) -> Iterator[Any]:
    """Give what a function may call: what it is closed over, or bound to."""
    yield from _closed_over_by(function)
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    for name in ("send", "_send"):
        other = getattr(getattr(function, "__self__", None), name, None)
        # A server's own send may be a method of that name.
        if getattr(other, "__func__", other) is not getattr(function, "__func__", None):
            yield other


def _closed_over_by(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is empty yet
            yield cell.cell_contents


def _owners(function: Any) -> Iterator[Any]:
    """Yield the objects that a function and the functions behind it work for.

    That is the object of a method, and the protocol of gunicorn's ASGI worker, whose ``send``
    is closed over it.
    """
    for one in _behind(function):
        yield getattr(one, "__self__", None)
        yield from (other for other in _closed_over_by(one) if _gunicorn_worker(other))


def _gunicorn_worker(protocol: Any) -> Any:
    worker = getattr(protocol, "worker", None)
    return worker if hasattr(worker, "alive") else None


def hold_back(send: Any) -> Producer | None:
    """Give what Daphne is to be waited for with, or ``None`` where ``send`` waits itself."""
    request = daphne_request(send)
    return None if request is None else Producer(request)


def find_transport(send: Any) -> Any:
    """Give the transport behind a ``send``: Twisted's under Daphne, else asyncio's.

    ``None`` where the server is not known, or where the connection carries other requests.
    """
    request = daphne_request(send)
    if request is not None:
        return getattr(request.channel, "transport", None)
    for one in _owners(send):
        # uvicorn and gunicorn keep the transport itself; hypercorn some objects further, each
        # with a send.
        if hasattr(one, "streams") or getattr(one, "_h2_tasks", None):
            return None  # HTTP/2
        for holder in (getattr(one, "writer", None), one):
            transport = getattr(holder, "transport", None)
            if hasattr(transport, "abort"):
                return transport
    return None


def find_shutdown(send: Any) -> Callable[[], bool] | None:
    """Return a function that returns whether the server shuts down.

    ``None`` where the server is not known. daphne and granian end their processes by a signal
    only, so there is nothing to find.
    """
    for one in (*_owners(send), *_owners(signal.getsignal(signal.SIGTERM))):
        for find in (_uvicorn_shutdown, _hypercorn_shutdown, _gunicorn_shutdown):
            ends = find(one)
            if ends is not None:
                return ends
    return None


def _uvicorn_shutdown(server: Any) -> Callable[[], bool] | None:
    """Look at a ``uvicorn.Server``, which the handler of SIGTERM belongs to.

    It closes its sockets when it shuts down. At ``--limit-max-requests`` nothing else shows it
    for every connection (0.54): ``should_exit`` stays false.
    """
    if not hasattr(server, "server_state") or not hasattr(server, "servers"):
        return None
    return lambda: not any(one.is_serving() for one in server.servers)


def _hypercorn_shutdown(stream: Any) -> Callable[[], bool] | None:
    """Look at a stream of hypercorn: all of a worker share its ``WorkerContext``."""
    terminated = getattr(getattr(stream, "context", None), "terminated", None)
    return getattr(terminated, "is_set", None)


def _gunicorn_shutdown(protocol: Any) -> Callable[[], bool] | None:
    """Look at a connection of gunicorn's ASGI worker."""
    worker = _gunicorn_worker(protocol)
    return None if worker is None else lambda: not worker.alive


def cut(transport: Any) -> None:
    """End a connection, dropping what is not yet sent."""
    abort = getattr(transport, "abortConnection", None) or getattr(transport, "abort", None)
    if abort is not None:
        abort()


async def emptied(transport: Any) -> None:
    """Wait until the transport holds nothing: it says only that it does not want more."""
    held = getattr(transport, "get_write_buffer_size", None)
    while held is not None and held():  # noqa: ASYNC110
        await asyncio.sleep(STEP_SECONDS)


def unsent(transport: Any) -> int | None:
    """Give the bytes that the reader has not got yet, as far as that can be known.

    They are in the transport's buffer, or with the operating system: for a slow reader that
    is megabytes, and nothing else shows that they become less.
    """
    size = getattr(transport, "get_write_buffer_size", None)
    handle = getattr(transport, "getHandle", None)
    try:
        if size is not None:
            held, connection = size(), transport.get_extra_info("socket")
        elif handle is not None:
            held = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
            connection = handle()
        else:
            return None
        return int(held) + _queued(connection.fileno())
    except (AttributeError, ValueError):
        return None


def _queued(descriptor: int) -> int:
    """Give what the operating system holds of a connection; 0 where it does not tell.

    :raises ValueError: when the connection has gone.
    """
    if descriptor < 0:
        raise ValueError("The connection has gone.")
    queued = array.array("i", [0])
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, termios.TIOCOUTQ, queued)
    return queued[0]
