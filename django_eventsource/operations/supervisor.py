"""The supervisor: admits the streams of an event loop and starts the tasks that end them."""

import asyncio
import contextlib
import logging
import time

from .. import _runtime
from ..delivery.hub import Hub, get_hub
from ..signals import Listener, Reason, stream_closed
from ..streaming.open_stream import OpenStream
from ..streaming.registry import Limit, registry
from .control_receiver import ControlReceiver
from .details import DetailsWriter
from .presence import Lease
from .productions import interrupt_dead_forever
from .shutdown import shutdown
from .stream_timeouts import StreamTimeouts

logger = logging.getLogger("django_eventsource.operations")


class StreamSupervisor:
    """Admits the streams of one event loop.

    :param hub: the hub of that loop, which owns the tasks.
    """

    SERVER_CHECK_SECONDS = 0.2
    """Seconds between two checks whether the server shuts down."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.lease = Lease(hub.loop)
        self.timeouts = StreamTimeouts(hub)
        self.details = DetailsWriter(hub, self.lease.process)
        self.control = ControlReceiver(hub.loop, self.details.request)

    def start(self) -> None:
        """Install the signal handlers and start the tasks."""
        shutdown.install(self.hub.loop, self.lease.withdraw)
        self.hub.start_task(self.timeouts.sweep_forever())
        self.hub.start_task(self._check_server_forever())
        self.hub.start_task(self.lease.renew_forever())
        self.hub.start_task(self.control.receive_forever())
        self.hub.start_task(interrupt_dead_forever())

    def admit(self, stream: OpenStream) -> Limit | None:
        """Admit a stream, or return the limit that it would exceed."""
        limit = registry.admit(stream, loop=self.hub.loop, on_end=self._on_end)
        if limit is None:
            self.lease.note_change(stream.listener)
            if self.control.matched_recently(stream.listener):
                # The request came after the policy had allowed the stream.
                stream.recheck_at = 0
        return limit

    def _on_end(self, stream: OpenStream) -> None:
        """Receive the end of a stream, in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.hub.loop.call_soon_threadsafe(
                self._ended, stream.listener, stream.sender, stream.reason
            )

    def _ended(self, listener: Listener, sender: type | None, reason: Reason | None) -> None:
        self.lease.note_change(listener)
        if stream_closed.has_listeners(sender):
            self.hub.start_task(
                stream_closed.asend_robust(
                    sender,
                    listener=listener,
                    reason=reason,
                    seconds=time.time() - listener.opened,
                )
            )

    async def _check_server_forever(self) -> None:
        """End the streams if the server shuts down without a signal to the application.

        This happens when a worker is recycled, and in hypercorn's worker processes.
        """
        while True:
            await asyncio.sleep(self.SERVER_CHECK_SECONDS)
            if not shutdown.begun and shutdown.server_is_ending(self.hub.loop):
                await shutdown.end(self.hub.loop)


_supervisors: dict[Hub, StreamSupervisor] = {}
_runtime.on_reset(_supervisors.clear)


def get_supervisor() -> StreamSupervisor:
    """Return the supervisor of the running event loop; the first call starts it."""
    hub = get_hub()
    supervisor = _supervisors.get(hub)
    if supervisor is None:
        for other in [other for other in list(_supervisors) if other.loop.is_closed()]:
            _supervisors.pop(other, None)
        supervisor = _supervisors[hub] = StreamSupervisor(hub)
        supervisor.start()
    return supervisor
