"""HTTP Basic logins: never on the event loop, few at once, throttled."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.backends import BaseBackend
from django.contrib.auth.hashers import MD5PasswordHasher
from django.contrib.auth.models import Permission, User
from django.core.cache import cache
from django.db import connection, connections
from django.test import AsyncClient, AsyncRequestFactory, Client

from django_eventsource import apublish, logins
from django_eventsource.exceptions import NotAuthenticated, RateLimited
from django_eventsource.policies import DefaultPolicy, basic_user
from tests.processes import run_python

SECONDS = 10
LISTEN_URL = "/events/poll/t"

with_users = pytest.mark.django_db(transaction=True)


class Recorded:
    """What the hasher and the backend of these tests have seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[int] = []
        self.running = 0
        self.most = 0
        self.gate: threading.Event | None = None
        """What each hash waits for."""
        self.in_time: list[bool] = []

    def hash(self) -> None:
        with self.lock:
            self.threads.append(threading.get_ident())
            self.running += 1
            self.most = max(self.most, self.running)
        if self.gate is not None:
            self.in_time.append(self.gate.wait(3))
        with self.lock:
            self.running -= 1


recorded = Recorded()


class RecordingHasher(MD5PasswordHasher):
    """A hasher that reports each hash."""

    def encode(self, password: str, salt: str) -> str:
        recorded.hash()
        return super().encode(password, salt)


class AwaitingBackend(BaseBackend):
    """A backend that awaits something, as one does that asks a directory over HTTP."""

    def authenticate(self, request: Any, username: str = "", password: str = "") -> Any:
        async def ask() -> User | None:
            await asyncio.sleep(0)
            return await User.objects.filter(username=username).afirst()

        return async_to_sync(ask)()


class ConnectionBackend(BaseBackend):
    """A backend that keeps the database connection that it used."""

    used: list[Any] = []

    def authenticate(self, request: Any, username: str = "", password: str = "") -> Any:
        user = User.objects.filter(username=username).first()
        self.used.append(connections["default"])
        assert connection.connection is not None
        return user


@pytest.fixture(autouse=True)
def fresh(settings: Any) -> Iterator[Recorded]:
    """Begin with no failures counted."""
    global recorded
    recorded = Recorded()
    settings.PASSWORD_HASHERS = [f"{__name__}.RecordingHasher"]
    cache.clear()
    yield recorded
    cache.clear()


def basic(name: str, password: str = "wrong") -> str:
    text = f"{name}:{password}"
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def login_from(address: str, name: str, password: str = "wrong") -> Any:
    request = AsyncRequestFactory().get("/", headers={"Authorization": basic(name, password)})
    request.META["REMOTE_ADDR"] = address
    return basic_user(request)


async def outcome(login: Any) -> str:
    """Await a login and return what came of it."""
    try:
        return str((await login).username)
    except (NotAuthenticated, RateLimited) as error:
        return type(error).__name__


async def make_user(name: str = "ada") -> User:
    user = await User.objects.acreate_user(name, password="right")
    await user.user_permissions.aadd(await Permission.objects.aget(codename="listen_event"))
    recorded.__init__()  # type: ignore[misc]
    return user


# Where


@with_users
@pytest.mark.parametrize("name", ["ada", "invented"])
async def test_no_password_is_hashed_on_the_event_loop(name: str) -> None:
    """Neither for a user who exists nor for one who does not."""
    await make_user()
    with pytest.raises(NotAuthenticated):
        await login_from("192.0.2.1", name)
    assert recorded.threads
    assert threading.get_ident() not in recorded.threads


@with_users
async def test_at_most_two_passwords_are_hashed_at_once(settings: Any) -> None:
    """However many connections attack, and from however many addresses."""
    await make_user()
    settings.EVENTSOURCE_LOGIN_RATE = None
    logins_at_once = [
        asyncio.ensure_future(outcome(login_from(f"192.0.2.{n}", f"invented{n}")))
        for n in range(20)
    ]
    recorded.gate = threading.Event()
    async with asyncio.timeout(SECONDS):
        while recorded.running < 2:
            await asyncio.sleep(0.01)
        recorded.gate.set()
        assert set(await asyncio.gather(*logins_at_once)) == {"NotAuthenticated"}
    assert len(recorded.threads) == 20
    assert recorded.most == 2


