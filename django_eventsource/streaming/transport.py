"""Access to the server's connection: back-pressure, abort, unsent bytes, and shutdown.

ASGI offers none of this, so the functions find the server's own objects through the ``send``
callable that the server passes to the application. For an unknown server they return ``None``, and
the caller relies on ASGI alone: ``send`` waits while the client does not read.

What each server needs (checked with daphne 4.2, uvicorn 0.54, hypercorn 0.18, gunicorn 27.0,
granian 2.8):

- daphne: ``send`` never waits. Its ``functools.partial`` contains the Twisted request, which
  accepts a push producer and has the transport. It shuts down by a signal only.
- uvicorn: ``send`` is a method of the request-response cycle, which has the asyncio transport. The
  handler of SIGTERM belongs to the ``Server``, whose sockets show a shutdown.
- hypercorn: ``send`` is a method of an object that refers, through others, to the
  ``StreamWriter`` and to the ``WorkerContext`` of the worker process.
- gunicorn's ASGI worker: ``send`` is a closure over the protocol, which has the transport and the
  worker.
- granian: ``send`` is compiled code. Nothing can be found, so its streams are sent in small
  pieces.
"""

import array
import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

try:
    import fcntl
    import termios
except ImportError:  # pragma: no cover (Windows has no TIOCOUTQ)
    fcntl = termios = None  # type: ignore[assignment]

DRAIN_POLL_SECONDS = 0.02
MAX_FUNCTIONS = 20
"""The number of nested functions after which the search through middleware stops."""


class Producer:
    """A Twisted push producer, through which a transport reports whether it accepts data.

    https://docs.twisted.org/en/stable/core/howto/producers.html
    """

    def __init__(self, request: Any) -> None:
        self.ready = asyncio.Event()
        """Set while the transport accepts data, and after the connection was lost."""
        self.ready.set()
        self._request = request
        request.registerProducer(self, True)

    def release(self) -> None:
        """Unregister the producer. Twisted requires this before the response ends."""
        request, self._request = self._request, None  # the request refers to the producer
        if getattr(request, "channel", None) is not None:
            request.unregisterProducer()

    def pauseProducing(self) -> None:  # noqa: N802
        """Record that the transport's buffer is full."""
        self.ready.clear()

    def resumeProducing(self) -> None:  # noqa: N802
        """Record that the transport accepts data again."""
        self.ready.set()

    def stopProducing(self) -> None:  # noqa: N802
        """Record that the connection was lost."""
        self.ready.set()


def _daphne_request(send: Any) -> Any:
    for function in _behind(send):
        for one in getattr(function, "args", ()):
            if hasattr(one, "registerProducer") and getattr(one, "channel", None) is not None:
                return one
    return None


def _behind(send: Any) -> Iterator[Any]:
    """Yield a ``send`` and the functions that it calls, because middleware wraps it."""
    functions = [send]
    for function in islice(functions, MAX_FUNCTIONS):  # the list grows during the loop
        yield function
        functions += [other for other in _held_by(function) if callable(other)]


def _held_by(function: Any) -> Iterator[Any]:
    """Yield what a function may call: its closure, its arguments, or a method of its object."""
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
        with contextlib.suppress(ValueError):  # the cell is empty
            yield cell.cell_contents


def _owners(function: Any) -> Iterator[Any]:
    """Yield the objects of the methods behind a function, and gunicorn's protocol."""
    for one in _behind(function):
        yield getattr(one, "__self__", None)
        yield from (other for other in _closed_over_by(one) if _gunicorn_worker(other))


def _gunicorn_worker(protocol: Any) -> Any:
    worker = getattr(protocol, "worker", None)
    return worker if hasattr(worker, "alive") else None


def register_producer(send: Any) -> Producer | None:
    """Return a producer for a ``send`` of daphne; ``None`` if ``send`` itself waits."""
    request = _daphne_request(send)
    return None if request is None else Producer(request)


