"""The values that a history accepts and returns."""

from __future__ import annotations

import datetime
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal, overload

from ..conf import conf
from ..events import Event
from ..exceptions import EventTooLarge
from ..protocol.batches import Batch
from ..protocol.cursors import Cursor
from ..protocol.field_rules import check_id, encode_text, retry_ms, unify_line_ends
from ..protocol.frames import (
    data_lines,
    encode_event,
    encode_retry,
    event_size,
    numbered_template,
)

__all__ = ["Draft", "Entry", "Found", "Head", "Kind", "Missing", "Position", "Slice"]

Missing = Literal["unknown", "expired"]
"""The reason why events after a cursor are missing.

``unknown``: the history never assigned the cursor. ``expired``: it has dropped events after it.
"""


def utc(seconds: float) -> datetime.datetime:
    """Return the time that is a number of seconds after the beginning of 1970."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


class Kind(StrEnum):
    """How a stream handles an event."""

    EVENT = "event"
    RETRY = "retry"
    CLOSE = "close"
    WHOLE = "whole"
    """The event contains what the events before it have sent in parts. A rewind does not begin
    before the newest event of this kind."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """A checked event, ready to be stored or sent. It is not changed after it was made.

    It is not a frozen dataclass, because making one of those takes three times as long.
    """

    action: str
    data: bytes
    """The value's lines, joined with LF, in UTF-8."""
    event_id: str | None = None
    """The own id that the event's class computed; ``None`` if its id is the sequence number."""
    kind: Kind = Kind.EVENT
    internal: bool = False
    """Whether the project itself publishes the event; see ``Event.internal``."""
    key: str | None = None
    """The digest of the key with which it is published at most once; ``None`` without a key."""

    @classmethod
    def of(cls, event: Event, key: str | None = None) -> Draft:
        """Read the lines, the id and the kind of an event, each once.

        :param event: the event.
        :param key: the digest of its key, or ``None``.
        :raises EventTooLarge: if its encoded form is larger than
            ``EVENTSOURCE_MAX_EVENT_BYTES``.
        :raises ValueError: if the event cannot be encoded.
        """
        value = event.value
        texts = [value] if isinstance(value, str) else value
        text = "\n".join(texts)
        if "\r" in text:
            text = "\n".join(map(unify_line_ends, texts))
        kind = Kind.EVENT
        if event.action == event.RETRY:
            retry_ms(text.split("\n"))
            kind = Kind.RETRY
        elif event.action == event.FINISH:
            kind = Kind.CLOSE
        event_id = None if event.id is None else str(event.id)
        if event_id is not None:
            check_id(event_id)
        data = encode_text("value", text)
        size, most = event_size(event.action, data), conf.max_event_bytes
        if size > most:
            raise EventTooLarge(
                f"The event has {size} bytes as it is sent; at most {most} are allowed "
                "(EVENTSOURCE_MAX_EVENT_BYTES)."
            )
        return cls(
            action=event.action,
            data=data,
            event_id=event_id,
            kind=kind,
            internal=event.internal,
            key=key,
        )

    def frame(self, seq: int | None = None) -> bytes:
        """Return the event as it is sent.

        :param seq: the sequence number of a durable event; ``None`` for a live-only event.
        """
        event_id = self.event_id if seq is None else (self.event_id or str(seq))
        if self.kind == Kind.RETRY:
            return encode_retry(int(self.data), event_id)
        return encode_event(self.action, self.data, event_id)

    def batch(self) -> Batch:
        """Return the live-only event as a batch."""
        return Batch((self.frame(),), closes=self.kind is Kind.CLOSE)


@dataclass(slots=True, kw_only=True)
class Entry:
    """A stored event. It is not changed after it was made."""

    seq: int
    draft: Draft
    created: datetime.datetime | None = None
    """When it was stored, with a time zone; ``None`` in what is read without times."""
    repeated: bool = False
    """Whether the event was not stored, because the token has an event with the same key.
    ``seq`` and ``id`` are those of that event."""

    @classmethod
    def of_stored(cls, draft: Draft, seq: int, event_id: str | None) -> Entry:
        """Return the entry of a draft that was not stored, because of an event with its key.

        :param draft: the draft.
        :param seq: the sequence number of the event with the same key.
        :param event_id: the own id of that event, or ``None``.
        """
        return cls(seq=seq, draft=replace(draft, event_id=event_id), repeated=True)

    @property
    def id(self) -> str:
        """The event's id on the wire."""
        return self.draft.event_id or str(self.seq)

    @property
    def closes(self) -> bool:
        """Whether the event has the close action, which ends the streams of its token."""
        return self.draft.kind == Kind.CLOSE

    def frame(self) -> bytes:
        """Return the event as it is sent."""
        return self.draft.frame(self.seq)

    def batch(self) -> Batch:
        """Return the event as a batch."""
        return Batch((self.frame(),), (self.seq,), closes=self.closes)


Row = tuple[int, str, bytes, str | None, str | None]
"""The sequence number, the action, the data, the own id and the kind of a stored event.

The kind of an ordinary event may be ``None``, because it takes longer to fetch a text.
"""


