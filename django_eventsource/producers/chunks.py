"""The chunks of a production: what is to be published next, and the whole."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Any

from ..conf import conf
from ..events import Event, JSONEvent
from ..exceptions import InvalidEvent
from ..protocol.field_rules import encode_text, shown

DELTA = "delta"
LINE_BYTES = 7
"""The most bytes of one character as it is sent: a line end and the next ``data:``."""
FRAME_BYTES = 100
"""More than the bytes of an event as it is sent, without its value and its id."""


class Chunks(ABC):
    """The chunks that a source has yielded.

    :param event_class: the class of the events.
    """

    def __init__(self, event_class: type[Event]) -> None:
        self.event_class = event_class
        self.size = 0
        """The bytes of all chunks."""
        self.waiting = 0
        """The bytes or characters that are to be published."""

    @abstractmethod
    def add(self, chunk: Any) -> None:
        """Add a chunk.

        :raises InvalidEvent: if the class of the events cannot send it.
        """

    @abstractmethod
    def finish(self) -> None:
        """Add what is left of the last chunk."""

    @abstractmethod
    def take(self) -> str:
        """Return the value of the next delta, and remove it from what is to be published."""

    @abstractmethod
    def whole(self) -> Any:
        """Return everything that the source has yielded, for the project's code."""

    @abstractmethod
    def value(self) -> str:
        """Return everything that the source has yielded, as the value of an event."""

    @abstractmethod
    def message(self, text: str) -> str:
        """Return a text as the value of an event."""


class TextChunks(Chunks):
    """Chunks of text. All line ends become LF, as in an event stream."""

    def __init__(self, event_class: type[Event]) -> None:
        super().__init__(event_class)
        # A CR at the end of a chunk and an LF at the start of the next are one line end.
        self._line_ends = io.IncrementalNewlineDecoder(None, translate=True)
        self._all: list[str] = []
        self._waiting: list[str] = []

    def add(self, chunk: Any) -> None:
        if not isinstance(chunk, str):
            raise InvalidEvent(
                f"The source yielded {shown(chunk)}. For {self.event_class.__name__} it must "
                "yield texts; for other values pass event_class=JSONIdEvent."
            )
        self.size += len(encode_text("chunk", chunk))
        self._add(self._line_ends.decode(chunk))

    def finish(self) -> None:
        self._add(self._line_ends.decode("", final=True))

    def _add(self, text: str) -> None:
        if text:
            self._all.append(text)
            self._waiting.append(text)
            self.waiting += len(text)

    def take(self) -> str:
        most = max((conf.max_event_bytes - FRAME_BYTES) // LINE_BYTES, 1)
        text = "".join(self._waiting)
        text, rest = text[:most], text[most:]
        self._waiting = [rest] if rest else []
        self.waiting = len(rest)
        return text

    def whole(self) -> str:
        return "".join(self._all)

    def value(self) -> str:
        return self.whole()

    def message(self, text: str) -> str:
        return text


class JSONChunks(Chunks):
    """Chunks that are JSON values. The value of an event is a list of chunks."""

    def __init__(self, event_class: type[Event]) -> None:
        super().__init__(event_class)
        self._all: list[Any] = []
        # Encoded at once, because a source may change an object that it has yielded.
        self._texts: list[str] = []
        self._taken = 0

    def add(self, chunk: Any) -> None:
        text = _encode([chunk])[1:-1]
        self._all.append(chunk)
        self._texts.append(text)
        size = len(text.encode())
        self.size += size
        self.waiting += size

    def finish(self) -> None:
        pass  # each chunk is complete

    def take(self) -> str:
        start = end = self._taken
        size = 0
        while end < len(self._texts):
            size += len(self._texts[end].encode()) + 1
            if end > start and size > conf.max_event_bytes - FRAME_BYTES:
                break
            end += 1
        texts = self._texts[start:end]
        self._taken = end
        self.waiting -= sum(len(text.encode()) for text in texts)
        return _joined(texts)

    def whole(self) -> list[Any]:
        return self._all

    def value(self) -> str:
        return _joined(self._texts)

    def message(self, text: str) -> str:
        return _encode([text])[1:-1]


def make_chunks(event_class: type[Event]) -> Chunks:
    """Return an empty collection of chunks for a class of events."""
    return (JSONChunks if issubclass(event_class, JSONEvent) else TextChunks)(event_class)


def _joined(texts: list[str]) -> str:
    return f"[{','.join(texts)}]"


def _encode(values: list[Any]) -> str:
    (line,) = JSONEvent("-", DELTA, values).value
    return str(line)