@with_users
@pytest.mark.usefixtures("memory_history")
async def test_a_stream_receives_events_while_passwords_are_hashed(settings: Any) -> None:
    """Four anonymous connections with invented users do not hold up the loop."""
    settings.EVENTSOURCE_LOGIN_RATE = None
    await make_user()
    client = AsyncClient()
    response = await client.get(LISTEN_URL, headers={"Authorization": basic("ada", "right")})
    stream = aiter(response)
    await anext(stream)
    recorded.gate = threading.Event()
    attacks = [
        asyncio.ensure_future(client.get(LISTEN_URL, headers={"Authorization": basic(f"x{n}")}))
        for n in range(4)
    ]
    async with asyncio.timeout(SECONDS):
        while not recorded.running:
            await asyncio.sleep(0.01)
        await apublish("t", "ping", "hello")
        assert b"hello" in await anext(stream)
        # Only now may a hash end: on the loop it would have waited in vain.
        recorded.gate.set()
        answers = await asyncio.gather(*attacks)
    await stream.aclose()
    assert [answer.status_code for answer in answers] == [401] * 4
    assert recorded.in_time
    assert all(recorded.in_time)


@with_users
async def test_the_pool_closes_its_database_connections(settings: Any) -> None:
    """A thread that waits for the next login holds no connection."""
    await make_user()
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.ConnectionBackend"]
    ConnectionBackend.used.clear()
    assert await outcome(login_from("192.0.2.1", "ada", "right")) == "ada"
    (used,) = ConnectionBackend.used
    assert used.connection is None


@with_users
async def test_a_backend_may_await(settings: Any) -> None:
    """async_to_sync() works inside the pool, and so does sync_to_async() inside of that."""
    await make_user()
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.AwaitingBackend"]
    async with asyncio.timeout(SECONDS):
        found = await asyncio.gather(
            *(outcome(login_from("192.0.2.1", "ada", "right")) for _ in range(6))
        )
    assert found == ["ada"] * 6


@with_users
def test_a_login_through_wsgi() -> None:
    """Sending needs no event loop of the server."""
    async_to_sync(make_user)()
    headers = {"Authorization": basic("ada", "right")}
    response = Client().post("/events/ping/t", headers=headers)
    assert response.status_code == 403
    assert b"lacks the permission" in response.content
    assert threading.get_ident() not in recorded.threads


@with_users
async def test_one_request_hashes_once_for_all_its_tokens() -> None:
    """A stream of many tokens asks the policy about each."""
    await make_user()
    request = AsyncRequestFactory().get("/", headers={"Authorization": basic("ada", "right")})
    for token in "abc":
        assert await DefaultPolicy().can_listen(request, token)
    assert len(recorded.threads) == 1


def test_a_fork_has_a_pool_of_its_own() -> None:
    """The threads of a process do not live on in its fork."""
    code = """
import asyncio, os, warnings
from django.test import AsyncRequestFactory
from django_eventsource import logins
warnings.simplefilter("ignore")

logins.authenticate = lambda request, username, password: username
def login():
    request = AsyncRequestFactory().get("/")
    return asyncio.run(asyncio.wait_for(logins.check_password(request, "ada", "x"), 10))
assert login() == "ada"
pid = os.fork()
if pid == 0:
    os._exit(0 if login() == "ada" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_python(code).strip() == "0"


# How many may wait


@with_users
async def test_too_many_waiting_logins_are_refused_at_once(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login waits for a bounded number of others, and the answer says when to try again."""
    settings.EVENTSOURCE_LOGIN_RATE = None
    monkeypatch.setattr(logins, "MAX_WAITING", 3)
    monkeypatch.setattr(logins, "_pools", {})
    await make_user()
    recorded.gate = threading.Event()
    waiting = [
        asyncio.ensure_future(outcome(login_from("192.0.2.1", f"invented{n}")))
        for n in range(2 + 3)
    ]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited, match="Too many logins") as caught:
        await login_from("192.0.2.9", "ada", "right")
    assert caught.value.retry_after == logins.BUSY_SECONDS
    recorded.gate.set()
    async with asyncio.timeout(SECONDS):
        assert set(await asyncio.gather(*waiting)) == {"NotAuthenticated"}
    assert await outcome(login_from("192.0.2.9", "ada", "right")) == "ada"
    logins._pools[os.getpid()].executor.shutdown()


