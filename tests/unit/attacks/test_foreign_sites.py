"""Tests of attacks by a page of another site, and by a client without permission."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.http import Http404, HttpRequest
from django.test import AsyncClient, Client
from django.urls import include, path

from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.policies import AllowAny
from django_eventsource.views import EventSourceView, RenewGrantView

pytestmark = pytest.mark.usefixtures("memory_history")

URL = "/events/ping/t"
EVIL = {"Origin": "https://evil.example"}
FOREIGN = [
    EVIL,
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://testserver.evil.example"},
    {"Origin": "https://testserver"},
    {"Origin": "http://testserver:8000"},
    {**EVIL, "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]
OWN = [
    {},
    {"Origin": "http://testserver"},
    {"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
]


class Forgetful(AllowAny):
    """A policy that lets a session send without calling check_csrf()."""

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        return bool((await request.auser()).is_authenticated)


class Hidden(AllowAny):
    """A policy that responds as if the token did not exist."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        raise Http404

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        raise Http404


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("forgetful/<action>/<token>", EventSourceView.as_view(policy=Forgetful)),
    path("open/<action>/<token>", EventSourceView.as_view(policy=AllowAny)),
    path("hidden/<action>/<token>", EventSourceView.as_view(policy=Hidden)),
    path("renew/<token>", RenewGrantView.as_view(policy=AllowAny)),
    path("renew-hidden/<token>", RenewGrantView.as_view(policy=Hidden)),
]


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__


async def post(url: str, headers: Any, client: AsyncClient | None = None) -> int:
    response = await (client or AsyncClient()).post(
        url, "x", content_type="text/plain", headers=headers
    )
    return int(response.status_code)


async def make_user() -> User:
    user = await User.objects.acreate_user("ada", password="right")
    await user.user_permissions.aadd(await Permission.objects.aget(codename="send_event"))
    return user


def published() -> bool:
    return bool(get_history().heads(["t"])["t"].has_epoch)


# POSTs of a page of another site


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_post_from_another_site_is_refused_by_every_policy(
    headers: dict[str, str],
) -> None:
    response = await AsyncClient().post("/open/ping/t", "x", "text/plain", headers=headers)
    assert response.status_code == 403
    assert b"page of another site" in response.content
    assert b"CSRF_TRUSTED_ORIGINS" in response.content
    assert not published()


@pytest.mark.parametrize("headers", OWN, ids=str)
async def test_a_post_of_the_own_site_or_without_a_browser_is_published(
    headers: dict[str, str],
) -> None:
    assert await post("/open/ping/t", headers) == 200


def test_a_foreign_post_through_wsgi_is_refused() -> None:
    response = Client().post("/open/ping/t", "x", content_type="text/plain", headers=EVIL)
    assert response.status_code == 403


@pytest.mark.django_db(transaction=True)
async def test_a_policy_without_a_csrf_check_is_protected_from_other_sites() -> None:
    """The cookie of a user who visits the other site is not sufficient."""
    client = AsyncClient()
    await client.aforce_login(await make_user())
    assert await post("/forgetful/ping/t", {}, client) == 200
    assert await post("/forgetful/ping/t", EVIL, client) == 403


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("headers", [EVIL, {"Sec-Fetch-Site": "cross-site"}], ids=str)
async def test_http_basic_that_a_browser_remembers_is_refused_from_another_site(
    headers: Any,
) -> None:
    await make_user()
    text = base64.b64encode(b"ada:right").decode()
    assert await post(URL, {"Authorization": f"Basic {text}", **headers}) == 403
    assert not published()
    assert await post(URL, {"Authorization": f"Basic {text}"}) == 200


@pytest.mark.parametrize("scheme", ["Basic", "Digest", "Negotiate", "NTLM"])
async def test_schemes_that_a_browser_adds_are_refused_from_another_site(scheme: str) -> None:
    assert await post("/open/ping/t", {"Authorization": f"{scheme} x", **EVIL}) == 403


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_grant_sends_from_any_site(headers: dict[str, str]) -> None:
    """Only pages that received the grant have it."""
    grant = make_grant("t", send=True)
    assert await post(f"{URL}?grant={grant}", headers) == 200
    assert await post(URL, {"Authorization": f"Bearer {grant}", **headers}) == 200


async def test_another_authorization_sends_from_any_site() -> None:
    """A browser does not add it, and the policy checks it."""
    assert await post("/open/ping/t", {"Authorization": "Token x", **EVIL}) == 200


