"""Tests of attacks by the holder of a grant."""

from __future__ import annotations

from html import unescape
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template import engines
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource import apublish
from django_eventsource.events import StringIdEvent
from django_eventsource.grants import hash_session_key, make_grant, read_grant
from django_eventsource.history import get_history
from django_eventsource.signals import Reason
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import listen
from tests.support.events import texts
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history")

with_users = pytest.mark.django_db(transaction=True)

PAGE = "{% load eventsource %}{% eventsource_url 't' %} {% eventsource_url 't' 'ping' %}"
UNBOUND = "{% load eventsource %}{% eventsource_url 't' bind=False %}"


def page(request: HttpRequest) -> HttpResponse:
    source = UNBOUND if "unbound" in request.GET else PAGE
    return HttpResponse(engines["django"].from_string(source).render({}, request))


async def async_page(request: HttpRequest) -> HttpResponse:
    if "user" in request.GET:
        await request.auser()
    return render(request, "page.html")


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("page/", page),
    path("async-page/", async_page),
]


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.TEMPLATES = [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "OPTIONS": {
                "loaders": [("django.template.loaders.locmem.Loader", {"page.html": PAGE})]
            },
        }
    ]


async def post(url: str, body: str = "5000", client: AsyncClient | None = None) -> Any:
    return await (client or AsyncClient()).post(url, body, content_type="text/plain")


# Actions


@pytest.mark.parametrize("action", ["close", "retry"])
async def test_a_grant_to_ping_does_not_close_or_set_the_retry(action: str) -> None:
    """The URL of the template tag is valid for its action only."""
    client = AsyncClient()
    url = unescape((await client.get("/page/")).content.decode()).split()[1]
    assert (await post(url)).status_code == 200
    response = await post(url.replace("/ping/", f"/{action}/"))
    assert response.status_code == 403
    assert response.content.decode() == f"The grant does not allow the action {action!r}.\n"


@pytest.mark.parametrize(
    ("actions", "allowed"),
    [
        (None, ["ping"]),
        (["ping"], ["ping"]),
        (["close"], ["close"]),
        ("retry", ["retry"]),
        (["retry", "ping"], ["ping", "retry"]),
        (["pong"], []),
    ],
    ids=str,
)
async def test_a_grant_allows_the_actions_that_it_names(actions: Any, allowed: list[str]) -> None:
    """Without names it allows all except the LISTEN, FINISH and RETRY of the class."""
    grant = make_grant("t", send=True, actions=actions)
    statuses = {
        action: (await post(f"/events/{action}/t?grant={grant}")).status_code
        for action in StringIdEvent.ACTIONS
    }
    assert statuses == {
        action: 200 if action in allowed else 403 for action in StringIdEvent.ACTIONS
    }


async def test_the_refusal_of_a_close_states_that_the_grant_must_name_it() -> None:
    response = await post(f"/events/close/t?grant={make_grant('t', send=True)}")
    assert response.content == (
        b"The grant does not name the action 'close'. To allow it, make a grant that names it: "
        b"make_grant(..., actions=['close']) or create_grant --action.\n"
    )


@pytest.mark.parametrize(
    ("milliseconds", "status"),
    [("0", 400), ("99", 400), ("100", 200), ("3600000", 200), ("3600001", 400), ("9" * 15, 400)],
)
async def test_a_posted_retry_must_be_in_the_range(milliseconds: str, status: int) -> None:
    grant = make_grant("t", actions=["retry"])
    response = await post(f"/events/retry/t?grant={grant}", milliseconds)
    assert response.status_code == status
    if status == 400:
        assert response.content.decode() == (
            "A posted reconnection time must be from 100 to 3600000 milliseconds "
            f"(EVENTSOURCE_RETRY_RANGE_MS), not {int(milliseconds)}.\n"
        )


async def test_the_range_of_a_posted_retry_is_a_setting(settings: Any) -> None:
    settings.EVENTSOURCE_RETRY_RANGE_MS = (5, 6)
    grant = make_grant("t", actions=["retry"])
    found = [
        (await post(f"/events/retry/t?grant={grant}", str(number))).status_code
        for number in (4, 5, 6, 7)
    ]
    assert found == [400, 200, 200, 400]


async def test_a_post_with_several_tokens_is_refused() -> None:
    """No event is published."""
    grant = make_grant(["a", "b"], send=True)
    response = await post(f"/events/ping/a?token=b&grant={grant}")
    assert response.status_code == 400
    assert b"?token= is for GET" in response.content
    assert not get_history().heads(["a"])["a"].has_epoch
    assert (await post(f"/events/ping/a?token=a&grant={grant}")).status_code == 200


# Sessions


async def logged_in(name: str = "ada") -> tuple[AsyncClient, list[str]]:
    """Return a client that has logged in, and the URLs of its page: to listen and to ping."""
    user = await User.objects.acreate_user(name, password="right")
    client = AsyncClient()
    await client.aforce_login(user)
    return client, unescape((await client.get("/page/")).content.decode()).split()


async def statuses(client: AsyncClient, urls: list[str]) -> list[int]:
    """Return the statuses of a HEAD of the first URL and a POST to the second one."""
    poll, ping = urls
    return [(await client.head(poll)).status_code, (await post(ping, "x", client)).status_code]


@with_users
async def test_a_grant_of_a_session_is_refused_after_the_logout() -> None:
    """This holds also for a client that has kept the cookie."""
    client, urls = await logged_in()
    assert await statuses(client, urls) == [200, 200]
    cookie = client.cookies["sessionid"].value
    await client.alogout()
    assert await statuses(client, urls) == [401, 401]
    client.cookies["sessionid"] = cookie
    assert await statuses(client, urls) == [401, 401]
    response = await client.get(urls[0])
    assert response.content == (
        b"The grant is bound to another session, or to one that has ended.\n"
    )


