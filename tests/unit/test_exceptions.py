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
def test_eventsource_error_is_the_base_of_every_exception(error_class):
    assert issubclass(error_class, EventSourceError)
    assert error_class.__doc__


@pytest.mark.parametrize(
    "name", ["InvalidToken", "InvalidEvent", "UnknownAction", "EventTooLarge"]
)
def test_malformed_input_is_a_value_error(name):
    """Code that catches ValueError for malformed input catches these exceptions."""
    assert issubclass(getattr(exceptions, name), ValueError)


HINT = (
    ' To allow others, write an Event class with the action, or "*", in ACTIONS (for a GET: as '
    "LISTEN), and name it in EVENTSOURCE_EVENT_CLASS or as_view(event_class=...)."
)


def test_unknown_action_contains_the_allowed_actions_and_the_solution():
    error = UnknownAction("pong", ["ping", "close"], "StringEvent")
    assert str(error) == f"Unknown action 'pong': StringEvent allows ping, close.{HINT}"
    assert (error.action, error.allowed) == ("pong", ["ping", "close"])


def test_unknown_action_of_a_class_without_actions_lists_none():
    assert str(UnknownAction("ping", [], "Mute")) == (
        f"Unknown action 'ping': Mute allows none.{HINT}"
    )


@pytest.mark.parametrize(("action", "shown"), [("x" * 9000, "'" + "x" * 41), (5, "5")])
def test_unknown_action_contains_the_start_of_any_action(action, shown):
    """A URL may contain a long one, and a call one that is not a text."""
    error = UnknownAction(action, ["ping"], "StringEvent")
    assert str(error).startswith(f"Unknown action {shown}: StringEvent allows ping.")
    assert error.action == action


@pytest.mark.parametrize("status", [None, 403])
def test_client_error_contains_the_status_or_none(status):
    error = ClientError("No answer.", status)
    assert (str(error), error.status) == ("No answer.", status)
    assert ClientError("No answer.").status is None


def test_rate_limited_contains_the_seconds_to_wait():
    error = RateLimited(7)
    assert error.retry_after == 7
    assert str(error) == "Too many events; try again in 7 s."
    assert not isinstance(error, ValueError)
