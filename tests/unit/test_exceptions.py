"""Tests of the exceptions."""

from __future__ import annotations

import pytest

from django_eventsource import exceptions
from django_eventsource.exceptions import ClientError, EventSourceError, RateLimited, UnknownAction

CLASSES = [
    value
    for value in vars(exceptions).values()
    if getattr(value, "__module__", None) == exceptions.__name__
]


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_one_base_catches_every_error(error_class):
    """A user who catches EventSourceError has caught everything that is raised here."""
    assert issubclass(error_class, EventSourceError)
    assert error_class.__doc__


@pytest.mark.parametrize(
    "name", ["InvalidToken", "InvalidEvent", "UnknownAction", "EventTooLarge"]
)
def test_malformed_input_is_a_value_error(name):
    """Code that expects Python's own ValueError for bad input gets one."""
    assert issubclass(getattr(exceptions, name), ValueError)


HINT = (
    " To allow another, set EVENTSOURCE_EVENT_CLASS or as_view(event_class=...) to a class with "
    "the action in ACTIONS (for a GET: as LISTEN)."
)


def test_unknown_action_names_the_allowed_ones_and_the_way_out():
    """The error says what was given, what is allowed, and how to allow another action."""
    error = UnknownAction("pong", ["ping", "close"], "StringEvent")
    assert str(error) == f"Unknown action 'pong': StringEvent allows ping, close.{HINT}"
    assert (error.action, error.allowed) == ("pong", ["ping", "close"])


def test_unknown_action_of_a_class_without_actions():
    """A class that allows nothing says so."""
    assert str(UnknownAction("ping", [], "Mute")) == (
        f"Unknown action 'ping': Mute allows none.{HINT}"
    )


@pytest.mark.parametrize("status", [None, 403])
def test_client_error_carries_the_status(status):
    """A client's error has the HTTP status, or None where there was no answer."""
    error = ClientError("No answer.", status)
    assert (str(error), error.status) == ("No answer.", status)
    assert ClientError("No answer.").status is None


def test_rate_limited_says_when_to_come_back():
    """The error has the seconds after which the next event is taken, as a sentence too."""
    error = RateLimited(7)
    assert error.retry_after == 7
    assert str(error) == "Too many events; try again in 7 s."
    assert not isinstance(error, ValueError)
