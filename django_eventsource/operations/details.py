"""The details of the server processes, which they write only while a console is open.

A console requests them with an event of the control token, so that a process reads nothing more
while no console is open. Each event loop that serves streams then writes its details as JSON, with
a lease of their own, until the requests stop. The details are the presence of a reserved token, so
every history stores them.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterable
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from typing import Any

from .._logging import ThrottledLogger
from ..delivery.hub import Hub
from ..delivery.statistics import statistics as delivery_statistics
from ..history import get_history
from ..protocol.field_rules import WRITE_DETAILS
from ..protocol.tokens import CONTROL_TOKEN, DETAILS_TOKEN, check_token
from ..publishing import counters as publishing_counters
from ..publishing import publish_event
from ..streaming.open_stream import OpenStream
from ..streaming.registry import registry
from .control import ControlEvent
from .presence import host_and_pid

logger = logging.getLogger("django_eventsource.operations")

DETAILS_PREFIX = "\ufffddetails:"
"""The first characters of the names of the leases."""


def request_details(token: str | None = None) -> None:
    """Request the details of all processes, which they write for some seconds.

    :param token: a token whose listeners they list; ``None`` for the slow listeners only.
    :raises InvalidToken: (a ``ValueError``) if the token is not valid.
    """
    if token is not None:
        check_token(token)
    publish_event(ControlEvent(CONTROL_TOKEN, WRITE_DETAILS, json.dumps(token)))


def read_details() -> list[dict[str, Any]]:
    """Return the details of the processes that have written them in the last seconds.

    :returns: what :meth:`DetailsWriter.details` returned, by host and process id.
    """
    found = [json.loads(text) for text in get_history().present(DETAILS_TOKEN)]
    return sorted(found, key=lambda one: (one["host"], one["pid"], one["process"]))


class DetailsWriter:
    """Writes the details of one event loop while they are requested.

    :param hub: the hub of that loop, which owns the task.
    :param process: the name of the loop's lease.
    """

    WRITE_SECONDS = 2.0
    """Seconds between two writes."""
    LEASE_WRITES = 3
    """The number of writes after which the details expire if no further one follows."""
    REQUEST_SECONDS = 15.0
    """Seconds for which a request is valid."""
    MAX_TOKENS = 10
    """The most tokens whose listeners are listed at the same time."""
    MAX_LISTENERS = 100
    """The most listeners of a token, and the most slow ones, that are listed."""
    MAX_TEXT = 100
    """The most characters of a user's id or an address."""
    SLOW_SECONDS = 2.0
    """Seconds without progress after which a listener counts as slow."""

    def __init__(self, hub: Hub, process: str) -> None:
        self._hub = hub
        self._process = process
        self._lease = f"{DETAILS_PREFIX}{process}"
        self._since = time.time()
        self._requests: dict[str | None, float] = {}
        self._writing = False

    def request(self, token: str | None) -> None:
        """Write the details until some seconds after the last request.

        :param token: a token whose listeners are listed; ``None`` for none.
        """
        self._requests.pop(token, None)
        self._requests[token] = time.monotonic() + self.REQUEST_SECONDS
        for oldest in list(self._requests)[: -self.MAX_TOKENS]:
            del self._requests[oldest]
        if not self._writing:
            self._writing = True
            self._hub.start_task(self._write_while_requested())

    async def _write_while_requested(self) -> None:
        try:
            while self._requested():
                try:
                    await self._write()
                except Exception as error:  # noqa: BLE001
                    ThrottledLogger(logger).error(
                        "The details for the console could not be written; retrying.", error=error
                    )
                await asyncio.sleep(self.WRITE_SECONDS)
        finally:
            self._writing = False
        # They contain addresses, which a store may keep for longer than the lease.
        with contextlib.suppress(Exception):
            await get_history().awithdraw(self._lease)

    async def _write(self) -> None:
        text = json.dumps(self.details())
        await get_history().aannounce(
            self._lease, {DETAILS_TOKEN: [text]}, self.LEASE_WRITES * self.WRITE_SECONDS
        )

    def _requested(self) -> dict[str | None, float]:
        now = time.monotonic()
        self._requests = {token: at for token, at in self._requests.items() if at > now}
        return self._requests

    def details(self) -> dict[str, Any]:
        """Return the details of this event loop, which JSON can encode.

        The size is bounded, whatever the number of streams. Times are in seconds since 1970.
        """
        host, pid = host_and_pid(self._process)
        streams = list(registry.streams(self._hub.loop))
        by_token: dict[str, list[OpenStream]] = {}
        for stream in streams:
            for token in stream.listener.tokens:
                by_token.setdefault(token, []).append(stream)
        counts = ((token, len(found)) for token, found in by_token.items())
        requested = {
            token: by_token.get(token, []) for token in self._requested() if token is not None
        }
        now = time.monotonic()
        slow = [stream for stream in streams if self._is_slow(stream, now)]
        delivery = delivery_statistics()
        return {
            "process": self._process,
            "host": host,
            "pid": pid,
            "since": self._since,
            "time": time.time(),
            "streams": len(streams),
            "counters": {
                "delivered": delivery.events + delivery.replayed_events,
                "published": publishing_counters.statistics().events,
                "resets": sum(delivery.resets.values()),
                "overflows": delivery.overflows,
            },
            "layer_silence": delivery.layer_silence_seconds,
            "slow_streams": len(slow),
            "slow": self._listed(now, slow),
            "busiest": nlargest(self.MAX_TOKENS, counts, key=itemgetter(1)),
            "tokens": {
                token: {"streams": len(found), "listeners": self._listed(now, found)}
                for token, found in requested.items()
            },
        }

    def _listed(self, now: float, streams: Iterable[OpenStream]) -> list[dict[str, Any]]:
        return [
            {
                "token": stream.listener.tokens[0],
                "tokens": len(stream.listener.tokens),
                "user": stream.listener.user[: self.MAX_TEXT],
                "address": stream.listener.address[: self.MAX_TEXT],
                "since": stream.listener.opened,
                "state": self._state_of(stream, now),
            }
            for stream in islice(streams, self.MAX_LISTENERS)
        ]

    def _state_of(self, stream: OpenStream, now: float) -> str:
        if stream.reason is not None:
            return "ending"
        if self._is_slow(stream, now):
            return "slow"
        return "behind" if stream.is_behind else "live"

    def _is_slow(self, stream: OpenStream, now: float) -> bool:
        since = stream.sending_since
        return since is not None and now - since > self.SLOW_SECONDS
