"""A bare ASGI application that writes ready bytes to its listeners: the minimum of work.

``GET /<anything>`` listens, ``POST`` publishes its body. No token, no history, no check.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
listeners: set[asyncio.Queue[bytes]] = set()


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Serve one request."""
    if scope["type"] != "http":
        return
    if scope["method"] == "POST":
        await publish(receive, send)
    else:
        await listen(receive, send)


async def publish(receive: Any, send: Any) -> None:
    """Pass the body to every listener, encoded once."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    frame = b"event: ping\ndata: %s\n\n" % body
    for queue in listeners:
        queue.put_nowait(frame)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def listen(receive: Any, send: Any) -> None:
    """Send frames until the listener disconnects."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.ensure_future(send_all(queue, send))
    listeners.add(queue)
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        listeners.discard(queue)
        task.cancel()


async def send_all(queue: asyncio.Queue[bytes], send: Any) -> None:
    """Send each frame when it arrives."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b": open\n", "more_body": True})
    while True:
        frame = await queue.get()
        await send({"type": "http.response.body", "body": frame, "more_body": True})


gc.collect()
gc.freeze()  # as the applications that it is compared with
