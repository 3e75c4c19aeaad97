"""The URLs, headers and error messages of the clients."""

from __future__ import annotations

import traceback

import httpx2
import pytest

from django_eventsource.client import _http as http


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
def test_only_the_same_origin_or_its_upgrade_receives_headers(url: str, carries: bool) -> None:
    """A redirect from http to https of the same host is an upgrade."""
    target = http.Target("http://a/", {"X-Api-Key": "secret"}, None)
    request = httpx2.Request("GET", url, headers=target.headers)
    target.protect_secrets(request)
    assert ("x-api-key" in request.headers) is carries


def test_a_redirect_from_https_to_http_receives_no_headers() -> None:
    target = http.Target("https://a/", {"X-Api-Key": "secret"}, None)
    request = httpx2.Request("GET", "http://a/", headers=target.headers)
    target.protect_secrets(request)
    assert "x-api-key" not in request.headers


def test_the_reason_of_an_error_without_a_message_is_its_class() -> None:
    """The reason of another error is its message, on one line."""
    assert http.reason(httpx2.ReadError("")) == "ReadError"
    assert http.reason(httpx2.ConnectError("Two\nlines.")) == "two lines"


@pytest.mark.parametrize(
    "url",
    ["", "x", "/poll/x", "ftp://host/", "http://", "http:///x", "http://h:x/", "http://[::1/"],
)
def test_a_url_that_is_not_http_or_has_no_host_raises(url: str) -> None:
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
def test_the_error_of_a_url_contains_no_secrets(url: str, shown: str) -> None:
    """The message has no user, password or query."""
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
def test_a_header_that_cannot_be_sent_raises(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header"):
        http.Target("http://h/", {name: value}, None)
