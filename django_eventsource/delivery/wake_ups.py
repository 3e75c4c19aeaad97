"""Wake-ups between processes without a shared channel layer.

A publisher wakes the other processes. A process with streams wakes its hubs, which then check for
new events. Nothing depends on it: the history checks find every event.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Protocol

from .. import _runtime
from .._logging import ThrottledLogger
from .._timing import Backoff, spread
from ..history import get_history
from ..history.wake_ups import Groups, WakeUps
from .layer import is_process_local

logger = logging.getLogger("django_eventsource.delivery")
throttled = ThrottledLogger(logger)


class Wakeable(Protocol):
    """A hub, as the watcher uses it."""

    loop: asyncio.AbstractEventLoop

    def wake(self, groups: Groups) -> None:
        """Check these groups for events soon. Callable in any thread."""


def _start(
    name: str, run: Callable[[WakeUps], None], wake_ups: WakeUps
) -> threading.Thread | None:
    thread = threading.Thread(target=run, args=[wake_ups], name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        throttled.error(
            "No thread can be started for wake-ups. Listeners receive events of other processes "
            "at the next history check.",
            error=error,
        )
        return None
    return thread


class Watcher:
    """Watches the database in a thread while hubs have streams, and wakes them."""

    backoff_seconds: tuple[float, ...] = (0.5, 1, 2, 5, 10)
    """Seconds between attempts after failures that follow one another."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the hubs, so that the thread ends. In a fork it does not exist."""
        self._lock = threading.Lock()
        self._hubs: set[Wakeable] = set()
        self._thread: threading.Thread | None = None

    def add(self, hub: Wakeable) -> None:
        """Wake a hub from now on, if the history has wake-ups and no layer replaces them."""
        wake_ups = get_history().wake_ups
        if wake_ups is None or not is_process_local():
            return
        with self._lock:
            self._hubs.add(hub)
            if self._thread is None:
                self._thread = _start("eventsource-watcher", self._run, wake_ups)

    def discard(self, hub: Wakeable) -> None:
        """Stop waking a hub, which has no streams any more."""
        with self._lock:
            self._hubs.discard(hub)

    def _run(self, wake_ups: WakeUps) -> None:
        backoff = Backoff(self.backoff_seconds)
        while self._is_needed():
            try:
                with closing(wake_ups.watch()) as news:
                    for groups in news:
                        backoff.reset()
                        if not self._is_needed():
                            return
                        self._wake(groups)
            except Exception as error:  # noqa: BLE001
                throttled.error(
                    "Cannot watch the database for events of other processes; retrying. Listeners "
                    "receive them at the next history check.",
                    error=error,
                )
                time.sleep(backoff.next() * spread(0.5, 1))

    def _is_needed(self) -> bool:
        """Return whether the thread shall continue. If not, the next hub starts another one."""
        with self._lock:
            if self._thread is not threading.current_thread():
                return False
            # A loop may have been stopped or closed while streams were open. The history check of
            # one that runs again adds its hub.
            self._hubs = {hub for hub in self._hubs if hub.loop.is_running()}
            if not self._hubs:
                self._thread = None
            return bool(self._hubs)

    def _wake(self, groups: Groups) -> None:
        if groups is None or groups:
            with self._lock:
                hubs = list(self._hubs)
            for hub in hubs:
                with suppress(RuntimeError):  # its loop was closed meanwhile
                    hub.wake(groups)


class News:
    """The wake-ups of a hub since its last check for them."""

    pause_seconds = 0.02
    """The fewest seconds between two checks. After a long check, the pause is as long as it."""

    def __init__(self) -> None:
        self.due_at = math.inf
        """The time of the next check, by the monotonic clock; infinity without a wake-up."""
        self._groups: Groups = frozenset()
        self._not_before = -math.inf

    def add(self, groups: Groups) -> None:
        """Add a wake-up."""
        known = self._groups
        self._groups = None if groups is None or known is None else {*known, *groups}
        self.due_at = min(self.due_at, max(time.monotonic(), self._not_before))

    def take(self) -> Groups:
        """Return the groups to check, ``None`` for all, and continue without any."""
        groups, self._groups = self._groups, frozenset()
        self.due_at = math.inf
        return groups

    def checked(self, began: float) -> None:
        """Begin the pause after a check.

        :param began: the time at which the check began, by the monotonic clock.
        """
        now = time.monotonic()
        self._not_before = now + max(self.pause_seconds, now - began)
        self.due_at = max(self.due_at, self._not_before)


