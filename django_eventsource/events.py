"""Event classes: what may be sent, how its value is read, and what is guaranteed.

The names and the extension points are those of the classic tornado library
``eventsource``, so that an Event class written for it ports by changing an import.

The class decides the guarantee. ``id = None``: live only, never stored, delivered
at most once. Any other ``id``: durable, stored in the history and replayed.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .exceptions import InvalidEvent

CURSOR_MARK = "~"
"""How the last event id of a stream with several tokens begins: no event's own id does."""
RESET = "reset"
"""The reserved action that tells a listener that it missed events."""
CURSOR = "cursor"
"""The reserved action that carries a cursor to clients that ignore an id without data."""
RESERVED = (RESET, CURSOR)

MAX_ACTION_LENGTH = 255
MAX_ID_LENGTH = 255

_FORBIDDEN = {"\r": "CR", "\n": "LF", "\0": "NUL"}
_VISIBLE_ASCII = re.compile(r"[!-~]+")
_RETRY = re.compile(r"[0-9]{1,15}")


def unify_line_ends(text: str) -> str:
    """Replace CRLF and CR, which end a line of an event stream as LF does, by LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_lines(text: str) -> list[str]:
    """Split at CRLF, CR and LF, the line ends of an event stream, and at no others."""
    return unify_line_ends(text).split("\n")


class _ComputedId:
    """A computed ``id``, computed once: one event has one id."""

    def __init__(self, compute: Callable[[Any], object]) -> None:
        self._compute = compute

    def __get__(self, event: Event | None, owner: type[Event]) -> Any:
        if event is None:
            return self
        if event._id is None:
            value = self._compute(event)
            event._id = None if value is None else str(value)
        return event._id


class Event:
    """One event: a token, an action, a value, and perhaps an id.

    :param token: the token whose listeners receive it.
    :param action: the event type on the wire.
    :param value: what :meth:`set_value` accepts.
    :raises ValueError: when the value is malformed, or the action could not be sent.
    """

    LISTEN = "poll"
    """The action that opens a stream with GET."""
    FINISH = "close"
    """The action that ends the streams of a token, after its event was received."""
    RETRY = "retry"
    """The action that sets the listeners' reconnection time, in milliseconds."""
    ACTIONS: list[str] = [FINISH]
    """The actions that may be published."""
    content_type = "text/plain"
    """The media type a POST is expected to carry: announced in ``Accept``, not enforced."""

    _id: str | None = None
    _seq: int | None = None

    if TYPE_CHECKING:

        @property
        def id(self) -> Any:
            """The id on the wire. A class whose ``id`` is ``None`` is live only."""
    else:
        id = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        computed = inspect.getattr_static(cls, "id")
        if isinstance(computed, property) and computed.fget is not None:
            cls.id = _ComputedId(computed.fget)  # type: ignore[assignment, method-assign]

    def __init__(self, token: str, action: str, value: Any = "") -> None:
        check_field("action", action, MAX_ACTION_LENGTH)
        self.token = token
        self.action = action
        self.set_value(value)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} token={self.token!r} action={self.action!r} id={self.id!r}>"
        )

    @property
    def target(self) -> str:
        """The classic library's name for the token."""
        return self.token

    # Hooks

    def get_value(self) -> list[str]:
        """Give the value as a list of lines; override to change what is sent."""
        return split_lines(self._value)

    def set_value(self, value: Any) -> None:
        """Take the value; override to check or convert it.

        :raises ValueError: when the value is malformed.
        """
        if value is None:
            value = ""
        if not isinstance(value, str):
            raise InvalidEvent(
                f"The value of a {type(self).__name__} must be a string, not {value!r}."
            )
        self._value: Any = value

    @property
    def value(self) -> Any:
        """The value's lines; setting it goes through :meth:`set_value`."""
        return self.get_value()

    @value.setter
    def value(self, value: Any) -> None:
        self.set_value(value)


class EventId(Event):
    """Mixin: events are durable and their id is the history's sequence number."""

    def get_id(self) -> str | None:
        """The sequence number as text, or ``None`` until the event is in the history."""
        return None if self._seq is None else str(self._seq)

    id = property(get_id)


class StringEvent(Event):
    """A multi-line string, live only."""

    ACTIONS = ["ping", Event.FINISH]


class JSONEvent(Event):
    """A JSON value, sent on one line, live only.

    A string value is JSON text; any other value is encoded. An empty value is
    ``null`` for :attr:`~Event.FINISH` and an error for every other action.
    """

    ACTIONS = ["ping", Event.FINISH]
    content_type = "application/json"

    def get_value(self) -> list[str]:
        return [json.dumps(self._value)]

    def set_value(self, value: Any) -> None:
        if value == "" and self.action == self.FINISH:
            value = None
        try:
            if isinstance(value, str):
                value = json.loads(value, parse_constant=_refuse_constant)
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidEvent(f"The value is not JSON: {error}") from error
        self._value = value


class StringIdEvent(EventId, StringEvent):
    """A multi-line string, durable."""

    ACTIONS = ["ping", Event.RETRY, Event.FINISH]


class JSONIdEvent(EventId, JSONEvent):
    """A JSON value, sent on one line, durable."""

    ACTIONS = ["ping", Event.RETRY, Event.FINISH]


def is_durable(event_class: type[Event]) -> bool:
    """Tell whether events of the class are stored and replayed."""
    return event_class.id is not None


def check_field(name: str, text: str, max_length: int) -> None:
    """Refuse text that cannot stand in an ``event`` field.

    :raises InvalidEvent: for CR, LF, NUL, text that has no UTF-8 form, nothing, or too much.
    """
    if not text:
        raise InvalidEvent(f"The {name} is empty.")
    if len(text) > max_length:
        raise InvalidEvent(
            f"The {name} is {len(text)} characters long; at most {max_length} are allowed."
        )
    for position, character in enumerate(text):
        if character in _FORBIDDEN:
            raise InvalidEvent(
                f"The {name} {text!r} holds {_FORBIDDEN[character]} at position {position}."
            )
    encode_text(name, text)


def check_id(event_id: str) -> None:
    """Refuse an id that is not 1 to 255 visible ASCII characters, or begins with ``~``.

    :raises InvalidEvent: when it is not.
    """
    if event_id.startswith(CURSOR_MARK):
        raise InvalidEvent(
            f"The id {event_id[:MAX_ID_LENGTH]!r} must not begin with {CURSOR_MARK!r}: so begin "
            "the last event ids of streams with several tokens."
        )
    if len(event_id) > MAX_ID_LENGTH or not _VISIBLE_ASCII.fullmatch(event_id):
        raise InvalidEvent(
            f"The id {event_id[:MAX_ID_LENGTH]!r} must be 1 to {MAX_ID_LENGTH} visible "
            "ASCII characters."
        )


def encode_text(name: str, text: str) -> bytes:
    """Encode as UTF-8.

    :raises InvalidEvent: for a lone surrogate, which has no UTF-8 form.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidEvent(
            f"The {name} holds a lone surrogate at position {error.start}, "
            "which cannot be sent as UTF-8."
        ) from error


def retry_ms(lines: list[str]) -> int:
    """Read the value of a retry event: one line of ASCII digits, milliseconds.

    :raises InvalidEvent: when it is anything else.
    """
    if len(lines) != 1 or not _RETRY.fullmatch(lines[0]):
        text = "\n".join(lines)
        raise InvalidEvent(
            "The value of a retry event must be ASCII digits, milliseconds "
            f"(at most 15 digits), not {text[:40]!r}."
        )
    return int(lines[0])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
