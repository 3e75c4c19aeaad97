"""Tests of the event-stream format, in the order of the section of the WHATWG standard."""

from __future__ import annotations

import codecs
import json
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_eventsource.events import StringEvent
from django_eventsource.exceptions import InvalidEvent, ReceivedEventTooLarge
from django_eventsource.protocol.field_rules import (
    MAX_ACTION_LENGTH,
    MAX_ID_LENGTH,
    check_field,
    check_id,
)
from django_eventsource.protocol.frames import (
    CONTENT_TYPE,
    KEEPALIVE,
    MAX_RETRY_MS,
    Decoder,
    ServerSentEvent,
    encode_event,
    encode_id,
    encode_reset,
    encode_retry,
    event_size,
    replace_id,
)


def decode(*chunks, last_event_id=""):
    """Return the events of a stream that arrives in these chunks."""
    decoder = Decoder(last_event_id)
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def decode_bytewise(stream):
    return decode(*(stream[n : n + 1] for n in range(len(stream))))


def data_of(*chunks):
    return [event.data for event in decode(*chunks)]


def wire(value, action="ping"):
    """Return the bytes of an event, encoded as the view encodes it."""
    return encode_event(action, "\n".join(StringEvent("token", action, value).value).encode())


# Server


def test_the_media_type_is_text_event_stream():
    assert CONTENT_TYPE == "text/event-stream"


@pytest.mark.parametrize("action", ["ping", "message", "é"])
@pytest.mark.parametrize("data", [b"", b"a", b"\n\na\n"])
def test_event_size_is_the_length_of_the_encoded_event(action, data):
    """The id is not counted."""
    assert event_size(action, data) == len(encode_event(action, data))


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"], ids=repr)
def test_server_3_each_line_of_a_value_is_a_data_line(end):
    """CRLF, CR and LF end a line."""
    assert wire(f"a{end} b{end}") == b"event: ping\ndata: a\ndata:  b\ndata: \n\n"


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c", ids=ascii)
def test_server_3_other_separators_do_not_end_a_line(character):
    """U+2028, U+0085, VT and FF are sent inside a data line."""
    frame = wire(f"a{character}b")
    assert frame == f"event: ping\ndata: a{character}b\n\n".encode()
    assert data_of(frame) == [f"a{character}b"]


@pytest.mark.parametrize("character", "\r\n\0", ids=ascii)
def test_server_4_fields_refuse_line_ends_and_nul(character):
    with pytest.raises(InvalidEvent):
        check_field("action", f"a{character}data: forged", MAX_ACTION_LENGTH)
    with pytest.raises(InvalidEvent):
        check_id(f"1{character}data:forged")


def test_a_comment_is_ignored():
    """It dispatches no event and commits no id."""
    decoder = Decoder()
    assert decoder.feed("id: 1\n: grüße: data\n".encode()) == []
    assert decoder.last_event_id == ""


def test_server_5_an_event_ends_with_a_blank_line():
    assert encode_event("ping", b"42") == b"event: ping\ndata: 42\n\n"


def test_server_5_an_empty_value_is_dispatched():
    """It has a data line, without which clients do not dispatch an event."""
    assert encode_event("close", b"") == b"event: close\ndata: \n\n"
    assert decode(encode_event("close", b"")) == [ServerSentEvent(event="close")]


def test_server_5_a_block_without_data_commits_its_id():
    decoder = Decoder("before")
    assert encode_id("1700") == b"id: 1700\n\n"
    assert decoder.feed(encode_id("1700")) == []
    assert decoder.last_event_id == "1700"


def test_server_6_a_keepalive_commits_no_id():
    """It has no blank line."""
    assert KEEPALIVE == b": keepalive\n"
    decoder = Decoder()
    assert decoder.feed(b"id: 1\n" + KEEPALIVE + KEEPALIVE) == []
    assert decoder.last_event_id == ""


def test_server_7_an_event_has_an_id_line_only_with_an_id():
    assert encode_event("ping", b"a", "17") == b"id: 17\nevent: ping\ndata: a\n\n"
    assert encode_event("ping", b"a") == b"event: ping\ndata: a\n\n"


