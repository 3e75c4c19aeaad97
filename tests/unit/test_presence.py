"""The list of listeners, in one process."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource.exceptions import InvalidToken
from django_eventsource.history import get_history
from django_eventsource.operations.presence import (
    Listeners,
    alisteners,
    host_and_pid,
    listeners,
    process_name,
)
from django_eventsource.policies import Policy
from django_eventsource.streaming.registry import registry
from django_eventsource.views import EventSourceView
from tests.support import waiting

SECONDS = 15

OPEN = {
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_POLL_SECONDS": 0.1,
    "ROOT_URLCONF": "tests.unit.test_presence",
}

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


until = functools.partial(waiting.until, seconds=SECONDS, interval_seconds=0.02)


@in_memory
def test_listeners_counts_every_stream_and_names_each_user_once() -> None:
    history = get_history()
    history.announce("one", {"t": ["7", "", "12"], "other": ["9"]}, 60)
    history.announce("two", {"t": ["7", ""]}, 60)
    assert listeners("t") == Listeners(count=5, users=("12", "7"))
    assert listeners("other") == Listeners(count=1, users=("9",))
    assert listeners("nobody") == Listeners(count=0, users=())


@in_memory
async def test_alisteners_returns_the_same() -> None:
    get_history().announce("one", {"t": ["7"]}, 60)
    assert await alisteners("t") == Listeners(count=1, users=("7",))


@in_memory
@pytest.mark.parametrize("token", ["", "a\0b", "a" * 256])
def test_an_invalid_token_is_an_error(token: str) -> None:
    with pytest.raises(InvalidToken):
        listeners(token)


@in_memory
async def test_without_presence_listeners_raises_and_names_the_setting(settings) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    with pytest.raises(ImproperlyConfigured, match="EVENTSOURCE_PRESENCE_SECONDS is None"):
        listeners("t")
    with pytest.raises(ImproperlyConfigured):
        await alisteners("t")


@in_memory
async def test_a_second_exclusive_listener_receives_423(settings) -> None:
    """Presence is not needed within one process."""
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
async def test_one_of_several_simultaneous_exclusive_requests_is_admitted() -> None:
    client = AsyncClient()
    answers = await asyncio.gather(*[client.get("/only/poll/race") for _ in range(5)])
    assert sorted(one.status_code for one in answers) == [200, 423, 423, 423, 423]
    assert registry.count("race") == 1
    for answer in answers:
        if answer.status_code == 200:
            await answer._stream.aclose()  # type: ignore[attr-defined]


@in_memory
@pytest.mark.parametrize("path", ["heard", "events"])
async def test_a_post_without_a_listener_is_refused_if_the_url_requires_one(path: str) -> None:
    response = await AsyncClient().post(
        f"/{path}/ping/nobody", data="x", content_type="text/plain"
    )
    assert response.status_code == (404 if path == "heard" else 200)
    published = get_history().heads(["nobody"])["nobody"].has_epoch
    assert published is (path == "events")


@in_memory
async def test_a_user_id_that_is_a_number_is_listed_as_text(settings) -> None:
    settings.EVENTSOURCE_POLICY = f"{__name__}.Numbers"
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.05
    stream = (await AsyncClient().get("/events/poll/t"))._stream
    await anext(stream)

    async def there() -> bool:
        return (await alisteners("t")).count == 1

    await until(there)
    assert (await alisteners("t")).users == ("7",)
    await stream.aclose()


class Numbers(Policy):
    """A policy whose users are numbers."""

    async def can_listen(self, request: Any, token: str) -> bool:
        return True

    async def can_send(self, request: Any, token: str, action: str) -> bool:
        return True

    async def identify(self, request: Any) -> int:
        return 7


def test_a_process_name_is_unique_and_contains_host_and_pid() -> None:
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
def test_the_host_may_contain_colons(name: str, expected: tuple[str, str]) -> None:
    """A name of another form is returned as the host."""
    assert host_and_pid(name) == expected


def test_a_long_host_name_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unique part is kept."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 300)
    name = process_name()
    assert len(name) <= 255
    assert host_and_pid(name) == ("h" * 200, str(os.getpid()))
