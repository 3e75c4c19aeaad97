"""The ASGI wrapper, which sends streams outside Django after Django's handler has finished.

In a project's ``asgi.py``, directly around Django's application::

    application = Handover(get_asgi_application())

The request passes through URL resolving, middleware, view and policy, and Django's handler sends
the headers of the response. Then the wrapper sends the body, without a thread and without the
request. It waits for clients that read slowly, also on daphne, whose ``send`` does not wait. A
client that reads nothing is disconnected after ``EVENTSOURCE_STREAM_STALL_SECONDS``.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Self

from django.core.exceptions import ImproperlyConfigured

from .operations.shutdown import shutdown
from .signals import Reason
from .streaming.open_stream import OpenStream
from .streaming.response import Slot
from .streaming.transport import (
    abort_connection,
    find_shutdown,
    find_transport,
    wait_drained,
)
from .streaming.writer import make_writer

__all__ = ["Handover"]

logger = logging.getLogger("django_eventsource.asgi")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class AsgiCall(partial[Awaitable[None]]):
    """An ``async def __call__()`` that raises an exception if a WSGI server calls it.

    A WSGI server does not await the coroutine, so the call itself must raise. Servers detect an
    ASGI application by ``inspect.iscoroutinefunction()``, which unwraps a ``partial``.
    """

    def __get__(self, instance: object, owner: type | None = None) -> Self:
        return self if instance is None else type(self)(self.func, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[None]:
        if len(args) == 2 and "wsgi.version" in args[0]:
            raise ImproperlyConfigured(
                "This ASGI application was called as a WSGI application. Start it with an ASGI "
                "server or worker, for example `gunicorn -k asgi mysite.asgi:application`, or "
                "serve the project's wsgi.py."
            )
        return super().__call__(*args, **kwargs)


class Handover:
    """An ASGI application around Django's, which sends the streams.

    :param application: Django's ASGI application, or one that passes ``scope`` and ``send`` on
        unchanged.
    """

    made = 0
    """The number of instances in this process; a system check requires one.

    It is not reset after a fork, because the forked process serves the same application.
    """

    def __init__(self, application: Application) -> None:
        self.application = application
        Handover.made += 1

    @AsgiCall
    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        """Serve one connection: call the application, then send the stream of its response."""
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        slot = Slot(scope)
        receiver = Receiver(receive)

        async def send_head(message: Message) -> None:
            # Drop the end of the empty body that Django sends.
            if slot.stream is None or message["type"] != "http.response.body":
                await send(message)

        try:
            await self.application({**scope, Slot.KEY: slot}, receiver, send_head)
            del send_head  # it would take memory for as long as the stream is open
            if slot.stream is not None:
                await serve(slot.stream, receiver, send)
        finally:
            receiver.close()
            if slot.stream is not None:
                await slot.stream.aclose()


class Receiver:
    """A server's ``receive``, whose pending call is not cancelled with its caller.

    Django cancels its call after it has sent the response. gunicorn's ASGI worker (27.0) then
    reports a disconnect that did not happen. Therefore the next caller awaits the same pending
    call. A disconnect is returned to every later caller, because servers report it once.
    """

    __slots__ = ("_callback", "_pending", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pending: asyncio.Future[Message] | None = None
        self._callback: Callable[[BaseException | None], None]

    async def __call__(self) -> Message:
        message = await asyncio.shield(self._call())
        if message["type"] != "http.disconnect":
            self._pending = None
        return message

    def on_disconnect(self, callback: Callable[[BaseException | None], None]) -> None:
        """Call a function when the client disconnects, or when the server's ``receive`` fails.

        This creates no task besides the pending call, because each open stream waits for it.

        :param callback: called with the exception of ``receive``, or with ``None``.
        """
        self._callback = callback
        self._call().add_done_callback(self._on_received)

    def _on_received(self, pending: asyncio.Future[Message]) -> None:
        if pending.cancelled():
            return
        error = pending.exception()
        if error is None and pending.result()["type"] != "http.disconnect":
            self._pending = None
            self.on_disconnect(self._callback)
        else:
            self._callback(error)

    def _call(self) -> asyncio.Future[Message]:
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._receive())
        return self._pending

    def close(self) -> None:
        """Cancel the pending call. Use it when the response has ended."""
        if self._pending is not None:
            self._pending.cancel()


async def serve(stream: OpenStream, receiver: Receiver, send: Send) -> None:
    """Send a stream as the body of a response whose headers were sent."""
    task = asyncio.current_task()
    stream.begin_sending(task)
    receiver.on_disconnect(partial(_on_disconnect, stream))
    try:
        stream.transport = find_transport(send)
        shutdown.watch_server(partial(find_shutdown, send))
        await _send_all(stream, send)
        if stream.reason is not Reason.CLIENT_DISCONNECTED:
            stream.note_progress()
            await wait_drained(stream.transport)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except asyncio.CancelledError:
        if task is None or not stream.was_cut:
            raise  # the server cancelled the task
        task.uncancel()
        if stream.reason is not Reason.CLIENT_DISCONNECTED:
            abort_connection(stream.transport)
            # Servers log an incomplete response unless they detect the disconnect first.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    finally:
        stream.end_sending()


async def _send_all(stream: OpenStream, send: Send) -> None:
    """Send a stream in pieces, and wait after each one until the server accepts more data."""
    writer = make_writer(stream, send)
    try:
        async for chunk in stream:
            if not chunk:
                await writer.drain()
            for start in range(0, len(chunk), writer.piece_bytes):
                if start:
                    stream.note_progress()
                    # After a disconnect send() may return at once, so let the stream end here.
                    await asyncio.sleep(0)
                await writer.send(chunk[start : start + writer.piece_bytes])
    finally:
        writer.close()


def _on_disconnect(stream: OpenStream, error: BaseException | None) -> None:
    if error is None:
        stream.abort(Reason.CLIENT_DISCONNECTED)
        return
    logger.error(
        "The server's receive() failed, so a disconnect cannot be detected. "
        "The stream of token %r is ended.",
        stream.token,
        exc_info=error,
    )
    stream.end(Reason.FAILED)
