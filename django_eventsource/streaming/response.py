"""The response whose body is a stream."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from django.http import StreamingHttpResponse

from ..protocol.frames import CONTENT_TYPE
from .open_stream import OpenStream

PRIVATE = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
"""The headers of every response. Django's cache middleware reads ``private`` only."""
HEADERS = {
    **PRIVATE,
    "Content-Type": CONTENT_TYPE,
    "Cache-Control": "private, no-store, no-transform",
    "X-Accel-Buffering": "no",
}
"""The headers of a stream."""


class Slot:
    """The place in the ASGI scope where a response puts its stream for ``Handover`` to send.

    :param scope: the server's ASGI scope, which exists as long as the connection.
    """

    __slots__ = ("scope", "stream")

    KEY = "django_eventsource.slot"
    """The key in the ASGI scope."""

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.scope = scope
        self.stream: OpenStream | None = None


class EventStreamResponse(StreamingHttpResponse):
    """The response whose body is a stream.

    :param slot: the place for the stream if ``Handover`` sends it; ``None`` if Django sends it.
    """

    def __init__(self, stream: OpenStream, slot: Slot | None = None) -> None:
        super().__init__(stream, headers=HEADERS)
        self._stream = stream
        self._slot = slot
        self._unwrapped = self._iterator  # type: ignore[attr-defined]

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Django wraps each chunk in two nested generators, which is most of its cost. Avoid them
        # unless middleware has put its own iterator around the stream.
        if self._iterator is not self._unwrapped:  # type: ignore[attr-defined]
            return super().__aiter__()
        # Django's handler sets this attribute on the response that it sends. Without it,
        # middleware iterates over the response to make another one.
        if self._slot is None or getattr(self, "_handler_class", None) is None:
            return self._stream
        self._slot.stream = self._stream
        return EmptyBody()


class EmptyBody(AsyncIterator[bytes]):
    """A body without chunks."""

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Do nothing; Django's handler calls it."""
