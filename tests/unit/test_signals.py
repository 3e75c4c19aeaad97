"""The signals of streams and events."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import markcoroutinefunction
from django.contrib.auth.models import User
from django.db import transaction
from django.dispatch import Signal
from django.http import HttpResponse
from django.test import AsyncClient

from django_eventsource import publish
from django_eventsource.events import JSONIdEvent, StringEvent, StringIdEvent
from django_eventsource.publishing import apublish
from django_eventsource.signals import Reason, event_published, stream_closed, stream_opened
from django_eventsource.streaming.registry import registry
from django_eventsource.streaming.response import EventStreamResponse
from django_eventsource.streaming.stream import EventStream
from django_eventsource.views import EventSourceView
from tests.support.waiting import PATIENCE_SECONDS, until

memory = pytest.mark.usefixtures("memory_history", "allow_any")


@pytest.fixture
def allow_any(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


@pytest.fixture
def connect() -> Iterator[Callable[..., None]]:
    """Connect receivers during a test."""
    connected: list[tuple[Signal, Any, Any]] = []

    def connect(signal: Signal, receiver: Any, sender: Any = None) -> None:
        signal.connect(receiver, sender=sender, weak=False)
        connected.append((signal, receiver, sender))

    yield connect
    for signal, receiver, sender in connected:
        assert signal.disconnect(receiver, sender=sender)


async def open_stream(token: str = "t") -> EventStream:
    """Open a stream and read its first bytes, as the wrapper does."""
    response = await AsyncClient().get(f"/events/poll/{token}")
    assert isinstance(response, EventStreamResponse)
    await anext(response._stream)
    return response._stream


def opens(got: list[dict[str, Any]]) -> Callable[..., None]:
    def receive(**kwargs: Any) -> None:
        got.append(kwargs)

    return receive


class Drops:
    """Middleware that returns another response."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: Any) -> HttpResponse:
        response = await self.get_response(request)
        assert isinstance(response, EventStreamResponse)
        return HttpResponse("dropped")


# Streams


@memory
async def test_both_signals_of_a_stream_carry_the_same_listener(
    connect: Callable[..., None],
) -> None:
    """The second one has the reason and the duration."""
    opened: list[dict[str, Any]] = []
    closed: list[dict[str, Any]] = []
    connect(stream_opened, opens(opened), EventSourceView)
    connect(stream_closed, opens(closed), EventSourceView)
    stream = await open_stream()
    (begin,) = opened
    assert begin["sender"] is EventSourceView
    assert begin["signal"] is stream_opened
    assert begin["listener"].tokens == ("t",)
    assert begin["listener"].address == "127.0.0.1"
    assert begin["request"].path == "/events/poll/t"
    assert closed == []
    await stream.aclose()
    await until(lambda: closed)
    (end,) = closed
    assert end["listener"] is begin["listener"]
    assert end["reason"] is Reason.CLIENT_DISCONNECTED
    assert 0 <= end["seconds"] < PATIENCE_SECONDS


@memory
async def test_a_close_event_sends_stream_closed_once(connect: Callable[..., None]) -> None:
    closed: list[dict[str, Any]] = []
    connect(stream_closed, opens(closed))
    stream = await open_stream()
    await apublish("t", "close")
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for _ in stream:
            pass
    await stream.aclose()
    await until(lambda: closed)
    await asyncio.sleep(0.01)
    assert [one["reason"] for one in closed] == [Reason.TOKEN_CLOSED]


@memory
async def test_a_response_that_middleware_drops_sends_stream_closed(
    connect: Callable[..., None], settings
) -> None:
    closed: list[dict[str, Any]] = []
    connect(stream_closed, opens(closed))
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "tests.unit.test_signals.Drops"]
    response = await AsyncClient().get("/events/poll/t")
    assert response.content == b"dropped"
    gc.collect()
    await until(lambda: closed)
    assert [one["reason"] for one in closed] == [Reason.CLIENT_DISCONNECTED]
    assert registry.count("t") == 0