def test_server_8a_the_action_message_has_no_event_line():
    """htmx 4 swaps only events without a name."""
    assert encode_event("message", b"a") == b"data: a\n\n"
    assert encode_event("message", b"a", "17") == b"id: 17\ndata: a\n\n"
    assert decode(encode_event("message", b"a")) == [ServerSentEvent(event="message", data="a")]


def test_replace_id_changes_the_id_line_only():
    assert replace_id(encode_event("ping", b"a\nb", "7"), "~x") == encode_event(
        "ping", b"a\nb", "~x"
    )
    assert replace_id(encode_retry(5, "7"), "8") == encode_retry(5, "8")


@pytest.mark.parametrize(
    ("event_id", "frame"),
    [
        (None, b"event: retry\nretry: 3000\n\n"),
        ("17", b"id: 17\nevent: retry\nretry: 3000\n\n"),
    ],
    ids=["live-only", "durable"],
)
def test_server_8_a_retry_is_digits_in_a_named_block_that_dispatches_nothing(event_id, frame):
    """htmx 4 drops a block that contains `retry` alone, so the block has an event type."""
    assert encode_retry(3000, event_id) == frame
    decoder = Decoder()
    assert decoder.feed(frame) == []
    assert (decoder.retry_ms, decoder.last_event_id) == (3000, event_id or "")


# Client

BOM = codecs.BOM_UTF8


@pytest.mark.parametrize(
    "chunks",
    [
        (BOM + b"data: a\n\n",),
        (BOM, b"data: a\n\n"),
        (BOM[:1], BOM[1:2], BOM[2:] + b"data: a\n\n"),
        (b"", BOM[:2], b"", BOM[2:], b"data: a\n\n"),
    ],
    ids=["whole", "alone", "split", "with-empty-chunks"],
)
def test_client_1_one_leading_bom_is_stripped(chunks):
    """It may be divided between chunks."""
    assert data_of(*chunks) == ["a"]


@pytest.mark.parametrize(
    ("chunks", "data"),
    [
        ((BOM + BOM + b"data: a\n\n",), []),
        ((BOM, BOM + b"data: a\n\n"), []),
        ((b"\n", BOM + b"data: a\n\n"), []),
        ((b"data: " + BOM + b"a\n\n",), ["\ufeffa"]),
    ],
    ids=["second", "second-in-next-chunk", "after-a-line", "in-data"],
)
def test_client_1_other_boms_are_text(chunks, data):
    assert data_of(*chunks) == data


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"], ids=repr)
def test_client_2_lf_cr_and_crlf_end_a_line(end):
    stream = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert data_of(stream) == ["a\nb", "c"]
    assert [event.data for event in decode_bytewise(stream)] == ["a\nb", "c"]


def test_client_2_line_ends_can_be_mixed():
    """LF CR is two line ends."""
    assert data_of(b"data: a\r\ndata: b\rdata: c\ndata: d\n\rdata: e\r\r") == ["a\nb\nc\nd", "e"]


def test_client_2_a_crlf_in_two_chunks_is_one_line_end():
    decoder = Decoder()
    assert decoder.feed(b"data: a\r") == []
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: b\r") == []
    assert decoder.feed(b"") == []
    assert [event.data for event in decoder.feed(b"\n\r")] == ["a\nb"]
    assert decoder.feed(b"\n") == []
    assert [event.data for event in decoder.feed(b"data: c\n\n")] == ["c"]


def test_client_2_an_event_is_returned_at_its_cr():
    """The decoder does not wait for the next character."""
    assert data_of(b"data: a\r\r") == ["a"]


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_client_2_a_character_can_be_divided_between_chunks(text):
    assert [event.data for event in decode_bytewise(f"data: {text}\n\n".encode())] == [text]


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\xff", "\ufffd"), (b"a\xe2\x82b", "a\ufffdb"), (b"\xed\xa0\x80", "\ufffd" * 3)],
    ids=["no-start-byte", "cut-off", "surrogate"],
)
def test_client_2_invalid_utf8_is_replaced(data, text):
    """The bytes around it are decoded."""
    stream = b"data: " + data + b"\n\ndata: next\n\n"
    assert data_of(stream) == [text, "next"]
    assert [event.data for event in decode_bytewise(stream)] == [text, "next"]


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c\x1c", ids=ascii)
def test_client_2_other_separators_do_not_end_a_line(character):
    """str.splitlines() would split there."""
    assert data_of(f"data: a{character}b\n\n".encode()) == [f"a{character}b"]


