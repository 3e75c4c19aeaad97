"""Event classes: the actions, the values and the guarantee of events.

The names and the hooks are those of the classic Tornado library ``eventsource``. To port an Event
class that was written for it, change its import.

The class decides the guarantee. Events of a class with ``id = None`` are live-only: not stored,
received at most once. Events of a class with any other ``id`` are durable: stored in the history
and replayed.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.core.serializers.json import DjangoJSONEncoder

from .exceptions import InvalidEvent, UnknownAction
from .protocol.field_rules import (
    ANY_ACTION,
    MAX_ACTION_LENGTH,
    PACKAGE_ACTIONS,
    check_action,
    check_field,
    shown,
    split_lines,
)

__all__ = [
    "Event",
    "EventId",
    "JSONEvent",
    "JSONIdEvent",
    "StringEvent",
    "StringIdEvent",
    "is_durable",
]

BROWSER_ACTIONS = ("open", "error")
"""The names of the events that a browser's EventSource itself dispatches."""


class Event:
    """One event: a token, an action, a value and, in a durable class, an id.

    :param token: the token whose listeners receive it.
    :param action: the event type on the wire.
    :param value: a value that :meth:`set_value` accepts.
    :raises ValueError: if the value is malformed, or the action cannot be sent.
    """

    LISTEN = "poll"
    """The action that opens a stream with GET."""
    FINISH = "close"
    """The action that closes a token: its listeners receive the event, and their streams end."""
    RETRY = "retry"
    """The action that sets the reconnection time of the listeners, in milliseconds."""
    ACTIONS: list[str] = [FINISH]
    """The actions that may be published. ``"*"`` allows every action that is a valid name."""
    content_type = "text/plain"
    """The media type of a POST. It is announced in the ``Accept`` header, and not enforced."""

    internal = False
    """Whether the package publishes the event to its own processes. ``event_published`` is not
    sent for it, and publishing it does not wait for a store that does not respond."""

    _id: str | None = None
    _seq: int | None = None

    if TYPE_CHECKING:

        @property
        def id(self) -> Any:
            """The id on the wire; ``None`` in a live-only class."""
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
        """Return the value as a list of lines. Override it to change the data that is sent."""
        return split_lines(self._value)

    def set_value(self, value: Any) -> None:
        """Set the value. Override it to check or convert the value.

        :param value: a string; ``None`` is the empty string.
        :raises ValueError: if the value is malformed.
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
        """The lines of the value. Assigning to it calls :meth:`set_value`."""
        return self.get_value()

    @value.setter
    def value(self, value: Any) -> None:
        self.set_value(value)


class _ComputedId:
    """The ``id`` of a class that computes it, computed once for each event."""

    def __init__(self, compute: Callable[[Any], object]) -> None:
        self._compute = compute

    def __get__(self, event: Event | None, owner: type[Event]) -> Any:
        if event is None:
            return self
        if event._id is None:
            value = self._compute(event)
            event._id = None if value is None else str(value)
        return event._id


class EventId(Event):
    """Mixin for durable events whose id is the sequence number in the history."""

    def get_id(self) -> str | None:
        """Return the sequence number as text, or ``None`` before the event is in the history."""
        return None if self._seq is None else str(self._seq)

    id = property(get_id)


class StringEvent(Event):
    """A live-only string of one or more lines."""

    ACTIONS = ["ping", Event.FINISH]


class JSONEvent(Event):
    """A live-only JSON value, sent on one line.

    A value that is a string must be JSON text, which is encoded again. Other values are encoded:
    all that Django's ``DjangoJSONEncoder`` accepts, such as dates, decimals, UUIDs and lazy
    strings, and instances of dataclasses, pydantic models and msgspec Structs, nested anywhere.
    An empty string is ``null`` for the action :attr:`~Event.FINISH`, and an error for other
    actions.
    """

    ACTIONS = ["ping", Event.FINISH]
    content_type = "application/json"

    _text: str | None = None
    """The encoded value; ``None`` if the value may have changed."""

    @property
    def _value(self) -> Any:
        # A subclass may change the value that it reads, so the value is encoded again.
        self._text = None
        return self._decoded

    @_value.setter
    def _value(self, value: Any) -> None:
        self._text = None
        self._decoded = value

    def get_value(self) -> list[str]:
        return [encode_json(self._value) if self._text is None else self._text]

    def set_value(self, value: Any) -> None:
        if isinstance(value, str):
            value = "null" if value == "" and self.action == self.FINISH else value
            value, text = _reencode_json(value)
        else:
            text = encode_json(value)
        self._value = value
        self._text = text


class StringIdEvent(EventId, StringEvent):
    """A durable string of one or more lines."""

    ACTIONS = ["ping", Event.RETRY, Event.FINISH]


class JSONIdEvent(EventId, JSONEvent):
    """A durable JSON value, sent on one line."""

    ACTIONS = ["ping", Event.RETRY, Event.FINISH]


def is_durable(event_class: type[Event]) -> bool:
    """Return whether the events of a class are stored and replayed.

    :param event_class: the class; its ``id`` decides.
    """
    return event_class.id is not None


def has_own_ids(event_class: type[Event]) -> bool:
    """Return whether a durable class has ids that are not the history's sequence numbers.

    :param event_class: the class; its ``id`` decides.
    """
    id_: object = event_class.id
    return id_ is not None and id_ is not EventId.id


def action_error(event_class: type[Event], action: str) -> InvalidEvent | None:
    """Return the error of an action that a class does not allow; ``None`` if it allows it.

    :param event_class: the class; its ``ACTIONS`` decide.
    :param action: the action of an event that is to be published.
    """
    if ANY_ACTION in event_class.ACTIONS:
        try:
            check_action(action)
        except InvalidEvent as error:
            return error
        return None
    if action in event_class.ACTIONS:
        return None
    return UnknownAction(action, list(event_class.ACTIONS), event_class.__name__)


def must_be_named(event_class: type[Event], action: str) -> bool:
    """Return whether a grant allows an action only if it names the action.

    :param event_class: the class; its ``LISTEN``, ``FINISH`` and ``RETRY`` are such actions, and
        those of :class:`Event`, which pages and other classes may give the same meaning.
    :param action: the action of an event that is to be published.
    """
    special = {one for cls in (event_class, Event) for one in (cls.LISTEN, cls.FINISH, cls.RETRY)}
    return action in special or action in PACKAGE_ACTIONS or action in BROWSER_ACTIONS


class _Encoder(DjangoJSONEncoder):
    def default(self, o: Any) -> Any:
        # Each branch tests the type, because the value may be a class.
        if dataclasses.is_dataclass(type(o)):
            # Not asdict(), which copies nested values. The encoder encodes them in its turn.
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        if hasattr(type(o), "model_dump"):
            return o.model_dump(mode="json")
        # A Struct exists only if msgspec is loaded.
        msgspec: Any = sys.modules.get("msgspec")
        if isinstance(o, getattr(msgspec, "Struct", ())):
            return msgspec.to_builtins(o, enc_hook=self.to_builtins)
        return super().default(o)

    def to_builtins(self, o: Any) -> Any:
        """Return a value that msgspec does not encode, such as a lazy string, as simple types."""
        return json.loads(self.encode(o))


_encoder = _Encoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_SURROGATE = re.compile("[\ud800-\udfff]")


def encode_json(value: Any) -> str:
    """Return the JSON text of a value, on one line.

    :raises InvalidEvent: if the value cannot be encoded.
    """
    try:
        return _encode(value)
    except Exception as error:  # code of the value runs, such as a property or model_dump()
        raise _not_json(
            error,
            f"A value of the type {type(value).__name__} was passed. Pass JSON text, a value that "
            "DjangoJSONEncoder accepts, or an instance of a dataclass, a pydantic model or a "
            "msgspec Struct.",
        ) from error


def _reencode_json(text: str) -> tuple[Any, str]:
    """Return the value of a JSON text, and its shortest text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        return value, _encode(value)
    except (ValueError, RecursionError) as error:
        raise _not_json(
            error,
            f"The string {shown(text)} was passed, and a string must be JSON text, as "
            "json.dumps() returns it. StringEvent and StringIdEvent accept any text.",
        ) from error


def _not_json(error: Exception, advice: str) -> InvalidEvent:
    usual = isinstance(error, ValueError | TypeError | RecursionError)
    reason = str(error) if usual else repr(error)
    return InvalidEvent(f"The value is not JSON: {reason.rstrip('.')}. {advice}")


def _encode(value: Any) -> str:
    text = _encoder.encode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # UTF-8 cannot encode a lone surrogate. JSON can escape it.
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
