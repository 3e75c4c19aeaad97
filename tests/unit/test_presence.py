"""Who listens, over all processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource.exceptions import InvalidToken
from django_eventsource.history import get_history
from django_eventsource.listeners import registry
from django_eventsource.presence import (
    Listeners,
    alisteners,
    host_and_pid,
    listeners,
    process_name,
)
from django_eventsource.views import EventSourceView
from tests.listeners import Connection
from tests.processes import Server, serve

SECONDS = 15
BEAT = 0.5
OPEN = {
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_POLL_SECONDS": 0.1,
    "ROOT_URLCONF": "tests.test_presence",
}

real_commits = pytest.mark.django_db(transaction=True)
in_memory = pytest.mark.usefixtures("memory_history", "open_to_all")

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("only/<action>/<token>", EventSourceView.as_view(exclusive=True)),
    path("heard/<action>/<token>", EventSourceView.as_view(require_listener=True)),
]


@pytest.fixture
def open_to_all(settings) -> None:
    for name, value in OPEN.items():
        setattr(settings, name, value)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(SECONDS):
        while not await condition():
            await asyncio.sleep(0.02)


# One process


@in_memory
def test_what_all_processes_say() -> None:
    """Every stream counts; a user is named once, and who is anonymous is not."""
    history = get_history()
    history.announce("one", {"t": ["7", "", "12"], "other": ["9"]}, 60)
    history.announce("two", {"t": ["7", ""]}, 60)
    assert listeners("t") == Listeners(count=5, users=("12", "7"))
    assert listeners("other") == Listeners(count=1, users=("9",))
    assert listeners("nobody") == Listeners(count=0, users=())


@in_memory
async def test_the_same_awaited() -> None:
    """alisteners() is for coroutines."""
    get_history().announce("one", {"t": ["7"]}, 60)
    assert await alisteners("t") == Listeners(count=1, users=("7",))


@in_memory
@pytest.mark.parametrize("token", ["", "a\0b", "a" * 256])
def test_what_is_no_token(token: str) -> None:
    """It is told, rather than answered with nobody."""
    with pytest.raises(InvalidToken):
        listeners(token)


@in_memory
async def test_nobody_keeps_the_list(settings) -> None:
    """Without presence the question is an error that names the setting."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    with pytest.raises(ImproperlyConfigured, match="EVENTSOURCE_PRESENCE_SECONDS is None"):
        listeners("t")
    with pytest.raises(ImproperlyConfigured):
        await alisteners("t")


@in_memory
async def test_one_listener_in_one_process(settings) -> None:
    """A second one gets 423 until the first has gone; without presence as well."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    client = AsyncClient()
    first = (await client.get("/only/poll/single"))._stream
    await anext(first)
    refused = await client.get("/only/poll/single")
    assert refused.status_code == 423
    assert (await client.get("/only/poll/other?token=single")).status_code == 423
    await first.aclose()
    second = (await client.get("/only/poll/single"))._stream
    await second.aclose()


@in_memory
async def test_two_that_ask_at_once() -> None:
    """Of two that come together one is let in, however their requests overlap."""
    client = AsyncClient()
    answers = await asyncio.gather(*[client.get("/only/poll/race") for _ in range(5)])
    assert sorted(one.status_code for one in answers) == [200, 423, 423, 423, 423]
    assert registry.count("race") == 1
    for answer in answers:
        if answer.status_code == 200:
            await answer._stream.aclose()  # type: ignore[attr-defined]


@in_memory
@pytest.mark.parametrize("path", ["heard", "events"])
async def test_a_post_to_nobody(path: str) -> None:
    """It is refused where the URL says so, and the event is not published."""
    response = await AsyncClient().post(
        f"/{path}/ping/nobody", data="x", content_type="text/plain"
    )
    assert response.status_code == (404 if path == "heard" else 200)
    published = get_history().heads(["nobody"])["nobody"].life
    assert published is (path == "events")


@in_memory
async def test_a_custom_policy_may_name_users_by_number(settings) -> None:
    """What identify() gives is text in the list, whatever it was."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.Numbers"
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.05
    stream = (await AsyncClient().get("/events/poll/t"))._stream
    await anext(stream)

    async def there() -> bool:
        return (await alisteners("t")).count == 1

    await until(there)
    assert (await alisteners("t")).users == ("7",)
    await stream.aclose()


class Numbers:
    """A policy whose users are numbers."""

    async def can_listen(self, request: Any, token: str) -> bool:
        return True

    async def can_send(self, request: Any, token: str, action: str) -> bool:
        return True

    async def identify(self, request: Any) -> int:
        return 7


