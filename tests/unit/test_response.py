"""The response whose body is a stream."""

from __future__ import annotations

from typing import Any

import pytest

from django_eventsource.history import get_history
from django_eventsource.signals import Listener
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.response import EventStreamResponse, Slot

pytestmark = pytest.mark.usefixtures("memory_history")


def open_stream() -> OpenStream:
    return OpenStream("t", get_history().locate("t", None), listener=Listener(tokens=("t",)))


def opening_of_a_stream() -> bytes:
    """Return the first bytes of each stream of the token, which contain the position."""
    return f"id: {get_history().locate('t', None).cursor.text}\n\n".encode()


async def test_a_stream_has_the_headers_of_the_standard_and_for_proxies() -> None:
    response = EventStreamResponse(open_stream())
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert response["X-Accel-Buffering"] == "no"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert not response.has_header("Content-Length")


async def test_the_response_returns_the_stream_itself_unless_middleware_wraps_it() -> None:
    stream = open_stream()
    response = EventStreamResponse(stream)
    assert response.__aiter__() is stream

    async def wrapped(inner: Any) -> Any:
        async for chunk in inner:
            yield chunk.upper()

    response.streaming_content = wrapped(response.streaming_content)
    chunks = response.__aiter__()
    assert await anext(chunks) == opening_of_a_stream().upper()
    await chunks.aclose()


def sent_by_django(stream: OpenStream, slot: Slot) -> EventStreamResponse:
    """A response that Django's handler is about to send."""
    response: Any = EventStreamResponse(stream, slot)
    response._handler_class = object
    return response


async def test_a_response_puts_its_stream_into_the_slot() -> None:
    """Django then sends an empty body."""
    stream, slot = open_stream(), Slot({})
    response = sent_by_django(stream, slot)
    assert slot.stream is None
    assert [chunk async for chunk in response] == []
    assert slot.stream is stream
    assert not stream.is_begun


async def test_a_stream_that_middleware_reads_stays_inside_django() -> None:
    """The middleware wraps it, or makes another response from its body."""
    first = opening_of_a_stream()
    stream, slot = open_stream(), Slot({})
    response = EventStreamResponse(stream, slot)
    assert await anext(aiter(response)) == first
    assert slot.stream is None
    await stream.aclose()
    stream = open_stream()
    response = sent_by_django(stream, slot)

    async def wrapped(inner: Any) -> Any:
        async for chunk in inner:
            yield chunk.upper()

    response.streaming_content = wrapped(response.streaming_content)
    chunks = aiter(response)
    assert await anext(chunks) == first.upper()
    assert slot.stream is None
    await chunks.aclose()
