"""Tests of the policies."""

from __future__ import annotations

import base64

import pytest
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.test import AsyncClient, AsyncRequestFactory

from django_eventsource import grants, policies
from django_eventsource.access import time_windows as rates
from django_eventsource.events import StringEvent
from django_eventsource.exceptions import NotAuthenticated, RateLimited
from django_eventsource.grants import make_grant
from django_eventsource.policies import (
    AllowAny,
    DefaultPolicy,
    Policy,
    check_rate,
    credentials_of,
    make_policy,
)
from django_eventsource.views import EventSourceView

LISTEN_URL = "/events/poll/token"
SEND_URL = "/events/ping/token"
CSRF = "c" * 32

with_users = pytest.mark.django_db(transaction=True)


def request(*, user=None, query="", **headers):
    """Return a request, with AuthenticationMiddleware's auser() if a user is passed."""
    made = AsyncRequestFactory().post(f"/?{query}", headers=headers)
    if user is not None:

        async def auser():
            return user

        made.auser = auser
    return made


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


async def ask(right, made):
    """Return whether the default policy allows one of the rights on `token`."""
    if right == "listen":
        return await DefaultPolicy().can_listen(made, "token")
    return await DefaultPolicy().can_send(made, "token", "ping")


async def make_user(*permissions, **fields):
    user = await User.objects.acreate_user("user", password="päss:word", **fields)
    async for permission in Permission.objects.filter(codename__in=permissions):
        await user.user_permissions.aadd(permission)
    return user


async def head(client, **headers):
    """Return the status of a HEAD, for which the policy is called as for a GET."""
    return (await client.head(LISTEN_URL, headers=headers)).status_code


async def post(client, **headers):
    response = await client.post(
        SEND_URL, data="x", content_type="text/plain; charset=utf-8", headers=headers
    )
    return response.status_code


@pytest.fixture
def client(memory_history):
    """Return a client that must pass Django's CSRF check, as a browser must."""
    return AsyncClient(enforce_csrf_checks=True)


either = pytest.mark.parametrize("right", ["listen", "send"])


# Grants


@either
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
async def test_a_bearer_grant_allows_its_right(right, scheme):
    """The scheme's name is case-insensitive."""
    grant = make_grant("token", **{right: True})
    assert await ask(right, request(Authorization=scheme + grant))


@either
async def test_a_grant_in_the_query_allows_its_right(right):
    """A browser's EventSource cannot set a header."""
    grant = make_grant("token", **{right: True})
    assert await ask(right, request(query=f"grant={grant}"))
    assert await ask(right, request(query=f"grant={grant}", Authorization=basic("no:body")))


@either
async def test_a_grant_can_allow_both_rights(right):
    grant = make_grant("token", listen=True, send=True)
    assert await ask(right, request(Authorization=f"Bearer {grant}"))


@either
async def test_a_grant_for_another_token_is_refused(right):
    grant = make_grant("Token", listen=True, send=True)
    with pytest.raises(PermissionDenied, match=r"^The grant is for another token\.$"):
        await ask(right, request(Authorization=f"Bearer {grant}"))


@pytest.mark.parametrize(
    ("right", "other", "verb"), [("listen", "send", "listen to"), ("send", "listen", "send to")]
)
async def test_a_grant_for_the_other_right_is_refused(right, other, verb):
    grant = make_grant("token", **{other: True})
    with pytest.raises(PermissionDenied, match=f"^The grant does not allow to {verb} this token"):
        await ask(right, request(query=f"grant={grant}"))


@either
async def test_an_expired_grant_is_not_authenticated(right, monkeypatch):
    grant = make_grant("token", **{right: True}, seconds=60)
    later = grants.time.time() + 61
    monkeypatch.setattr(grants.time, "time", lambda: later)
    with pytest.raises(NotAuthenticated, match="expired"):
        await ask(right, request(Authorization=f"Bearer {grant}"))


@either
@pytest.mark.parametrize("text", ["forged", "a:b:c", "é:é:é"])
async def test_a_forged_grant_is_not_authenticated(right, text):
    """This holds also for a user who needs no grant."""
    user = User(is_superuser=True)
    for made in (
        request(user=user, Authorization=f"Bearer {text}"),
        request(user=user, query=f"grant={text}"),
    ):
        with pytest.raises(NotAuthenticated, match="The grant is not valid"):
            await ask(right, made)