class RowEntries(Sequence[Entry]):
    """The entries of rows. Each is made when it is used, because a replay uses only the bytes.

    :param rows: the rows, by their sequence numbers. The data may be memoryviews, as psycopg2
        returns them.
    :param times: when each event was stored, with a time zone; ``None`` if that was not read.
    """

    def __init__(
        self, rows: Sequence[Any], times: Sequence[datetime.datetime] | None = None
    ) -> None:
        self.rows: Sequence[Row] = rows
        if rows and isinstance(rows[0][2], memoryview):
            self.rows = [(row[0], row[1], bytes(row[2]), row[3], row[4]) for row in rows]
        self._times = times

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Entry: ...

    @overload
    def __getitem__(self, at: slice) -> RowEntries: ...

    def __getitem__(self, at: int | slice) -> Entry | RowEntries:
        times = self._times
        if isinstance(at, slice):
            return RowEntries(self.rows[at], None if times is None else times[at])
        seq, action, data, event_id, kind = self.rows[at]
        draft = Draft(action=action, data=data, event_id=event_id, kind=Kind(kind or Kind.EVENT))
        created = None if times is None else times[at]
        return Entry(seq=seq, draft=draft, created=created)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


def encode_rows(rows: Sequence[Row]) -> tuple[Batch, ...]:
    """Return the events of rows as batches. A close is the last event of its batch."""
    if not rows:
        return ()
    # The numbers and the data of ordinary events. A replay consists mostly of them, so they are
    # encoded in one operation, which takes two thirds of the time of one for each event.
    event = Kind.EVENT.value
    ordinary: list[Any] = [
        value
        for seq, _, data, own_id, kind in rows
        if own_id is None and (kind is None or kind == event)
        for value in (seq, data)
    ]
    templates = {action: numbered_template(action) for action in {row[1] for row in rows}}
    if len(ordinary) < 2 * len(rows):
        return _encode_each(rows, templates)
    seqs, values = ordinary[::2], ordinary[1::2]
    if b"\n" in b"".join(values):
        ordinary[1::2] = [*map(data_lines, values)]
    if len(templates) == 1:
        template = templates[rows[0][1]] * len(rows)
    else:
        template = b"".join([templates[row[1]] for row in rows])
    return (Batch.of_data(template % tuple(ordinary), seqs),)


def _encode_each(rows: Sequence[Row], templates: Mapping[str, bytes]) -> tuple[Batch, ...]:
    retry, close = Kind.RETRY.value, Kind.CLOSE.value
    frames = [
        encode_retry(int(data), own_id or str(seq))
        if kind == retry
        else encode_event(action, data, own_id)
        if own_id
        else templates[action] % (seq, data_lines(data))
        for seq, action, data, own_id, kind in rows
    ]
    seqs = [row[0] for row in rows]
    ends = [n for n, row in enumerate(rows, 1) if row[4] == close]
    return tuple(
        Batch(frames[start:end], seqs[start:end], closes=end in ends)
        for start, end in pairwise(sorted({0, *ends, len(rows)}))
    )


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The result of a read: the events after the position that was passed."""

    entries: Sequence[Entry] = ()
    """The events, the oldest first."""
    complete: bool
    """Whether no event is missing between the position and the first entry, or ``last``."""
    last: int
    """The newest sequence number, or the floor if the token has no epoch."""
    closed: bool = False
    """Whether the newest event has the close action."""

    @property
    def more(self) -> bool:
        """Whether the history has entries after these."""
        return bool(self.entries) and self.entries[-1].seq < self.last

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The entries, encoded once for all listeners. A close is the last event of its batch."""
        entries = self.entries
        if isinstance(entries, RowEntries):
            batches = encode_rows(entries.rows)
        else:
            batches = encode_rows(
                [
                    (one.seq, one.draft.action, one.draft.data, one.draft.event_id, one.draft.kind)
                    for one in entries
                ]
            )
        first = 0
        for batch in batches:
            created = entries[first].created
            batch.published = None if created is None else created.timestamp()
            first += batch.count
        return batches

    def after(self, seq: int) -> Slice:
        """Return the part after one of the entries.

        :param seq: the sequence number of an entry, which is not the last one.
        """
        at = bisect_right(self.entries, seq, key=attrgetter("seq"))
        rest = replace(self, entries=self.entries[at:])
        # The entries are encoded already.
        rest.__dict__["batches"] = tuple(
            batch.after(seq) for batch in self.batches if (batch.last or 0) > seq
        )
        return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """The position in a token's history from which a stream continues."""

    seq: int
    """The sequence number after which the stream continues."""
    cursor: Cursor
    """The cursor of a client at this position."""
    missing: Missing | None = None
    """Why events after the client's cursor are not available; ``None`` if all are."""
    rewound: bool = False
    """Whether it is before the oldest event of a rewind. Events that the history drops before the
    first read are not missing, because the client has not received an event before them."""
    closed: bool = False
    """Whether the event at this position is the close that ended the client's stream."""

    @property
    def known(self) -> bool:
        """Whether this is the position of the client's cursor."""
        return self.missing is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search for a cursor."""

    last: int
    """The newest sequence number, or the floor if the token has no epoch."""
    closed: int | None = None
    """The sequence number of the last event with the close action; ``None`` without one."""
    seq: int | None = None
    """The position that the cursor names; ``None`` if it names none."""
    kind: Kind | None = None
    """The kind of the event at this position; ``None`` if the event is not kept."""
    complete: bool = False
    """Whether all events after this position are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest position of a token."""

    seq: int
    """The newest sequence number, or the floor if the token has no epoch."""
    has_epoch: bool
    """Whether events were published to the token since the history last dropped it."""
    generation: str = ""
    """A text that changes if the store loses its data, because it was emptied or replaced."""
