"""Ending streams from anywhere, and a control token that nobody sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.contrib.auth.signals import user_logged_out
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.http import HttpRequest
from django.template import Context, Template
from django.test import AsyncClient, Client

from django_eventsource import publish
from django_eventsource.control import (
    CLOSE,
    ControlEvent,
    Selection,
    aclose_streams,
    close_streams,
    on_logout,
)
from django_eventsource.exceptions import InvalidToken
from django_eventsource.frames import Decoder
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.listeners import Listener, registry
from django_eventsource.models import PendingEvent, StoredEvent, TokenHead
from django_eventsource.presence import listeners
from django_eventsource.publishing import apublish, publish_event
from django_eventsource.signals import event_published
from django_eventsource.tokens import CONTROL_TOKEN
from tests.histories import texts
from tests.listeners import Connection
from tests.processes import Server, serve
from tests.valkey import shared_server

SECONDS = 10
OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}

real_commits = pytest.mark.django_db(transaction=True)


def told() -> list[dict[str, Any]]:
    """What the processes were told."""
    slice_ = get_history().read(CONTROL_TOKEN, get_history().oldest(CONTROL_TOKEN))
    return [json.loads(text) for text in texts(slice_.entries)]


# Which streams


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
def test_all_that_is_named_must_match(selection: dict[str, str], matches: bool) -> None:
    """A selection narrows down with each word."""
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
def test_what_is_told(arguments: dict[str, Any], selection: dict[str, str]) -> None:
    """A user is an instance or a primary key."""
    close_streams(**arguments)
    assert told() == [selection]


@pytest.mark.usefixtures("memory_history")
def test_nothing_is_named() -> None:
    """Nobody ends all streams by accident."""
    with pytest.raises(ValueError, match=r"give token=, user= or both"):
        close_streams()
    assert told() == []


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    "user", [AnonymousUser(), User(), ""], ids=["anonymous", "unsaved", "empty"]
)
def test_nobody_is_no_user(user: Any) -> None:
    """A user without a primary key would select nobody, or everybody who is anonymous."""
    with pytest.raises(ValueError, match="user"):
        close_streams(user=user)
    assert told() == []


@pytest.mark.usefixtures("memory_history")
async def test_the_same_awaited() -> None:
    """aclose_streams() is for coroutines, and raises the same."""
    await aclose_streams(token="t")
    assert told() == [{"token": "t", "user": None}]
    with pytest.raises(ValueError, match="give token="):
        await aclose_streams()
    with pytest.raises(InvalidToken):
        await aclose_streams(token="")


@real_commits
def test_inside_a_transaction() -> None:
    """Streams are ended when it commits, and not when it rolls back."""
    with transaction.atomic():
        close_streams(token="a")
        assert told() == []
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        close_streams(token="b")
        raise ZeroDivisionError
    assert [one["token"] for one in told()] == ["a"]


# Logging out


@pytest.mark.usefixtures("memory_history")
def test_a_logout_without_a_session_tells_nothing() -> None:
    """An API's logout, or a signal sent by hand, has no session."""
    on_logout(User, request=None)
    on_logout(User, request=HttpRequest())
    assert told() == []


@real_commits
@pytest.mark.usefixtures("memory_history")
def test_a_logout_tells_no_session_key() -> None:
    """The history holds what stands for the session's key, never the key."""
    client = Client()
    client.force_login(User.objects.create_user("user"))
    key = client.cookies["sessionid"].value
    client.logout()
    (one,) = told()
    assert list(one) == ["session"]
    assert one["session"]
    assert key not in one["session"]


@real_commits
@pytest.mark.usefixtures("memory_history")
def test_a_logout_with_signed_cookies(settings) -> None:
    """Such a session's key is all its data, and has changed since: the user is told of."""
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    user = User.objects.create_user("user")
    client = Client()
    client.force_login(user)
    client.logout()
    assert told() == [{"user": str(user.pk)}]
    request = HttpRequest()
    request.session = SignedCookies("a-key-that-is-long")
    on_logout(User, request=request, user=None)
    assert list(told()[1]) == ["session"]


