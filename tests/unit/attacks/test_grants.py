"""What the holder of a grant may not do with it."""

from __future__ import annotations

from html import unescape
from typing import Any

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
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.listeners import registry
from django_eventsource.streams import Reason
from tests.histories import texts

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
    """The URL of the template tag is for its action only."""
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
async def test_actions_of_a_grant(actions: Any, allowed: list[str]) -> None:
    """It covers those that it names; without names all but the class's FINISH and RETRY."""
    grant = make_grant("t", send=True, actions=actions)
    statuses = {
        action: (await post(f"/events/{action}/t?grant={grant}")).status_code
        for action in StringIdEvent.ACTIONS
    }
    assert statuses == {
        action: 200 if action in allowed else 403 for action in StringIdEvent.ACTIONS
    }


async def test_a_grant_that_names_no_actions_is_told_so() -> None:
    """The answer to a close says what the grant lacks."""
    response = await post(f"/events/close/t?grant={make_grant('t', send=True)}")
    assert response.content == (
        b"The grant does not name the action 'close', and only then allows it.\n"
    )


@pytest.mark.parametrize(
    ("milliseconds", "status"),
    [("0", 400), ("99", 400), ("100", 200), ("3600000", 200), ("3600001", 400), ("9" * 15, 400)],
)
async def test_a_posted_retry_is_bounded(milliseconds: str, status: int) -> None:
    """A sender can neither make all listeners hammer the server nor stay away."""
    grant = make_grant("t", actions=["retry"])
    response = await post(f"/events/retry/t?grant={grant}", milliseconds)
    assert response.status_code == status
    if status == 400:
        assert response.content.decode() == (
            "A posted reconnection time must be from 100 to 3600000 milliseconds "
            f"(EVENTSOURCE_RETRY_RANGE_MS), not {int(milliseconds)}.\n"
        )


async def test_the_bounds_of_a_posted_retry_are_a_setting(settings: Any) -> None:
    settings.EVENTSOURCE_RETRY_RANGE_MS = (5, 6)
    grant = make_grant("t", actions=["retry"])
    found = [
        (await post(f"/events/retry/t?grant={grant}", str(number))).status_code
        for number in (4, 5, 6, 7)
    ]
    assert found == [400, 200, 200, 400]


async def test_no_token_of_a_posts_query_is_ignored() -> None:
    """A POST that names further tokens is refused, and publishes nothing."""
    grant = make_grant(["a", "b"], send=True)
    response = await post(f"/events/ping/a?token=b&grant={grant}")
    assert response.status_code == 400
    assert b"?token= is for GET" in response.content
    assert not get_history().heads(["a"])["a"].life
    assert (await post(f"/events/ping/a?token=a&grant={grant}")).status_code == 200


# Sessions


async def logged_in(name: str = "ada") -> tuple[AsyncClient, list[str]]:
    """Return a client that has logged in, and the URLs of its page: to listen and to ping."""
    user = await User.objects.acreate_user(name, password="right")
    client = AsyncClient()
    await client.aforce_login(user)
    return client, unescape((await client.get("/page/")).content.decode()).split()


async def statuses(client: AsyncClient, urls: list[str]) -> list[int]:
    """Return how a HEAD of the first URL and a POST to the second are answered."""
    listen, ping = urls
    return [(await client.head(listen)).status_code, (await post(ping, "x", client)).status_code]


@with_users
async def test_a_page_loses_its_grant_at_the_logout() -> None:
    """Also for a client that has kept the session's cookie."""
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
async def test_a_copied_grant_of_a_session_is_worthless() -> None:
    """Whether the thief has no session or one of another user."""
    _, urls = await logged_in("ada")
    other, _ = await logged_in("bob")
    assert await statuses(AsyncClient(), urls) == [401, 401]
    assert await statuses(other, urls) == [401, 401]