async def test_the_grant_of_the_header_takes_precedence_over_the_query():
    good, other = make_grant("token", listen=True), make_grant("other", listen=True)
    assert await ask("listen", request(Authorization=f"Bearer {good}", query=f"grant={other}"))
    with pytest.raises(PermissionDenied):
        await ask("listen", request(Authorization=f"Bearer {other}", query=f"grant={good}"))


@either
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Digest x", "x"])
async def test_a_request_without_credentials_is_not_authenticated(right, header):
    """The error names the credentials that are required."""
    for user in (None, AnonymousUser()):
        with pytest.raises(NotAuthenticated, match="A grant for this token, or a login"):
            await ask(right, request(user=user, Authorization=header))


# Users


@with_users
@pytest.mark.parametrize(
    ("permissions", "listens", "sends"),
    [
        ([], 403, 403),
        (["listen_event"], 200, 403),
        (["send_event"], 403, 200),
        (["listen_event", "send_event"], 200, 200),
        (["view_storedevent"], 403, 403),
    ],
    ids=["none", "listen", "send", "both", "view"],
)
async def test_a_model_permission_allows_a_user(client, permissions, listens, sends):
    """The user logs in by session or by HTTP Basic."""
    user = await make_user(*permissions)
    with_basic = {"Authorization": basic("user:päss:word")}
    assert [await head(client, **with_basic), await post(client, **with_basic)] == [listens, sends]
    await client.aforce_login(user)
    client.cookies["csrftoken"] = CSRF
    with_token = {"X-CSRFToken": CSRF}
    assert [await head(client), await post(client, **with_token)] == [listens, sends]


@with_users
async def test_a_superuser_may_listen_and_send(client):
    await make_user(is_superuser=True)
    headers = {"Authorization": basic("user:päss:word")}
    assert [await head(client, **headers), await post(client, **headers)] == [200, 200]


@with_users
@pytest.mark.parametrize(
    ("backend", "status"),
    [("ModelBackend", 401), ("AllowAllUsersModelBackend", 403)],
)
async def test_an_inactive_user_is_refused(client, settings, backend, status):
    """This holds also if the backend lets the user log in."""
    settings.AUTHENTICATION_BACKENDS = [f"django.contrib.auth.backends.{backend}"]
    user = await make_user(is_superuser=True, is_active=False)
    assert await head(client, Authorization=basic("user:päss:word")) == status
    await client.aforce_login(user)
    assert await head(client) == status


@with_users
async def test_the_refusal_names_the_missing_permission(client):
    await client.aforce_login(await make_user())
    response = await client.get(LISTEN_URL)
    assert response.content == (
        b"The user lacks the permission django_eventsource.listen_event.\n"
    )


@with_users
@either
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (basic("user:wrong"), r"^Wrong user name or password\.$"),
        (basic("nobody:päss:word"), r"^Wrong user name or password\.$"),
        (basic("user"), r"^Wrong user name or password\.$"),
        ("Basic", r"^Wrong user name or password\.$"),
        ("Basic !", r"credentials cannot be decoded"),
        ("Basic YQ", r"credentials cannot be decoded"),
        ("Basic a a", r"credentials cannot be decoded"),
        ("Basic /w==", r"credentials cannot be decoded"),
        ("Basic é", r"credentials cannot be decoded"),
        (basic("us\0er:x"), r"credentials contain NUL"),
        (basic("user:\0"), r"credentials contain NUL"),
    ],
    ids=[
        "password",
        "name",
        "no-colon",
        "empty",
        "character",
        "padding",
        "space",
        "utf-8",
        "é",
        "nul",
        "nul-2",
    ],
)
async def test_damaged_or_wrong_http_basic_is_not_authenticated(right, header, reason):
    """This holds also for a request with a valid session."""
    user = await make_user("listen_event", "send_event")
    with pytest.raises(NotAuthenticated, match=reason):
        await ask(right, request(user=user, Authorization=header))


@with_users
async def test_the_basic_scheme_is_case_insensitive():
    """RFC 9110 defines this."""
    await make_user("listen_event")
    header = basic("user:päss:word").replace("Basic", "bASIC")
    assert await ask("listen", request(Authorization=header))


# CSRF


