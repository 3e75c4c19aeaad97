"""Where requests of the clients go, and how failures are put in words."""

from __future__ import annotations

import traceback

import httpx
import pytest

from django_eventsource import connection as http


@pytest.mark.parametrize(
    ("url", "carries"),
    [
        ("http://a/x", True),
        ("http://a:80/", True),
        ("https://a/", True),
        ("https://a:8443/", False),
        ("http://a:81/", False),
        ("http://b/", False),
    ],
)
def test_which_redirects_carry_headers(url: str, carries: bool) -> None:
    """The same origin does, and so does its upgrade from http to https; no other does."""
    target = http.Target("http://a/", {"X-Api-Key": "secret"}, None)
    request = httpx.Request("GET", url, headers=target.headers)
    target.guard(request)
    assert ("x-api-key" in request.headers) is carries


def test_no_downgrade_carries_headers() -> None:
    """A redirect from https to http carries no credentials."""
    target = http.Target("https://a/", {"X-Api-Key": "secret"}, None)
    request = httpx.Request("GET", "http://a/", headers=target.headers)
    target.guard(request)
    assert "x-api-key" not in request.headers


def test_an_error_without_words() -> None:
    """An exception without a message is told by its name."""
    assert http.reason(httpx.ReadError("")) == "ReadError"
    assert http.reason(httpx.ConnectError("Two\nlines.")) == "two lines"


@pytest.mark.parametrize(
    "url",
    ["", "x", "/poll/x", "ftp://host/", "http://", "http:///x", "http://h:x/", "http://[::1/"],
)
def test_bad_urls(url: str) -> None:
    """What is no http or https URL with a host is refused at once."""
    with pytest.raises(ValueError, match="is not a valid http:// or https:// URL with a host"):
        http.Target(url, {}, None)


SECRET_URLS = [
    ("http://user:SECRET@h:x/", "http://***@h:x/"),
    ("http://user:a/SECRET@h/", "http://***@h/"),
    ("http://user:a?b#SECRET@h/", "http://***@h/"),
    ("http://user:a@SECRET@h:x/", "http://***@h:x/"),
    ("http://user:SECRET\n@h/", "http://***@h/"),
    ("ftp://SECRET@h/p?grant=SECRET", "ftp://***@h/p"),
    ("user:SECRET@h/", "***@h/"),
    ("http://h:x/p?grant=SECRET#SECRET", "http://h:x/p"),
]


@pytest.mark.parametrize(("url", "shown"), SECRET_URLS)
def test_a_bad_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    """The error of a bad URL contains neither user nor password nor query."""
    with pytest.raises(ValueError) as caught:
        http.Target(url, {}, None)
    assert repr(shown) in str(caught.value)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value, limit=0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("a b", "x"),
        ("é", "x"),
        ("a:", "x"),
        ("a", "x\ny"),
        ("a", "\0"),
        ("a", "\udc80"),
    ],
)
def test_bad_headers(name: str, value: str) -> None:
    """What cannot stand in a header is refused at once."""
    with pytest.raises(ValueError, match="header"):
        http.Target("http://h/", {name: value}, None)
