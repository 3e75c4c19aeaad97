"""The watch: one per event loop, over all streams that the loop serves.

Once per second it ends the streams that are too old, whose reader has stalled, and whose
listener has lost its right. It tells the history who listens, and hears from other
processes which streams are to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import cast

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import DatabaseError, connections

from .conf import conf
from .control import CLOSE, Selection
from .events import RESET
from .frames import Decoder
from .history import get_history
from .hub import Hub, get_hub
from .listeners import Limit, Listener, registry
from .presence import is_listened, process_name
from .shutdown import install, shutdown
from .signals import stream_closed
from .streams import COME_BACK_MS, EventStream, Reason, jittered_ms, leave_thread
from .tokens import CONTROL_TOKEN
from .troubles import log_failure

logger = logging.getLogger("django_eventsource.watch")

SWEEP_SECONDS = 1.0
FOLLOW_SECONDS = 0.2
"""Seconds between two checks whether the server shuts down."""
LEASE_BEATS = 3
"""After how many missed beats a process's listeners are no longer counted."""
RECHECKS_AT_ONCE = 10
RECHECKS_EACH = 20
"""How many are rechecked in one thread, with one connection, if there are as many."""
UNSERVED_SECONDS = 30.0
"""How long a stream may wait to be served: its response may have been dropped."""
RECHECK_SECONDS = 30.0
"""How long the policy may take to answer."""
RETRY_SECONDS = 5.0
"""How soon it is asked again when the database kept it from answering."""
REMEMBER_SECONDS = 10.0
"""How long a word to end streams also means those that were being opened when it came."""


class Stuck(TimeoutError):
    """A policy did not answer in time, and neither may what it waits for in its thread."""


