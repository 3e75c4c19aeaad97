"""Listening and sending over HTTP, without Django and its settings."""

from ..protocol.frames import Decoder, ServerSentEvent
from .client import TRANSIENT_STATUSES, AsyncEventSourceClient, EventSourceClient
from .sender import EventSender, send

__all__ = [
    "TRANSIENT_STATUSES",
    "AsyncEventSourceClient",
    "Decoder",
    "EventSender",
    "EventSourceClient",
    "ServerSentEvent",
    "send",
]
