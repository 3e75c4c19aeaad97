"""Tests of the policies."""

from __future__ import annotations

import base64

import pytest
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.cache import cache
from django.core.exceptions import PermissionDenied
from django.test import AsyncClient, AsyncRequestFactory

from django_eventsource import grants, policies, rates
from django_eventsource.exceptions import NotAuthenticated, RateLimited
from django_eventsource.grants import make_grant
from django_eventsource.policies import (
    AllowAny,
    DefaultPolicy,
    check_rate,
    credentials_of,
    identify,
)

LISTEN_URL = "/events/poll/token"
SEND_URL = "/events/ping/token"
CSRF = "c" * 32

with_users = pytest.mark.django_db(transaction=True)


def request(*, user=None, query="", **headers):
    """Give a request, with AuthenticationMiddleware's auser() if a user is given."""
    made = AsyncRequestFactory().post(f"/?{query}", headers=headers)
    if user is not None:

        async def auser():
            return user

        made.auser = auser
    return made


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


async def ask(right, made):
    """Ask the default policy for one of the rights to `token`."""
    if right == "listen":
        return await DefaultPolicy().can_listen(made, "token")
    return await DefaultPolicy().can_send(made, "token", "ping")


async def make_user(*permissions, **fields):
    user = await User.objects.acreate_user("user", password="päss:word", **fields)
    async for permission in Permission.objects.filter(codename__in=permissions):
        await user.user_permissions.aadd(permission)
    return user


async def head(client, **headers):
    """Ask for a stream's headers: the policy's answer is that of GET."""
    return (await client.head(LISTEN_URL, headers=headers)).status_code


async def post(client, **headers):
    response = await client.post(
        SEND_URL, data="x", content_type="text/plain; charset=utf-8", headers=headers
    )
    return response.status_code


@pytest.fixture
def client(memory_history):
    """A browser: it is held to Django's CSRF check."""
    return AsyncClient(enforce_csrf_checks=True)


either = pytest.mark.parametrize("right", ["listen", "send"])


# Grants


@either
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
async def test_grant_in_header(right, scheme):
    """A grant in `Authorization: Bearer`, in any case, gives its right."""
    grant = make_grant("token", **{right: True})
    assert await ask(right, request(Authorization=scheme + grant))


@either
async def test_grant_in_query(right):
    """A grant in the query does too: a browser's EventSource can set no header."""
    grant = make_grant("token", **{right: True})
    assert await ask(right, request(query=f"grant={grant}"))
    assert await ask(right, request(query=f"grant={grant}", Authorization=basic("no:body")))


@either
async def test_grant_with_both_rights(right):
    """A grant may hold both rights."""
    grant = make_grant("token", listen=True, send=True)
    assert await ask(right, request(Authorization=f"Bearer {grant}"))


@either
async def test_grant_for_another_token(right):
    """A grant opens its own token only."""
    grant = make_grant("Token", listen=True, send=True)
    with pytest.raises(PermissionDenied, match=r"^The grant is for another token\.$"):
        await ask(right, request(Authorization=f"Bearer {grant}"))


@pytest.mark.parametrize(
    ("right", "other", "verb"), [("listen", "send", "listen to"), ("send", "listen", "send to")]
)
async def test_grant_for_the_other_right(right, other, verb):
    """The right to listen is not the right to send, nor the other way round."""
    grant = make_grant("token", **{other: True})
    with pytest.raises(PermissionDenied, match=f"^The grant does not allow to {verb} this token"):
        await ask(right, request(query=f"grant={grant}"))


@either
async def test_expired_grant(right, monkeypatch):
    """An expired grant is 401: a new one would help."""
    grant = make_grant("token", **{right: True}, seconds=60)
    later = grants.time.time() + 61
    monkeypatch.setattr(grants.time, "time", lambda: later)
    with pytest.raises(NotAuthenticated, match="expired"):
        await ask(right, request(Authorization=f"Bearer {grant}"))


@either
@pytest.mark.parametrize("text", ["forged", "a:b:c", "é:é:é"])
async def test_forged_grant(right, text):
    """A forged or damaged grant is 401, also for a user who would need none."""
    user = User(is_superuser=True)
    for made in (
        request(user=user, Authorization=f"Bearer {text}"),
        request(user=user, query=f"grant={text}"),
    ):
        with pytest.raises(NotAuthenticated, match="The grant is not valid"):
            await ask(right, made)