@with_users
@pytest.mark.parametrize(
    ("cookie", "headers", "status"),
    [
        (None, {}, 403),
        (CSRF, {}, 403),
        (None, {"X-CSRFToken": CSRF}, 403),
        (CSRF, {"X-CSRFToken": "d" * 32}, 403),
        (CSRF, {"X-CSRFToken": "short"}, 403),
        (CSRF, {"X-CSRFToken": CSRF, "Origin": "https://evil.example"}, 403),
        (CSRF, {"X-CSRFToken": CSRF}, 200),
        (CSRF, {"X-CSRFToken": CSRF, "Origin": "http://testserver"}, 200),
    ],
    ids=["nothing", "cookie", "header", "other", "damaged", "origin", "good", "same-origin"],
)
async def test_a_post_of_a_session_needs_a_csrf_token(client, cookie, headers, status):
    """A page of another site cannot send with the session of its visitor."""
    await client.aforce_login(await make_user("send_event"))
    if cookie:
        client.cookies["csrftoken"] = cookie
    assert await post(client, **headers) == status


@with_users
async def test_a_csrf_token_in_a_form_field_is_accepted(client):
    """An HTML form sends it in Django's hidden field."""
    await client.aforce_login(await make_user("send_event"))
    client.cookies["csrftoken"] = CSRF
    response = await client.post(
        SEND_URL,
        data=f"csrfmiddlewaretoken={CSRF}&x=1",
        content_type="application/x-www-form-urlencoded",
    )
    assert response.status_code == 200


@with_users
async def test_a_csrf_token_in_the_session_is_accepted(client, settings):
    """CSRF_USE_SESSIONS reads the session from the database."""
    settings.CSRF_USE_SESSIONS = True
    await client.aforce_login(await make_user("send_event"))
    assert await post(client, **{"X-CSRFToken": CSRF}) == 403
    session = await client.asession()
    await session.aset("_csrftoken", CSRF)
    await session.asave()
    assert await post(client, **{"X-CSRFToken": CSRF}) == 200


@with_users
async def test_a_csrf_refusal_contains_the_reason(client):
    await client.aforce_login(await make_user("send_event"))
    response = await client.post(SEND_URL, data="x", content_type="text/plain")
    assert response.content == b"CSRF check failed: CSRF cookie not set.\n"


async def test_a_post_with_a_grant_needs_no_csrf_token(client):
    """A browser does not add a grant to a request of another site."""
    grant = make_grant("token", send=True)
    assert await post(client, Authorization=f"Bearer {grant}") == 200
    assert await post(client) == 401


# Other policies, and projects without Django's middleware


class Refuses(Policy):
    async def can_listen(self, request, token):
        return False

    async def can_send(self, request, token, action):
        raise PermissionDenied(f"No {action} to {token} here.")


class AsksForLogin(Policy):
    async def can_listen(self, request, token):
        raise NotAuthenticated("Who are you?")

    async def can_send(self, request, token, action):
        return token == "token" and action == "ping"


class NotAsynchronous(AllowAny):
    def can_listen(self, request, token):
        return True


class WithAnArgument(AllowAny):
    def __init__(self, argument):
        raise NotImplementedError


async def test_the_base_policy_refuses_every_request(client, settings):
    """A subclass that overrides one method leaves the other one closed."""
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.Policy"
    assert [await head(client), await post(client)] == [401, 401]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (request, "must be a subclass of django_eventsource.policies.Policy, not <function"),
        (StringEvent, "must be a subclass of django_eventsource.policies.Policy, not <class"),
        (NotAsynchronous, "whose method can_listen() is not asynchronous: define it with `async"),
        (WithAnArgument, "must be a class that needs no arguments (WithAnArgument.__init__()"),
    ],
    ids=["function", "other class", "not async", "argument"],
)
def test_an_unusable_policy_is_refused(settings, policy, reason):
    """The error names the setting or the argument, what was passed, and what is expected."""
    settings.EVENTSOURCE_POLICY = f"{policy.__module__}.{policy.__name__}"
    for name, ask in (
        ("EVENTSOURCE_POLICY", lambda: make_policy()),
        ("policy", lambda: make_policy(policy)),
    ):
        with pytest.raises(ImproperlyConfigured) as caught:
            ask()
        assert str(caught.value).startswith(f"{name} ")
        assert reason in str(caught.value)