class Watch:
    """Looks after the streams of one event loop."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.process = process_name()
        """What the lease of this loop's listeners is held under."""
        self._changed: set[str] = set()
        self._at_once = asyncio.Semaphore(RECHECKS_AT_ONCE)
        self._words: deque[tuple[float, Selection]] = deque(maxlen=1000)
        self._beating = asyncio.Lock()
        self._beat_now = asyncio.Event()
        install(hub.loop, self.withdraw)
        hub.start(self._sweep_forever())
        hub.start(self._follow_server())
        hub.start(self._beat_forever())
        hub.start(self._hear_forever())

    def admit(self, stream: EventStream, listener: Listener) -> Limit | None:
        """Take a stream under watch, unless that would pass a limit, which is given then."""
        listener.loop = self.hub.loop
        limit = registry.admit(stream, listener, self._on_close)
        if limit is None:
            self._note(listener)
            since = time.monotonic() - REMEMBER_SECONDS
            if any(at > since and word.matches(listener) for at, word in self._words):
                # It came between the policy's answer and this moment.
                listener.recheck_at = 0
        return limit

    def _on_close(self, listener: Listener, stream: EventStream) -> None:
        """Receive the end of a stream, in whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.hub.loop.call_soon_threadsafe(self._closed, listener, stream.reason)

    def _closed(self, listener: Listener, reason: Reason | None) -> None:
        self._note(listener)
        if stream_closed.has_listeners(listener.sender):
            self.hub.start(self._tell(listener, reason))

    async def _tell(self, listener: Listener, reason: Reason | None) -> None:
        seconds = time.time() - listener.opened
        await stream_closed.asend_robust(
            listener.sender, listener=listener, reason=reason, seconds=seconds
        )

    # Once per second

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self._sweep()
            except Exception:
                logger.exception("Looking after the streams failed; trying again.")

    async def _sweep(self) -> None:
        now = time.monotonic()
        stall_seconds = conf.stream_stall_seconds or float("inf")
        due = []
        for stream, listener in registry.streams(self.hub.loop):
            if max(stream.stalled_for(now), stream.ending_for(now)) > stall_seconds:
                stream.abort(Reason.STALLED)
            elif not stream.served and now > listener.admitted + UNSERVED_SECONDS:
                stream.abort(Reason.LEFT)
            elif now > listener.ends_at:
                stream.end(Reason.AGE)
            elif now > listener.recheck_at:
                due.append((stream, listener))
                listener.recheck_at = float("inf")  # until this one is done
        if due:
            # In a task of its own: a policy that hangs holds up nothing else.
            self.hub.start(self._recheck_all(due))

    async def _follow_server(self) -> None:
        """End the streams when the server shuts down and the application receives no signal.

        That is so when a worker is recycled, and in hypercorn's worker processes.
        """
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            if not shutdown.begun and shutdown.detects(self.hub.loop):
                await shutdown.end(self.hub.loop)

    async def _recheck_all(self, due: list[tuple[EventStream, Listener]]) -> None:
        queue = deque(due)
        workers = min(RECHECKS_AT_ONCE, -(-len(due) // RECHECKS_EACH))
        found = await asyncio.gather(*(self._recheck_some(queue) for _ in range(workers)))
        failed = [error for errors in found for error in errors]
        if failed:
            logger.error(
                "The rights of %d listeners could not be checked; trying again.",
                len(failed),
                exc_info=failed[0],
            )

    async def _recheck_some(self, queue: deque[tuple[EventStream, Listener]]) -> list[Exception]:
        """Recheck one after the other, in a thread that the histories' reads do not wait for.

        Gives what kept policies from answering.
        """
        errors = []
        async with self._at_once:
            while queue:
                async with ThreadSensitiveContext():
                    error: Exception | None = None
                    while queue and not isinstance(error, Stuck):
                        error = await asyncio.ensure_future(self._recheck(*queue.popleft()))
                        if error is not None:
                            errors.append(error)
                    if isinstance(error, Stuck):
                        leave_thread()
                    else:
                        # No request's end lets go of them. Those that wait their turn must
                        # get it, whatever a broken connection says.
                        try:
                            await sync_to_async(connections.close_all)()
                        except Exception:
                            logger.exception("A connection could not be closed.")
        return errors

    async def _recheck(self, stream: EventStream, listener: Listener) -> Exception | None:
        """Ask the policy again; give what kept it from answering."""
        seconds = conf.recheck_seconds or float("inf")
        limit = asyncio.timeout(RECHECK_SECONDS)
        try:
            async with limit:
                allowed = listener.recheck is None or await listener.recheck()
        except passing() as error:
            self._recheck_in(listener, min(seconds, RETRY_SECONDS))
            return Stuck("The policy takes too long.") if limit.expired() else error
        except (Exception, asyncio.CancelledError):
            if cast("asyncio.Task[object]", asyncio.current_task()).cancelling():
                raise
            # What it says of a new listener is the same: an error, and no stream.
            logger.exception("The policy failed; the stream of %r is ended.", listener.tokens)
            allowed = False
        self._recheck_in(listener, seconds)
        if not allowed:
            stream.end(Reason.REFUSED)
        return None

    @staticmethod
    def _recheck_in(listener: Listener, seconds: float) -> None:
        """Set when a listener is due again, unless somebody wanted that sooner meanwhile."""
        listener.recheck_at = min(listener.recheck_at, time.monotonic() + seconds)

    # Presence

    def _note(self, listener: Listener) -> None:
        self._changed.update(listener.tokens)
        if listener.exclusive:
            self._beat_now.set()

    async def _beat_forever(self) -> None:
        while True:
            seconds = SWEEP_SECONDS
            try:
                seconds = conf.presence_seconds or SWEEP_SECONDS
                await self.beat()
            except Exception as error:  # noqa: BLE001
                text = "The list of listeners could not be written; trying again."
                log_failure(logger, text, error=error)
            timer = self.hub.loop.call_later(seconds, self._beat_now.set)
            await self._beat_now.wait()
            timer.cancel()
            self._beat_now.clear()

    async def beat(self) -> None:
        """Tell the history what has changed, and that this process lives."""
        seconds = conf.presence_seconds
        if seconds is None:
            self._changed.clear()
            return
        async with self._beating:
            if not await self._announce(LEASE_BEATS * seconds):
                # The lease was not there: everything is to be told anew.
                for _, listener in registry.streams(self.hub.loop):
                    self._changed.update(listener.tokens)
                await self._announce(LEASE_BEATS * seconds)

    async def withdraw(self) -> None:
        """Give up the lease: nobody listens here any more."""
        if conf.presence_seconds is not None:
            async with self._beating:
                self._changed.clear()
                await get_history().awithdraw(self.process)

    async def _announce(self, lease_seconds: float) -> bool:
        changed, self._changed = self._changed, set()
        try:
            lists = self._lists(changed)
            if not changed and not any(registry.streams(self.hub.loop)):
                return True  # a process without listeners needs no lease
            return await get_history().aannounce(self.process, lists, lease_seconds)
        except BaseException:
            self._changed |= changed
            raise

    def _lists(self, tokens: set[str]) -> dict[str, list[str]]:
        lists: dict[str, list[str]] = {token: [] for token in tokens}
        if tokens:
            for _, listener in registry.streams(self.hub.loop):
                for token in tokens.intersection(listener.tokens):
                    lists[token].append(listener.user)
        return lists

    async def is_listened(self, token: str) -> bool:
        """Tell whether anybody in any process listens to a token, as of this moment here."""
        return bool(registry.count(token)) or await is_listened(token, elsewhere=self.process)

    # What other processes say

    async def _hear_forever(self) -> None:
        cursor = None
        while True:
            try:
                position = await get_history().alocate(CONTROL_TOKEN, cursor)
                stream = EventStream(CONTROL_TOKEN, position, asked=cursor)
                decoder = Decoder()
                async for chunk in stream:
                    for event in decoder.feed(chunk):
                        self._hear(event.event, event.data)
                    cursor = decoder.last_event_id
            except Exception as error:  # noqa: BLE001
                text = "What other processes say cannot be heard; trying again."
                log_failure(logger, text, error=error)
                if cursor is None:
                    self._recheck_everybody()
            await asyncio.sleep(SWEEP_SECONDS)

    def _hear(self, action: str, data: str) -> None:
        if action == RESET:
            self._recheck_everybody()  # something was missed
        elif action == CLOSE:
            try:
                selection = Selection.read(data)
            except ValueError:
                # A newer version's, perhaps. A look at everybody's rights makes up for it.
                logger.exception("A word of another process is not understood: %.200r", data)
                self._recheck_everybody()
                return
            self._words.append((time.monotonic(), selection))
            if not registry.has(selection.user, selection.session):
                return
            for stream, listener in registry.streams(self.hub.loop):
                if selection.matches(listener):
                    stream.end(Reason.CLOSED, jittered_ms(*COME_BACK_MS))

    def _recheck_everybody(self) -> None:
        for _, listener in registry.streams(self.hub.loop):
            listener.recheck_at = 0


def passing() -> tuple[type[Exception], ...]:
    """Give what keeps a policy from answering and goes away again."""
    return DatabaseError, OSError, *get_history().failures


_watches: dict[Hub, Watch] = {}


def get_watch() -> Watch:
    """Give the watch of the running event loop, started when first asked for."""
    hub = get_hub()
    watch = _watches.get(hub)
    if watch is None:
        for other in [other for other in list(_watches) if other.loop.is_closed()]:
            _watches.pop(other, None)
        watch = _watches[hub] = Watch(hub)
    return watch
