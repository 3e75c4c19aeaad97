"""The exceptions of this package. All are subclasses of :class:`EventSourceError`."""

from typing import Any

__all__ = [
    "ClientError",
    "DeliveryFailed",
    "EventSourceError",
    "EventTooLarge",
    "InvalidEvent",
    "InvalidGrant",
    "InvalidParameter",
    "InvalidToken",
    "NotAuthenticated",
    "ProductionRunning",
    "RateLimited",
    "ReceivedEventTooLarge",
    "UnknownAction",
]


class EventSourceError(Exception):
    """Base of all exceptions that are defined in this package."""


class InvalidToken(EventSourceError, ValueError):
    """Raised for a token that is not a text of 1 to 255 characters, or cannot be stored."""


class InvalidParameter(EventSourceError, ValueError):
    """Raised for a parameter or an argument that is not valid, or a key without a sender."""


class InvalidEvent(EventSourceError, ValueError):
    """Raised for an action, a value or an id that cannot be sent as a server-sent event."""


class EventTooLarge(InvalidEvent):
    """Raised if an encoded event has more than ``EVENTSOURCE_MAX_EVENT_BYTES`` bytes."""


class UnknownAction(InvalidEvent):
    """Raised for an action that the Event class does not allow.

    :ivar action: the action that was passed.
    :ivar allowed: the actions that the class lists.
    """

    def __init__(self, action: str, allowed: list[str], class_name: str) -> None:
        self.action = action
        self.allowed = allowed
        names = ", ".join(allowed) or "none"
        # The action may be a large part of a URL, or no text.
        super().__init__(
            f"Unknown action {action!r:.42}: {class_name} allows {names}. To allow others, write "
            'an Event class with the action, or "*", in ACTIONS (for a GET: as LISTEN), and name '
            "it in EVENTSOURCE_EVENT_CLASS or as_view(event_class=...)."
        )


class InvalidGrant(EventSourceError):
    """Raised for a grant that is forged, damaged or expired."""


class NotAuthenticated(EventSourceError):
    """Raised by a policy if the request has no valid credentials. The status is 401."""


class RateLimited(EventSourceError):
    """Raised by a policy if a client exceeds a limit. The status is 429.

    :param retry_after: seconds after which the client may try again.
    :param reason: the start of the message, which names the exceeded limit.
    :ivar retry_after: the same seconds, for the ``Retry-After`` header.
    """

    def __init__(self, retry_after: int, reason: str = "Too many events") -> None:
        self.retry_after = retry_after
        super().__init__(f"{reason}; try again in {retry_after} s.")


class DeliveryFailed(EventSourceError):
    """Raised by ``publish()`` if a live-only event did not reach the channel layer and is lost.

    It is never raised for a durable event, which listeners receive from the history.
    """


class ProductionRunning(EventSourceError):
    """Raised by ``produce()`` if another production of the token has no end yet.

    :ivar token: the token.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        super().__init__(
            f"A production of {token!r} is running. Use a token for each answer, or call "
            "stop_production() and wait for the event `stopped`."
        )


class ReceivedEventTooLarge(EventSourceError):
    """Raised by the decoder for an event that has more bytes than ``max_event_bytes``.

    :ivar events: the events before it that the same bytes completed.
    """

    def __init__(self, max_event_bytes: int, events: list[Any]) -> None:
        self.events = events
        super().__init__(f"The event has more than {max_event_bytes} bytes.")


class ClientError(EventSourceError):
    """Raised by the clients if a server sends no usable response.

    :ivar status: the HTTP status, or ``None`` without a response.
    :ivar retry_after: the seconds of the response's ``Retry-After`` header, or ``None``.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: float | None = None
    ) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(message)