@pytest.mark.parametrize(
    ("line", "data"),
    [
        (b"data:a", ["a"]),
        (b"data: a", ["a"]),
        (b"data:  a", [" a"]),
        (b"data:\ta", ["\ta"]),
        (b"data:a: b", ["a: b"]),
        (b"data::a", [":a"]),
        (b"data:", [""]),
        (b"data: ", [""]),
        (b"data", [""]),
        (b"Data: a", []),
        (b" data: a", []),
        (b"data : a", []),
        (b"datum: a", []),
        (b"nothing", []),
        (b": data: a", []),
        (b":", []),
    ],
    ids=repr,
)
def test_client_3_a_field_is_split_at_its_first_colon(line, data):
    """One space is removed after the colon, and unknown fields are ignored."""
    assert data_of(line + b"\n\n") == data


def test_client_4_data_lines_are_joined_with_lf():
    assert data_of(b"data: a\ndata\ndata:b\ndata: \n\n") == ["a\n\nb\n"]


def test_client_4_an_event_without_data_is_not_dispatched():
    """Its type does not apply to the next event."""
    assert decode(b"event: ping\n\ndata: a\n\n") == [ServerSentEvent(event="message", data="a")]


@pytest.mark.parametrize("line", [b"", b"event\n", b"event:\n", b"event: a\nevent:\n"], ids=repr)
def test_client_4_the_default_type_is_message(line):
    assert decode(line + b"data: a\n\n") == [ServerSentEvent(event="message", data="a")]


def test_client_4_the_id_applies_to_all_events_that_follow():
    """The type and the data apply to one event."""
    assert decode(b"id: 1\nevent: ping\ndata: a\n\ndata: b\n\n") == [
        ServerSentEvent(event="ping", data="a", id="1"),
        ServerSentEvent(event="message", data="b", id="1"),
    ]


def test_client_4_the_last_event_and_id_line_of_a_block_apply():
    stream = b"event: a\nid: 1\nevent: b\nid: 2\ndata: x\n\n"
    assert decode(stream) == [ServerSentEvent(event="b", data="x", id="2")]


@pytest.mark.parametrize("line", [b"id: a\0b", b"id:\0"], ids=repr)
def test_client_5_an_id_with_nul_is_ignored(line):
    assert decode(line + b"\ndata: x\n\n", last_event_id="7")[0].id == "7"


@pytest.mark.parametrize("line", [b"id", b"id:", b"id: "], ids=repr)
def test_client_5_an_empty_id_resets_the_last_event_id(line):
    assert decode(line + b"\ndata: x\n\n", last_event_id="7")[0].id == ""


def test_client_5_an_id_is_committed_at_the_blank_line():
    decoder = Decoder("before")
    decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert decoder.last_event_id == "1"
    decoder.feed(b"\n")
    assert decoder.last_event_id == "2"