def find_transport(send: Any) -> Any:
    """Return the transport behind a ``send``: Twisted's for daphne, otherwise asyncio's.

    ``None`` if the server is unknown, or if other requests share the connection (HTTP/2).
    """
    request = _daphne_request(send)
    if request is not None:
        return getattr(request.channel, "transport", None)
    for one in _owners(send):
        # uvicorn and gunicorn have the transport itself. hypercorn has it some objects further,
        # each of which has a ``send``.
        if (
            hasattr(one, "streams")
            or getattr(one, "_h2_tasks", None)
            or hasattr(getattr(one, "stream", None), "pending_bytes")
        ):
            return None  # HTTP/2: of hypercorn, gunicorn and uvicorn
        for holder in (getattr(one, "writer", None), one):
            transport = getattr(holder, "transport", None)
            if hasattr(transport, "abort"):
                return transport
    return None


def find_shutdown(send: Any) -> Callable[[], bool] | None:
    """Return a function that returns whether the server shuts down.

    ``None`` if the server is unknown. daphne and granian end their processes by a signal only.
    """
    for one in (*_owners(send), *_owners(signal.getsignal(signal.SIGTERM))):
        for find in (_uvicorn_shutdown, _hypercorn_shutdown, _gunicorn_shutdown):
            is_ending = find(one)
            if is_ending is not None:
                return is_ending
    return None


def _uvicorn_shutdown(server: Any) -> Callable[[], bool] | None:
    """Check the sockets of a ``uvicorn.Server``, which closes them when it shuts down.

    At ``--limit-max-requests`` (uvicorn 0.54) ``should_exit`` stays false, so it cannot be used.
    """
    if not hasattr(server, "server_state") or not hasattr(server, "servers"):
        return None
    return lambda: not any(one.is_serving() for one in server.servers)


def _hypercorn_shutdown(stream: Any) -> Callable[[], bool] | None:
    """Check the ``WorkerContext`` that all streams of a hypercorn worker share."""
    terminated = getattr(getattr(stream, "context", None), "terminated", None)
    return getattr(terminated, "is_set", None)


def _gunicorn_shutdown(protocol: Any) -> Callable[[], bool] | None:
    """Check the worker of gunicorn that a connection belongs to."""
    worker = _gunicorn_worker(protocol)
    return None if worker is None else lambda: not worker.alive


def abort_connection(transport: Any) -> None:
    """Abort a connection and drop its unsent bytes."""
    abort = getattr(transport, "abortConnection", None) or getattr(transport, "abort", None)
    if abort is not None:
        abort()


async def wait_drained(transport: Any) -> None:
    """Wait until the transport's buffer is empty.

    It is polled, because the transport reports only whether its buffer is full.
    """
    size = getattr(transport, "get_write_buffer_size", None)
    while size is not None and size():  # noqa: ASYNC110
        await asyncio.sleep(DRAIN_POLL_SECONDS)


def unsent(transport: Any) -> int | None:
    """Return the number of bytes that the client has not received; ``None`` if it is unknown.

    They are in the transport's buffer and in the operating system's, which for a slow client
    contains megabytes. A decreasing number is the only sign that such a client reads.
    """
    size = getattr(transport, "get_write_buffer_size", None)
    handle = getattr(transport, "getHandle", None)
    try:
        if size is not None:
            buffered, connection = size(), transport.get_extra_info("socket")
        elif handle is not None:
            buffered = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
            connection = handle()
        else:
            return None
        return int(buffered) + _queued(connection.fileno())
    except (AttributeError, ValueError):
        return None


def _queued(descriptor: int) -> int:
    """Return the unsent bytes in the operating system's buffer; 0 if it does not report them.

    :raises ValueError: if the connection is closed.
    """
    if descriptor < 0:
        raise ValueError("The connection is closed.")
    queued = array.array("i", [0])
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, termios.TIOCOUTQ, queued)
    return queued[0]
