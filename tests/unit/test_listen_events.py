"""``manage.py listen_events`` without a server."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import include, path

from tests.support.commands import Run

urlpatterns = [path("ev/", include("django_eventsource.urls"))]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``ev/``."""
    settings.ROOT_URLCONF = __name__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "token"),
        (("x" * 256,), "token"),
        (("42", "-P", "x"), "-P/--port must be a whole number, from 1 to 65535, not 'x'."),
        (("42", "--rewind", "5d"), "rewind must be a number of events (10), an age in seconds"),
        (("42", "-r", "0"), "-r/--retry must be a whole number, 1 or more, not '0'."),
        (("42", "--count", "-1"), "--count must be a whole number, 1 or more, not '-1'."),
        (("42", "--read-timeout", "0"), "--read-timeout must be a positive number of seconds"),
        (("42", "--header", "x"), "--header must be 'Name: value', not 'x'."),
        (("42", "--header", "a b: x"), "'a b' is not a valid HTTP header name."),
        (("42", "--cafile", "/nowhere"), "--cafile '/nowhere' cannot be read"),
        (("42", "-p", "x"), "-p/--password needs a user"),
        (("42", "--last-event-id", "a\nb"), "cannot be sent"),
        (("http://",), "'http://' is not a valid http:// or https:// URL with a host."),
        (
            ("http://h/", "-H", "h", "-a", "x"),
            "'http://h/' is a whole URL and cannot be combined with -H/--host, -a/--action.",
        ),
        (("http://u:SECRET@h:x/?grant=SECRET",), "'http://***@h:x/' is not a valid http://"),
        (("http://u:SECRET@h/?grant=SECRET", "-a", "x"), "'http://***@h/' is a whole URL"),
        (("http://h/", "b"), "is a whole URL and cannot be combined with another TOKEN."),
        (("42", ""), "token"),
    ],
)
def test_an_argument_that_is_not_valid_is_one_line(
    arguments: tuple[str, ...], message: str
) -> None:
    """The command sends no request."""
    result = Run("listen_events", *arguments)
    assert message in str(result.error)
    assert "\n" not in str(result.error)
    assert "SECRET" not in str(result.error)
