"""Fuzzers of all that untrusted bytes reach: the wire format, cursors, grants, messages, requests.

The examples are the same in each run, unless the profile ``explore`` is chosen: see CONTRIBUTING.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from django.core import signing
from django.test import AsyncClient
from django.urls import include, path
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from django_eventsource.client._http import response_error
from django_eventsource.events import Event, JSONEvent, StringEvent
from django_eventsource.exceptions import InvalidGrant, ReceivedEventTooLarge
from django_eventsource.grants import make_grant, read_grant
from django_eventsource.history import Draft
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.policies import AllowAny
from django_eventsource.protocol import messages
from django_eventsource.protocol.batches import Batch, encode_chunk, merge
from django_eventsource.protocol.cursors import (
    MAX_SEQ,
    UNKNOWN,
    join_cursor,
    parse_cursors,
    short_key,
)
from django_eventsource.protocol.field_rules import MAX_ID_LENGTH
from django_eventsource.protocol.frames import (
    DEFAULT_ACTION,
    KEEPALIVE,
    MAX_RETRY_MS,
    Decoder,
    ServerSentEvent,
    encode_id,
    encode_reset,
    encode_retry,
    replace_id,
)
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.views import EventSourceView

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("open/<action>/<path:token>", EventSourceView.as_view(policy=AllowAny)),
]


# Wire format

ANY_TEXT = st.text(max_size=40)
"""Any characters, with lone surrogates."""
LINE_ENDS = st.sampled_from(
    ["\r", "\n", "\r\n", "\0", "\u2028", "\x85", "\ufeff", "data: x", ": "]
)
VALUES = st.lists(LINE_ENDS | ANY_TEXT, max_size=8).map("".join)
IDS = st.text(st.characters(min_codepoint=33, max_codepoint=125), min_size=1, max_size=30)


class OwnId(StringEvent):
    """A class whose ids are whatever a project computes."""

    def __init__(self, own_id: str, *arguments: Any) -> None:
        self.own_id = own_id
        super().__init__(*arguments)

    id = property(lambda self: self.own_id)


def frame_of(make: Any) -> bytes | None:
    """Return the bytes of an event, or ``None`` if it is refused with a ``ValueError``."""
    try:
        return Draft.of(make()).frame()
    except ValueError:
        return None


def decode(stream: bytes) -> list[ServerSentEvent]:
    """Return the events of a stream that begins with an id."""
    return Decoder().feed(encode_id("first") + stream + KEEPALIVE)


@settings(max_examples=300)
@given(action=ANY_TEXT, value=VALUES, own_id=ANY_TEXT | IDS)
@example(action="a", value="x", own_id="1\ndata: forged")
@example(action="a\rdata: forged", value="x", own_id="1")
def test_an_event_is_refused_or_is_exactly_one_event_for_its_listeners(
    action: str, value: str, own_id: str
) -> None:
    """No action, value or id adds an event, a field or an id."""
    frame = frame_of(partial(OwnId, own_id, "t", action, value))
    if frame is None:
        return
    if action == Event.RETRY:
        assert decode(frame) == []
        return
    data = value.replace("\r\n", "\n").replace("\r", "\n")
    assert decode(frame) == [ServerSentEvent(event=action, data=data, id=own_id)]
    assert 0 < len(own_id) <= MAX_ID_LENGTH
    assert decode(replace_id(frame, "~x"))[0].id == "~x"


JSON_TEXTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON_TEXTS | st.binary(max_size=8))
def test_a_json_value_is_refused_or_is_one_line(value: object) -> None:
    frame = frame_of(partial(JSONEvent, "t", "ping", value))
    if frame is not None:
        assert frame.count(b"\n") == 3
        assert len(decode(frame)) == 1


@given(reason=IDS, after=st.none() | ANY_TEXT, token=st.none() | ANY_TEXT)
def test_a_reset_contains_the_last_event_id_of_the_client_as_data_only(
    reason: str, after: str | None, token: str | None
) -> None:
    """The client may have sent any text as its last event id."""
    (event,) = decode(encode_reset(reason, after=after, resume="7", token=token))
    assert (event.event, event.id, "\n" in event.data) == ("reset", "7", False)


# Batches

BATCHES = st.lists(
    st.tuples(
        st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4),
        st.none() | st.integers(-5, 2**64),
        st.booleans(),
    ),
    max_size=8,
)


def batch_of(frames: list[bytes], seq: int | None, closes: bool) -> Batch:
    seqs = None if seq is None else range(seq, seq + len(frames))
    return Batch(frames, seqs, closes=closes)


@given(parts=BATCHES, max_bytes=st.integers(1, 60), consecutive=st.booleans())
def test_merged_batches_contain_the_same_events_in_the_same_order(
    parts: list[tuple[list[bytes], int | None, bool]], max_bytes: int, consecutive: bool
) -> None:
    batches = [batch_of(*part) for part in parts]
    merged = merge(batches, max_bytes=max_bytes, consecutive=consecutive)

    def events(some: list[Batch]) -> list[tuple[bytes, int | None, bool]]:
        found = []
        for batch in some:
            seqs = batch.seqs or [None] * len(batch.frames)
            ends = [False] * (len(batch.frames) - 1) + [batch.closes]
            found += list(zip(batch.frames, seqs, ends, strict=True))
        return found

    assert events(merged) == events(batches)
    for batch in merged:
        assert batch.data == b"".join(batch.frames)
        assert len(batch.data) <= max_bytes or batch in batches
        if consecutive and batch.seqs:
            assert all(after == before + 1 for before, after in pairwise(batch.seqs))


@given(part=st.tuples(*[st.binary(min_size=1, max_size=300)] * 3))
def test_chunks_of_http_are_read_as_what_was_encoded(part: tuple[bytes, ...]) -> None:
    """No data ends the body early, or is read as the size of a chunk."""
    wire = b"".join(map(encode_chunk, part)) + b"0\r\n\r\n"
    body = []
    while True:
        size, _, wire = wire.partition(b"\r\n")
        length = int(size, 16)
        body.append(wire[:length])
        assert wire[length : length + 2] == b"\r\n"
        wire = wire[length + 2 :]
        if not length:
            break
    assert (body, wire) == ([*part, b""], b"")


# The decoder of the clients


def decode_as_the_standard(
    stream: bytes, last_event_id: str = ""
) -> tuple[list[ServerSentEvent], str, int | None]:
    """Decode a whole stream as the HTML standard describes it, with no regard to memory or time.

    :returns: the events, the last event id, and the reconnection time.
    """
    text = stream.decode("utf-8", "replace")
    # The first bytes are read as bytes: U+FFFD is not a byte order mark.
    if stream.startswith(codecs.BOM_UTF8):
        text = text[1:]
    *lines, _unfinished = re.split("\r\n|\r|\n", text)
    events: list[ServerSentEvent] = []
    data: list[str] = []
    kind, id_buffer, retry = "", last_event_id, None
    for line in lines:
        if line == "":
            last_event_id = id_buffer
            if data:
                events.append(
                    ServerSentEvent(
                        event=kind or DEFAULT_ACTION, data="\n".join(data), id=last_event_id
                    )
                )
            data, kind = [], ""
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "data":
            data.append(value)
        elif field == "event":
            kind = value
        elif field == "id" and "\0" not in value:
            id_buffer = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            retry = min(int(value), MAX_RETRY_MS)
    return events, last_event_id, retry


STREAMS = st.lists(
    st.sampled_from([b"data", b"id", b"event", b"retry", b":", b" ", b"\r", b"\n", b"\r\n"])
    | st.sampled_from(
        [b"\0", b"1", b"007", b"-1", b"9" * 30, b"\xef\xbb\xbf", b"\xe2\x82", b"\xac"]
    )
    | st.sampled_from([b"data: a\n\n", b"id: 7\n", b"event:x\n", "\u2028\x85²".encode()])
    | st.binary(max_size=8),
    max_size=30,
).map(b"".join)
CUTS = st.lists(st.integers(0, 200), max_size=12)


def chunks_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(place, len(stream)) for place in cuts} | {0, len(stream)})
    return [stream[start:end] for start, end in pairwise(places)]


@settings(max_examples=1000)
@given(stream=STREAMS, cuts=CUTS, last_event_id=st.sampled_from(["", "5"]))
@example(stream=b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", cuts=[1, 2, 4], last_event_id="")
@example(stream=b"data\r\r\n\r\ndata: \xe2\n\n", cuts=[5, 6, 7], last_event_id="5")
def test_the_decoder_returns_what_the_standard_describes(
    stream: bytes, cuts: list[int], last_event_id: str
) -> None:
    decoder = Decoder(last_event_id)
    events = [event for chunk in chunks_of(stream, cuts) for event in decoder.feed(chunk)]
    found = events, decoder.last_event_id, decoder.retry_ms
    assert found == decode_as_the_standard(stream, last_event_id)


@settings(max_examples=300)
@given(stream=STREAMS, cuts=CUTS, most=st.integers(1, 40))
def test_a_bounded_decoder_returns_the_same_events_or_raises(
    stream: bytes, cuts: list[int], most: int
) -> None:
    """It never keeps more bytes than that, and what it has returned before is right."""
    decoder = Decoder(max_event_bytes=most)
    events = []
    expected, last_event_id, _ = decode_as_the_standard(stream)
    try:
        for chunk in chunks_of(stream, cuts):
            events += decoder.feed(chunk)
            assert len(decoder._line) + len(decoder._data) <= most
    except ReceivedEventTooLarge as error:
        events += error.events
        assert events == expected[: len(events)]
    else:
        assert (events, decoder.last_event_id) == (expected, last_event_id)


RETRY_AFTER = st.sampled_from(
    ["9" * 5000, "1.5", "-1", "Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359"]
)


@given(text=RETRY_AFTER | st.text(max_size=40) | st.text("0123456789:, GMTJanMon+-", max_size=40))
def test_any_retry_after_is_a_number_of_seconds_or_is_ignored(text: str) -> None:
    headers = [(b"Retry-After", text.encode("utf-8", "replace"))]
    request = httpx2.Request("GET", "http://testserver/")
    error = response_error(httpx2.Response(429, headers=headers, request=request), b"")
    assert error.retry_after is None or error.retry_after >= 0


# Cursors

CURSOR_ALPHABET = "~+-_=0123456789ABCDEFabcdefghxyz"
CURSORS = (
    st.text(max_size=80)
    | st.text(CURSOR_ALPHABET, max_size=400)
    | st.text(CURSOR_ALPHABET, max_size=80).map(lambda text: f"~{text}")
)


@settings(max_examples=300)
@given(text=CURSORS, count=st.integers(1, 3), most=st.none() | st.integers(1, 20))
def test_any_cursor_names_a_position_of_each_token_or_is_unknown(
    text: str, count: int, most: int | None
) -> None:
    tokens = ["a", "b", "c"][:count]
    found = parse_cursors(text, tokens, most)
    assert list(found) == tokens
    for token, cursor in found.items():
        if cursor is not None:
            assert cursor.seq is None or 0 <= cursor.seq <= MAX_SEQ
            assert len(cursor.text) <= MAX_ID_LENGTH
            MemoryHistory().locate(token, cursor)


@given(parts=st.lists(st.tuples(st.integers(0, MAX_SEQ), st.booleans()), min_size=1, max_size=16))
def test_a_joined_cursor_names_the_positions_that_it_was_made_of(
    parts: list[tuple[int, bool]],
) -> None:
    tokens = [f"token {n}" for n in range(len(parts))]
    text = join_cursor(
        (short_key(token), *part) for token, part in zip(tokens, parts, strict=True)
    )
    found = parse_cursors(text, tokens)
    assert [(one.seq, one.reopened) for one in found.values() if one is not None] == parts


@given(
    place=st.integers(0, 200),
    character=st.characters(max_codepoint=1000),
    removed=st.integers(0, 2),
)
def test_a_damaged_joined_cursor_raises_nothing(place: int, character: str, removed: int) -> None:
    """It may name other positions, which the history checks: it is not secret."""
    text = join_cursor((short_key(token), 10**15, True) for token in "abc")
    damaged = text[:place] + character + text[place + removed :]
    for token, cursor in parse_cursors(damaged, list("abc")).items():
        assert cursor is None or cursor == UNKNOWN or cursor.seq is not None or cursor.text
        MemoryHistory().locate(token, cursor)


# Grants

TOKENS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufffd"),
    min_size=1,
    max_size=20,
)


@given(
    tokens=st.lists(TOKENS, min_size=1, max_size=4),
    listen=st.booleans(),
    send=st.booleans(),
    seconds=st.floats(1, 10**9),
    user=st.none() | st.integers() | st.text(min_size=1, max_size=9),
)
def test_a_grant_contains_what_was_granted_and_nothing_else(
    tokens: list[str], listen: bool, send: bool, seconds: float, user: Any
) -> None:
    assume(listen or send)
    grant = read_grant(make_grant(tokens, listen=listen, send=send, seconds=seconds, user=user))
    assert (grant.tokens, grant.listen, grant.send) == (tuple(tokens), listen, send)
    assert grant.user == ("" if user is None else str(user))
    assert grant.expires >= time.time() + seconds - 5


@settings(max_examples=300)
@given(text=st.text(max_size=200) | st.text(".:-_eyJabc019=", max_size=200))
@example(text=".eJw:a:b")
@example(text="." * 1000)
def test_a_text_that_was_not_signed_is_not_a_grant(text: str) -> None:
    with pytest.raises(InvalidGrant):
        read_grant(text)


@settings(max_examples=300)
@given(
    place=st.integers(0, 200),
    inserted=st.text(max_size=3),
    removed=st.integers(0, 30),
)
def test_a_changed_grant_is_not_a_grant(place: int, inserted: str, removed: int) -> None:
    text = make_grant("token", listen=True)
    changed = text[:place] + inserted + text[place + removed :]
    assume(changed != text)
    with pytest.raises(InvalidGrant):
        read_grant(changed)


SIGNED = signing.dumps([["t"], "ls", 10**10, None, "", ""], salt="django_eventsource.grant")


@given(
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    salt=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
@example(key="", salt="django.core.signing")
@example(key="", salt="django_eventsource.session")
@example(key="", salt="django_eventsource.grants")
@example(key="django-insecure", salt="django_eventsource.grant")
def test_another_key_or_another_salt_signs_no_grant(key: str, salt: str) -> None:
    """Another project has another key. Other code of the project has another salt."""
    assume(key or salt != "django_eventsource.grant")
    assert read_grant(SIGNED).send
    content = [["t"], "ls", 10**10, None, "", ""]
    with pytest.raises(InvalidGrant):
        read_grant(signing.dumps(content, key=key or None, salt=salt))


# Messages of the channel layer

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["type", "group", "seq", "closes", "frames"])


@settings(max_examples=500)
@given(changes=st.dictionaries(NAMES | ANY_TEXT, VALUE, max_size=3), removed=st.sets(NAMES))
@example(changes={"frames": [b"data: a\n\n", b""]}, removed=set())
@example(changes={"seq": 2**64 - 1}, removed=set())
def test_any_message_is_a_batch_or_a_probe_or_a_value_error(
    changes: dict[str, Any], removed: set[str]
) -> None:
    message = messages.encode("g", Batch([b"data: a\n\n"], [7])) | changes
    check_message({name: value for name, value in message.items() if name not in removed})


@given(message=VALUE)
def test_any_value_is_not_a_message(message: Any) -> None:
    check_message(message)


def check_message(message: Any) -> None:
    error = None
    decoded = None
    try:
        decoded = messages.decode(message)
    except ValueError as caught:
        error = str(caught)
    if error is not None:
        assert len(error) < 300
        assert error.isprintable()
    elif decoded is None:
        assert message["type"] == messages.PROBE_TYPE
    else:
        group, batch = decoded
        assert isinstance(group, str)
        # An empty frame would be an empty chunk, which ends the body of an HTTP response.
        assert all(isinstance(frame, bytes) and frame for frame in batch.frames)
        assert batch.seqs is None or len(batch.seqs) == len(batch.frames)
        assert isinstance(batch.closes, bool)


@given(part=BATCHES.filter(bool).map(lambda parts: parts[0]))
def test_a_message_contains_the_batch_that_was_sent(
    part: tuple[list[bytes], int | None, bool],
) -> None:
    batch = batch_of(*part)
    decoded = messages.decode(messages.encode("g", batch))
    assert decoded is not None
    group, found = decoded
    assert (group, found.frames, found.seqs, found.closes) == (
        "g",
        batch.frames,
        batch.seqs,
        batch.closes,
    )


@given(milliseconds=st.integers(0, MAX_RETRY_MS), event_id=st.none() | IDS)
def test_a_reconnection_time_is_decoded_to_itself(milliseconds: int, event_id: str | None) -> None:
    decoder = Decoder("before")
    assert decoder.feed(encode_retry(milliseconds, event_id)) == []
    assert (decoder.retry_ms, decoder.last_event_id) == (milliseconds, event_id or "before")


# Requests

HEADER_NAMES = st.sampled_from(
    [
        "Accept",
        "Authorization",
        "Content-Length",
        "Content-Type",
        "Cookie",
        "Idempotency-Key",
        "If-None-Match",
        "Last-Event-ID",
        "Origin",
        "Sec-Fetch-Site",
        "X-CSRFToken",
    ]
)
STARTS = [
    "",
    "Basic ",
    "Bearer ",
    "~",
    "1",
    "application/json;q=",
    'W/"',
    "https://",
    "sessionid=",
]
HEADER_VALUES = st.tuples(
    st.sampled_from(STARTS),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
).map("".join)
PARAMETERS = st.sampled_from(
    ["token", "grant", "last_event_id", "rewind", "after", "limit", "action"]
)
ACTIONS = st.sampled_from(["poll", "ping", "close", "retry", "..", "*"]) | st.text(max_size=5)
STATUSES = {200, 204, 304, 400, 401, 403, 404, 405, 413, 429}


@pytest.mark.usefixtures("memory_history")
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("prefix", ["open", "events"])
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=st.sampled_from(["GET", "GET", "HEAD", "POST", "POST", "PUT", "OPTIONS"]),
    action=ACTIONS,
    token=st.sampled_from(["t", "a/b", "..", "\0", "\ud800", CONTROL_TOKEN, "a\r\nX: forged"])
    | st.text(max_size=9),
    query=st.lists(st.tuples(PARAMETERS, st.sampled_from(["t", "1", "~", "30s"]) | ANY_TEXT)),
    headers=st.dictionaries(HEADER_NAMES, HEADER_VALUES, max_size=4),
    body=st.binary(max_size=40),
)
def test_no_request_causes_an_error_of_the_server(
    settings: Any,
    prefix: str,
    method: str,
    action: str,
    token: str,
    query: list[tuple[str, str]],
    headers: dict[str, str],
    body: bytes,
) -> None:
    """One prefix accepts every client, and the other one only clients with credentials."""
    settings.ROOT_URLCONF = __name__
    url = "/".join(
        ["", prefix, *(quote(part, errors="replace", safe="") for part in (action, token))]
    )
    url += "?" + "&".join(f"{name}={quote(value, errors='replace')}" for name, value in query)
    response = asyncio.run(request(method, url, body, headers))
    assert response.status_code in STATUSES, response
    assert all(value.isascii() and value.isprintable() for value in response.headers.values())
    assert not any("forged" in value for value in response.headers.values())
    if prefix == "events" and method in ("GET", "HEAD", "POST"):
        assert response.status_code in (400, 401, 403, 404, 413, 429), response


async def request(method: str, url: str, body: bytes, headers: dict[str, str]) -> Any:
    # An exception of the view is raised here.
    client = AsyncClient()
    response = await client.generic(method, url, body, "text/plain", headers=headers)
    if response.streaming:
        async for chunk in response._stream:
            assert chunk.endswith(b"\n")
            break
        await response._stream.aclose()
    return response