async def test_header_wins_over_query():
    """Of two grants the header's is the one that counts."""
    good, other = make_grant("token", listen=True), make_grant("other", listen=True)
    assert await ask("listen", request(Authorization=f"Bearer {good}", query=f"grant={other}"))
    with pytest.raises(PermissionDenied):
        await ask("listen", request(Authorization=f"Bearer {other}", query=f"grant={good}"))


@either
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Digest x", "x"])
async def test_no_grant_and_no_user(right, header):
    """Without any credentials the answer is 401, saying what is required."""
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
async def test_user_with_model_permissions(client, permissions, listens, sends):
    """A user's model permission decides, for a session and for HTTP Basic alike."""
    user = await make_user(*permissions)
    with_basic = {"Authorization": basic("user:päss:word")}
    assert [await head(client, **with_basic), await post(client, **with_basic)] == [listens, sends]
    await client.aforce_login(user)
    client.cookies["csrftoken"] = CSRF
    with_token = {"X-CSRFToken": CSRF}
    assert [await head(client), await post(client, **with_token)] == [listens, sends]


@with_users
async def test_superuser(client):
    """A superuser may do everything."""
    await make_user(is_superuser=True)
    headers = {"Authorization": basic("user:päss:word")}
    assert [await head(client, **headers), await post(client, **headers)] == [200, 200]


@with_users
@pytest.mark.parametrize(
    ("backend", "status"),
    [("ModelBackend", 401), ("AllowAllUsersModelBackend", 403)],
)
async def test_inactive_user(client, settings, backend, status):
    """An inactive user may do nothing, even where the backend lets such a user log in."""
    settings.AUTHENTICATION_BACKENDS = [f"django.contrib.auth.backends.{backend}"]
    user = await make_user(is_superuser=True, is_active=False)
    assert await head(client, Authorization=basic("user:päss:word")) == status
    await client.aforce_login(user)
    assert await head(client) == status


@with_users
async def test_refusals_name_what_is_missing(client):
    """The answer to a user without the permission names it."""
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
        (basic("us\0er:x"), r"credentials hold NUL"),
        (basic("user:\0"), r"credentials hold NUL"),
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
async def test_damaged_or_wrong_basic(right, header, reason):
    """Wrong or damaged HTTP Basic is 401, also for a request with a good session."""
    user = await make_user("listen_event", "send_event")
    with pytest.raises(NotAuthenticated, match=reason):
        await ask(right, request(user=user, Authorization=header))


@with_users
async def test_basic_scheme_in_any_case():
    """The scheme's name is case-insensitive, as RFC 9110 says."""
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
async def test_session_post_needs_a_csrf_token(client, cookie, headers, status):
    """Another site's page cannot send with the session of a user who visits it."""
    await client.aforce_login(await make_user("send_event"))
    if cookie:
        client.cookies["csrftoken"] = cookie
    assert await post(client, **headers) == status


@with_users
async def test_csrf_token_in_a_form_field(client):
    """A plain HTML form may send, with Django's own hidden field."""
    await client.aforce_login(await make_user("send_event"))
    client.cookies["csrftoken"] = CSRF
    response = await client.post(
        SEND_URL,
        data=f"csrfmiddlewaretoken={CSRF}&x=1",
        content_type="application/x-www-form-urlencoded",
    )
    assert response.status_code == 200


@with_users
async def test_csrf_token_kept_in_the_session(client, settings):
    """CSRF_USE_SESSIONS, which reads the session in the database, works too."""
    settings.CSRF_USE_SESSIONS = True
    await client.aforce_login(await make_user("send_event"))
    assert await post(client, **{"X-CSRFToken": CSRF}) == 403
    session = await client.asession()
    await session.aset("_csrftoken", CSRF)
    await session.asave()
    assert await post(client, **{"X-CSRFToken": CSRF}) == 200


@with_users
async def test_csrf_refusal_says_so(client):
    """The answer says that it was the CSRF check, and what it missed."""
    await client.aforce_login(await make_user("send_event"))
    response = await client.post(SEND_URL, data="x", content_type="text/plain")
    assert response.content == b"CSRF check failed: CSRF cookie not set.\n"


async def test_grant_post_needs_no_csrf_token(client):
    """A grant is no ambient authority: another site's page does not have it."""
    grant = make_grant("token", send=True)
    assert await post(client, Authorization=f"Bearer {grant}") == 200
    assert await post(client) == 401


# Other policies, and none of Django's middleware


class Refuses:
    async def can_listen(self, request, token):
        return False

    async def can_send(self, request, token, action):
        raise PermissionDenied(f"No {action} to {token} here.")


class AsksForLogin:
    async def can_listen(self, request, token):
        raise NotAuthenticated("Who are you?")

    async def can_send(self, request, token, action):
        return token == "token" and action == "ping"


