"""Tests of drafts and entries."""

from __future__ import annotations

import pytest

from django_eventsource.events import Event, EventId, JSONIdEvent, StringEvent, StringIdEvent
from django_eventsource.exceptions import EventTooLarge
from django_eventsource.history import Draft, Entry, Kind, Slice
from django_eventsource.history.records import RowEntries, utc
from django_eventsource.protocol.frames import encode_event
from tests.support.events import draft


def read_back(event: Event) -> tuple[str, bytes, str | None, Kind]:
    one = Draft.of(event)
    return one.action, one.data, one.event_id, one.kind


def test_a_draft_contains_the_lines_the_own_id_and_the_kind() -> None:
    assert read_back(StringEvent("t", "ping", "a\r\nb\rc")) == (
        "ping",
        b"a\nb\nc",
        None,
        Kind.EVENT,
    )
    assert read_back(StringIdEvent("t", "retry", "50"))[3] == Kind.RETRY
    assert read_back(JSONIdEvent("t", "close"))[1:] == (b"null", None, Kind.CLOSE)


def test_line_ends_within_a_line_of_an_override_are_normalised() -> None:
    """CR and CRLF in what `get_value()` returns become LF."""

    class Whole(Event):
        def get_value(self) -> list[str]:
            return [self._value, "end"]

    class Text(Event):
        def get_value(self) -> str:  # type: ignore[override]
            return self._value

    assert Draft.of(Whole("t", "close", "a\nb")).data == b"a\nb\nend"
    assert Draft.of(Whole("t", "close", "a\r\nb\r")).data == b"a\nb\n\nend"
    assert Draft.of(Text("t", "close", "a\nb")).data == b"a\nb"


def test_a_draft_computes_an_own_id_once() -> None:
    """The id is checked as well."""
    ids = iter(["one", "two"])

    class Counted(Event):
        id = property(lambda self: next(ids))

    class Bad(Event):
        id = property(lambda self: "a\nb")

    event = Counted("t", "close")
    assert Draft.of(event).event_id == event.id == "one"
    with pytest.raises(ValueError, match="visible ASCII"):
        Draft.of(Bad("t", "close"))


@pytest.mark.parametrize("value", ["", "-5", "+1", "1.5", "abc", "5\n6", "\u0665", "1" * 16])
def test_a_draft_refuses_a_retry_that_is_not_ascii_digits(value: str) -> None:
    with pytest.raises(ValueError, match="must be ASCII digits"):
        Draft.of(StringIdEvent("t", "retry", value))


