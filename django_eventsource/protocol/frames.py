"""Encode events in the event-stream format, and decode them, without I/O.

The module follows "Server-sent events" in the WHATWG HTML standard,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import codecs
import json
from dataclasses import dataclass
from functools import lru_cache

from ..exceptions import ReceivedEventTooLarge
from .field_rules import RESET

CONTENT_TYPE = "text/event-stream"

KEEPALIVE = b": keepalive\n"
"""A comment line without a blank line, because a blank line would commit the id buffer."""

DEFAULT_ACTION = "message"
"""The event type of an event without an ``event`` line."""

MAX_RETRY_MS = 10**15 - 1
"""The longest reconnection time that is sent. The decoder reduces a longer one to this."""

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""The default limit of the bytes of one received event."""


# Events to bytes


def encode_event(action: str, data: bytes, event_id: str | None = None) -> bytes:
    """Return the bytes of one event. The type ``message``, which is the default, is left out.

    :param action: the event type, checked with ``text.check_field``.
    :param data: UTF-8 text whose lines end with LF only. Empty data is one ``data`` line,
        because clients do not dispatch an event without one.
    :param event_id: the id, or ``None`` for an event that does not change the last event id.
    """
    return b"%b%bdata: %b\n\n" % (
        b"" if event_id is None else b"id: %b\n" % event_id.encode(),
        event_line(action),
        data_lines(data),
    )


@lru_cache(maxsize=1024)
def event_line(action: str) -> bytes:
    """Return the line with the type of an event; nothing for the default one."""
    return b"" if action == DEFAULT_ACTION else b"event: %b\n" % action.encode()


def data_lines(data: bytes) -> bytes:
    """Return data with ``data:`` before each line but the first one."""
    return data.replace(b"\n", b"\ndata: ")


def numbered_template(action: str) -> bytes:
    """Return what :func:`encode_event` returns for a number as the id, as a ``%`` template.

    A replay uses it, because a call of a function for each event takes longer than the encoding.

    :param action: the event type.
    :returns: the template. Its values are the number, and what :func:`data_lines` returns.
    """
    return b"id: %%d\n%bdata: %%b\n\n" % event_line(action).replace(b"%", b"%%")


def event_size(action: str, data: bytes) -> int:
    """Return the number of bytes that :func:`encode_event` needs, without an id."""
    return len(encode_event(action, b"")) + len(data) + data.count(b"\n") * len(b"data: ")


def replace_id(frame: bytes, event_id: str) -> bytes:
    """Return an encoded event, which has an id, with another id."""
    return _id_line(event_id) + frame.partition(b"\n")[2]


def encode_retry(milliseconds: int, event_id: str | None = None) -> bytes:
    """Return the bytes of a reconnection time.

    The block has an event type because htmx 4 drops a block that contains ``retry`` alone. It has
    no data, so clients do not dispatch it.

    :param milliseconds: the reconnection time, at most :data:`MAX_RETRY_MS`.
    :param event_id: an id that the block commits, or ``None``.
    """
    return b"%sevent: retry\nretry: %d\n\n" % (_id_line(event_id), milliseconds)


def encode_id(event_id: str) -> bytes:
    """Return the bytes of a block that commits an id and dispatches no event."""
    return _id_line(event_id) + b"\n"


def encode_reset(
    reason: str,
    *,
    after: str | None,
    resume: str | None,
    token: str | None = None,
    commit: bool = True,
) -> bytes:
    """Return the bytes of the event that reports missed events to a listener.

    :param reason: ``unknown`` (the history has no event with the id), ``expired`` (events after
        the id may be missing) or ``overflow`` (live-only events were dropped).
    :param after: the last event id before the missed events, or ``None``.
    :param resume: the id after which the stream continues, or ``None``.
    :param token: the token of the missed events, on a stream with several tokens.
    :param commit: whether ``resume`` becomes the last event id of the listener.
    """
    data = {"reason": reason, "after": after, "resume": resume}
    if token is not None:
        data["token"] = token
    return encode_event(RESET, json.dumps(data).encode(), resume if commit else None)


def _id_line(event_id: str | None) -> bytes:
    return b"" if event_id is None else b"id: %s\n" % event_id.encode()


# Bytes to events


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSentEvent:
    """One received event."""

    event: str = DEFAULT_ACTION
    """The event type."""
    data: str = ""
    """The data; lines are separated by LF."""
    id: str = ""
    """The last event id at this event."""


class Decoder:
    """Incremental decoder of one event stream.

    Pass it the bytes of the stream in chunks of any size. Use a new decoder for each connection,
    and pass it the ``last_event_id`` of the previous decoder.

    :param last_event_id: the last event id at the start.
    :param max_event_bytes: the most bytes of a line, together with the data lines of its event
        before it.
    :raises ValueError: if ``max_event_bytes`` is less than 1.
    """

    def __init__(self, last_event_id: str = "", *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes must be 1 or more, not {max_event_bytes}.")
        self.last_event_id = last_event_id
        """The last event id that a blank line has committed."""
        self.retry_ms: int | None = None
        """The last reconnection time that the server sent, in milliseconds, or ``None``."""
        self._max_event_bytes = max_event_bytes
        self._at_start = True
        self._after_cr = False
        # Bytes in place of lists of texts, which would need an object for each line or chunk.
        self._line = bytearray()
        self._data = bytearray()
        self._event = ""
        self._id_buffer = last_event_id

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that the next bytes of the stream complete.

        :param chunk: any number of bytes, which may end in the middle of a line.
        :raises ReceivedEventTooLarge: if an event has more than ``max_event_bytes``. The decoder
            cannot be used after that.
        """
        if self._after_cr and chunk:
            # The CR ended the line. An LF that follows it belongs to the same line end.
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events: list[ServerSentEvent] = []
        for line in lines:
            if len(self._line) + len(line) + len(self._data) > self._max_event_bytes:
                raise ReceivedEventTooLarge(self._max_event_bytes, events)
            if self._line:
                self._line += line
                line = bytes(self._line)
                self._line.clear()
            event = self._end_line(line)
            if event is not None:
                events.append(event)
        self._line += rest
        if len(self._line) + len(self._data) > self._max_event_bytes:
            raise ReceivedEventTooLarge(self._max_event_bytes, events)
        return events

    def _end_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line:
            return self._end_block()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data += value
            self._data += b"\n"
        elif name == b"event":
            self._event = value.decode(errors="replace")
        elif name == b"id":
            if b"\0" not in value:
                self._id_buffer = value.decode(errors="replace")
        elif name == b"retry" and value.isdigit():
            # int() raises for more than 4,300 digits.
            self.retry_ms = min(int(value.lstrip(b"0")[:18] or b"0"), MAX_RETRY_MS)
        return None

    def _end_block(self) -> ServerSentEvent | None:
        self.last_event_id = self._id_buffer
        event = None
        if self._data:
            del self._data[-1]  # the line end after the last line
            event = ServerSentEvent(
                event=self._event or DEFAULT_ACTION,
                data=self._data.decode(errors="replace"),
                id=self.last_event_id,
            )
            self._data.clear()
        self._event = ""
        return event
