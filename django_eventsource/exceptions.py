"""What can go wrong, as classes. All of them are :class:`EventSourceError`."""

from __future__ import annotations

from typing import Any


class EventSourceError(Exception):
    """Base of every error this package raises itself."""


class InvalidToken(EventSourceError, ValueError):
    """The text is no token: empty, too long, or not storable as text."""


class InvalidEvent(EventSourceError, ValueError):
    """The action, value or id cannot be sent as a server-sent event."""


class EventTooLarge(InvalidEvent):
    """The event is larger than ``EVENTSOURCE_MAX_EVENT_BYTES`` once it is encoded."""


class UnknownAction(InvalidEvent):
    """The Event class does not list the action.

    ``allowed`` holds the actions that it lists.
    """

    def __init__(self, action: str, allowed: list[str], class_name: str) -> None:
        self.action = action
        self.allowed = allowed
        names = ", ".join(allowed) or "none"
        super().__init__(
            f"Unknown action {action!r}: {class_name} allows {names}. To allow another, set "
            "EVENTSOURCE_EVENT_CLASS or as_view(event_class=...) to a class with the action in "
            "ACTIONS (for a GET: as LISTEN)."
        )


class InvalidGrant(EventSourceError):
    """The grant is forged, damaged or expired."""


class NotAuthenticated(EventSourceError):
    """The request carries no usable credentials: the answer is 401."""


class RateLimited(EventSourceError):
    """The client did something too often: the answer is 429.

    :param retry_after: seconds after which it may try again.
    :param reason: what there was too much of.
    """

    def __init__(self, retry_after: int, reason: str = "Too many events") -> None:
        self.retry_after = retry_after
        super().__init__(f"{reason}; try again in {retry_after} s.")


class DeliveryFailed(EventSourceError):
    """A live-only event did not reach the channel layer; it is lost.

    A durable event never raises this: it is stored, and listeners find it in
    the history.
    """


class ReceivedEventTooLarge(EventSourceError):
    """A received event has more bytes than the decoder's ``max_event_bytes``.

    ``events`` holds the events that the same bytes completed before it.
    """

    def __init__(self, max_event_bytes: int, events: list[Any]) -> None:
        self.events = events
        super().__init__(f"The event has more than {max_event_bytes} bytes.")


class ClientError(EventSourceError):
    """A listening or sending client got no usable answer.

    ``status`` is the HTTP status, or ``None`` where there was no answer. ``retry_after`` is
    the number of seconds that the response's ``Retry-After`` asked to wait, or ``None``.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: float | None = None
    ) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(message)