def test_as_view_refuses_an_unusable_policy():
    """The error is raised when the URLs are loaded, and not by the first request."""
    with pytest.raises(ImproperlyConfigured, match="policy must be a subclass of"):
        EventSourceView.as_view(policy=StringEvent)


async def test_allow_any_allows_every_request(client, settings):
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    assert [await head(client), await post(client)] == [200, 200]
    assert await AllowAny().can_send(request(), "token", "close")


@with_users
async def test_false_is_responded_with_401_without_a_user_and_403_with_one(client, settings):
    settings.EVENTSOURCE_POLICY = f"{__name__}.Refuses"
    response = await client.get(LISTEN_URL)
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == 'Bearer realm="eventsource"'
    await client.aforce_login(await make_user())
    assert await head(client) == 403


@pytest.mark.parametrize(
    ("name", "url", "status", "text"),
    [
        ("Refuses", SEND_URL, 403, "No ping to token here."),
        ("AsksForLogin", LISTEN_URL, 401, "Who are you?"),
    ],
)
async def test_the_exception_of_a_policy_decides_the_status(
    client, settings, name, url, status, text
):
    """Its text is the response."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.{name}"
    method = client.get if url == LISTEN_URL else client.post
    response = await method(url)
    assert (response.status_code, response.content.decode()) == (status, f"{text}\n")


async def test_a_policy_receives_the_token_and_the_action(client, settings):
    """The policy decides whether CSRF is checked."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.AsksForLogin"
    assert await post(client) == 200
    assert (await client.post("/events/close/token")).status_code == 401
    assert (await client.post("/events/ping/other")).status_code == 401


async def test_a_project_without_middleware_can_use_grants(client, settings):
    """Every other request is refused."""
    settings.MIDDLEWARE = []
    grant = make_grant("token", listen=True, send=True)
    with_grant = {"Authorization": f"Bearer {grant}"}
    assert [await head(client, **with_grant), await post(client, **with_grant)] == [200, 200]
    assert [await head(client), await post(client)] == [401, 401]
    settings.EVENTSOURCE_POLICY = f"{__name__}.Refuses"
    assert await head(client) == 401


# Identity


async def test_a_request_without_a_user_is_identified_as_empty_text():
    """A grant does not identify a user."""
    grant = make_grant("token", listen=True)
    assert await DefaultPolicy().identify(request(Authorization=f"Bearer {grant}")) == ""
    assert await DefaultPolicy().identify(request()) == ""
    assert await DefaultPolicy().identify(request(user=AnonymousUser())) == ""


@with_users
async def test_a_user_is_identified_by_the_primary_key():
    """The user of a session and the user of HTTP Basic are identified in the same way."""
    user = await make_user("listen_event")
    assert await DefaultPolicy().identify(request(user=user)) == str(user.pk)
    made = request(Authorization=basic("user:päss:word"))
    assert await DefaultPolicy().identify(made) == ""  # the password has not been checked
    assert await ask("listen", made)
    assert await DefaultPolicy().identify(made) == str(user.pk)


# Rates


