"""close_streams() and the control token, without a database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest
from django.template import Context, Template
from django.test import AsyncClient

from django_eventsource import publish
from django_eventsource.exceptions import InvalidToken
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.operations.close_requests import (
    Selection,
    aclose_streams,
    close_streams,
    on_logout,
)
from django_eventsource.operations.control import ControlEvent
from django_eventsource.operations.presence import listeners
from django_eventsource.protocol.field_rules import CLOSE_STREAMS
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.publishing import publish_event
from django_eventsource.signals import Listener, event_published
from django_eventsource.streaming.registry import registry
from tests.support.control import close_requests


@pytest.mark.parametrize(
    ("selection", "matches"),
    [
        ({"token": "a"}, True),
        ({"token": "b"}, True),
        ({"token": "c"}, False),
        ({"user": "7"}, True),
        ({"user": "8"}, False),
        ({"session": "s"}, True),
        ({"session": ""}, False),
        ({"token": "a", "user": "7"}, True),
        ({"token": "a", "user": "8"}, False),
        ({"token": "c", "user": "7"}, False),
        ({"token": "a", "user": "7", "session": "other"}, False),
    ],
    ids=str,
)
def test_a_selection_matches_if_all_fields_match(selection: dict[str, str], matches: bool) -> None:
    listener = Listener(tokens=("a", "b"), user="7", session="s")
    assert Selection(**selection).matches(listener) is matches


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    ("arguments", "selection"),
    [
        ({"token": "t"}, {"token": "t", "user": None}),
        ({"user": 7}, {"token": None, "user": "7"}),
        ({"user": User(pk=7)}, {"token": None, "user": "7"}),
        ({"token": "t", "user": "x-1"}, {"token": "t", "user": "x-1"}),
    ],
    ids=str,
)
def test_a_user_may_be_an_instance_or_a_primary_key(
    arguments: dict[str, Any], selection: dict[str, str]
) -> None:
    close_streams(**arguments)
    assert close_requests() == [selection]


@pytest.mark.usefixtures("memory_history")
def test_close_streams_without_arguments_raises() -> None:
    with pytest.raises(ValueError, match=r"requires token=, user= or both"):
        close_streams()
    assert close_requests() == []


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    "user", [AnonymousUser(), User(), ""], ids=["anonymous", "unsaved", "empty"]
)
def test_a_user_without_a_primary_key_raises(user: Any) -> None:
    with pytest.raises(ValueError, match="user"):
        close_streams(user=user)
    assert close_requests() == []


@pytest.mark.usefixtures("memory_history")
async def test_aclose_streams_does_the_same() -> None:
    await aclose_streams(token="t")
    assert close_requests() == [{"token": "t", "user": None}]
    with pytest.raises(ValueError, match="requires token="):
        await aclose_streams()
    with pytest.raises(InvalidToken):
        await aclose_streams(token="")


@pytest.mark.usefixtures("memory_history")
def test_a_logout_without_a_session_ends_no_stream() -> None:
    on_logout(User, request=None)
    on_logout(User, request=HttpRequest())
    assert close_requests() == []


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    "use",
    [
        lambda: publish(CONTROL_TOKEN, CLOSE_STREAMS, "{}", ControlEvent),
        lambda: make_grant(CONTROL_TOKEN, listen=True),
        lambda: make_grant(["t", CONTROL_TOKEN], listen=True),
        lambda: listeners(CONTROL_TOKEN),
        lambda: close_streams(token=CONTROL_TOKEN),
        lambda: Template("{% load eventsource %}{% eventsource_url token %}").render(
            Context({"token": CONTROL_TOKEN})
        ),
    ],
    ids=["publish", "grant", "grants", "listeners", "close", "tag"],
)
def test_the_control_token_is_not_valid_in_public_functions(use: Callable[[], object]) -> None:
    with pytest.raises(InvalidToken):
        use()


@pytest.mark.usefixtures("memory_history")
def test_event_published_is_not_sent_for_the_control_token() -> None:
    got: list[Any] = []

    def receive(event: Any, **kwargs: Any) -> None:
        got.append(event.token)

    event_published.connect(receive)
    try:
        publish("t", "ping", "x")
        close_streams(token="t")
    finally:
        event_published.disconnect(receive)
    assert got == ["t"]


@pytest.mark.usefixtures("memory_history")
async def test_the_stream_of_the_receiver_is_not_registered(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    response = await AsyncClient().get("/events/poll/t")
    stream = response._stream  # type: ignore[attr-defined]
    await anext(stream)
    await asyncio.sleep(0.05)
    assert ("t",) in [stream.listener.tokens for stream in registry.streams()]
    assert CONTROL_TOKEN not in {
        one for stream in registry.streams() for one in stream.listener.tokens
    }
    assert get_history().present(CONTROL_TOKEN) == []
    await stream.aclose()


@pytest.mark.usefixtures("memory_history")
def test_a_close_request_is_durable() -> None:
    publish_event(ControlEvent(CONTROL_TOKEN, CLOSE_STREAMS, {"token": "t"}))
    assert close_requests() == [{"token": "t"}]


@pytest.mark.parametrize(
    "data", ["[]", '{"shoe": "9"}', '{"user": 7}', "{}", '{"token": null}', "no JSON"]
)
def test_an_invalid_close_request_is_rejected_as_a_whole(data: str) -> None:
    with pytest.raises(ValueError):
        Selection.read(data)
