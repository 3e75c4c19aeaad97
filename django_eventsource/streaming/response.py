"""The response that carries a stream, and hands it over where it can."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from django.http import StreamingHttpResponse

from .frames import CONTENT_TYPE
from .streams import EventStream

PRIVATE = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
"""The headers of every answer. Django's cache middleware heeds ``private`` alone."""
HEADERS = {
    **PRIVATE,
    "Content-Type": CONTENT_TYPE,
    "Cache-Control": "private, no-store, no-transform",
    "X-Accel-Buffering": "no",
}
"""The headers of a stream."""


class Slot:
    """Where the response of a stream leaves it for ``django_eventsource.asgi`` to serve.

    :param scope: the server's ASGI scope, which lives as long as the connection.
    """

    __slots__ = ("scope", "stream")

    KEY = "django_eventsource.slot"
    """Its place in the ASGI scope."""

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.scope = scope
        self.stream: EventStream | None = None


class EventStreamResponse(StreamingHttpResponse):
    """The response that carries a stream.

    :param slot: where to leave the stream, instead of streaming inside of Django.
    """

    def __init__(self, stream: EventStream, slot: Slot | None = None) -> None:
        super().__init__(stream, headers=HEADERS)
        self._stream = stream
        self._slot = slot
        self._unwrapped = self._iterator  # type: ignore[attr-defined]

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Two nested generators per chunk are most of what Django costs: skip them while
        # no middleware has put its own iterator around the stream.
        if self._iterator is not self._unwrapped:  # type: ignore[attr-defined]
            return super().__aiter__()
        # Django's handler marks the response that it sends. Any other is being iterated over
        # by middleware, for a response of its own.
        if self._slot is None or getattr(self, "_handler_class", None) is None:
            return self._stream
        self._slot.stream = self._stream
        return Nothing()


class Nothing(AsyncIterator[bytes]):
    """Gives no chunk at all."""

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End it, which it is."""