@real_commits
def test_a_logout_where_the_history_fails(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who logs out gets out, and it is logged that the streams go on for a while."""
    client = Client()
    client.force_login(User.objects.create_user("user"))

    def fail(*args: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(get_history(), "append", fail)
    client.logout()
    assert "go on until rechecked" in caplog.text
    assert "sessionid" not in client.cookies


@real_commits
def test_a_logout_in_a_transaction_where_the_history_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With ATOMIC_REQUESTS too: the transaction of who logs out is not broken by it."""
    client = Client()
    client.force_login(User.objects.create_user("user"))
    request = HttpRequest()
    request.session = client.session
    table = PendingEvent._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO gone")
    try:
        with transaction.atomic():
            user_logged_out.send(User, request=request, user=None)
            assert User.objects.count() == 1
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE gone RENAME TO {table}")
    assert "go on until rechecked" in caplog.text


# Two processes


LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "database": lambda: {"EVENTSOURCE_POLL_SECONDS": 0.1},
    "valkey": lambda: {
        "EVENTSOURCE_POLL_SECONDS": 600,  # so that nothing but the layer can be that quick
        "CHANNEL_LAYERS": {
            "default": {
                "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
                "CONFIG": {"hosts": [shared_server().url]},
            }
        },
    },
}


@pytest.fixture(params=list(LAYERS))
def pair(request: pytest.FixtureRequest, settings) -> Iterator[tuple[Server, Server]]:
    """Two processes that only the database connects, or a broker besides."""
    changes = LAYERS[request.param]()
    for name, value in changes.items():
        setattr(settings, name, value)
    with serve("daphne", **OPEN, **changes) as one, serve("uvicorn", **OPEN, **changes) as two:
        yield one, two


async def open_at(server: Server, path: str, client: AsyncClient | None = None) -> Connection:
    headers = {}
    if client is not None:
        headers["Cookie"] = f"sessionid={client.cookies['sessionid'].value}"
    stream = await Connection.open(server.address, path, **headers)
    assert stream.status == 200
    await stream.read()
    return stream


async def comes_back_ms(stream: Connection) -> int:
    """Read to the end, which is a reconnection time."""
    body = b""
    while chunk := await stream.read():
        body += chunk
    stream.close()
    name, field = body.strip().split(b"\n")
    assert name == b"event: retry"
    return int(field.removeprefix(b"retry: "))


async def is_served(token: str, *streams: Connection) -> None:
    """The streams are open: an event arrives."""
    await apublish(token, "ping", "still there")
    for stream in streams:
        assert [event.data for event in Decoder().feed(await stream.read())] == ["still there"]


@real_commits
async def test_streams_of_two_processes_end(pair: tuple[Server, Server]) -> None:
    """A token's, a user's, a session's: they end everywhere, and all the others go on."""
    user = await User.objects.acreate_user("user")
    other = await User.objects.acreate_user("other")
    laptop, phone, theirs = AsyncClient(), AsyncClient(), AsyncClient()
    await laptop.aforce_login(user)
    await phone.aforce_login(user)
    await theirs.aforce_login(other)

    a = [await open_at(server, "/events/poll/a") for server in pair]
    joined = [await open_at(server, "/events/poll/b?token=a") for server in pair]
    b = [await open_at(server, "/events/poll/b") for server in pair]
    await aclose_streams(token="a")
    for stream in [*a, *joined]:
        assert 500 <= await comes_back_ms(stream) <= 5000
    await is_served("b", *b)

    on_laptop = [await open_at(server, "/events/poll/b", laptop) for server in pair]
    on_phone = [await open_at(server, "/events/poll/b", phone) for server in pair]
    of_other = [await open_at(server, "/events/poll/b", theirs) for server in pair]
    await laptop.alogout()
    for stream in on_laptop:
        assert 500 <= await comes_back_ms(stream) <= 5000
    await is_served("b", *b, *on_phone, *of_other)

    elsewhere = [await open_at(server, "/events/poll/c", phone) for server in pair]
    await aclose_streams(token="b", user=user)
    for stream in on_phone:
        assert 500 <= await comes_back_ms(stream) <= 5000
    await is_served("c", *elsewhere)
    await aclose_streams(user=user.pk)
    for stream in elsewhere:
        assert 500 <= await comes_back_ms(stream) <= 5000
    await is_served("b", *b, *of_other)
    for stream in [*b, *of_other]:
        stream.close()


