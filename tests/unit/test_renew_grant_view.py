"""Tests of the view that renews grants."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError
from django.http import HttpRequest
from django.test import AsyncClient, override_settings
from django.urls import include, path

from django_eventsource.grants import hash_session_key, make_grant, read_grant
from django_eventsource.policies import AllowAny, Policy, session_user
from django_eventsource.views import RenewGrantView

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("memory_history"),
    pytest.mark.urls(__name__),
]


class Members(Policy):
    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        return token != "secret" and await session_user(request) is not None


class Down(Policy):
    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        raise OperationalError("away")


urlpatterns = [
    path("renew/<path:token>", RenewGrantView.as_view()),
    path("members/<path:token>", RenewGrantView.as_view(policy=Members, seconds=60)),
    path("open/<path:token>", RenewGrantView.as_view(policy=AllowAny)),
    path("down/<path:token>", RenewGrantView.as_view(policy=Down)),
    path("events/", include("django_eventsource.urls")),
]


async def log_in(*permissions: str) -> tuple[AsyncClient, User]:
    """Return a client whose user is logged in."""
    user = await User.objects.acreate_user("ada", password="pw")
    async for permission in Permission.objects.filter(codename__in=permissions):
        await user.user_permissions.aadd(permission)
    client = AsyncClient()
    await client.aforce_login(user)
    return client, user


async def test_a_user_whom_the_policy_allows_receives_a_grant_until_the_logout() -> None:
    """The streams themselves may have another policy, which accepts grants only."""
    client, user = await log_in()
    assert (await client.head("/events/poll/a?token=b")).status_code == 403
    response = await client.get("/members/a?token=b")
    assert response.headers["Cache-Control"] == "private, no-store"
    (text,) = json.loads(response.content).values()
    grant = read_grant(text)
    assert (grant.tokens, grant.listen, grant.send) == (("a", "b"), True, False)
    assert grant.user == str(user.pk)
    assert (await client.head(f"/events/poll/a?token=b&grant={text}")).status_code == 200
    assert grant.session == hash_session_key(client.cookies["sessionid"].value)
    await client.alogout()
    assert (await client.head(f"/events/poll/a?token=b&grant={text}")).status_code == 401
    assert (await client.get("/members/a")).status_code == 401


async def test_a_renewed_grant_is_valid_in_its_session_only() -> None:
    """Another session of the user, and a later one after the logout, do not revive it."""
    client, user = await log_in()
    other = AsyncClient()
    await other.aforce_login(user)
    url = f"/events/poll/a?grant={(await client.get('/members/a')).json()['grant']}"
    assert [(await one.head(url)).status_code for one in (client, other)] == [200, 401]
    await client.alogout()
    await client.aforce_login(user)
    assert [(await one.head(url)).status_code for one in (client, other)] == [401, 401]


async def test_a_user_who_loses_the_permission_keeps_the_grant_and_receives_no_new_one() -> None:
    """A grant is a permission of its own. The end of its session ends it before its expiry."""
    client, user = await log_in("listen_event")
    url = f"/events/poll/a?grant={(await client.get('/renew/a')).json()['grant']}"
    await user.user_permissions.aclear()
    assert (await client.get("/renew/a")).status_code == 403
    assert (await client.head("/events/poll/a")).status_code == 403
    assert (await client.head(url)).status_code == 200
    await User.objects.aupdate(is_active=False)
    assert (await client.head(url)).status_code == 401


async def test_a_grant_is_bound_to_the_user_if_the_key_of_the_session_changes(
    settings: Any,
) -> None:
    """The key of a signed_cookies session contains its data."""
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    client, user = await log_in()
    grant = read_grant((await client.get("/members/a")).json()["grant"])
    assert (grant.session, grant.user) == ("", str(user.pk))


async def test_the_lifetime_is_that_of_the_view_or_of_the_setting() -> None:
    client, _ = await log_in("listen_event")
    lifetimes = []
    for url in ("/members/a", "/renew/a"):
        text = (await client.get(url)).json()["grant"]
        lifetimes.append(read_grant(text).expires)
    assert 86_340 <= lifetimes[1] - lifetimes[0] <= 86_400


async def test_the_policy_refuses_a_user_a_token_and_a_client_without_a_user() -> None:
    assert (await AsyncClient().get("/renew/a")).status_code == 401
    client, _ = await log_in()
    refused = [
        await client.get(url) for url in ("/renew/a", "/members/secret", "/members/a?token=secret")
    ]
    assert [response.status_code for response in refused] == [403, 403, 403]
    assert b"lacks the permission" in refused[0].content


async def test_a_grant_is_not_renewed_with_a_grant() -> None:
    """It would have no end."""
    grant = make_grant("a", listen=True)
    response = await AsyncClient().get(f"/renew/a?grant={grant}")
    assert response.status_code == 403
    assert b"A grant is not renewed with a grant" in response.content


async def test_a_grant_for_http_basic_is_bound_to_its_user() -> None:
    """It has no session, also if the client has one besides."""
    client, user = await log_in("listen_event")
    header = "Basic " + base64.b64encode(b"ada:pw").decode()
    response = await client.get("/renew/a", headers={"Authorization": header})
    grant = read_grant(response.json()["grant"])
    assert (grant.session, grant.user) == ("", str(user.pk))


async def test_every_client_receives_a_grant_if_the_policy_allows_all() -> None:
    response = await AsyncClient().get("/open/a")
    assert read_grant(response.json()["grant"]).user == ""


async def test_a_bad_token_and_a_database_that_fails_are_errors() -> None:
    response = await AsyncClient().get(f"/renew/{'x' * 256}")
    assert (response.status_code, b"256" in response.content) == (400, True)
    response = await AsyncClient().get("/down/a")
    assert (response.status_code, response.content) == (
        503,
        b"The database failed; try again later.\n",
    )
    assert (await AsyncClient().post("/renew/a")).status_code == 405


async def test_the_middleware_that_requires_a_login_leaves_the_decision_to_the_policy() -> None:
    """A redirect to a page would not be JSON."""
    name = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    with override_settings(MIDDLEWARE=[*django_settings.MIDDLEWARE, name]):
        assert (await AsyncClient().get("/members/a")).status_code == 401


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": object}, "policy must be a subclass"),
        ({"seconds": 0}, "seconds must be a positive number or None, not 0"),
    ],
)
def test_a_view_with_a_bad_argument_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=words):
        RenewGrantView.as_view(**arguments)