# Two processes


@pytest.fixture
def pair(settings) -> Iterator[tuple[Server, Server]]:
    """Two processes that only the database connects."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = BEAT
    changes = {**OPEN, "EVENTSOURCE_PRESENCE_SECONDS": BEAT}
    with serve("daphne", **changes) as one, serve("uvicorn", **changes) as two:
        yield one, two


async def open_at(server: Server, path: str, **headers: str) -> Connection:
    stream = await Connection.open(server.address, path, **headers)
    assert stream.status == 200, stream.head
    await stream.read()
    return stream


async def status_at(server: Server, path: str, **options: str) -> int:
    connection = await Connection.open(server.address, path, **options)
    connection.close()
    return connection.status


def count_is(token: str, count: int) -> Callable[[], Any]:
    async def check() -> bool:
        return (await alisteners(token)).count == count

    return check


@real_commits
async def test_listeners_of_two_processes(pair: tuple[Server, Server]) -> None:
    """They are counted together; who leaves is gone; who is killed after three beats."""
    one, two = pair
    user = await User.objects.acreate_user("user")
    client = AsyncClient()
    await client.aforce_login(user)
    cookie = {"Cookie": f"sessionid={client.cookies['sessionid'].value}"}
    streams = [
        await open_at(one, "/events/poll/t"),
        await open_at(one, "/events/poll/t?token=u", **cookie),
        await open_at(two, "/events/poll/t", **cookie),
    ]
    await until(count_is("t", 3))
    assert await alisteners("t") == Listeners(count=3, users=(str(user.pk),))
    assert await alisteners("u") == Listeners(count=1, users=(str(user.pk),))
    streams[1].close()
    await until(count_is("t", 2))
    assert await alisteners("u") == Listeners(count=0, users=())
    await asyncio.sleep(4 * BEAT)  # the leases have been renewed
    assert (await alisteners("t")).count == 2
    one.stop(signal.SIGKILL)
    killed = time.monotonic()
    await until(count_is("t", 1))
    assert time.monotonic() - killed < 4 * BEAT
    assert (await alisteners("t")).users == (str(user.pk),)
    streams[0].close()
    streams[2].close()


@real_commits
async def test_view_options_across_processes(pair: tuple[Server, Server]) -> None:
    """`exclusive` and `require_listener` know of the listeners of the other process."""
    one, two = pair
    post = {"method": "POST", "Content_Length": "0"}
    assert await status_at(one, "/heard/ping/t", **post) == 404
    first = await open_at(one, "/only/poll/t")
    await until(count_is("t", 1))
    assert await status_at(two, "/only/poll/t") == 423
    assert await status_at(one, "/only/poll/t") == 423
    assert await status_at(two, "/heard/ping/t", **post) == 200
    assert b"event: ping" in await first.read()
    first.close()
    await until(count_is("t", 0))
    assert await status_at(two, "/heard/ping/t", **post) == 404
    second = await open_at(two, "/only/poll/t")
    await until(count_is("t", 1))
    assert await status_at(one, "/only/poll/t") == 423
    second.close()


@real_commits
async def test_an_exclusive_listener_is_told_of_at_once() -> None:
    """Other processes need not wait for the next beat, neither when it comes nor goes."""
    with serve("uvicorn", **OPEN, EVENTSOURCE_PRESENCE_SECONDS=600) as server:
        stream = await open_at(server, "/only/poll/t")
        await until(count_is("t", 1))
        stream.close()
        await until(count_is("t", 0))


def test_a_process_name_contains_host_and_pid() -> None:
    """An operator finds the process by it, and no two event loops have the same."""
    names = {process_name() for _ in range(100)}
    assert len(names) == 100
    assert {host_and_pid(name) for name in names} == {(socket.gethostname(), str(os.getpid()))}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("::1:5:abc", ("::1", "5")),
        ("other", ("other", "")),
        ("other:5", ("other:5", "")),
        ("", ("", "")),
    ],
)
def test_host_and_pid_of_any_name(name: str, expected: tuple[str, str]) -> None:
    """Colons in the host do no harm; a name of another form is shown whole."""
    assert host_and_pid(name) == expected


def test_a_long_host_name_fits_into_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off is the host, and not what makes the name unique."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 300)
    name = process_name()
    assert len(name) <= 255
    assert host_and_pid(name) == ("h" * 200, str(os.getpid()))