@pytest.fixture
def rate(settings, monkeypatch):
    """Allow two events in ten seconds, and return a function that moves the stopped clock."""
    settings.EVENTSOURCE_SEND_RATE = (2, 10)
    cache.clear()
    now = 1_800_000_003.5

    def move(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(rates.time, "time", lambda: now)
    yield move
    cache.clear()


async def test_without_a_send_rate_no_post_is_counted(client, settings):
    """The cache is not used."""
    settings.CACHES = {"default": {"BACKEND": "nowhere.Cache"}}
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    assert [await post(client) for _ in range(20)] == [200] * 20


@pytest.mark.parametrize("policy", ["AllowAny", "DefaultPolicy"])
async def test_a_post_over_the_rate_is_responded_with_429(client, settings, rate, policy):
    """Retry-After contains the seconds until the next window. Listening is not limited."""
    settings.EVENTSOURCE_POLICY = f"django_eventsource.policies.{policy}"
    grant = make_grant("token", listen=True, send=True, seconds=10**9)
    headers = {"Authorization": f"Bearer {grant}"}
    assert [await post(client, **headers) for _ in range(3)] == [200, 200, 429]
    response = await client.post(SEND_URL, headers=headers)
    assert response["Retry-After"] == "7"
    assert response.content == b"Too many events; try again in 7 s.\n"
    assert await head(client, **headers) == 200
    rate(6.4)
    assert await post(client, **headers) == 429
    rate(0.1)
    assert [await post(client, **headers) for _ in range(3)] == [200, 200, 429]


async def test_refused_posts_are_not_counted(client, rate):
    """A client without permission does not use up the rate."""
    assert [await post(client) for _ in range(4)] == [401] * 4
    grant = make_grant("token", send=True, seconds=10**9)
    assert await post(client, Authorization=f"Bearer {grant}") == 200


@with_users
async def test_each_user_and_each_address_has_its_own_rate(client, rate):
    """A user has one rate for all addresses."""
    users = [User(pk=7), User(pk=8)]
    for user in users:
        for _ in range(2):
            await check_rate(request(user=user))
        with pytest.raises(RateLimited):
            await check_rate(request(user=user))
    for address in ("10.0.0.1", "10.0.0.2", ""):
        made = request()
        made.META["REMOTE_ADDR"] = address
        for _ in range(2):
            await check_rate(made)
        with pytest.raises(RateLimited) as caught:
            await check_rate(made)
        assert caught.value.retry_after == 7


async def test_a_user_id_and_an_address_never_share_a_rate(rate):
    made = request(user=User(pk=7))
    for _ in range(2):
        await check_rate(made)
    nobody = request()
    nobody.META["REMOTE_ADDR"] = "7"
    await check_rate(nobody)


async def test_a_count_that_the_cache_dropped_refuses_no_sender(rate, monkeypatch):
    """A key that disappears between two commands does not fail the request."""

    def incr(key):
        raise ValueError(key)

    monkeypatch.setattr(cache, "incr", incr)
    for _ in range(5):
        await check_rate(request())


# Rechecks of an open stream


def opened(made, ago=0.0):
    """Return the request as a recheck passes it."""
    credentials_of(made).opened = grants.time.time() - ago
    return made


async def test_a_grant_that_expires_does_not_end_an_open_stream(monkeypatch):
    """Its expiry was checked when the stream was opened."""
    grant = make_grant("token", listen=True, seconds=60)
    now = grants.time.time()
    monkeypatch.setattr(grants.time, "time", lambda: now + 1000)
    made = request(Authorization=f"Bearer {grant}")
    with pytest.raises(NotAuthenticated, match="expired"):
        await ask("listen", made)
    assert await ask("listen", opened(made, ago=1000))
    with pytest.raises(NotAuthenticated, match="expired"):
        await ask("listen", opened(made, ago=900))


@with_users
async def test_a_recheck_does_not_hash_the_password_again(monkeypatch):
    await make_user("listen_event")
    made = request(Authorization=basic("user:päss:word"))
    assert await ask("listen", made)

    async def refuse(*args, **kwargs):
        return None

    monkeypatch.setattr(policies, "check_password", refuse)
    assert await ask("listen", opened(made))
    with pytest.raises(NotAuthenticated, match="Wrong user name"):
        await ask("listen", request(Authorization=basic("user:päss:word")))


@with_users
@pytest.mark.parametrize("change", ["password", "inactive", "gone", "permission"])
async def test_a_recheck_refuses_a_user_who_has_changed(change):
    """The password is new, the user is inactive or deleted, or lacks the permission."""
    user = await make_user("listen_event")
    made = request(Authorization=basic("user:päss:word"))
    assert await ask("listen", made)
    assert await ask("listen", opened(made))
    if change == "gone":
        await user.adelete()
    elif change == "permission":
        await user.user_permissions.aclear()
    else:
        user.is_active = change != "inactive"
        if change == "password":
            user.set_password("new")
        await user.asave()
    with pytest.raises(PermissionDenied if change == "permission" else NotAuthenticated):
        await ask("listen", opened(made))


@with_users
async def test_a_recheck_without_an_earlier_check_authenticates_the_user():
    """A stream that another policy allowed has no verified user."""
    await make_user("listen_event")
    assert await ask("listen", opened(request(Authorization=basic("user:päss:word"))))
    with pytest.raises(NotAuthenticated, match="Wrong user name"):
        await ask("listen", opened(request(Authorization=basic("user:wrong"))))
