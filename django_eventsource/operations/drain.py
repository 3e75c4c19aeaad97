"""Drain requests: the processes of a host end their streams before their servers are stopped.

A drain request is a control event. It names the host, and perhaps one server of the host.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Self

from .. import _runtime
from ..protocol.field_rules import DRAIN_HOST
from ..protocol.tokens import CONTROL_TOKEN
from ..publishing import publish_event
from .control import ControlEvent

_started_at = time.time()


@_runtime.on_reset
def _note_start() -> None:
    """Record the start of the process, also of a forked one."""
    global _started_at
    _started_at = time.time()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequest:
    """A request to the processes of a host to end their streams and to open no others."""

    seconds: float
    """Seconds over which the ends of the streams are spread."""
    pid: int | None = None
    """The id of the process, or of its parent; ``None`` for all processes of the host."""
    host: str = field(default_factory=socket.gethostname)
    """The name of the host."""
    requested_at: float = field(default_factory=time.time)
    """The time of the request on that host, in seconds since 1970."""

    @classmethod
    def read(cls, data: str) -> Self:
        """Return the request that is the data of an event.

        :raises ValueError: if it is not a valid request.
        """
        match json.loads(data):
            case {
                "seconds": float(seconds),
                "pid": int() | None as pid,
                "host": str(host),
                "requested_at": float(requested_at),
                **others,
            } if not others:
                return cls(seconds=seconds, pid=pid, host=host, requested_at=requested_at)
        raise ValueError("A drain request must have seconds, pid, host and requested_at.")

    @property
    def value(self) -> dict[str, object]:
        """The request as the value of an event."""
        return asdict(self)

    def is_for_this_process(self) -> bool:
        """Return whether this process is to drain, and was not started after the request."""
        return (
            self.host == socket.gethostname()
            and self.pid in (None, os.getpid(), os.getppid())
            and self.requested_at >= _started_at
        )


def request_drain(seconds: float, pid: int | None = None) -> None:
    """Request the processes of this host to end their streams and to open no others.

    :param seconds: seconds over which the ends of the streams are spread.
    :param pid: the id of a process, or of the parent of several; ``None`` for all.
    """
    request = DrainRequest(seconds=float(seconds), pid=pid)
    publish_event(ControlEvent(CONTROL_TOKEN, DRAIN_HOST, request.value))
