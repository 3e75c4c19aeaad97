"""Django signals of streams and events, and the data that they carry.

A receiver may be a function or a coroutine function. If a receiver raises an exception, it is
logged, and the stream or the publisher continues.
"""

import time
from dataclasses import dataclass, field
from enum import StrEnum

from django.dispatch import Signal

__all__ = ["Listener", "Reason", "event_published", "stream_closed", "stream_opened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A client with an open stream."""

    tokens: tuple[str, ...]
    """The tokens that the stream carries."""
    user: str = ""
    """The id that the policy returns, by default the user's primary key as text; empty without a
    user."""
    address: str = ""
    """The client's network address, or that of the proxy in front of the server."""
    session: str = ""
    """A hash of the session's key; empty without a session."""
    opened: float = field(default_factory=time.time)
    """The time at which the stream was opened, in seconds since 1970."""
    exclusive: bool = False
    """Whether the listener must be the only one of its tokens."""


class Reason(StrEnum):
    """The reason why a stream ended."""

    TOKEN_CLOSED = "token_closed"  # noqa: S105
    """The close action closed all tokens of the stream."""
    CLIENT_DISCONNECTED = "client_disconnected"
    """The client disconnected, or the server stopped sending the response."""
    MAX_AGE = "max_age"
    """The stream was open for ``EVENTSOURCE_STREAM_MAX_AGE_SECONDS``."""
    STALLED = "stalled"
    """The client read nothing for ``EVENTSOURCE_STREAM_STALL_SECONDS``."""
    CLOSE_REQUESTED = "close_requested"
    """``close_streams()`` was called for the stream, or its user logged out."""
    REFUSED = "refused"
    """The policy refused the listener when it was asked again."""
    SHUTDOWN = "shutdown"
    """The server shuts down."""
    FAILED = "failed"
    """An error occurred. It is logged."""


stream_opened = Signal()
"""A stream was opened. Arguments: ``listener`` (a :class:`Listener`) and ``request``. The sender
is the view's class."""

stream_closed = Signal()
"""A stream has ended. Arguments: ``listener`` (a :class:`Listener`), ``reason`` (a
:class:`Reason`) and ``seconds``, the time for which it was open. The sender is the view's
class."""

event_published = Signal()
"""An event was published, and its transaction, if there is one, has committed. Argument:
``event``, with its id. The sender is the event's class."""
