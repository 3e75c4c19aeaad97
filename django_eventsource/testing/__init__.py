"""The test kit: what a project's tests use to check its events and streams."""

from .capture import CapturedEvent, capture_events
from .clock import move_time
from .faults import atrim_history, drop_layer_messages, recycle_server, trim_history
from .listening import ClientStream, listen

__all__ = [
    "CapturedEvent",
    "ClientStream",
    "atrim_history",
    "capture_events",
    "drop_layer_messages",
    "listen",
    "move_time",
    "recycle_server",
    "trim_history",
]