def test_a_draft_refuses_an_event_that_is_too_large_when_encoded(settings) -> None:
    """Each line of the value is sent with `data: ` before it."""
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1000
    room = 1000 - len(encode_event("ping", b""))
    for value in ("x" * room, "\n" * (room // 7)):
        assert len(Draft.of(StringIdEvent("t", "ping", value)).frame()) <= 1000
        with pytest.raises(EventTooLarge, match=r"has 100\d bytes as it is sent; at most 1000"):
            Draft.of(StringIdEvent("t", "ping", value + "\n"))


def test_a_draft_refuses_lone_surrogates() -> None:
    """The error names their position."""
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        Draft.of(StringEvent("t", "ping", "a\ud800"))


def test_durable_frames_carry_an_id_and_live_only_frames_do_not() -> None:
    one = Draft(action="ping", data=b"a\nb")
    assert one.frame() == b"event: ping\ndata: a\ndata: b\n\n"
    assert one.frame(7) == b"id: 7\nevent: ping\ndata: a\ndata: b\n\n"
    assert Entry(seq=7, draft=one).frame() == one.frame(7)
    assert draft("x", own_id="u").frame(7) == b"id: u\nevent: ping\ndata: x\n\n"
    assert draft("50", kind=Kind.RETRY).frame(7) == b"id: 7\nevent: retry\nretry: 50\n\n"
    assert draft("50", kind=Kind.RETRY).frame() == b"event: retry\nretry: 50\n\n"


def test_an_event_of_an_event_id_class_has_no_own_id() -> None:
    """The history assigns its id."""

    class Mixed(StringEvent, EventId):
        pass

    assert Draft.of(Mixed("t", "ping", "x")).event_id is None


ROWS = [
    (7, "ping", b"a\nb", None, "event"),
    (8, "close", b"", "own", "close"),
    (9, "retry", b"250", None, "retry"),
    (10, "message", b"c", None, "event"),
]
ENTRIES = (
    Entry(seq=7, draft=Draft(action="ping", data=b"a\nb")),
    Entry(seq=8, draft=Draft(action="close", data=b"", event_id="own", kind=Kind.CLOSE)),
    Entry(seq=9, draft=Draft(action="retry", data=b"250", kind=Kind.RETRY)),
    Entry(seq=10, draft=Draft(action="message", data=b"c")),
)


def test_rows_are_a_sequence_of_their_entries() -> None:
    entries = RowEntries(ROWS)
    assert entries == ENTRIES
    assert entries != ENTRIES[:3]
    assert entries != 4
    assert len(entries) == 4
    assert entries[-1] == ENTRIES[3]
    assert list(entries[1:3]) == list(ENTRIES[1:3])
    assert not RowEntries([])


def test_rows_may_have_memoryviews_as_psycopg2_returns_them() -> None:
    rows = [(seq, action, memoryview(data), *rest) for seq, action, data, *rest in ROWS]
    assert RowEntries(rows) == ENTRIES
    batches = Slice(entries=RowEntries(rows), complete=True, last=10).batches
    assert [frame for batch in batches for frame in batch.frames] == [
        entry.frame() for entry in ENTRIES
    ]


def test_the_entries_of_rows_have_the_times_that_were_read() -> None:
    times = [utc(n) for n in range(4)]
    entries = RowEntries(ROWS, times)
    assert [entry.created for entry in entries] == times
    assert [entry.created for entry in entries[1:3]] == times[1:3]
    assert [entry.created for entry in RowEntries(ROWS)[1:]] == [None] * 3


@pytest.mark.parametrize("entries", [ENTRIES, RowEntries(ROWS)], ids=["entries", "rows"])
def test_a_slice_is_encoded_in_batches_that_end_with_a_close(entries) -> None:
    slice_ = Slice(entries=entries, complete=True, last=10)
    first, second = slice_.batches
    assert list(first.frames) == [entry.frame() for entry in ENTRIES[:2]]
    assert list(second.frames) == [entry.frame() for entry in ENTRIES[2:]]
    assert (list(first.seqs or ()), list(second.seqs or ())) == ([7, 8], [9, 10])
    assert (first.closes, second.closes) == (True, False)
    assert [
        batch.closes for batch in Slice(entries=entries[:2], complete=True, last=8).batches
    ] == [True]


ORDINARY = [
    Entry(seq=7, draft=Draft(action="ping", data=b"a")),
    Entry(seq=8, draft=Draft(action="ping", data=b"")),
    Entry(seq=9, draft=Draft(action="ping", data=b"%d %% a\0b")),
]


@pytest.mark.parametrize(
    "last",
    [
        Draft(action="ping", data=b"a\n\nb\n"),
        Draft(action="message", data=b"x"),
        Draft(action="50 % %s", data=b"x"),
    ],
    ids=["several lines", "another action", "percent signs"],
)
def test_ordinary_events_are_encoded_together(last: Draft) -> None:
    """The bytes are the same as those of each event alone."""
    entries = [*ORDINARY, Entry(seq=10, draft=last)]
    rows = [(one.seq, one.draft.action, one.draft.data, None, None) for one in entries]
    (batch,) = Slice(entries=RowEntries(rows), complete=True, last=10).batches
    assert batch.data == b"".join(entry.frame() for entry in entries)
    assert batch.frames == [entry.frame() for entry in entries]
    assert (list(batch.seqs or ()), batch.count, batch.closes) == ([7, 8, 9, 10], 4, False)
    assert list(RowEntries(rows)) == entries


def test_a_slice_without_events_has_no_batches() -> None:
    assert Slice(entries=RowEntries([]), complete=True, last=10).batches == ()


def test_a_batch_of_rows_has_the_time_of_its_first_event() -> None:
    """The latency of events that a history check finds is counted from it."""
    rows = RowEntries(ROWS, [utc(n) for n in range(4)])
    assert [one.published for one in Slice(entries=rows, complete=True, last=10).batches] == [0, 2]
    rows = RowEntries(ROWS)
    batches = Slice(entries=rows, complete=True, last=10).batches
    assert [one.published for one in batches] == [None, None]


@pytest.mark.parametrize("entries", [ENTRIES, RowEntries(ROWS)], ids=["entries", "rows"])
def test_the_rest_of_a_slice_has_the_same_bytes(entries) -> None:
    slice_ = Slice(entries=entries, complete=True, last=10)
    rest = slice_.after(7)
    assert rest.entries == ENTRIES[1:]
    assert [batch.data for batch in rest.batches] == [
        ENTRIES[1].frame(),
        slice_.batches[1].data,
    ]
    assert rest.batches[1] is slice_.batches[1]
