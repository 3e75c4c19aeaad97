"""``ACTIONS = ["*"]``: event classes that allow every action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Permission, User
from django.test import AsyncClient
from django.urls import path

from django_eventsource import publish
from django_eventsource.events import (
    Event,
    JSONIdEvent,
    StringIdEvent,
    action_error,
    must_be_named,
)
from django_eventsource.exceptions import InvalidEvent, UnknownAction
from django_eventsource.grants import make_grant
from django_eventsource.history import History, Kind, get_history
from django_eventsource.protocol.field_rules import check_action
from django_eventsource.testing import listen
from django_eventsource.views import EventSourceView

pytestmark = pytest.mark.usefixtures("memory_history")


class AnyEvent(StringIdEvent):
    ACTIONS = ["*"]


class RenamedEvent(AnyEvent):
    LISTEN = "listen"
    FINISH = "end"
    RETRY = "wait"


class AnyAndNamesEvent(JSONIdEvent):
    ACTIONS = ["ping", "*", Event.FINISH]


Stored = Callable[[], list[tuple[str, str, Kind]]]

urlpatterns = [
    path("any/<action>/<token>", EventSourceView.as_view(event_class=AnyEvent)),
    path("renamed/<action>/<token>", EventSourceView.as_view(event_class=RenamedEvent)),
    path("named/<action>/<token>", EventSourceView.as_view(event_class=StringIdEvent)),
]


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


async def post(url: str, body: str = "5000", **keywords: Any) -> tuple[int, str]:
    """Return the status and the text of a POST."""
    response = await AsyncClient().post(url, body, content_type="text/plain", **keywords)
    return response.status_code, response.content.decode()


@pytest.fixture
def stored(memory_history: History) -> Stored:
    """Return a function for the action, the value and the kind of each event of ``t``."""
    floor = memory_history.newest("t")[0]

    def read() -> list[tuple[str, str, Kind]]:
        drafts = [entry.draft for entry in memory_history.read("t", floor).entries]
        return [(draft.action, draft.data.decode(), draft.kind) for draft in drafts]

    return read


# Names

VALID = ["ping", "...", "a" * 255, "\u2028", " ", "ü:ö", "poll", "close", "retry", "close-streams"]
NOT_VALID = [
    ("", "The action is empty."),
    ("a" * 256, "The action is 256 characters long; at most 255 are allowed."),
    ("a/b", "The action 'a/b' contains a slash."),
    (".", "The action '.' cannot be in the path of a URL, because browsers remove it."),
    ("..", "The action '..' cannot be in the path of a URL, because browsers remove it."),
    ("a\rb", "The action 'a\\rb' contains CR at position 1."),
    ("a\nb", "The action 'a\\nb' contains LF at position 1."),
    ("a\0", "The action 'a\\x00' contains NUL at position 1."),
    ("\ud800", "The action contains a lone surrogate at position 0"),
    ("*", "'*' is not an action: in the ACTIONS of a class it allows every action."),
    ("reset", "The action 'reset' is reserved for events that the streams themselves send."),
    ("cursor", "The action 'cursor' is reserved for events that the streams themselves send."),
    (5, "An action must be a text, not 5."),
    (None, "An action must be a text, not None."),
]


@pytest.mark.parametrize("action", VALID, ids=lambda action: ascii(action)[:16])
def test_a_class_with_any_action_allows_each_valid_name(action: str) -> None:
    check_action(action)
    assert action_error(AnyEvent, action) is None
    assert action_error(AnyAndNamesEvent, action) is None


@pytest.mark.parametrize(
    ("action", "reason"), NOT_VALID, ids=[ascii(action)[:16] for action, _ in NOT_VALID]
)
def test_a_class_with_any_action_refuses_other_names(action: Any, reason: str) -> None:
    """The error contains the rule. No event is published."""
    for event_class in (AnyEvent, AnyAndNamesEvent):
        with pytest.raises(InvalidEvent) as caught:
            publish("t", action, "1", event_class)
        assert str(caught.value).startswith(reason)
        assert not isinstance(caught.value, UnknownAction)
    assert not get_history().heads(["t"])["t"].has_epoch


@pytest.mark.parametrize("action", ["news", "*", "reset"])
def test_a_class_with_names_refuses_every_other_action(action: str) -> None:
    """The error contains the ways out, one of which is ``"*"``."""
    error = action_error(StringIdEvent, action)
    assert isinstance(error, UnknownAction)
    assert str(error).startswith(
        f"Unknown action {action!r}: StringIdEvent allows ping, retry, close. "
    )
    assert 'an Event class with the action, or "*", in ACTIONS' in str(error)


def test_finish_and_retry_keep_their_meaning(stored: Stored) -> None:
    """Their values are checked, and other actions are plain events."""
    for action, value in (("chat", "hello"), ("retry", "3000"), ("close", "bye")):
        publish("t", action, value, AnyEvent)
    with pytest.raises(InvalidEvent, match="must be ASCII digits"):
        publish("t", "retry", "soon", AnyEvent)
    for action in ("retry", "wait", "close", "end"):
        publish("t", action, "7", RenamedEvent)
    assert stored() == [
        ("chat", "hello", Kind.EVENT),
        ("retry", "3000", Kind.RETRY),
        ("close", "bye", Kind.CLOSE),
        ("retry", "7", Kind.EVENT),
        ("wait", "7", Kind.RETRY),
        ("close", "7", Kind.EVENT),
        ("end", "7", Kind.CLOSE),
    ]


# The view


@pytest.fixture
def allow_any(settings: Any) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"


@pytest.mark.usefixtures("allow_any")
async def test_a_post_of_any_action_reaches_a_listener() -> None:
    """The event has the action of the URL."""
    async with listen("t", url="/any/poll/t") as stream:
        for action in ("chat", "poll", "a:b c"):
            assert (await post(f"/any/{quote(action)}/t", "hello"))[0] == 200
            assert (await stream.next(action)).data == "hello"


@pytest.mark.usefixtures("allow_any")
@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("reset", "The action 'reset' is reserved"),
        ("cursor", "The action 'cursor' is reserved"),
        ("*", "'*' is not an action"),
        ("a%0Ab", "The action 'a\\nb' contains LF"),
        ("a" * 256, "The action is 256 characters long"),
    ],
)
async def test_a_post_of_a_name_that_is_not_valid_is_responded_with_404(
    action: str, reason: str
) -> None:
    """The text states the rule. No event is published."""
    status, text = await post(f"/any/{action}/t")
    assert (status, text.count("\n")) == (404, 1)
    assert text.startswith(reason)
    assert not get_history().heads(["t"])["t"].has_epoch


@pytest.mark.usefixtures("allow_any")
async def test_the_methods_of_a_url_depend_on_its_action() -> None:
    """LISTEN may be read and posted, other actions posted, and reserved ones neither."""
    client = AsyncClient()
    assert (await client.head("/any/poll/t")).status_code == 200
    response = await client.get("/any/chat/t")
    assert (response.status_code, response["Allow"]) == (405, "POST, OPTIONS")
    response = await client.get("/any/reset/t")
    assert response.status_code == 404
    assert response.content.startswith(b"Unknown action 'reset': AnyEvent allows poll. ")
    for action in ("poll", "chat", "reset"):
        response = await client.options(f"/any/{action}/t")
        assert (response.status_code, response["Allow"]) == (200, "GET, HEAD, POST, OPTIONS")


# Grants


@pytest.mark.parametrize(
    ("event_class", "named", "unnamed"),
    [
        (AnyEvent, [], ["listen", "end", "wait", "chat", "message"]),
        (RenamedEvent, ["listen", "end", "wait"], ["chat"]),
    ],
)
def test_a_grant_must_name_the_special_actions_of_the_class_and_the_package(
    event_class: type[Event], named: list[str], unnamed: list[str]
) -> None:
    """A page also gives a meaning to the actions of the base class and to a browser's events."""
    of_every_class = ["poll", "close", "retry", "error", "open", "reset", "cursor"]
    for action in (*named, *of_every_class, "close-streams"):
        assert must_be_named(event_class, action)
    for action in unnamed:
        assert not must_be_named(event_class, action)


