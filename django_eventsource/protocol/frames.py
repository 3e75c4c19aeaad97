"""The event-stream format: events to bytes, and bytes to events. Pure, no I/O.

Follows "Server-sent events" in the WHATWG HTML standard,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from .exceptions import ReceivedEventTooLarge

CONTENT_TYPE = "text/event-stream"

KEEPALIVE = b": keepalive\n"
"""A comment line. No blank line: any blank line would commit the id buffer."""

DEFAULT_ACTION = "message"
"""The event type of an event without an ``event`` line."""

MAX_RETRY_MS = 10**15 - 1
"""The longest reconnection time that is sent, and the one a longer one is read as."""

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""The most bytes of one received event, unless the decoder is given another number."""


# Events to bytes


def encode_event(action: str, data: bytes, event_id: str | None = None) -> bytes:
    """Encode one event. The type ``message`` is the default, which is not named.

    :param action: the event type; the caller has checked it with ``events.check_field``.
    :param data: UTF-8 text whose lines end with LF only. Always gives at least one
        ``data`` line, since an event without one is never dispatched.
    :param event_id: the id, or ``None`` for an event that leaves the last event id alone.
    """
    return b"%s%sdata: %s\n\n" % (
        _id_line(event_id),
        b"" if action == DEFAULT_ACTION else b"event: %s\n" % action.encode(),
        data.replace(b"\n", b"\ndata: "),
    )


def event_size(action: str, data: bytes) -> int:
    """Return the number of bytes that :func:`encode_event` needs, without an id."""
    return len(encode_event(action, b"")) + len(data) + data.count(b"\n") * len(b"data: ")


def encode_retry(milliseconds: int, event_id: str | None = None) -> bytes:
    """Encode a reconnection time. With an id it is a block that commits the id.

    The block has an event type because htmx 4 drops one that contains ``retry`` alone. It has
    no data, so that no client dispatches it.
    """
    return b"%sevent: retry\nretry: %d\n\n" % (_id_line(event_id), milliseconds)


def encode_id(event_id: str) -> bytes:
    """Encode a block that commits an id and dispatches nothing."""
    return _id_line(event_id) + b"\n"


def encode_comment(text: str) -> bytes:
    """Encode one comment line, which clients ignore.

    :raises ValueError: when the text holds a line end.
    """
    if "\r" in text or "\n" in text:
        raise ValueError(f"A comment must not hold a line end: {text!r}.")
    return b": %s\n" % text.encode()


def _id_line(event_id: str | None) -> bytes:
    return b"" if event_id is None else b"id: %s\n" % event_id.encode()


# Bytes to events


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSentEvent:
    """One received event: its type, its data, and the last event id as of it."""

    event: str = "message"
    data: str = ""
    id: str = ""


class Decoder:
    """Incremental decoder of one event stream.

    Feed it the bytes of the stream, cut anywhere. Use a new decoder for each connection, and
    start it with the last event id of the one before.

    :param last_event_id: the id to start from.
    :param max_event_bytes: the most bytes that a line may have, together with the data lines
        of its event before it.
    :raises ValueError: if ``max_event_bytes`` is less than 1.
    """

    def __init__(self, last_event_id: str = "", *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes must be 1 or more, not {max_event_bytes}.")
        self.last_event_id = last_event_id
        """The last event id, as committed by the blank lines seen so far."""
        self.retry_ms: int | None = None
        """The last reconnection time the server set, milliseconds."""
        self._max_event_bytes = max_event_bytes
        self._at_start = True
        self._after_cr = False
        # Bytes, and not lists of texts: short lines and chunks would cost an object each.
        self._line = bytearray()
        self._data = bytearray()
        self._event = ""
        self._id_buffer = last_event_id

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that the next bytes of the stream complete.

        :raises ReceivedEventTooLarge: if an event has more than ``max_event_bytes``. The decoder
            cannot be used after that.
        """
        if self._after_cr and chunk:
            # The CR ended the line already; an LF right after it belongs to the same line end.
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
            # Bounded before int(), which refuses more than 4,300 digits.
            self.retry_ms = min(int(value.lstrip(b"0")[:18] or b"0"), MAX_RETRY_MS)
        return None

    def _end_block(self) -> ServerSentEvent | None:
        self.last_event_id = self._id_buffer
        event = None
        if self._data:
            del self._data[-1]  # the line end after the last line
            event = ServerSentEvent(
                event=self._event or "message",
                data=self._data.decode(errors="replace"),
                id=self.last_event_id,
            )
            self._data.clear()
        self._event = ""
        return event
