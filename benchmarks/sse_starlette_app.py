"""The same work with sse-starlette: a queue for each listener, as in its documentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

queues: set[asyncio.Queue[str]] = set()


async def listen(request: Request) -> EventSourceResponse:
    """Stream what arrives."""

    async def events() -> AsyncIterator[ServerSentEvent]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        queues.add(queue)
        try:
            yield ServerSentEvent(comment="open")
            while True:
                yield ServerSentEvent(await queue.get(), event="ping")
        finally:
            queues.discard(queue)

    return EventSourceResponse(events())


async def publish(request: Request) -> Response:
    """Pass the body to every listener."""
    text = (await request.body()).decode()
    for queue in queues:
        queue.put_nowait(text)
    return Response(status_code=204)


application = Starlette(
    routes=[Route("/x", listen, methods=["GET"]), Route("/x", publish, methods=["POST"])]
)
