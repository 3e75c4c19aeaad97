"""Productions that run detached from their caller, and the request to stop one."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
from collections.abc import Coroutine
from typing import Any, Unpack

from asgiref.sync import sync_to_async
from django.db import close_old_connections
from django.utils.asyncio import async_unsafe

from .. import _runtime
from ..delivery.hub import empty_context, end_hub
from ..delivery.layer import Background
from ..events import Event
from ..operations.shutdown import shutdown
from ..operations.supervisor import get_supervisor
from ..protocol.tokens import check_token
from ..publishing import publish_event
from .producer import STOP, Options, Producer, check_durable
from .sources import Source, close_unread

logger = logging.getLogger("django_eventsource.producers")

END_SECONDS = 3.0
"""Seconds for which the end of the process waits for the ends of productions."""

background = Background()
"""The event loop of the productions that synchronous code starts."""
_runtime.on_reset(background.reset)
_in_background: set[Producer] = set()
"""The productions of that loop."""
_runtime.on_reset(_in_background.clear)


def end_background() -> None:
    """Interrupt the productions of the process, and end the loop of those of synchronous code."""
    if background.started:
        with contextlib.suppress(TimeoutError):
            work = shutdown.end_productions(END_SECONDS)
            background.start(None, work).result(END_SECONDS + 1)
    background.end()


# Before the pools of threads end, which the productions need to publish their ends. CPython has no
# public function for it.
getattr(threading, "_register_atexit", atexit.register)(end_background)


async def astart_production(token: str, source: Source, **options: Unpack[Options]) -> None:
    """Claim a token, and run a production as a task of the running event loop.

    The task continues after the request that starts it. At a shutdown its end is ``interrupted``.

    The errors are those of :func:`produce`. The errors of the source and of ``on_complete`` are
    logged.

    :param token: the token.
    :param source: the chunks.
    :param options: the other arguments of :func:`produce`.
    """
    get_supervisor()  # it installs the handlers of the signals
    producer = Producer(token, source, **options)
    await producer.aclaim()
    _create_task(_run(producer))


@async_unsafe("start_production() blocks: in async code call `await astart_production(...)`.")
def start_production(token: str, source: Source, **options: Unpack[Options]) -> None:
    """Claim a token, and run a production on an event loop in a thread of the process.

    The production continues after the request that starts it. When the process ends in order, the
    end of the production is ``interrupted``.

    The errors are those of :func:`produce`. The errors of the source and of ``on_complete`` are
    logged.

    :param token: the token.
    :param source: the chunks.
    :param options: the other arguments of :func:`produce`.
    :raises TransactionManagementError: in a transaction, because the production would begin
        before the commit.
    """
    producer = Producer(token, source, **options)
    try:
        # In this thread, which may be the one that the event loop would need for it.
        producer.claim()
        try:
            # In an empty context: that of a request contains the thread that waits here.
            empty_context().run(background.start, None, _start(producer)).result()
        except Exception:
            producer.release()
            raise
    except Exception:
        close_unread(source)
        raise


@async_unsafe("stop_production() blocks: in async code call `await astop_production(...)`.")
def stop_production(token: str, *, event_class: type[Event] | None = None) -> None:
    """Request the production of a token to stop, in whatever process it runs.

    It publishes an event of the action ``stop``, as a POST of this action does. The production
    then publishes ``stopped``. Without a production, nothing happens. In a transaction, the
    event is published after the commit.

    :param token: the token.
    :param event_class: a durable class; ``EVENTSOURCE_EVENT_CLASS`` by default.
    :raises ValueError: if the token or the class is not valid.
    """
    check_token(token)
    publish_event(check_durable(event_class)(token, STOP, None))


async def astop_production(token: str, *, event_class: type[Event] | None = None) -> None:
    """Call :func:`stop_production` in Django's thread for synchronous work."""
    await sync_to_async(stop_production)(token, event_class=event_class)


async def _start(producer: Producer) -> None:
    _in_background.add(producer)
    _create_task(_run_in_background(producer))


def _create_task(work: Coroutine[Any, Any, None]) -> None:
    # In an empty context: that of a request contains its thread, which ends with the request.
    task = asyncio.get_running_loop().create_task(work, context=empty_context())
    shutdown.add_production(task)


async def _run_in_background(producer: Producer) -> None:
    try:
        await _run(producer)
    finally:
        _in_background.discard(producer)
        if not _in_background:
            # The process may never have another one, or a stream. Its hub would read the history
            # for ever.
            await end_hub()
            await sync_to_async(close_old_connections)()


async def _run(producer: Producer) -> None:
    try:
        await producer.run()
    except Exception:
        logger.exception("The production of %r failed.", producer.token)
