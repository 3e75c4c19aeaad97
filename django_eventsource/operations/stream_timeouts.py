"""The timeouts of open streams: stall, age and recheck.

One sweep per second replaces a timer for each stream.
"""

import asyncio
import logging
import time

from .. import _runtime
from .._statistics import Histogram
from ..conf import conf
from ..delivery.hub import Hub
from ..signals import Reason
from ..streaming.open_stream import NEVER
from ..streaming.registry import registry
from .recheck import Rechecker

logger = logging.getLogger("django_eventsource.operations")


loop_lag = Histogram()
"""The seconds that the sweeps began too late, because other work kept the event loop busy."""
_runtime.on_reset(loop_lag.reset)


class StreamTimeouts:
    """Ends the streams of one event loop that have stalled or are too old, and rechecks them.

    :param hub: the hub of that loop, which owns the tasks.
    """

    SWEEP_SECONDS = 1.0
    """Seconds between two sweeps over all streams."""
    UNSERVED_SECONDS = 30.0
    """Seconds after which a stream ends whose first bytes were never requested."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.rechecker = Rechecker()

    async def sweep_forever(self) -> None:
        """Sweep over the streams until the task is cancelled."""
        while True:
            due_at = time.monotonic() + self.SWEEP_SECONDS
            await asyncio.sleep(self.SWEEP_SECONDS)
            loop_lag.observe(time.monotonic() - due_at)
            try:
                self._sweep()
            except Exception:
                logger.exception("The sweep over the streams failed; retrying.")

    def _sweep(self) -> None:
        now = time.monotonic()
        stall_seconds = conf.stream_stall_seconds or NEVER
        due = []
        for stream in registry.streams(self._hub.loop):
            if max(stream.stalled_for(now), stream.ending_for(now)) > stall_seconds:
                stream.abort(Reason.STALLED)
            elif not stream.is_begun and now > stream.admitted_at + self.UNSERVED_SECONDS:
                stream.abort(Reason.CLIENT_DISCONNECTED)
            elif now > stream.ends_at:
                stream.end(Reason.MAX_AGE)
            elif now > stream.recheck_at:
                due.append(stream)
                stream.recheck_at = NEVER  # until this recheck is done
        if due:
            # A separate task, so that a policy that hangs does not delay the next sweep.
            self._hub.start_task(self.rechecker.recheck(due))