@with_users
async def test_a_login_whose_client_left_makes_room(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that is cancelled while it waits is not hashed, and does not count."""
    settings.EVENTSOURCE_LOGIN_RATE = None
    monkeypatch.setattr(logins, "MAX_WAITING", 1)
    monkeypatch.setattr(logins, "_pools", {})
    await make_user()
    recorded.gate = threading.Event()
    running = [
        asyncio.ensure_future(outcome(login_from("192.0.2.1", f"invented{n}"))) for n in range(2)
    ]
    async with asyncio.timeout(SECONDS):
        while recorded.running < 2:
            await asyncio.sleep(0.01)
        left = asyncio.ensure_future(outcome(login_from("192.0.2.1", "left")))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        waits = asyncio.ensure_future(outcome(login_from("192.0.2.9", "ada", "right")))
        await asyncio.sleep(0)
        recorded.gate.set()
        assert await waits == "ada"
        await asyncio.gather(*running)
    assert left.cancelled()
    assert len(recorded.threads) == 3
    logins._pools[os.getpid()].executor.shutdown()


# Failures


@with_users
async def test_failures_are_throttled_without_hashing(settings: Any) -> None:
    """After so many failures of a user at an address, even the right password is 429."""
    settings.EVENTSOURCE_LOGIN_RATE = (3, 10**6)
    await make_user()
    assert [await outcome(login_from("192.0.2.1", "ada")) for _ in range(3)] == [
        "NotAuthenticated"
    ] * 3
    hashed = len(recorded.threads)
    for password in ("wrong", "right"):
        with pytest.raises(RateLimited, match="Too many failed logins") as caught:
            await login_from("192.0.2.1", "ada", password)
        assert 0 < caught.value.retry_after <= 10**6
    assert len(recorded.threads) == hashed


@with_users
async def test_a_victim_is_not_locked_out_by_failures_elsewhere(settings: Any) -> None:
    """Failures are never counted per user alone: another address is not throttled."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for n in range(20):
        assert await outcome(login_from(f"192.0.2.{n}", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("198.51.100.1", "ada", "right")) == "ada"


@with_users
async def test_other_users_at_an_address_are_throttled_later(settings: Any) -> None:
    """An address may fail more often than one user at it, but not without end."""
    settings.EVENTSOURCE_LOGIN_RATE = (2, 10**6)
    await make_user()
    for _ in range(2):
        await outcome(login_from("192.0.2.1", "bob"))
    assert await outcome(login_from("192.0.2.1", "bob")) == "RateLimited"
    assert await outcome(login_from("192.0.2.1", "ada", "right")) == "ada"
    for n in range(2 * logins.ADDRESS_FACTOR - 2):
        assert await outcome(login_from("192.0.2.1", f"invented{n}")) == "NotAuthenticated"
    assert await outcome(login_from("192.0.2.1", "another")) == "RateLimited"
    assert await outcome(login_from("192.0.2.1", "ada", "right")) == "RateLimited"


@with_users
async def test_successes_are_not_counted(settings: Any) -> None:
    """A client that sends its password with each request is not throttled."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for _ in range(5):
        assert await outcome(login_from("192.0.2.1", "ada", "right")) == "ada"


@with_users
async def test_an_ipv6_client_is_throttled_by_its_64_bit_prefix(settings: Any) -> None:
    """Changing the address within the /64 does not reset the count."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    assert await outcome(login_from("2001:db8::1", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("2001:db8::2", "ada", "right")) == "RateLimited"
    assert await outcome(login_from("2001:db8:0:1::2", "ada", "right")) == "ada"


@with_users
async def test_clients_without_an_address_are_not_throttled(settings: Any) -> None:
    """Without addresses the count would be per user alone, which locks victims out."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for _ in range(9):
        assert await outcome(login_from("", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("", "ada", "right")) == "ada"


@with_users
@pytest.mark.usefixtures("memory_history")
async def test_a_throttled_request_is_answered_429(settings: Any) -> None:
    """With Retry-After, for listening and for sending."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    client = AsyncClient()
    headers = {"Authorization": basic("ada")}
    assert (await client.get(LISTEN_URL, headers=headers)).status_code == 401
    for response in (
        await client.get(LISTEN_URL, headers=headers),
        await client.post("/events/ping/t", headers=headers),
    ):
        assert response.status_code == 429
        assert 0 < int(response["Retry-After"]) <= 10**6
        assert response.content.startswith(b"Too many failed logins; ")