@with_users
async def test_a_grant_ends_when_the_key_of_its_session_rotates() -> None:
    """As at a change of the password, which keeps the user logged in."""
    client, urls = await logged_in()
    session = await client.asession()
    await session.acycle_key()
    client.cookies["sessionid"] = session.session_key
    assert await statuses(client, urls) == [401, 401]
    renewed = unescape((await client.get("/page/")).content.decode()).split()
    assert await statuses(client, renewed) == [200, 200]


@with_users
async def test_a_grant_ends_with_its_user() -> None:
    """A session of a user who was deactivated opens nothing."""
    client, urls = await logged_in()
    await User.objects.aupdate(is_active=False)
    assert await statuses(client, urls) == [401, 401]


@with_users
async def test_an_open_stream_ends_with_the_session_of_its_grant() -> None:
    """At the next recheck, where the session was deleted without a logout."""
    client, urls = await logged_in()
    response = await client.get(urls[0])
    assert response.status_code == 200
    ((stream, listener),) = [one for one in registry.streams() if one[1].tokens == ("t",)]
    assert listener.recheck is not None
    assert await listener.recheck()
    await Session.objects.all().adelete()
    assert not await listener.recheck()
    stream.abort(Reason.CLOSED)


@with_users
async def test_an_open_stream_ends_at_the_logout() -> None:
    """At once: the stream belongs to the session that the grant is bound to."""
    client, urls = await logged_in()
    stream = aiter(await client.get(urls[0]))
    await anext(stream)
    await client.alogout()
    rest = b"".join([chunk async for chunk in stream])
    assert b"\nretry: " in rest


@with_users
@pytest.mark.parametrize("how", ["anonymous", "unbound", "signed_cookies"])
async def test_a_grant_that_is_not_bound(settings: Any, how: str) -> None:
    """Of an anonymous page, with bind=False, and where the cookie is the session."""
    client = AsyncClient()
    if how == "signed_cookies":
        settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    if how != "anonymous":
        await client.aforce_login(await User.objects.acreate_user("ada"))
    query = "?unbound" if how == "unbound" else ""
    (url, *_) = unescape((await client.get(f"/page/{query}")).content.decode()).split()
    assert (await AsyncClient().head(url)).status_code == 200


@with_users
async def test_an_anonymous_session_does_not_bind() -> None:
    """Its key rotates at the login, and the page that was open before would stop."""
    client = AsyncClient()
    session = await client.asession()
    await session.aset("basket", 1)
    await session.asave()
    client.cookies["sessionid"] = session.session_key
    (url, *_) = unescape((await client.get("/page/")).content.decode()).split()
    assert (await AsyncClient().head(url)).status_code == 200


@with_users
async def test_an_asynchronous_view_reads_the_session_first() -> None:
    """The tag cannot, and its error says how."""
    user = await User.objects.acreate_user("ada")
    client = AsyncClient()
    await client.aforce_login(user)
    response = await client.get("/async-page/?user")
    urls = unescape(response.content.decode()).split()
    assert await statuses(client, urls) == [200, 200]
    assert await statuses(AsyncClient(), urls) == [401, 401]
    with pytest.raises(Exception, match=r"await request\.auser\(\)` before you render"):
        await client.get("/async-page/")


async def test_a_bound_grant_without_session_middleware(settings: Any) -> None:
    """A process that has no sessions cannot check it, and refuses it."""
    settings.MIDDLEWARE = []
    grant = make_grant("t", listen=True, session_key="a-session-key")
    assert (await AsyncClient().head(f"/events/poll/t?grant={grant}")).status_code == 401


# Users


@with_users
async def test_a_grant_of_a_user_is_valid_for_that_user_only(settings: Any) -> None:
    """Who must be logged in, by session or by HTTP Basic."""
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


async def test_publish_in_code_is_not_bounded() -> None:
    """The range of a retry is for what is posted."""
    event = await apublish("t", "retry", "1")
    assert texts(get_history().read("t", int(event.id) - 1).entries) == ["1"]