@memory
async def test_a_coroutine_function_receives_the_signals_of_streams(
    connect: Callable[..., None],
) -> None:
    got: list[str] = []

    async def on_open(listener: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        got.append("open")

    async def on_close(reason: Reason, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        got.append(reason.value)

    connect(stream_opened, on_open)
    connect(stream_closed, on_close)
    stream = await open_stream()
    assert got == ["open"]
    await stream.aclose()
    await until(lambda: len(got) == 2)
    assert got == ["open", "client_disconnected"]


@memory
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_receiver_that_raises_does_not_stop_the_stream_or_other_receivers(
    connect: Callable[..., None], caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    got: list[dict[str, Any]] = []

    def fail(**kwargs: Any) -> None:
        raise RuntimeError("a receiver failed")

    async def afail(**kwargs: Any) -> None:
        raise RuntimeError("a receiver failed")

    for signal in (stream_opened, stream_closed):
        connect(signal, afail if asynchronous else fail)
        connect(signal, opens(got))
    stream = await open_stream()
    await stream.aclose()
    await until(lambda: len(got) == 2)
    await until(lambda: caplog.text.count("RuntimeError: a receiver failed") == 2)


@memory
async def test_a_receiver_of_another_view_is_not_called(connect: Callable[..., None]) -> None:
    got: list[dict[str, Any]] = []

    class Other(EventSourceView):
        pass

    connect(stream_opened, opens(got), Other)
    connect(stream_closed, opens(got), Other)
    stream = await open_stream()
    await stream.aclose()
    await until(lambda: not registry.count("t"))
    await asyncio.sleep(0.01)
    assert got == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("allow_any")
async def test_the_listener_has_the_user_id_and_a_hash_of_the_session_key(
    connect: Callable[..., None],
) -> None:
    got: list[dict[str, Any]] = []
    connect(stream_opened, opens(got))
    user = await User.objects.acreate_user("user")
    client = AsyncClient()
    await client.aforce_login(user)
    response = await client.get("/events/poll/t")
    (begin,) = got
    key = client.cookies["sessionid"].value
    assert begin["listener"].user == str(user.pk)
    assert begin["listener"].session
    assert key not in repr(begin["listener"])
    await response._stream.aclose()  # type: ignore[attr-defined]


# Events


@memory
@pytest.mark.parametrize("event_class", [StringIdEvent, JSONIdEvent, StringEvent])
def test_event_published_carries_the_id_of_a_durable_event(
    connect: Callable[..., None], event_class: type, settings
) -> None:
    got: list[dict[str, Any]] = []
    connect(event_published, opens(got), event_class)
    event = publish("t", "ping", "42", event_class)
    (one,) = got
    assert one["event"] is event
    assert (event.id is None) == (event_class is StringEvent)
    assert (event.token, event.action) == ("t", "ping")


@memory
def test_a_receiver_that_raises_does_not_fail_the_publisher(
    connect: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("a receiver failed")

    connect(event_published, fail)
    for event_class in (StringIdEvent, StringEvent):
        publish("t", "ping", "42", event_class)
    assert caplog.text.count("RuntimeError: a receiver failed") == 2


@memory
async def test_a_coroutine_function_receives_events_of_synchronous_and_asynchronous_publishers(
    connect: Callable[..., None],
) -> None:
    got: list[str | None] = []

    async def receive(event: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        got.append(event.id)

    connect(event_published, receive)
    one = await apublish("t", "ping", "a")
    two = await asyncio.to_thread(publish, "t", "ping", "b")
    assert got == [one.id, two.id]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("event_class", [StringIdEvent, StringEvent])
def test_event_published_is_sent_after_the_commit_and_not_after_a_rollback(
    connect: Callable[..., None], event_class: type
) -> None:
    got: list[dict[str, Any]] = []
    connect(event_published, opens(got))
    with transaction.atomic():
        publish("t", "ping", "a", event_class)
        assert got == []
    assert [one["event"].value for one in got] == [["a"]]
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        publish("t", "ping", "b", event_class)
        raise ZeroDivisionError
    assert len(got) == 1
    assert (got[0]["event"].id is None) == (event_class is StringEvent)


@pytest.mark.django_db(transaction=True)
def test_a_receiver_that_raises_after_the_commit_affects_no_other_hook(
    connect: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("a receiver failed")

    done = []
    connect(event_published, fail)
    with transaction.atomic():
        publish("t", "ping", "a")
        transaction.on_commit(lambda: done.append(1))
    assert done == [1]
    assert "RuntimeError: a receiver failed" in caplog.text
