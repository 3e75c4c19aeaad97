"""The event-stream format: events to bytes, and bytes to events. Pure, no I/O.

Follows "Server-sent events" in the WHATWG HTML standard,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

CONTENT_TYPE = "text/event-stream"

KEEPALIVE = b": keepalive\n"
"""A comment line. No blank line: any blank line would commit the id buffer."""

MAX_RETRY_MS = 10**15 - 1
"""The longest reconnection time that is sent, and the one a longer one is read as."""


# Events to bytes


def encode_event(action: str, data: bytes, event_id: str | None = None) -> bytes:
    """Encode one event.

    :param action: the event type; the caller has checked it with ``events.check_field``.
    :param data: UTF-8 text whose lines end with LF only. Always gives at least one
        ``data`` line, since an event without one is never dispatched.
    :param event_id: the id, or ``None`` for an event that leaves the last event id alone.
    """
    return b"%sevent: %s\ndata: %s\n\n" % (
        _id_line(event_id),
        action.encode(),
        data.replace(b"\n", b"\ndata: "),
    )


def encode_retry(milliseconds: int, event_id: str | None = None) -> bytes:
    """Encode a reconnection time. With an id it is a block that commits the id."""
    return b"%sretry: %d\n\n" % (_id_line(event_id), milliseconds)


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

    Feed it what arrives, cut anywhere. Use a new one for each connection, starting with
    the last event id of the one before.

    :param last_event_id: the id to start from.
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        """The last event id, as committed by the blank lines seen so far."""
        self.retry_ms: int | None = None
        """The last reconnection time the server set, milliseconds."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._after_cr = False
        self._line: list[str] = []
        self._id_buffer = last_event_id
        self._reset_block()

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes and give the events that they complete."""
        text = self._utf8.decode(chunk)
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if self._after_cr and text:
            # A CR ended the last line already; an LF right after it is its other half.
            self._after_cr = False
            text = text.removeprefix("\n")
        if not text:
            return []
        self._after_cr = text.endswith("\r")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rest = lines.pop()
        events = []
        for line in lines:
            if self._line:
                self._line.append(line)
                line = "".join(self._line)
                self._line.clear()
            event = self._end_line(line)
            if event is not None:
                events.append(event)
        if rest:
            self._line.append(rest)
        return events

    def _end_line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._end_block()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            if "\0" not in value:
                self._id_buffer = value
        elif name == "retry" and value.isascii() and value.isdigit():
            # Bounded before int(), which refuses more than 4,300 digits.
            self.retry_ms = min(int(value.lstrip("0")[:18] or "0"), MAX_RETRY_MS)
        return None

    def _end_block(self) -> ServerSentEvent | None:
        self.last_event_id = self._id_buffer
        event = None
        if self._data:
            event = ServerSentEvent(
                event=self._event or "message",
                data="\n".join(self._data),
                id=self.last_event_id,
            )
        self._reset_block()
        return event

    def _reset_block(self) -> None:
        self._event = ""
        self._data: list[str] = []
