"""Iteration over the source of a production, whether it is asynchronous or not."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any

from asgiref.sync import async_to_sync
from django.db import connections

from ..protocol.field_rules import shown

Source = AsyncIterable[Any] | Iterable[Any]

_END: Any = object()
_Requests = SimpleQueue[Future[Any] | None]


def check_source(source: Any) -> None:
    """Check that a source is an iterable that yields chunks.

    :raises TypeError: if it is not, or is a text, bytes or a mapping.
    """
    is_iterable = isinstance(source, AsyncIterable | Iterable)
    if not is_iterable or isinstance(source, str | bytes | bytearray | Mapping):
        raise TypeError(
            "source must be an iterator or an asynchronous iterator of chunks, not "
            f"{shown(source)}. Call a generator function, await a coroutine, and put a single "
            "text into a list."
        )


async def iterate(source: Source) -> AsyncGenerator[Any, None]:
    """Yield the chunks of a source, and close the source at the end.

    A synchronous source runs in a thread that has its own database connections.
    """
    if not isinstance(source, AsyncIterable):
        source = _in_thread(source)
    iterator = source.__aiter__()
    try:
        async for chunk in iterator:
            yield chunk
    finally:
        await _aclose(iterator)
        if source is not iterator:
            await _aclose(source)


def close_unread(source: Source) -> None:
    """Close a source that is not read, such as the response of a model."""
    if isinstance(source, AsyncIterable):
        async_to_sync(_aclose)(source)
    else:
        _close(source)


async def aclose_unread(source: Source) -> None:
    """Do the same as :func:`close_unread` in asynchronous code."""
    if isinstance(source, AsyncIterable):
        await _aclose(source)
    else:
        await asyncio.to_thread(_close, source)


# The errors of closing are ignored, because the production has its end already, or has none.


async def _aclose(closable: object) -> None:
    # The streams of some clients of models have an asynchronous method with the name "close".
    close = getattr(closable, "aclose", None) or getattr(closable, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):
            closing = close()
            if inspect.isawaitable(closing):
                await closing


def _close(closable: object) -> None:
    close = getattr(closable, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):
            close()


async def _in_thread(source: Iterable[Any]) -> AsyncGenerator[Any, None]:
    requests: _Requests = SimpleQueue()
    # All steps run in one thread, because a database connection belongs to its thread. It is a
    # daemon, because a source that blocks must not prevent the end of the process.
    threading.Thread(
        target=copy_context().run,
        args=(_serve, source, requests),
        name="eventsource-source",
        daemon=True,
    ).start()
    try:
        while True:
            request: Future[Any] = Future()
            requests.put(request)
            chunk = await asyncio.wrap_future(request)
            if chunk is _END:
                return
            yield chunk
    finally:
        requests.put(None)


def _serve(source: Iterable[Any], requests: _Requests) -> None:
    iterator: Iterator[Any] | None = None
    while (request := requests.get()) is not None:
        if not request.set_running_or_notify_cancel():
            continue
        try:
            iterator = iter(source) if iterator is None else iterator
            chunk = next(iterator, _END)
        except BaseException as error:  # noqa: BLE001
            # An event loop ends if a task raises anything else.
            if not isinstance(error, Exception):
                error = RuntimeError(f"The source raised {error!r}.")
            request.set_exception(error)
        else:
            request.set_result(chunk)
    _close(iterator)
    if source is not iterator:
        _close(source)
    connections.close_all()
