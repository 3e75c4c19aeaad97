"""The check that the history can be read, for the readiness view."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future
from contextlib import suppress

from django.db import connections

from .. import _runtime
from .._logging import ThrottledLogger
from ..history import get_history
from ..protocol.tokens import CONTROL_TOKEN

logger = logging.getLogger("django_eventsource.monitoring")
throttled = ThrottledLogger(logger)


class HistoryCheck:
    """Reads the history, at most once a second, and never twice at the same time.

    Each read has a thread, which ends with it. So a store that hangs occupies one thread, and not
    one for each probe.
    """

    CACHE_SECONDS = 1.0
    """Seconds from one read to the next."""
    TIMEOUT_SECONDS = 2.0
    """Seconds for which a probe waits for a read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the last result. In a fork, the thread of a read does not exist."""
        self._lock = threading.Lock()
        self._began = 0.0
        self._result: Future[bool] | None = None

    async def is_readable(self) -> bool:
        """Return whether the history can be read, within the time-out."""
        result = asyncio.wrap_future(self._read())
        await asyncio.wait([result], timeout=self.TIMEOUT_SECONDS)
        # The thread must not report to an event loop that may be closed by then.
        return not result.cancel() and result.result()

    def _read(self) -> Future[bool]:
        """Return the read that runs or is young enough, or begin another one."""
        with self._lock:
            now = time.monotonic()
            result = self._result
            if result is None or (result.done() and now - self._began >= self.CACHE_SECONDS):
                self._began = now
                result = self._result = Future()
                # A caller that is cancelled must not cancel it for the others.
                result.set_running_or_notify_cancel()
                name = "eventsource-health"
                thread = threading.Thread(target=_run, args=[result], name=name, daemon=True)
                try:
                    thread.start()
                except Exception as error:  # noqa: BLE001
                    result.set_result(False)
                    _log(error)
            return result


def _run(result: Future[bool]) -> None:
    is_readable = False
    try:
        get_history().newest(CONTROL_TOKEN)
        is_readable = True
    except Exception as error:  # noqa: BLE001
        _log(error)
    finally:
        with suppress(Exception):  # a connection that is broken
            connections.close_all()
        result.set_result(is_readable)


def _log(error: Exception) -> None:
    throttled.error("The history cannot be read, so the process is not ready.", error=error)


history_check = HistoryCheck()
_runtime.on_reset(history_check.reset)