async def test_allow_any(client, settings):
    """AllowAny is one line away, and lets everybody do everything."""
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    assert [await head(client), await post(client)] == [200, 200]
    assert await AllowAny().can_send(request(), "token", "close")


@with_users
async def test_own_policy_that_returns_false(client, settings):
    """False is 401 for somebody unknown, and 403 for somebody known."""
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
async def test_own_policy_that_raises(client, settings, name, url, status, text):
    """A policy says why with the exception that it raises."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.{name}"
    method = client.get if url == LISTEN_URL else client.post
    response = await method(url)
    assert (response.status_code, response.content.decode()) == (status, f"{text}\n")


async def test_own_policy_is_told_token_and_action(client, settings):
    """A policy decides by token and action; CSRF is its own matter."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.AsksForLogin"
    assert await post(client) == 200
    assert (await client.post("/events/close/token")).status_code == 401
    assert (await client.post("/events/ping/other")).status_code == 401


async def test_without_authentication_middleware(client, settings):
    """A project without users and sessions uses grants, and is closed otherwise."""
    settings.MIDDLEWARE = []
    grant = make_grant("token", listen=True, send=True)
    with_grant = {"Authorization": f"Bearer {grant}"}
    assert [await head(client, **with_grant), await post(client, **with_grant)] == [200, 200]
    assert [await head(client), await post(client)] == [401, 401]
    settings.EVENTSOURCE_POLICY = f"{__name__}.Refuses"
    assert await head(client) == 401


# Who it is


async def test_identity_of_nobody():
    """A grant alone, or nothing, is nobody: empty text."""
    grant = make_grant("token", listen=True)
    assert await identify(request(Authorization=f"Bearer {grant}")) == ""
    assert await identify(request()) == ""
    assert await identify(request(user=AnonymousUser())) == ""


@with_users
async def test_identity_of_a_user():
    """A session's user and one of HTTP Basic are their primary key, as text."""
    user = await make_user("listen_event")
    assert await identify(request(user=user)) == str(user.pk)
    made = request(Authorization=basic("user:päss:word"))
    assert await identify(made) == ""  # nobody has checked the password
    assert await ask("listen", made)
    assert await identify(made) == str(user.pk)


# How much


@pytest.fixture
def rate(settings, monkeypatch):
    """Two events in ten seconds, with the clock stopped; rate(seconds) moves it."""
    settings.EVENTSOURCE_SEND_RATE = (2, 10)
    cache.clear()
    now = 1_800_000_003.5

    def move(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(rates.time, "time", lambda: now)
    yield move
    cache.clear()


async def test_no_rate_unless_set(client, settings):
    """Without the setting nobody is counted, and the cache is not asked."""
    settings.CACHES = {"default": {"BACKEND": "nowhere.Cache"}}
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    assert [await post(client) for _ in range(20)] == [200] * 20


@pytest.mark.parametrize("policy", ["AllowAny", "DefaultPolicy"])
async def test_too_many_posts(client, settings, rate, policy):
    """The third one is 429, with the seconds after which the next is taken; listening goes on."""
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
    """Who may not send is told so, however often, and takes nobody's share."""
    assert [await post(client) for _ in range(4)] == [401] * 4
    grant = make_grant("token", send=True, seconds=10**9)
    assert await post(client, Authorization=f"Bearer {grant}") == 200


@with_users
async def test_each_user_has_a_share(client, rate):
    """Users are counted apart, wherever they come from; who is nobody by address."""
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


async def test_user_whose_id_looks_like_an_address(rate):
    """A user cannot use up an address's share, nor the other way round."""
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


# Asked again, with the stream open


def opened(made, ago=0.0):
    """What the view does before it asks again."""
    credentials_of(made).opened = grants.time.time() - ago
    return made


async def test_grant_that_expired_while_the_stream_is_open(monkeypatch):
    """It was checked when the stream began, and is good for the stream."""
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
async def test_basic_user_is_not_authenticated_again(monkeypatch):
    """The password is hashed once for a stream, not at every look."""
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
async def test_basic_user_who_has_changed(change):
    """A new password, no account, no permission: the next look refuses."""
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
async def test_basic_user_whom_nobody_has_checked():
    """A stream that began without asking this policy gives no right for nothing."""
    await make_user("listen_event")
    assert await ask("listen", opened(request(Authorization=basic("user:päss:word"))))
    with pytest.raises(NotAuthenticated, match="Wrong user name"):
        await ask("listen", opened(request(Authorization=basic("user:wrong"))))
