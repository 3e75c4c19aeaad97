"""The ASGI wrapper: streams are served outside of Django, once its handler has finished.

In a project's ``asgi.py``, directly around Django's application::

    application = Handover(get_asgi_application())

The view runs as ever, with URL resolving, middleware and policy, and its response's headers
are sent as Django produced them. Then the body is streamed without Django: with no thread
and no request. Readers that stall are held back, on Daphne too, which does not do that by
itself, and are disconnected after ``EVENTSOURCE_STREAM_STALL_SECONDS``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Self

from django.core.exceptions import ImproperlyConfigured

from .backpressure import Producer, cut, emptied, find_shutdown, find_transport, hold_back, unsent
from .responses import Slot
from .shutdown import shutdown
from .streams import EventStream, Reason

logger = logging.getLogger("django_eventsource.asgi")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


PIECE_BYTES = 64 * 1024
"""The largest piece of a body. A reader that stalls costs the server a piece, not an event."""
SMALL_PIECE_BYTES = 8 * 1024
"""The same for a server that may hold a number of pieces, whatever their size."""


class AsgiCall(partial[Awaitable[None]]):
    """An ``async def __call__()`` that rejects the call of a WSGI server.

    A WSGI server does not await the coroutine, so the call itself must raise. Servers detect an
    ASGI application by ``inspect.iscoroutinefunction()``, which looks through a ``partial``.
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
    """Serves an ASGI application, and the streams of its responses itself.

    :param application: Django's, or one that hands ``scope`` and ``send`` on as they are.
    """

    made = 0
    """How many there are in this process: a system check looks for one."""

    def __init__(self, application: Application) -> None:
        self.application = application
        Handover.made += 1

    @AsgiCall
    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        slot = Slot(scope)
        receiver = Receiver(receive)

        async def send_head(message: Message) -> None:
            # Django ends the body that it believes to be empty.
            if slot.stream is None or message["type"] != "http.response.body":
                await send(message)

        try:
            await self.application({**scope, Slot.KEY: slot}, receiver, send_head)
            if slot.stream is not None:
                await serve(slot.stream, receiver, send)
        finally:
            receiver.close()
            if slot.stream is not None:
                await slot.stream.aclose()


class Receiver:
    """A server's ``receive``, whose pending call outlives the cancellation of its caller.

    Django cancels its call when it has sent the response. After that, gunicorn's ASGI worker
    (27.0) reports a disconnect that did not happen. The next caller takes over the pending call.
    A disconnect is returned to every later caller, because servers report it once.
    """

    __slots__ = ("_pending", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pending: asyncio.Future[Message] | None = None

    async def __call__(self) -> Message:
        message = await asyncio.shield(self._call())
        if message["type"] != "http.disconnect":
            self._pending = None
        return message

    def on_disconnect(self, callback: Callable[[BaseException | None], None]) -> None:
        """Call back when the client disconnects, or when the server's ``receive`` fails.

        It takes no task besides the pending call: a stream waits for this as long as it is open.

        :param callback: takes the exception of ``receive``, or ``None``.
        """

        def received(pending: asyncio.Future[Message]) -> None:
            if pending.cancelled():
                return
            error = pending.exception()
            if error is None and pending.result()["type"] != "http.disconnect":
                self._pending = None
                self.on_disconnect(callback)
            else:
                callback(error)

        self._call().add_done_callback(received)

    def _call(self) -> asyncio.Future[Message]:
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._receive())
        return self._pending

    def close(self) -> None:
        """Cancel the pending call, when the response has ended."""
        if self._pending is not None:
            self._pending.cancel()


async def serve(stream: EventStream, receiver: Receiver, send: Send) -> None:
    """Send a stream as the body of a response whose headers are sent."""
    task = asyncio.current_task()
    was_cut = False

    def cut_off() -> None:
        nonlocal was_cut
        if task is not None:
            was_cut = task.cancel()

    stream.on_abort = cut_off
    # It counts as open until its last byte is sent: who looks for streams still finds it.
    release, stream.on_close = stream.on_close, None
    receiver.on_disconnect(partial(_disconnected, stream))
    producer: Producer | None = None
    transport = None
    try:
        producer = hold_back(send)
        transport = find_transport(send)
        stream.unsent = partial(unsent, transport)
        shutdown.follow(find_shutdown(send))
        await _send_all(
            stream, send, producer, SMALL_PIECE_BYTES if transport is None else PIECE_BYTES
        )
        if stream.reason is not Reason.LEFT:
            stream.progress(begin=True)
            await emptied(transport)
            if producer is not None:
                producer.release()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except asyncio.CancelledError:
        if not was_cut or task is None:
            raise  # the server ends it
        task.uncancel()
        if stream.reason is not Reason.LEFT:
            cut(transport)
            # The server must see it, or it complains of a response that is not whole.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    finally:
        receiver.close()
        if producer is not None:
            producer.release()
        await stream.aclose()
        if release is not None:
            release(stream)


async def _send_all(stream: EventStream, send: Send, producer: Producer | None, most: int) -> None:
    """Send a stream in pieces, and wait after each one until the server wants more."""
    async for chunk in stream:
        start = 0
        while len(chunk) - start > most:
            piece = chunk[start : start + most]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if producer is not None and not producer.ready:
                await producer.wait()
            stream.progress()
            start += most
            # After a disconnect send() may return at once: let the stream end then.
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": chunk[start:], "more_body": True})
        if producer is not None and not producer.ready:
            await producer.wait()


def _disconnected(stream: EventStream, error: BaseException | None) -> None:
    """End the stream of a listener that has disconnected."""
    if error is None:
        stream.abort(Reason.LEFT)
        return
    logger.error(
        "The server's receive() failed, so a disconnect cannot be detected. "
        "The stream of token %r is ended.",
        stream.token,
        exc_info=error,
    )
    stream.end(Reason.FAILED)
