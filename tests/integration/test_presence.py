"""The list of listeners of all processes."""

from __future__ import annotations

import asyncio
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource.events import StringIdEvent
from django_eventsource.operations.presence import (
    Listeners,
    alisteners,
)
from django_eventsource.views import EventSourceView
from tests.support import waiting
from tests.support.listeners import Connection
from tests.support.processes import Server, serve

SECONDS = 15
BEAT = 0.5
OPEN = {
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_POLL_SECONDS": 0.1,
    "ROOT_URLCONF": "tests.integration.test_presence",
}

real_commits = pytest.mark.django_db(transaction=True)


class Answer(StringIdEvent):
    """An event of a production, which clients may stop."""

    ACTIONS = ["stop"]


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("only/<action>/<token>", EventSourceView.as_view(exclusive=True)),
    path("answers/<action>/<token>", EventSourceView.as_view(event_class=Answer)),
    path("heard/<action>/<token>", EventSourceView.as_view(require_listener=True)),
]


until = functools.partial(waiting.until, seconds=SECONDS, interval_seconds=0.02)


# Two processes


@pytest.fixture
def pair(settings) -> Iterator[tuple[Server, Server]]:
    """Run two processes that share only the database."""
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
async def test_listeners_of_two_processes_are_counted_together(
    pair: tuple[Server, Server],
) -> None:
    """Those of a killed process disappear after three missed renewals."""
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
async def test_exclusive_and_require_listener_use_the_listeners_of_other_processes(
    pair: tuple[Server, Server],
) -> None:
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
async def test_an_exclusive_listener_is_written_at_once() -> None:
    with serve("uvicorn", **OPEN, EVENTSOURCE_PRESENCE_SECONDS=600) as server:
        stream = await open_at(server, "/only/poll/t")
        await until(count_is("t", 1))
        stream.close()
        await until(count_is("t", 0))
