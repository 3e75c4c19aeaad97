"""Rechecks: the policy is asked again about streams that are open."""

import asyncio
import logging
import time
from collections import deque
from typing import cast

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import DatabaseError, connections

from ..conf import conf
from ..history import get_history
from ..signals import Reason
from ..streaming.open_stream import NEVER, OpenStream
from ..streaming.registry import registry
from ..streaming.thread_release import abandon_thread

logger = logging.getLogger("django_eventsource.operations")


class PolicyTimeout(TimeoutError):
    """A policy did not return in time, and its thread may be blocked too."""


class Rechecker:
    """Asks the policy about streams, in few threads with one database connection each."""

    MAX_THREADS = 10
    """The number of threads in which policies run at once."""
    STREAMS_PER_THREAD = 20
    """The number of streams for which another thread is used."""
    TIMEOUT_SECONDS = 30.0
    """Seconds after which a policy that has not returned is abandoned."""
    RETRY_SECONDS = 5.0
    """Seconds after which a policy is asked again whose database or network failed."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(self.MAX_THREADS)

    async def recheck(self, streams: list[OpenStream]) -> None:
        """Ask the policy about streams, and end those that it refuses."""
        queue = deque(streams)
        workers = min(self.MAX_THREADS, -(-len(streams) // self.STREAMS_PER_THREAD))
        results = await asyncio.gather(*(self._recheck_some(queue) for _ in range(workers)))
        errors = [error for found in results for error in found]
        if errors:
            logger.error(
                "The policy could not check %d listeners; retrying.",
                len(errors),
                exc_info=errors[0],
            )

    async def _recheck_some(self, queue: deque[OpenStream]) -> list[Exception]:
        """Recheck streams one after the other, and return the errors of the policy.

        The context gives them a thread that no read of a history waits for.
        """
        errors = []
        async with self._slots:
            while queue:
                async with ThreadSensitiveContext():
                    error: Exception | None = None
                    while queue and not isinstance(error, PolicyTimeout):
                        error = await asyncio.ensure_future(self._recheck_one(queue.popleft()))
                        if error is not None:
                            errors.append(error)
                    if isinstance(error, PolicyTimeout):
                        abandon_thread()
                    else:
                        # No end of a request closes these connections. A broken connection must
                        # not prevent the next worker from starting.
                        try:
                            await sync_to_async(connections.close_all)()
                        except Exception:
                            logger.exception("A database connection could not be closed.")
        return errors

    async def _recheck_one(self, stream: OpenStream) -> Exception | None:
        """Ask the policy again; return the error if it could not decide."""
        seconds = conf.recheck_seconds or NEVER
        timeout = asyncio.timeout(self.TIMEOUT_SECONDS)
        # Errors that do not come from the policy itself and may not happen again.
        transient: tuple[type[Exception], ...] = (
            DatabaseError,
            OSError,
            *get_history().storage_errors,
        )
        try:
            async with timeout:
                allowed = stream.recheck is None or await stream.recheck()
        except transient as error:
            self._schedule(stream, min(seconds, self.RETRY_SECONDS))
            if timeout.expired():
                return PolicyTimeout(
                    f"The policy did not return in {self.TIMEOUT_SECONDS} seconds."
                )
            return error
        except (Exception, asyncio.CancelledError):
            if cast("asyncio.Task[object]", asyncio.current_task()).cancelling():
                raise
            # A new listener would receive an error and no stream, so this stream ends too.
            logger.exception(
                "The policy failed; the stream of %r is ended.", stream.listener.tokens
            )
            allowed = False
        self._schedule(stream, seconds)
        if not allowed:
            stream.end(Reason.REFUSED)
        return None

    @staticmethod
    def _schedule(stream: OpenStream, seconds: float) -> None:
        # Keep an earlier recheck that was requested while this one ran.
        stream.recheck_at = min(stream.recheck_at, time.monotonic() + seconds)


def request_rechecks(loop: asyncio.AbstractEventLoop) -> None:
    """Make all streams of an event loop due for a recheck."""
    for stream in registry.streams(loop):
        stream.recheck_at = 0
