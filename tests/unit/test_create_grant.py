"""manage.py create_grant."""

from __future__ import annotations

import io
import shlex
import time
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.urls import include, path

from django_eventsource.events import Event
from django_eventsource.grants import Grant, read_grant

urlpatterns = [path("ev/", include("django_eventsource.urls"))]


class OnlyClose(Event):
    """A class whose events are all about the end."""

    LISTEN = "listen"


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs under a path of their own."""
    settings.ROOT_URLCONF = __name__


def create(*arguments: str) -> tuple[Grant, str, list[list[str]]]:
    """Run the command; give what the grant says, its text, and the words of each curl line."""
    out = io.StringIO()
    call_command("create_grant", *arguments, stdout=out)
    text, *lines = out.getvalue().splitlines()
    return read_grant(text), text, [shlex.split(line) for line in lines]


def test_a_grant_to_listen() -> None:
    """Without options it grants listening, for the default time, and tells the curl line."""
    grant, text, lines = create("it's 42")
    assert (grant.tokens, grant.listen, grant.send) == (("it's 42",), True, False)
    assert 86_390 < grant.expires - time.time() <= 86_401
    assert lines == [
        [
            "curl",
            "-N",
            "-H",
            f"Authorization: Bearer {text}",
            "http://127.0.0.1:8000/ev/poll/it%27s%2042",
        ]
    ]


def test_a_grant_to_send() -> None:
    """--send alone grants sending only; --expires is in seconds."""
    grant, text, lines = create("42", "--send", "--expires", "10", "-S", "-H", "h", "-P", "443")
    assert (grant.listen, grant.send) == (False, True)
    assert 5 < grant.expires - time.time() <= 11
    assert lines == [
        [
            "curl",
            "-H",
            f"Authorization: Bearer {text}",
            "-d",
            "hello",
            "https://h:443/ev/ping/42",
        ]
    ]


def test_a_grant_for_actions() -> None:
    """--action grants sending these actions only, and the curl line sends the first."""
    grant, _, lines = create("42", "--action", "close", "--action", "ping")
    assert (grant.listen, grant.send, grant.actions) == (False, True, ("close", "ping"))
    assert [line[-1] for line in lines] == ["http://127.0.0.1:8000/ev/close/42"]
    grant, _, lines = create("42", "--listen", "--action", "retry")
    assert (grant.listen, grant.send, grant.actions) == (True, True, ("retry",))
    assert len(lines) == 2


def test_a_grant_to_send_that_covers_no_action(settings: Any) -> None:
    """With a class of which --send covers nothing the error names the way out."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.OnlyClose"
    with pytest.raises(CommandError, match=r"--send covers no action of OnlyClose, .* --action"):
        create("42", "--send")
    grant, _, _ = create("42", "--action", "close")
    assert grant.actions == ("close",)


def test_a_grant_for_both() -> None:
    """Both rights are one grant, with a line for each."""
    grant, _, lines = create("42", "--listen", "--send", "--url", "https://h/x")
    assert (grant.listen, grant.send) == (True, True)
    assert [line[-1] for line in lines] == ["https://h/x/poll/42", "https://h/x/ping/42"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("django_eventsource.events.JSONIdEvent", ['"hello"', "http://127.0.0.1:8000/ev/ping/42"]),
    ],
)
def test_the_line_fits_the_event_class(settings: Any, path: str, words: list[str]) -> None:
    """What the curl line sends is something that the class accepts."""
    settings.EVENTSOURCE_EVENT_CLASS = path
    _, _, lines = create("42", "--send")
    assert lines[0][-2:] == words


def test_urls_that_are_not_mounted(settings: Any) -> None:
    """The grant is printed all the same; what is missing is told on standard error."""
    settings.ROOT_URLCONF = ()
    out, err = io.StringIO(), io.StringIO()
    call_command("create_grant", "42", "--listen", "--send", stdout=out, stderr=err)
    assert read_grant(out.getvalue().strip()).send
    assert err.getvalue().startswith("No curl line: The project's URLs do not include")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "token"),
        (("42", "--expires", "0"), "--expires must be a positive number of seconds, not '0'."),
        (("42", "-P", "0"), "-P/--port must be a whole number"),
        (("42", "--action", ""), "The action is empty"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    """A bad argument is an error, and no grant is printed."""
    out = io.StringIO()
    with pytest.raises(CommandError, match=message):
        call_command("create_grant", *arguments, stdout=out)
    assert out.getvalue() == ""