class Waker:
    """Wakes other processes from a thread, off the path of the publishers.

    The thread and its connection exist until there was nothing to send for a moment.
    """

    interval_seconds = 0.005
    """The fewest seconds between two wake-ups, because each one costs the database a commit."""
    idle_seconds = 2.0
    """Seconds without a publisher after which the connection is closed. The database of a test run
    can be dropped only then, and PostgreSQL waits 5 seconds for it."""
    flush_seconds = 2.0
    """Seconds for which the end of the process waits for what is left to send."""
    backoff_seconds: tuple[float, ...] = (0.1, 0.5, 1, 2)
    """Seconds without an attempt after failures that follow one another."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        # A thread of the parent process may have held the lock during a fork.
        self._condition = threading.Condition()
        self._groups: set[str] = set()
        self._flushed = threading.Event()
        self._flushed.set()
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        """Drop what waits and end the thread. In a fork it does not exist."""
        if not _runtime.keep_in_fork(self._condition):
            self._end_thread()
        self._clear()

    def put(self, group: str) -> None:
        """Wake the other processes soon, if the history has wake-ups that must be sent.

        It does not wait, and any thread may call it.

        :param group: the channel-layer group of the token of a stored event.
        """
        wake_ups = get_history().wake_ups
        if wake_ups is None or not wake_ups.sends:
            return
        with self._condition:
            # One group more than fits stands for any number.
            if len(self._groups) <= wake_ups.most_groups:
                self._groups.add(group)
            self._flushed.clear()
            self._condition.notify()
            if self._thread is None:
                self._thread = _start("eventsource-waker", self._run, wake_ups)
            if self._thread is None:
                self._drop()

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything is sent or dropped, and return whether it is.

        :param seconds: the most seconds to wait; :attr:`flush_seconds` if not passed.
        """
        return self._flushed.wait(self.flush_seconds if seconds is None else seconds)

    def end(self) -> None:
        """Send what is left, and end the thread with its connection."""
        deadline = time.monotonic() + self.flush_seconds
        self.flush()
        thread = self._end_thread()
        if thread is not None:
            thread.join(max(deadline - time.monotonic(), 0))

    def _end_thread(self) -> threading.Thread | None:
        with self._condition:
            thread, self._thread = self._thread, None
            self._drop()
            self._condition.notify()
        return thread

    def _drop(self) -> None:
        self._groups = set()
        self._flushed.set()

    def _run(self, wake_ups: WakeUps) -> None:
        backoff = Backoff(self.backoff_seconds)
        while self._is_needed():
            try:
                wake_ups.send(self._batches(wake_ups.most_groups, backoff))
            except Exception as error:  # noqa: BLE001
                with self._condition:
                    if self._thread is threading.current_thread():
                        self._drop()
                throttled.error(
                    "Cannot wake other processes. Their listeners receive events at the next "
                    "history check.",
                    error=error,
                )
                self._pause(backoff.next())

    def _pause(self, seconds: float) -> None:
        """Wait, but not if the thread shall end."""
        condition, thread = self._condition, threading.current_thread()
        with condition:
            condition.wait_for(lambda: self._thread is not thread, seconds)

    def _is_needed(self) -> bool:
        """Return whether the thread shall continue. If not, the next event starts another one."""
        with self._condition:
            if self._thread is not threading.current_thread():
                return False
            if not self._groups:
                self._thread = None
            return bool(self._groups)

    def _batches(self, most: int, backoff: Backoff) -> Iterator[Groups]:
        """Yield what waits, until there was nothing for a moment."""
        while groups := self._take():
            yield groups if len(groups) <= most else None
            # The batch was sent.
            backoff.reset()
            time.sleep(self.interval_seconds)

    def _take(self) -> set[str]:
        """Wait for groups, and return nothing if there were none or the thread shall end."""
        condition, thread = self._condition, threading.current_thread()
        with condition:
            if not self._groups:
                self._flushed.set()
            condition.wait_for(
                lambda: self._groups or self._thread is not thread, self.idle_seconds
            )
            if self._thread is not thread:
                return set()
            groups, self._groups = self._groups, set()
            return groups


watcher = Watcher()
_runtime.on_reset(watcher.reset)
waker = Waker()
_runtime.on_reset(waker.reset)
# A script may end right after it has published. See the notifier.
getattr(threading, "_register_atexit", atexit.register)(waker.end)
