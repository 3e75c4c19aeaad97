"""The rules for the text of an event: lines, actions, ids, reconnection times; reserved names."""

import re

from ..exceptions import InvalidEvent

CURSOR_MARK = "~"
"""The first character of the last event ids of streams with several tokens. No event id may
start with it."""
RESET = "reset"
"""The reserved action of the event that reports missed events to a listener."""
CURSOR = "cursor"
"""The reserved action of the event with a cursor, for clients that ignore an id without data."""
RESERVED = (RESET, CURSOR)
CLOSE_STREAMS = "close-streams"
"""The action of the events with which processes request each other to end streams."""
DRAIN_HOST = "drain-host"
"""The action of the events that request the processes of a host to drain."""
WRITE_DETAILS = "write-details"
"""The action of the events with which a console requests the details of all processes."""
PACKAGE_ACTIONS = (*RESERVED, CLOSE_STREAMS, DRAIN_HOST, WRITE_DETAILS)
"""The actions of the events that the package itself publishes."""
ANY_ACTION = "*"
"""The entry of ``ACTIONS`` that allows every action."""
DOT_SEGMENTS = frozenset({".", ".."})
"""The segments that a browser removes from the path of a URL (URL standard, "path state")."""

MAX_ACTION_LENGTH = 255
MAX_ID_LENGTH = 255
SHOWN = 40
"""The most characters of a value that an error contains."""

_NAMES = {"\r": "CR", "\n": "LF", "\0": "NUL"}
_FORBIDDEN = re.compile(r"[\r\n\0]")
_VISIBLE_ASCII = re.compile(r"[!-~]+")


def unify_line_ends(text: str) -> str:
    """Return a text with LF in place of CRLF and CR, the other line ends of an event stream."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, split at CRLF, CR and LF, the line ends of an event stream."""
    return unify_line_ends(text).split("\n")


def shown(value: object) -> str:
    """Return the start of a value as Python shows it, for an error."""
    if isinstance(value, str):
        return repr(value[:SHOWN])
    try:
        return repr(value)[:SHOWN]
    except ValueError:  # Python does not show an integer of more than 4,300 digits.
        return f"a large {type(value).__name__}"


def check_field(name: str, text: object, max_length: int) -> None:
    """Check that a value is a text that can be sent in an ``event`` field.

    :param name: the name of the text, for the error.
    :param max_length: the most characters of the text.
    :raises InvalidEvent: if it is not a text, is empty or too long, or contains CR, LF, NUL or a
        lone surrogate.
    """
    if not isinstance(text, str):
        raise InvalidEvent(f"The {name} must be a text, not {shown(text)}.")
    if not text:
        raise InvalidEvent(f"The {name} is empty.")
    if len(text) > max_length:
        raise InvalidEvent(
            f"The {name} is {len(text)} characters long; at most {max_length} are allowed."
        )
    found = _FORBIDDEN.search(text)
    if found is not None:
        raise InvalidEvent(
            f"The {name} {text!r} contains {_NAMES[found[0]]} at position {found.start()}."
        )
    encode_text(name, text)


def check_action(action: object) -> None:
    """Check that a project may publish events of an action.

    :raises InvalidEvent: if it is not a text that fits into a URL segment and an ``event`` field,
        or if it is reserved.
    """
    if not isinstance(action, str):
        raise InvalidEvent(f"An action must be a text, not {shown(action)}.")
    check_field("action", action, MAX_ACTION_LENGTH)
    if "/" in action:
        raise InvalidEvent(f"The action {action!r} contains a slash.")
    if action in DOT_SEGMENTS:
        raise InvalidEvent(
            f"The action {action!r} cannot be in the path of a URL, because browsers remove it. "
            "Choose another name."
        )
    if action == ANY_ACTION:
        raise InvalidEvent(
            f"{ANY_ACTION!r} is not an action: in the ACTIONS of a class it allows every action."
        )
    if action in RESERVED:
        raise InvalidEvent(
            f"The action {action!r} is reserved for events that the streams themselves send. "
            "Choose another name."
        )


def check_id(event_id: str) -> None:
    """Check that an id is 1 to 255 visible ASCII characters and does not start with ``~``.

    :raises InvalidEvent: if it is not.
    """
    if event_id.startswith(CURSOR_MARK):
        raise InvalidEvent(
            f"The id {event_id[:MAX_ID_LENGTH]!r} must not start with {CURSOR_MARK!r}, which "
            "marks the last event ids of streams with several tokens."
        )
    if len(event_id) > MAX_ID_LENGTH or not _VISIBLE_ASCII.fullmatch(event_id):
        raise InvalidEvent(
            f"The id {event_id[:MAX_ID_LENGTH]!r} must be 1 to {MAX_ID_LENGTH} visible "
            "ASCII characters."
        )


def encode_text(name: str, text: str) -> bytes:
    """Return a text as UTF-8.

    :param name: the name of the text, for the error.
    :raises InvalidEvent: if the text contains a lone surrogate, which UTF-8 cannot encode.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidEvent(
            f"The {name} contains a lone surrogate at position {error.start}, "
            "which cannot be sent as UTF-8."
        ) from error


def retry_ms(lines: list[str]) -> int:
    """Return the milliseconds of a retry event.

    :param lines: the lines of its value: one line of at most 15 ASCII digits.
    :raises InvalidEvent: if the value has another form.
    """
    text = "\n".join(lines)
    if not re.fullmatch("[0-9]{1,15}", text):
        raise InvalidEvent(
            "The value of a retry event must be ASCII digits, milliseconds "
            f"(at most 15 digits), not {text[:40]!r}."
        )
    return int(text)
