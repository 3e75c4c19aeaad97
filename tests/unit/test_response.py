"""Responses that carry a stream, and hand it over where they can."""

from __future__ import annotations

from typing import Any

import pytest

from django_eventsource.history import get_history
from django_eventsource.responses import EventStreamResponse, Slot
from django_eventsource.streams import EventStream

pytestmark = pytest.mark.usefixtures("memory_history")


def open_stream() -> EventStream:
    return EventStream("t", get_history().locate("t", None))


def opening_of_a_stream() -> bytes:
    """What every stream of the token begins with: its place."""
    return f"id: {get_history().locate('t', None).cursor}\n\n".encode()


async def test_response_headers() -> None:
    """What the standard and proxies ask for."""
    response = EventStreamResponse(open_stream())
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert response["X-Accel-Buffering"] == "no"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert not response.has_header("Content-Length")


async def test_response_gives_its_own_iterator() -> None:
    """Django's generators are skipped as long as no middleware has wrapped the stream."""
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


def sent_by_django(stream: EventStream, slot: Slot) -> EventStreamResponse:
    """A response that Django's handler is about to send."""
    response: Any = EventStreamResponse(stream, slot)
    response._handler_class = object
    return response


async def test_a_response_leaves_its_stream_in_the_slot() -> None:
    """Whoever made the slot serves the stream; Django sends an empty body."""
    stream, slot = open_stream(), Slot({})
    response = sent_by_django(stream, slot)
    assert slot.stream is None
    assert [chunk async for chunk in response] == []
    assert slot.stream is stream
    assert not stream.is_open


async def test_a_stream_that_middleware_reads_is_not_handed_over() -> None:
    """Neither one that it wraps, nor one that it takes the body of."""
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