@with_users
async def test_a_grant_of_another_session_is_refused() -> None:
    """The client has no session, or a session of another user."""
    _, urls = await logged_in("ada")
    other, _ = await logged_in("bob")
    assert await statuses(AsyncClient(), urls) == [401, 401]
    assert await statuses(other, urls) == [401, 401]


@with_users
async def test_a_grant_is_refused_after_the_key_of_its_session_rotates() -> None:
    """A change of the password rotates the key."""
    client, urls = await logged_in()
    session = await client.asession()
    await session.acycle_key()
    client.cookies["sessionid"] = session.session_key
    assert await statuses(client, urls) == [401, 401]
    renewed = unescape((await client.get("/page/")).content.decode()).split()
    assert await statuses(client, renewed) == [200, 200]


@with_users
async def test_the_grants_of_a_page_contain_the_id_of_its_user() -> None:
    client, urls = await logged_in()
    user = await User.objects.aget()
    grants = [read_grant(parse_qs(urlsplit(url).query)["grant"][0]) for url in urls]
    session = await client.asession()
    assert [grant.user for grant in grants] == [str(user.pk)] * len(urls)
    assert {grant.session for grant in grants} == {hash_session_key(session.session_key)}


@with_users
async def test_a_grant_is_refused_after_its_user_is_deactivated() -> None:
    client, urls = await logged_in()
    await User.objects.aupdate(is_active=False)
    assert await statuses(client, urls) == [401, 401]


@with_users
async def test_an_open_stream_ends_after_its_session_is_deleted() -> None:
    """It ends at the next recheck."""
    client, urls = await logged_in()
    response = await client.get(urls[0])
    assert response.status_code == 200
    (stream,) = [one for one in registry.streams() if one.listener.tokens == ("t",)]
    assert stream.recheck is not None
    assert await stream.recheck()
    await Session.objects.all().adelete()
    assert not await stream.recheck()
    stream.abort(Reason.CLOSE_REQUESTED)


@with_users
async def test_an_open_stream_ends_at_the_logout() -> None:
    """It does not wait for the recheck."""
    client, urls = await logged_in()
    async with listen("t", url=urls[0], client=client) as stream:
        await client.alogout()
        await until(lambda: not stream.is_open)
        assert b"\nretry: " in stream.body


@with_users
@pytest.mark.parametrize("how", ["anonymous", "unbound", "signed_cookies"])
async def test_a_grant_is_not_bound_without_a_session_on_the_server(
    settings: Any, how: str
) -> None:
    """An anonymous page, bind=False, and signed_cookies sessions."""
    client = AsyncClient()
    if how == "signed_cookies":
        settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    if how != "anonymous":
        await client.aforce_login(await User.objects.acreate_user("ada"))
    query = "?unbound" if how == "unbound" else ""
    (url, *_) = unescape((await client.get(f"/page/{query}")).content.decode()).split()
    assert (await AsyncClient().head(url)).status_code == 200


@with_users
async def test_an_anonymous_session_does_not_bind_a_grant() -> None:
    """Its key rotates at the login."""
    client = AsyncClient()
    session = await client.asession()
    await session.aset("basket", 1)
    await session.asave()
    client.cookies["sessionid"] = session.session_key
    (url, *_) = unescape((await client.get("/page/")).content.decode()).split()
    assert (await AsyncClient().head(url)).status_code == 200


@with_users
async def test_the_tag_raises_an_error_if_an_asynchronous_view_has_not_read_the_session() -> None:
    """The error contains the solution."""
    user = await User.objects.acreate_user("ada")
    client = AsyncClient()
    await client.aforce_login(user)
    response = await client.get("/async-page/?user")
    urls = unescape(response.content.decode()).split()
    assert await statuses(client, urls) == [200, 200]
    assert await statuses(AsyncClient(), urls) == [401, 401]
    with pytest.raises(Exception, match=r"await request\.auser\(\)` before you render"):
        await client.get("/async-page/")


async def test_a_bound_grant_is_refused_without_session_middleware(settings: Any) -> None:
    settings.MIDDLEWARE = []
    grant = make_grant("t", listen=True, session_key="a-session-key")
    assert (await AsyncClient().head(f"/events/poll/t?grant={grant}")).status_code == 401


# Users


@with_users
async def test_a_grant_of_a_user_is_valid_for_that_user_only(settings: Any) -> None:
    """The user logs in by session or by HTTP Basic."""
    client, _ = await logged_in("ada")
    other, _ = await logged_in("bob")
    ada = await User.objects.aget(username="ada")
    for user in (ada, ada.pk):
        url = f"/events/poll/t?grant={make_grant('t', listen=True, user=user)}"
        found = [(await one.head(url)).status_code for one in (client, other, AsyncClient())]
        assert found == [200, 401, 401]
    with_basic = {"Authorization": "Basic YWRhOnJpZ2h0"}  # ada:right
    assert (await AsyncClient().head(url, headers=with_basic)).status_code == 200
    response = await other.get(url)
    assert response.content == b"The grant is bound to a user who is not logged in here.\n"


async def test_publish_accepts_a_retry_outside_of_the_range() -> None:
    """The range applies to posted events."""
    event = await apublish("t", "retry", "1")
    assert texts(get_history().read("t", int(event.id) - 1).entries) == ["1"]