# The control token is nobody's


@pytest.mark.usefixtures("memory_history")
@pytest.mark.parametrize(
    "use",
    [
        lambda: publish(CONTROL_TOKEN, CLOSE, "{}", ControlEvent),
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
def test_nobody_names_it(use: Callable[[], object]) -> None:
    """It is no token to any of the functions that users call."""
    with pytest.raises(InvalidToken):
        use()


@real_commits
@pytest.mark.parametrize("kind", ["daphne", "uvicorn"])
async def test_no_url_leads_to_it(kind: str) -> None:
    """With a policy that lets everybody do everything: bytes that are no UTF-8 neither."""
    names = ["%EF%BF%BDcontrol", "%FFcontrol", "t?token=%EF%BF%BDcontrol", "t?token=%FFcontrol"]
    with serve(kind, **OPEN) as server:
        for name in names:
            for method, action in (("GET", "poll"), ("POST", "ping"), ("POST", CLOSE)):
                path = f"/events/{action}/{name}"
                answer = await Connection.open(
                    server.address, path, method=method, Content_Length="0"
                )
                assert answer.status == 400
                answer.close()
    assert not await TokenHead.objects.filter(token=CONTROL_TOKEN).aexists()


@real_commits
def test_the_command_does_not_send_it() -> None:
    """send_event refuses it as it refuses any other bad token."""
    with pytest.raises(CommandError):
        call_command("send_event", CONTROL_TOKEN, CLOSE, "{}")
    assert not StoredEvent.objects.exists()


@real_commits
@pytest.mark.parametrize("name", ["tokenhead", "storedevent", "pendingevent", "tokenpresence"])
def test_the_admin_does_not_show_it(admin_client: Client, name: str) -> None:
    """Sessions and users of others are not for everybody who may look at events."""
    publish("visible-token", "ping", "x")
    close_streams(token="t", user="some-user")
    with transaction.atomic():
        close_streams(token="t", user="some-user")
    if name == "pendingevent":
        get_history().stage(CONTROL_TOKEN, [])
        head = StoredEvent.objects.filter(head__token=CONTROL_TOKEN).first()
        assert head is not None
        PendingEvent.objects.create(
            key=TokenHead.objects.get(token=CONTROL_TOKEN).key,
            token=CONTROL_TOKEN,
            ref="12345678123456781234567812345678",
            action=head.action,
            data=head.data,
            kind=head.kind,
            created=head.created,
        )
    page = admin_client.get(f"/admin/django_eventsource/{name}/").content.decode()
    page = page.replace("<wbr>", "")
    assert CONTROL_TOKEN not in page
    assert CLOSE not in page
    assert "some-user" not in page
    if name == "tokenhead":
        assert "visible-token" in page


@pytest.mark.usefixtures("memory_history")
def test_the_signal_does_not_tell_of_it() -> None:
    """Who receives all published events gets the project's."""
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
async def test_the_watchs_own_stream_counts_nowhere(settings) -> None:
    """It is none of the process's streams, so that no limit meets it, and nobody sees it."""
    settings.EVENTSOURCE_POLICY = OPEN["EVENTSOURCE_POLICY"]
    response = await AsyncClient().get("/events/poll/t")
    stream = response._stream  # type: ignore[attr-defined]
    await anext(stream)
    await asyncio.sleep(0.05)
    assert ("t",) in [who.tokens for _, who in registry.streams()]
    assert CONTROL_TOKEN not in {one for _, who in registry.streams() for one in who.tokens}
    assert get_history().present(CONTROL_TOKEN) == []
    await stream.aclose()


@pytest.mark.usefixtures("memory_history")
def test_the_word_is_durable() -> None:
    """What a process does not hear at once it finds in the history."""
    publish_event(ControlEvent(CONTROL_TOKEN, CLOSE, {"token": "t"}))
    assert told() == [{"token": "t"}]


@pytest.mark.parametrize(
    "data", ["[]", '{"shoe": "9"}', '{"user": 7}', "{}", '{"token": null}', "no JSON"]
)
def test_a_word_that_is_not_understood(data: str) -> None:
    """Another version's word is refused as a whole: half of it could mean too much."""
    with pytest.raises(ValueError):
        Selection.read(data)
