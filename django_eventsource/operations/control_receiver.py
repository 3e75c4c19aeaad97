"""The task of an event loop that receives control events."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable

from .._logging import ThrottledLogger
from ..history import History, get_history
from ..protocol.cursors import parse_cursor
from ..protocol.field_rules import CLOSE_STREAMS, DRAIN_HOST, RESET, WRITE_DETAILS
from ..protocol.frames import Decoder
from ..protocol.tokens import CONTROL_TOKEN
from ..signals import Listener, Reason
from ..streaming.registry import registry
from ..streaming.stream import EventStream, reconnect_delay_ms
from .close_requests import Selection
from .drain import DrainRequest
from .recheck import request_rechecks
from .shutdown import shutdown

logger = logging.getLogger("django_eventsource.operations")


class ControlReceiver:
    """Receives the control events of all processes, for the streams of one event loop.

    :param loop: the event loop.
    :param on_details_requested: called with the token of a request for details, or ``None``.
    """

    MEMORY_SECONDS = 10.0
    """Seconds for which a request also applies to streams that are opened after it."""
    DRAIN_MEMORY_SECONDS = 600.0
    """Seconds for which a drain request also applies to event loops that had no stream before."""
    DRAIN_MEMORY_EVENTS = 5000
    """The most control events of this time that are read: an open console adds 10 a minute."""
    RETRY_SECONDS = 1.0
    """Seconds after which the control token is read again when its stream has ended."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_details_requested: Callable[[str | None], None],
    ) -> None:
        self._loop = loop
        self._on_details_requested = on_details_requested
        self.has_read = asyncio.Event()
        """Set when the requests were read that came before the first stream."""
        self._recent_close_requests: deque[tuple[float, Selection]] = deque(maxlen=1000)

    def matched_recently(self, listener: Listener) -> bool:
        """Return whether a request of the last seconds would have ended a listener's stream."""
        since = time.monotonic() - self.MEMORY_SECONDS
        return any(
            at > since and selection.matches(listener)
            for at, selection in self._recent_close_requests
        )

    async def receive_forever(self) -> None:
        """Read the control token; after a failure continue from the last event."""
        cursor = None
        while True:
            try:
                history = get_history()
                position = await history.alocate(CONTROL_TOKEN, parse_cursor(cursor))
                if cursor is None:
                    await self._find_drain_request(history)
                    self.has_read.set()
                stream = EventStream(CONTROL_TOKEN, position, asked=cursor)
                decoder = Decoder()
                async for chunk in stream:
                    for event in decoder.feed(chunk):
                        self.apply(event.event, event.data)
                    cursor = decoder.last_event_id
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "Cannot read control messages from other processes; retrying.",
                    error=error,
                )
                if cursor is None:
                    request_rechecks(self._loop)
            await asyncio.sleep(self.RETRY_SECONDS)

    async def _find_drain_request(self, history: History) -> None:
        """Apply the drain requests that came before the first stream of this event loop."""
        most = self.DRAIN_MEMORY_EVENTS
        before = await history.call(history.rewind, CONTROL_TOKEN, most, self.DRAIN_MEMORY_SECONDS)
        found = await history.aread(CONTROL_TOKEN, before or 0, max_events=most)
        for entry in found.entries:
            if entry.draft.action == DRAIN_HOST:
                self.apply(DRAIN_HOST, entry.draft.data.decode())

    def apply(self, action: str, data: str) -> None:
        """Apply an event of the control token; ignore unknown actions."""
        if action == RESET:
            request_rechecks(self._loop)  # requests were missed
        elif action == CLOSE_STREAMS:
            self._close(data)
        elif action == DRAIN_HOST:
            self._drain(data)
        elif action == WRITE_DETAILS:
            self._write_details(data)

    def _close(self, data: str) -> None:
        try:
            selection = Selection.read(data)
        except (ValueError, RecursionError):
            # A newer version may have sent it. A recheck of all streams replaces it.
            logger.exception("A close request is not valid: %.200r", data)
            request_rechecks(self._loop)
            return
        self._recent_close_requests.append((time.monotonic(), selection))
        if registry.has(selection.user, selection.session):
            for stream in registry.streams(self._loop):
                if selection.matches(stream.listener):
                    stream.end(Reason.CLOSE_REQUESTED, reconnect_delay_ms())

    def _drain(self, data: str) -> None:
        try:
            request = DrainRequest.read(data)
        except (ValueError, RecursionError):
            # A newer version may have sent it. SIGTERM ends the streams later.
            logger.exception("A drain request is not valid: %.200r", data)
            return
        if request.is_for_this_process():
            shutdown.start_drain(self._loop, request.seconds)

    def _write_details(self, data: str) -> None:
        try:
            token = json.loads(data)
        except (ValueError, RecursionError):
            logger.exception("A request for details is not valid: %.200r", data)
            return
        if isinstance(token, str | None):  # a newer version may send another value
            self._on_details_requested(token)
