"""Faults that a test can cause: lost messages, a trimmed history, a recycled server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from asgiref.sync import sync_to_async

from .. import publishing
from ..history import get_history
from ..history.database import DatabaseHistory
from ..history.memory import MemoryHistory
from ..operations.shutdown import shutdown


@contextmanager
def drop_layer_messages() -> Iterator[None]:
    """Lose each message that this process sends over the channel layer inside of the block.

    Listeners of a durable event class receive its events at the next history check. Live-only
    events are lost, and their publisher receives no error.
    """
    with (
        patch.object(publishing, "get_shared_layer", lambda: None),
        patch.object(publishing, "hubs", list),
    ):
        yield


def trim_history() -> None:
    """Remove all stored events, as if each of them were older than ``MAX_AGE``.

    A listener that reconnects after it has missed events receives ``reset``.

    :raises TypeError: if the history is neither a ``DatabaseHistory`` nor a ``MemoryHistory``.
    """
    history = get_history()
    if not isinstance(history, DatabaseHistory | MemoryHistory):
        raise TypeError(
            "trim_history() requires a DatabaseHistory or a MemoryHistory, not a "
            f"{type(history).__name__}. Override EVENTSOURCE_HISTORY in the test."
        )
    # Also what was stored at this moment is older than a time that is yet to come.
    with patch.object(history, "max_age", -1):
        history.prune()


async def atrim_history() -> None:
    """Call :func:`trim_history` from asynchronous code; with the same errors."""
    await sync_to_async(trim_history)()


async def recycle_server() -> None:
    """End the streams of the running event loop as a server does that is replaced.

    Each stream sends what is buffered and a reconnection time, and ends. The replaced server
    refuses no stream: a client that reconnects is served at once.
    """
    try:
        await shutdown.end(asyncio.get_running_loop())
    finally:
        shutdown.begun = False
