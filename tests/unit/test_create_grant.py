"""``manage.py create_grant``."""

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
    """A class whose only action is close."""

    LISTEN = "listen"


class AnyAction(Event):
    """A class that allows every action."""

    ACTIONS = ["*"]


class AnyActionAndNames(AnyAction):
    """A class that also lists names, first those that a grant must name."""

    ACTIONS = ["*", "poll", "close", "close-streams", "chat"]


class AnyActionButExamples(AnyAction):
    """A class whose special actions have the names of the examples."""

    LISTEN = "ping"
    FINISH = "message"
    RETRY = "news"


class OnlySpecial(Event):
    """A class without an action that a grant allows by itself."""

    ACTIONS = [Event.FINISH, Event.RETRY, Event.LISTEN, "close-streams"]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``ev/``."""
    settings.ROOT_URLCONF = __name__


def create(*arguments: str) -> tuple[Grant, str, list[list[str]]]:
    """Run the command; return the grant, its text, and the arguments of each curl line."""
    out = io.StringIO()
    call_command("create_grant", *arguments, stdout=out)
    text, *lines = out.getvalue().splitlines()
    return read_grant(text), text, [shlex.split(line) for line in lines]


def test_without_options_the_grant_allows_listening() -> None:
    """It expires after the default time, and a curl line is printed."""
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


def test_send_grants_sending_only() -> None:
    """--expires is in seconds."""
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


def test_action_grants_these_actions_only() -> None:
    """The curl line sends the first action."""
    grant, _, lines = create("42", "--action", "close", "--action", "ping")
    assert (grant.listen, grant.send, grant.actions) == (False, True, ("close", "ping"))
    assert [line[-1] for line in lines] == ["http://127.0.0.1:8000/ev/close/42"]
    grant, _, lines = create("42", "--listen", "--action", "retry")
    assert (grant.listen, grant.send, grant.actions) == (True, True, ("retry",))
    assert len(lines) == 2


def test_send_without_an_allowed_action_is_an_error(settings: Any) -> None:
    """The error names --action."""
    for name, actions in (("OnlyClose", "close"), ("OnlySpecial", "close, retry, poll, close-")):
        settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.{name}"
        with pytest.raises(
            CommandError,
            match=rf"--send allows no action of {name}, whose ACTIONS are {actions}.* --action",
        ):
            create("42", "--send")
        grant, _, _ = create("42", "--action", "close")
        assert grant.actions == ("close",)


@pytest.mark.parametrize(
    ("name", "action"),
    [("AnyAction", "ping"), ("AnyActionAndNames", "chat"), ("AnyActionButExamples", "sample")],
)
def test_the_curl_line_of_a_class_with_any_action_sends_an_allowed_one(
    settings: Any, name: str, action: str
) -> None:
    """It sends an action that the class lists, or else an example."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.{name}"
    grant, _, lines = create("42", "--send")
    assert (grant.send, grant.actions) == (True, None)
    assert [line[-1] for line in lines] == [f"http://127.0.0.1:8000/ev/{action}/42"]


def test_listen_and_send_make_one_grant_and_two_lines() -> None:
    grant, _, lines = create("42", "--listen", "--send", "--url", "https://h/x")
    assert (grant.listen, grant.send) == (True, True)
    assert [line[-1] for line in lines] == ["https://h/x/poll/42", "https://h/x/ping/42"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("django_eventsource.events.JSONIdEvent", ['"hello"', "http://127.0.0.1:8000/ev/ping/42"]),
    ],
)
def test_the_curl_line_sends_a_value_that_the_class_accepts(
    settings: Any, path: str, words: list[str]
) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = path
    _, _, lines = create("42", "--send")
    assert lines[0][-2:] == words


def test_the_grant_is_printed_without_mounted_urls(settings: Any) -> None:
    """Standard error has the reason for the missing curl line."""
    settings.ROOT_URLCONF = ()
    out, err = io.StringIO(), io.StringIO()
    call_command("create_grant", "42", "--listen", "--send", stdout=out, stderr=err)
    assert read_grant(out.getvalue().strip()).send
    assert err.getvalue().startswith("No curl line: The project's URL patterns do not include")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "token"),
        (("42", "--expires", "0"), "--expires must be a positive number of seconds, not '0'."),
        (("42", "-P", "0"), "-P/--port must be a whole number"),
        (("42", "--action", ""), "The action is empty"),
    ],
)
def test_an_argument_that_is_not_valid_prints_no_grant(
    arguments: tuple[str, ...], message: str
) -> None:
    out = io.StringIO()
    with pytest.raises(CommandError, match=message):
        call_command("create_grant", *arguments, stdout=out)
    assert out.getvalue() == ""