async def test_a_grant_that_the_policy_has_not_checked_does_not_allow_another_site() -> None:
    """The holder of any grant could add it to the URL of a form."""
    grant = make_grant("other", send=True)
    assert await post(f"/open/ping/t?grant={grant}", EVIL) == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "https://*.example"])
async def test_a_post_from_a_trusted_origin_is_published(settings: Any, origin: str) -> None:
    settings.CSRF_TRUSTED_ORIGINS = [origin]
    assert await post("/open/ping/t", {**EVIL, "Sec-Fetch-Site": "cross-site"}) == 200
    assert await post("/open/ping/t", {"Origin": "https://evil.test"}) == 403


# Without permission


@pytest.mark.parametrize("method", ["get", "head", "post", "put", "delete", "options"])
async def test_a_response_without_permission_does_not_depend_on_the_action(method: str) -> None:
    client = AsyncClient()
    found = []
    for action in ("poll", "ping", "close", "unknown"):
        response = await getattr(client, method)(f"/events/{action}/t")
        found.append((response.status_code, response.content, response.get("Allow")))
    assert len(set(found)) == 1
    expected = {"put": 405, "delete": 405, "options": 200}.get(method, 401)
    assert found[0][0] == expected


@pytest.mark.parametrize(
    ("method", "action", "status", "allow"),
    [
        ("get", "unknown", 404, None),
        ("post", "unknown", 404, None),
        ("get", "ping", 405, "POST, OPTIONS"),
        ("head", "ping", 405, "POST, OPTIONS"),
        ("post", "poll", 405, "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_response_with_permission_depends_on_the_action(
    method: str, action: str, status: int, allow: str | None
) -> None:
    """Who may listen or send is told what there is."""
    grant = make_grant("t", listen=True, send=True)
    response = await getattr(AsyncClient(), method)(f"/events/{action}/t?grant={grant}")
    assert (response.status_code, response.get("Allow")) == (status, allow)


# Headers


async def test_every_response_is_private_and_nosniff(settings: Any) -> None:
    """A stream, a HEAD, a POST, a 204, a page, a 304, OPTIONS, the errors, and a new grant."""
    client = AsyncClient()
    stream = await client.get("/open/poll/t")
    settings.EVENTSOURCE_MAX_STREAMS = 1
    close = await client.post("/open/close/t", "", "text/plain")
    headers = {"Last-Event-ID": close.json()["id"]}
    settings.EVENTSOURCE_MAX_STREAMS = None
    page = await client.get("/open/poll/t", headers={"Accept": "application/json"})
    known = {"Accept": "application/json", "If-None-Match": page["ETag"]}
    for response, status in [
        (stream, 200),
        (await client.head("/open/poll/t"), 200),
        (close, 200),
        (await client.get("/open/poll/t", headers=headers), 204),
        (await client.get("/events/poll/t"), 401),
        (await client.put("/events/poll/t"), 405),
        (await client.get("/open/nothing/t"), 404),
        (page, 200),
        (await client.get("/open/poll/t", headers=known), 304),
        (await client.options("/open/poll/t"), 200),
        (await client.get("/hidden/poll/t"), 404),
        (await client.post("/hidden/ping/t", "x", "text/plain"), 404),
        (await client.get("/renew/t"), 200),
        (await client.options("/renew/t"), 200),
        (await client.post("/renew/t"), 405),
        (await client.head("/renew/t"), 405),
        (await client.get("/renew-hidden/t"), 404),
        (await client.get("/renew/" + "x" * 256), 400),
    ]:
        assert response.status_code == status
        directives = response["Cache-Control"].split(", ")
        assert {"private", "no-store"} <= set(directives)
        assert response["X-Content-Type-Options"] == "nosniff"
    await stream._stream.aclose()


async def test_djangos_cache_stores_no_response(settings: Any) -> None:
    """Its middleware checks for `private` only."""
    settings.MIDDLEWARE = [
        "django.middleware.cache.UpdateCacheMiddleware",
        "django.middleware.cache.FetchFromCacheMiddleware",
    ]
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
            "LOCATION": "answers",
        }
    }
    settings.EVENTSOURCE_MAX_STREAMS_PER_ADDRESS = 1
    client = AsyncClient()
    first = await client.get("/open/poll/t")
    assert not (await client.get("/open/poll/t")).streaming
    await first._stream.aclose()
    again = await client.get("/open/poll/t")
    assert again.streaming
    await again._stream.aclose()
