"""What the view reads from a request."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.sessions.backends.db import SessionStore
from django.http import HttpRequest, RawPostDataException
from django.test import RequestFactory

from django_eventsource.exceptions import InvalidToken
from django_eventsource.grants import hash_session_key
from django_eventsource.streaming.request import (
    keep_body,
    last_event_id,
    prefers_json,
    read_tokens,
    session_of,
)

factory = RequestFactory()


# JSON or a stream


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/json", True),
        ("APPLICATION/JSON", True),
        ("application/*", True),
        ("text/html, application/json;q=0.9", True),
        ("application/json" + " " * 984, True),
        ("application/json" + " " * 985, False),
        ("application/json, text/event-stream", True),
        ("text/event-stream, application/json", False),
        ("text/event-stream", False),
        ("application/xml", False),
        ("*/*", False),
        ("", False),
        ("application/json;a*=bogus''x", False),
        ("application/json;a*=idna''%ff.", False),
        ("application/json;a*=\0''x", False),
        ("application/json;q=nan", True),
        ("application/;;;", False),
    ],
)
def test_a_client_whose_header_cannot_be_read_prefers_a_stream(
    accept: str, expected: bool
) -> None:
    assert prefers_json(factory.get("/", headers={"Accept": accept})) == expected


@pytest.mark.parametrize("accept", ["a;b," * 16_000, "application/json;" + "a=b;" * 5000])
def test_a_long_accept_header_is_not_parsed(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpRequest, "get_preferred_type")
    assert not prefers_json(factory.get("/", headers={"Accept": accept}))


# The body


@pytest.mark.parametrize("size", [0, 9, 10])
def test_a_body_within_the_limit_can_be_read_again(size: int) -> None:
    request = factory.post("/", b"x" * size, content_type="text/plain")
    assert keep_body(request, 10)
    assert request.body == b"x" * size


@pytest.mark.parametrize(
    ("length", "asked"),
    [("50", []), ("", [11]), ("abc", [11]), ("5,5", [11]), ("5", [11]), ("9" * 5000, [])],
)
def test_at_most_one_byte_more_than_the_limit_is_read(length: str, asked: list[int]) -> None:
    """A declared length above the limit is rejected without a read."""
    request: Any = factory.post("/", b"x" * 50, content_type="text/plain")
    request.META["CONTENT_LENGTH"] = length
    read: list[int] = []
    real = request._stream.read
    request._stream.read = lambda size: read.append(size) or real(size)
    assert not keep_body(request, 10)
    assert read == asked


def test_a_body_that_middleware_consumed_is_an_error() -> None:
    """A body that middleware read as a whole is still there."""
    request = factory.post("/", b"abc", content_type="text/plain")
    assert request.body == b"abc"
    assert keep_body(request, 10)
    assert request.body == b"abc"
    request = factory.post("/", {"a": "1"})
    assert request.POST["a"] == "1"
    with pytest.raises(RawPostDataException, match="consumed"):
        keep_body(request, 1000)


# Tokens


def test_the_token_of_the_path_comes_before_those_of_the_query() -> None:
    """Each token is returned once."""
    assert read_tokens(factory.get("/"), "a", 1) == ["a"]
    request = factory.get("/?token=b&token=c&token=a&token=b&token=%C3%A9%20%2F")
    assert read_tokens(request, "a", 4) == ["a", "b", "c", "é /"]


def test_too_many_tokens_are_rejected_with_the_limit() -> None:
    with pytest.raises(
        InvalidToken, match="The request has 3 tokens; one stream carries at most 2"
    ):
        read_tokens(factory.get("/?token=b&token=c"), "a", 2)


@pytest.mark.parametrize("text", ["", "%00", "x" * 256, "%FF"])
def test_an_invalid_token_in_the_query_is_rejected(text: str) -> None:
    with pytest.raises(InvalidToken):
        read_tokens(factory.get(f"/?token={text}"), "a", 16)


# The last event id


def test_a_request_without_a_last_event_id_has_an_empty_one() -> None:
    """An empty header or parameter counts as none."""
    assert last_event_id(factory.get("/")) == ""
    assert last_event_id(factory.get("/", {"last_event_id": ""})) == ""
    assert last_event_id(factory.get("/", headers={"Last-Event-ID": ""})) == ""


def test_the_header_has_precedence_over_the_query() -> None:
    """A browser that reconnects sends the header and the URL of its first request."""
    request = factory.get("/?last_event_id=1", headers={"Last-Event-ID": "2"})
    assert last_event_id(request) == "2"


def test_the_header_is_decoded_as_utf_8() -> None:
    """Servers decode headers as Latin-1."""
    header = {"Last-Event-ID": "€".encode().decode("latin-1")}
    assert last_event_id(factory.get("/", headers=header)) == "€"
    assert last_event_id(factory.get("/", headers={"Last-Event-ID": "\xff"})) == "\ufffd"


# The session


def test_only_a_hash_of_the_session_key_is_returned() -> None:
    """It is empty without a session or without a key."""
    request: Any = factory.get("/")
    assert session_of(request) == ""
    request.session = SessionStore()
    assert session_of(request) == ""
    request.session = SessionStore("a-session-key")
    assert session_of(request) == hash_session_key("a-session-key")
