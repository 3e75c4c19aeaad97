"""Tests of HTTP Basic logins: their threads, their queue and the limit on failures."""

from __future__ import annotations

import asyncio
import base64
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

from django_eventsource import apublish
from django_eventsource.access import basic_login as logins
from django_eventsource.exceptions import NotAuthenticated, RateLimited
from django_eventsource.policies import DefaultPolicy, basic_user
from tests.support.waiting import PATIENCE_SECONDS

LISTEN_URL = "/events/poll/t"

with_users = pytest.mark.django_db(transaction=True)


class Recorded:
    """The calls of the hasher of these tests."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[int] = []
        self.running = 0
        self.most = 0
        self.gate: threading.Event | None = None
        """The event that each hash waits for."""
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
    """A hasher that records each hash."""

    def encode(self, password: str, salt: str) -> str:
        recorded.hash()
        return super().encode(password, salt)


class AwaitingBackend(BaseBackend):
    """A backend that calls async_to_sync(), as one that uses an HTTP service does."""

    def authenticate(self, request: Any, username: str = "", password: str = "") -> Any:
        async def ask() -> User | None:
            await asyncio.sleep(0)
            return await User.objects.filter(username=username).afirst()

        return async_to_sync(ask)()


class ConnectionBackend(BaseBackend):
    """A backend that records its database connection."""

    used: list[Any] = []

    def authenticate(self, request: Any, username: str = "", password: str = "") -> Any:
        user = User.objects.filter(username=username).first()
        self.used.append(connections["default"])
        assert connection.connection is not None
        return user


@pytest.fixture(autouse=True)
def fresh(settings: Any) -> Iterator[Recorded]:
    """Record the hashes of one test, and count no failures of other tests."""
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
    """Await a login and return the user name or the name of the error."""
    try:
        return str((await login).username)
    except (NotAuthenticated, RateLimited) as error:
        return type(error).__name__


async def make_user(name: str = "ada") -> User:
    user = await User.objects.acreate_user(name, password="right")
    await user.user_permissions.aadd(await Permission.objects.aget(codename="listen_event"))
    recorded.__init__()  # type: ignore[misc]
    return user


# Threads


@with_users
@pytest.mark.parametrize("name", ["ada", "invented"])
async def test_no_password_is_hashed_on_the_event_loop(name: str) -> None:
    """The user exists or does not exist."""
    await make_user()
    with pytest.raises(NotAuthenticated):
        await login_from("192.0.2.1", name)
    assert recorded.threads
    assert threading.get_ident() not in recorded.threads


@with_users
async def test_at_most_two_passwords_are_hashed_at_once(settings: Any) -> None:
    """The connections come from many addresses."""
    await make_user()
    settings.EVENTSOURCE_LOGIN_RATE = None
    logins_at_once = [
        asyncio.ensure_future(outcome(login_from(f"192.0.2.{n}", f"invented{n}")))
        for n in range(20)
    ]
    recorded.gate = threading.Event()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while recorded.running < 2:
            await asyncio.sleep(0.01)
        recorded.gate.set()
        assert set(await asyncio.gather(*logins_at_once)) == {"NotAuthenticated"}
    assert len(recorded.threads) == 20
    assert recorded.most == 2


@with_users
@pytest.mark.usefixtures("memory_history")
async def test_a_stream_receives_events_while_passwords_are_hashed(settings: Any) -> None:
    """Four connections with invented users do not block the event loop."""
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
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not recorded.running:
            await asyncio.sleep(0.01)
        await apublish("t", "ping", "hello")
        assert b"hello" in await anext(stream)
        # A hash on the event loop would block here until its timeout.
        recorded.gate.set()
        answers = await asyncio.gather(*attacks)
    await stream.aclose()
    assert [answer.status_code for answer in answers] == [401] * 4
    assert recorded.in_time
    assert all(recorded.in_time)


@with_users
async def test_the_threads_close_their_database_connections(settings: Any) -> None:
    await make_user()
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.ConnectionBackend"]
    ConnectionBackend.used.clear()
    assert await outcome(login_from("192.0.2.1", "ada", "right")) == "ada"
    (used,) = ConnectionBackend.used
    assert used.connection is None


@with_users
async def test_a_backend_can_use_async_to_sync(settings: Any) -> None:
    await make_user()
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.AwaitingBackend"]
    async with asyncio.timeout(PATIENCE_SECONDS):
        found = await asyncio.gather(
            *(outcome(login_from("192.0.2.1", "ada", "right")) for _ in range(6))
        )
    assert found == ["ada"] * 6


@with_users
def test_a_login_through_wsgi_is_hashed_in_the_pool() -> None:
    async_to_sync(make_user)()
    headers = {"Authorization": basic("ada", "right")}
    response = Client().post("/events/ping/t", headers=headers)
    assert response.status_code == 403
    assert b"lacks the permission" in response.content
    assert threading.get_ident() not in recorded.threads


@with_users
async def test_a_request_with_several_tokens_hashes_its_password_once() -> None:
    await make_user()
    request = AsyncRequestFactory().get("/", headers={"Authorization": basic("ada", "right")})
    for token in "abc":
        assert await DefaultPolicy().can_listen(request, token)
    assert len(recorded.threads) == 1


def test_a_reset_starts_new_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork resets the state of the process, and has no threads of its parent."""
    pool = logins._Pool()
    monkeypatch.setattr(logins, "_pool", pool)
    logins._renew_pool()
    assert logins._pool is not pool


