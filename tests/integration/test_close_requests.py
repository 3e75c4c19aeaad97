"""close_streams(), logouts, and the control token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.auth.signals import user_logged_out
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.http import HttpRequest
from django.test import AsyncClient, Client

from django_eventsource import publish
from django_eventsource.history import get_history
from django_eventsource.models import PendingEvent, StoredEvent, TokenHead
from django_eventsource.operations.close_requests import (
    aclose_streams,
    close_streams,
    on_logout,
)
from django_eventsource.protocol.field_rules import CLOSE_STREAMS
from django_eventsource.protocol.frames import Decoder
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.publishing import apublish
from tests.support.control import close_requests
from tests.support.listeners import Connection
from tests.support.processes import Server, serve
from tests.support.valkey import shared_server

OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}

real_commits = pytest.mark.django_db(transaction=True)


@real_commits
def test_streams_end_after_a_commit_and_not_after_a_rollback() -> None:
    with transaction.atomic():
        close_streams(token="a")
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        close_streams(token="b")
        raise ZeroDivisionError
    assert [one["token"] for one in close_requests()] == ["a"]


# Logouts


@real_commits
@pytest.mark.usefixtures("memory_history")
def test_a_close_request_contains_no_session_key() -> None:
    client = Client()
    client.force_login(User.objects.create_user("user"))
    key = client.cookies["sessionid"].value
    client.logout()
    (one,) = close_requests()
    assert list(one) == ["session"]
    assert one["session"]
    assert key not in one["session"]


@real_commits
@pytest.mark.usefixtures("memory_history")
def test_a_logout_with_signed_cookies_ends_the_streams_of_the_user(settings) -> None:
    """The key of such a session changes with its data."""
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    user = User.objects.create_user("user")
    client = Client()
    client.force_login(user)
    client.logout()
    assert close_requests() == [{"user": str(user.pk)}]
    request = HttpRequest()
    request.session = SignedCookies("a-key-that-is-long")
    on_logout(User, request=request, user=None)
    assert list(close_requests()[1]) == ["session"]


@real_commits
def test_a_logout_succeeds_if_the_history_fails(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    client.force_login(User.objects.create_user("user"))

    def fail(*args: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(get_history(), "append", fail)
    client.logout()
    assert "cannot be ended before their next recheck" in caplog.text
    assert "sessionid" not in client.cookies


@real_commits
def test_a_failed_history_does_not_break_the_transaction_of_a_logout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client()
    client.force_login(User.objects.create_user("user"))
    request = HttpRequest()
    request.session = client.session
    table = StoredEvent._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO gone")
    try:
        with transaction.atomic():
            user_logged_out.send(User, request=request, user=None)
            assert User.objects.count() == 1
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE gone RENAME TO {table}")
    assert "cannot be ended before their next recheck" in caplog.text


# Two processes


LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "database": lambda: {"EVENTSOURCE_POLL_SECONDS": 0.1},
    "valkey": lambda: {
        "EVENTSOURCE_POLL_SECONDS": 600,  # so that only the channel layer can be fast enough
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
    """Run two processes that share the database, or a broker too."""
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


async def reconnection_ms(stream: Connection) -> int:
    """Read to the end, which contains a reconnection time."""
    body = b""
    while chunk := await stream.read():
        body += chunk
    stream.close()
    name, field = body.strip().split(b"\n")
    assert name == b"event: retry"
    return int(field.removeprefix(b"retry: "))


async def is_served(token: str, *streams: Connection) -> None:
    """Check that the streams are open: they receive an event."""
    await apublish(token, "ping", "still there")
    for stream in streams:
        assert [event.data for event in Decoder().feed(await stream.read())] == ["still there"]


@real_commits
async def test_close_requests_end_the_matching_streams_of_two_processes(
    pair: tuple[Server, Server],
) -> None:
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
        assert 500 <= await reconnection_ms(stream) <= 5000
    await is_served("b", *b)

    on_laptop = [await open_at(server, "/events/poll/b", laptop) for server in pair]
    on_phone = [await open_at(server, "/events/poll/b", phone) for server in pair]
    of_other = [await open_at(server, "/events/poll/b", theirs) for server in pair]
    await laptop.alogout()
    for stream in on_laptop:
        assert 500 <= await reconnection_ms(stream) <= 5000
    await is_served("b", *b, *on_phone, *of_other)

    elsewhere = [await open_at(server, "/events/poll/c", phone) for server in pair]
    await aclose_streams(token="b", user=user)
    for stream in on_phone:
        assert 500 <= await reconnection_ms(stream) <= 5000
    await is_served("c", *elsewhere)
    await aclose_streams(user=user.pk)
    for stream in elsewhere:
        assert 500 <= await reconnection_ms(stream) <= 5000
    await is_served("b", *b, *of_other)
    for stream in [*b, *of_other]:
        stream.close()


# The control token is not public


@real_commits
@pytest.mark.parametrize("kind", ["daphne", "uvicorn"])
async def test_no_url_leads_to_the_control_token(kind: str) -> None:
    names = ["%EF%BF%BDcontrol", "%FFcontrol", "t?token=%EF%BF%BDcontrol", "t?token=%FFcontrol"]
    with serve(kind, **OPEN) as server:
        for name in names:
            for method, action in (("GET", "poll"), ("POST", "ping"), ("POST", CLOSE_STREAMS)):
                path = f"/events/{action}/{name}"
                answer = await Connection.open(
                    server.address, path, method=method, Content_Length="0"
                )
                assert answer.status == 400
                answer.close()
    assert not await TokenHead.objects.filter(token=CONTROL_TOKEN).aexists()


@real_commits
def test_send_event_refuses_the_control_token() -> None:
    with pytest.raises(CommandError):
        call_command("send_event", CONTROL_TOKEN, CLOSE_STREAMS, "{}")
    assert not StoredEvent.objects.exists()


@real_commits
@pytest.mark.parametrize("name", ["tokenhead", "storedevent", "pendingevent", "tokenpresence"])
def test_the_admin_does_not_show_the_control_token(admin_client: Client, name: str) -> None:
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
    assert CLOSE_STREAMS not in page
    assert "some-user" not in page
    if name == "tokenhead":
        assert "visible-token" in page