@pytest.mark.parametrize(
    ("url", "allowed", "refused"),
    [
        (
            "any",
            ["chat", "ping", "end", "listen"],
            ["poll", "close", "retry", "close-streams", "error"],
        ),
        ("renamed", ["chat"], ["listen", "end", "wait", "close-streams", "close", "open"]),
        ("named", ["ping"], ["close", "retry"]),
    ],
)
async def test_a_grant_without_names_does_not_allow_the_special_actions(
    stored: Stored, url: str, allowed: list[str], refused: list[str]
) -> None:
    """The text of the response names the way out, and a grant that names the action is it."""
    grant = make_grant("t", send=True)
    for action in allowed:
        assert (await post(f"/{url}/{action}/t?grant={grant}"))[0] == 200
    for action in refused:
        status, text = await post(f"/{url}/{action}/t?grant={grant}")
        assert status == 403
        assert f"make_grant(..., actions=[{action!r}])" in text
    assert [action for action, *_ in stored()] == allowed
    for action in refused:
        naming = make_grant("t", actions=[action])
        assert (await post(f"/{url}/{action}/t?grant={naming}"))[0] == 200
    assert [action for action, *_ in stored()] == allowed + refused


@pytest.mark.parametrize("action", ["reset", "*", "a/b"])
def test_a_grant_cannot_name_an_action_that_is_not_valid(action: str) -> None:
    with pytest.raises(InvalidEvent):
        make_grant("t", actions=["chat", action])


async def test_without_permission_the_response_does_not_depend_on_the_action() -> None:
    for action in ("chat", "reset", "close"):
        assert (await post(f"/any/{action}/t"))[0] == 401
    listening = make_grant("t", listen=True)
    assert (await post(f"/any/chat/t?grant={listening}"))[0] == 403


@pytest.mark.django_db(transaction=True)
def test_the_model_permission_allows_every_valid_action() -> None:
    """Its owner needs no grant that names the special ones."""
    user = User.objects.create_user("ada", password="right")
    user.user_permissions.add(Permission.objects.get(codename="send_event"))
    basic = {"Authorization": "Basic YWRhOnJpZ2h0"}  # ada:right
    statuses = {
        action: async_to_sync(post)(f"/any/{action}/t", headers=basic)[0]
        for action in ("chat", "poll", "retry", "close-streams", "close", "reset", "cursor")
    }
    assert statuses == {
        **dict.fromkeys(("chat", "poll", "retry", "close-streams", "close"), 200),
        **dict.fromkeys(("reset", "cursor"), 404),
    }