# The queue


@with_users
async def test_a_login_is_refused_if_too_many_logins_wait(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response contains the seconds to wait."""
    settings.EVENTSOURCE_LOGIN_RATE = None
    pool = logins._Pool(max_waiting=3)
    monkeypatch.setattr(logins, "_pool", pool)
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
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert set(await asyncio.gather(*waiting)) == {"NotAuthenticated"}
    assert await outcome(login_from("192.0.2.9", "ada", "right")) == "ada"
    pool.executor.shutdown()


@with_users
async def test_a_login_that_is_cancelled_does_not_count_as_waiting(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its password is not hashed."""
    settings.EVENTSOURCE_LOGIN_RATE = None
    pool = logins._Pool(max_waiting=1)
    monkeypatch.setattr(logins, "_pool", pool)
    await make_user()
    recorded.gate = threading.Event()
    running = [
        asyncio.ensure_future(outcome(login_from("192.0.2.1", f"invented{n}"))) for n in range(2)
    ]
    async with asyncio.timeout(PATIENCE_SECONDS):
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
    pool.executor.shutdown()


# Failures


@with_users
async def test_too_many_failures_are_refused_without_hashing(settings: Any) -> None:
    """The correct password is refused as well."""
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
async def test_failures_at_other_addresses_do_not_lock_out_a_user(settings: Any) -> None:
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for n in range(20):
        assert await outcome(login_from(f"192.0.2.{n}", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("198.51.100.1", "ada", "right")) == "ada"


@with_users
async def test_an_address_has_three_times_the_failures_of_a_user(settings: Any) -> None:
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
async def test_successful_logins_are_not_counted(settings: Any) -> None:
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for _ in range(5):
        assert await outcome(login_from("192.0.2.1", "ada", "right")) == "ada"


@with_users
async def test_failures_of_an_ipv6_client_are_counted_by_its_64_bit_prefix(settings: Any) -> None:
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    assert await outcome(login_from("2001:db8::1", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("2001:db8::2", "ada", "right")) == "RateLimited"
    assert await outcome(login_from("2001:db8:0:1::2", "ada", "right")) == "ada"


@with_users
async def test_failures_without_an_address_are_not_counted(settings: Any) -> None:
    """A count of the user alone would lock the user out."""
    settings.EVENTSOURCE_LOGIN_RATE = (1, 10**6)
    await make_user()
    for _ in range(9):
        assert await outcome(login_from("", "ada")) == "NotAuthenticated"
    assert await outcome(login_from("", "ada", "right")) == "ada"


@with_users
@pytest.mark.usefixtures("memory_history")
async def test_a_request_after_too_many_failures_is_responded_with_429(settings: Any) -> None:
    """GET and POST have a Retry-After header."""
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
