"""What the view reads of a request, all of it untrusted."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.sessions.backends.db import SessionStore
from django.http import RawPostDataException
from django.test import RequestFactory

from django_eventsource.cursors import join_cursor, max_length, short_key
from django_eventsource.exceptions import InvalidToken
from django_eventsource.grants import hash_session_key
from django_eventsource.requests import (
    NO_CURSOR,
    keep_body,
    last_event_id,
    read_tokens,
    session_of,
)

factory = RequestFactory()


# The body


@pytest.mark.parametrize("size", [0, 9, 10])
def test_a_body_within_the_limit_is_kept(size: int) -> None:
    """It is where Django keeps it, and can be read again."""
    request = factory.post("/", b"x" * size, content_type="text/plain")
    assert keep_body(request, 10)
    assert request.body == b"x" * size


@pytest.mark.parametrize(
    ("length", "asked"),
    [("50", []), ("", [11]), ("abc", [11]), ("5,5", [11]), ("5", [11]), ("9" * 5000, [])],
)
def test_a_body_over_the_limit_is_not_read(length: str, asked: list[int]) -> None:
    """A declared length is believed when it is too much; else one byte too many is read."""
    request: Any = factory.post("/", b"x" * 50, content_type="text/plain")
    request.META["CONTENT_LENGTH"] = length
    read: list[int] = []
    real = request._stream.read
    request._stream.read = lambda size: read.append(size) or real(size)
    assert not keep_body(request, 10)
    assert read == asked


def test_a_body_that_was_read_before() -> None:
    """What middleware has read as a whole is there still; what it consumed is an error."""
    request = factory.post("/", b"abc", content_type="text/plain")
    assert request.body == b"abc"
    assert keep_body(request, 10)
    assert request.body == b"abc"
    request = factory.post("/", {"a": "1"})
    assert request.POST["a"] == "1"
    with pytest.raises(RawPostDataException, match="consumed"):
        keep_body(request, 1000)


# Tokens


def test_tokens_of_path_and_query() -> None:
    """The path's comes first, the others in their order, each once."""
    assert read_tokens(factory.get("/"), "a", 1) == ["a"]
    request = factory.get("/?token=b&token=c&token=a&token=b&token=%C3%A9%20%2F")
    assert read_tokens(request, "a", 4) == ["a", "b", "c", "é /"]


def test_too_many_tokens() -> None:
    """The answer says how many there may be."""
    with pytest.raises(InvalidToken, match="3 tokens are asked for; one stream carries at most 2"):
        read_tokens(factory.get("/?token=b&token=c"), "a", 2)


@pytest.mark.parametrize("text", ["", "%00", "x" * 256, "%FF"])
def test_bad_tokens_in_the_query(text: str) -> None:
    """Each is checked as the path's is."""
    with pytest.raises(InvalidToken):
        read_tokens(factory.get(f"/?token={text}"), "a", 16)


# The last event id


def test_no_last_event_id() -> None:
    """Nothing at all is a fresh listener."""
    assert last_event_id(factory.get("/")) is None
    assert last_event_id(factory.get("/", {"last_event_id": ""})) is None
    assert last_event_id(factory.get("/", headers={"Last-Event-ID": ""})) is None


def test_the_header_wins() -> None:
    """A browser that reconnects sends the header, and the URL of its first request."""
    request = factory.get("/?last_event_id=1", headers={"Last-Event-ID": "2"})
    assert last_event_id(request) == "2"


def test_the_query_is_as_untrusted_as_the_header() -> None:
    """What is no id stands for none that exists."""
    for text in ["a\nb", "a b", "é", "\0", "x" * 256]:
        assert last_event_id(factory.get("/", {"last_event_id": text})) == NO_CURSOR
    for text in ["x" * 255, "~x", "17+", "!"]:
        assert last_event_id(factory.get("/", {"last_event_id": text})) == text
    header = {"Last-Event-ID": "€".encode().decode("latin-1")}
    assert last_event_id(factory.get("/", headers=header)) == NO_CURSOR


def joined(tokens: int) -> str:
    return join_cursor((short_key(str(n)), 10**17 + n, False) for n in range(tokens))


def test_the_cursor_of_many_tokens_is_long() -> None:
    """It may be as long as those tokens need, and no longer."""
    cursor = joined(40)
    assert len(cursor) == max_length(40) > 255
    assert last_event_id(factory.get("/", {"last_event_id": cursor}), 40) == cursor
    assert last_event_id(factory.get("/", {"last_event_id": "x" + cursor}), 40) == NO_CURSOR
    assert last_event_id(factory.get("/", {"last_event_id": "~" * 10_000}), 40) == NO_CURSOR


def test_a_page_that_comes_back_with_fewer_tokens() -> None:
    """The cursor of as many tokens as a stream may carry is read, however few come back."""
    cursor = joined(16)
    assert last_event_id(factory.get("/", {"last_event_id": cursor}), 12) == cursor
    assert last_event_id(factory.get("/", {"last_event_id": cursor}), 1) == cursor


# Who it is from


def test_session() -> None:
    """Only a hash of its key is kept; there may be no session, or one without a key."""
    request: Any = factory.get("/")
    assert session_of(request) == ""
    request.session = SessionStore()
    assert session_of(request) == ""
    request.session = SessionStore("a-session-key")
    assert session_of(request) == hash_session_key("a-session-key")
