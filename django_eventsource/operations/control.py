"""Control events, with which one process reaches all others.

A control event is a durable event of the control token. It reaches the other processes through the
channel layer, or through the history if the layer loses it.
"""

from ..events import JSONIdEvent
from ..protocol.field_rules import CLOSE_STREAMS, DRAIN_HOST, WRITE_DETAILS


class ControlEvent(JSONIdEvent):
    """An event of the control token."""

    ACTIONS = [CLOSE_STREAMS, DRAIN_HOST, WRITE_DETAILS]
    internal = True