@pytest.mark.parametrize(
    ("value", "milliseconds"),
    [
        (b"0", 0),
        (b"3000", 3000),
        (b"000000000000000000000000003000", 3000),
        (b"9" * 15, MAX_RETRY_MS),
        (b"9" * 16, MAX_RETRY_MS),
        (b"9" * 10_000, MAX_RETRY_MS),
        (b"0" * 10_000, 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_client_6_retry_sets_the_reconnection_time(value, milliseconds):
    """A time above the maximum is read as the maximum."""
    decoder = Decoder()
    decoder.feed(b"retry: " + value + b"\n")
    assert decoder.retry_ms == milliseconds


@pytest.mark.parametrize(
    "value",
    [
        b"-5",
        b"+1",
        b"1.5",
        b"abc",
        b"",
        b" 1",
        b"1 ",
        b"1e3",
        b"1_0",
        "\u0663".encode(),
        "\u00b2".encode(),
    ],
    ids=repr,
)
def test_client_6_a_retry_that_is_not_ascii_digits_is_ignored(value):
    decoder = Decoder()
    decoder.feed(b"retry: 1\nretry: " + value + b"\n")
    assert decoder.retry_ms == 1


@pytest.mark.parametrize("rest", [b"data: b", b"data: b\n", b"data: b\r", b"id: 2\r\n"], ids=repr)
def test_client_7_a_final_block_without_a_blank_line_is_discarded(rest):
    assert data_of(b"data: a\n\n" + rest) == ["a"]


# The limit of one event


@pytest.mark.parametrize(
    "stream",
    [
        b"data: 12345",
        b"data: 1234\ndata: 5",
        b"data: 12345\n\n",
        b"data\n" * 10 + b"\n",
        b": a long comment",
        b"id: 1234567",
        b"x" * 11,
    ],
    ids=repr,
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_an_event_of_more_bytes_than_max_event_bytes_raises(stream, bytewise):
    """The limit applies to a line with the data before it, and also to an unfinished line."""
    decoder = Decoder(max_event_bytes=10)
    chunks = [stream[n : n + 1] for n in range(len(stream))] if bytewise else [stream]
    with pytest.raises(ReceivedEventTooLarge, match=r"^The event has more than 10 bytes\.$"):
        for chunk in chunks:
            decoder.feed(chunk)


@pytest.mark.parametrize(
    "stream", [b"data: 1234\n\n", b"data:\ndata: 123\n\n", b": keepalive\n" * 9, b"id: 123456\n\n"]
)
def test_events_within_max_event_bytes_are_decoded(stream):
    """The limit applies to each event separately."""
    decoder = Decoder(max_event_bytes=11)
    once = decoder.feed(stream)
    assert decoder.feed(stream * 50) == once * 50


def test_received_event_too_large_contains_the_events_before_it():
    decoder = Decoder(max_event_bytes=10)
    with pytest.raises(ReceivedEventTooLarge) as caught:
        decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: 12345678")
    assert caught.value.events == [ServerSentEvent(data="a", id="1")]
    assert decoder.last_event_id == "1"


def test_max_event_bytes_is_16_mib_by_default():
    decoder = Decoder()
    chunk = b"x" * 2**20
    for _ in range(16):
        decoder.feed(chunk)
    with pytest.raises(ReceivedEventTooLarge, match="16777216 bytes"):
        decoder.feed(b"x")


def test_max_event_bytes_must_be_positive():
    """The limit cannot be disabled."""
    with pytest.raises(ValueError, match="max_event_bytes must be 1 or more, not 0"):
        Decoder(max_event_bytes=0)


@pytest.mark.parametrize("unit", [b"data: ab\n", b"data\n", b"ab"], ids=repr)
def test_an_unfinished_event_needs_about_its_bytes_in_memory(unit):
    """Short lines and short chunks do not need an object each."""
    decoder = Decoder()
    tracemalloc.start()
    try:
        for _ in range(2**18 // len(unit)):
            decoder.feed(unit)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 1.5 * 2**18


# The examples of the standard

STANDARD = {
    "three-messages": (
        b"data: This is the first message.\n\n"
        b"data: This is the second message, it\ndata: has two lines.\n\n"
        b"data: This is the third message.\n\n",
        [
            ("message", "This is the first message.", ""),
            ("message", "This is the second message, it\nhas two lines.", ""),
            ("message", "This is the third message.", ""),
        ],
    ),
    "event-types": (
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
        [("add", "73857293", ""), ("remove", "2153", ""), ("add", "113411", "")],
    ),
    "stocks": (
        b"data: YHOO\ndata: +2\ndata: 10\n\n",
        [("message", "YHOO\n+2\n10", "")],
    ),
    "four-blocks": (
        b": test stream\n\ndata: first event\nid: 1\n\n"
        b"data:second event\nid\n\ndata:  third event\n",
        [("message", "first event", "1"), ("message", "second event", "")],
    ),
    "four-blocks-ended": (
        b": test stream\n\ndata: first event\nid: 1\n\n"
        b"data:second event\nid\n\ndata:  third event\n\n",
        [
            ("message", "first event", "1"),
            ("message", "second event", ""),
            ("message", " third event", ""),
        ],
    ),
    "empty-data": (b"data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
    "optional-space": (
        b"data:test\n\ndata: test\n\n",
        [("message", "test", ""), ("message", "test", "")],
    ),
}


@pytest.mark.parametrize(("stream", "events"), STANDARD.values(), ids=STANDARD)
def test_the_examples_of_the_standard_are_decoded(stream, events):
    expected = [ServerSentEvent(event=event, data=data, id=id_) for event, data, id_ in events]
    assert decode(stream) == expected
    assert decode_bytewise(stream) == expected


# Properties

PLAIN = st.characters(exclude_categories=["Cs"])
ACTIONS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"),
    min_size=1,
    max_size=20,
)
VALUES = st.lists(
    st.sampled_from(["\r", "\n", "\r\n", ":", " ", "data: ", "\ufeff"]) | st.text(PLAIN)
)
IDS = st.none() | st.text(
    st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30
)
CUTS = st.lists(st.integers(min_value=0, max_value=400))
STREAMS = st.lists(
    st.sampled_from(
        (b"data", b"id", b"event", b"retry", b":", b" ", b"\r", b"\n", b"\r\n", b"\0", b"1", b"99")
    )
    | st.sampled_from((BOM, b"\xe2\x82", b"\xf0\x9f"))
    | st.binary(max_size=8)
).map(b"".join)


def cut(stream, cuts):
    """Return the chunks of a stream, divided at these positions."""
    places = sorted({min(place, len(stream)) for place in cuts} | {0, len(stream)})
    return [stream[start:end] for start, end in pairwise(places)]


@settings(deadline=None)
@given(events=st.lists(st.tuples(ACTIONS, VALUES, IDS), max_size=5), cuts=CUTS)
@example(events=[("a", ["x\r"], "1"), ("\ufeff", ["", "\n"], None)], cuts=list(range(60)))
def test_any_encoded_event_is_decoded(events, cuts):
    """The bytes are divided into any chunks."""
    stream, expected, last_id = KEEPALIVE, [], ""
    for action, parts, event_id in events:
        value = "".join(parts)
        check_field("action", action, MAX_ACTION_LENGTH)
        lines = StringEvent("token", action, value).value
        stream += encode_event(action, "\n".join(lines).encode(), event_id) + KEEPALIVE
        if event_id is not None:
            assert len(event_id) <= MAX_ID_LENGTH
            last_id = event_id
        data = value.replace("\r\n", "\n").replace("\r", "\n")
        expected.append(ServerSentEvent(event=action, data=data, id=last_id))
    assert decode(*cut(stream, cuts)) == expected


@settings(deadline=None, max_examples=300)
@given(stream=STREAMS, cuts=CUTS)
def test_any_bytes_are_decoded_without_an_error(stream, cuts):
    """The chunks do not change the result."""
    whole, pieces = Decoder(), Decoder()
    events = whole.feed(stream)
    assert [event for chunk in cut(stream, cuts) for event in pieces.feed(chunk)] == events
    assert (pieces.last_event_id, pieces.retry_ms) == (whole.last_event_id, whole.retry_ms)
    assert decode_bytewise(stream) == events


@settings(deadline=None)
@given(stream=STREAMS)
def test_a_stream_that_is_cut_off_is_decoded_to_its_first_events(stream):
    """No event is decoded partly."""
    events = decode(stream)
    for length in range(len(stream)):
        part = decode(stream[:length])
        assert part == events[: len(part)]


@pytest.mark.parametrize("token", [None, "t"])
@pytest.mark.parametrize("commit", [True, False])
def test_reset_commits_the_resume_id_only_if_asked(token, commit):
    """The data contains the reason, the ids, and the token of a stream with several tokens."""
    frame = encode_reset("expired", after="5", resume="9+", token=token, commit=commit)
    decoder = Decoder("before")
    (event,) = decoder.feed(frame)
    named = {"reason": "expired", "after": "5", "resume": "9+"} | (
        {"token": token} if token else {}
    )
    assert (event.event, json.loads(event.data)) == ("reset", named)
    assert decoder.last_event_id == ("9+" if commit else "before")


def test_reset_without_a_resume_id_has_no_id():
    """The last event id of the listener does not change."""
    assert b"id:" not in encode_reset("overflow", after=None, resume=None)
