"""The faults, the clocks and the fixtures of the test kit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.utils import timezone

from django_eventsource import apublish, publish
from django_eventsource.delivery.hub import get_hub
from django_eventsource.events import StringEvent
from django_eventsource.exceptions import InvalidGrant
from django_eventsource.grants import make_grant, read_grant
from django_eventsource.history import get_history
from django_eventsource.operations.shutdown import shutdown
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import (
    capture_events,
    drop_layer_messages,
    listen,
    move_time,
    recycle_server,
    trim_history,
)
from django_eventsource.testing.connection import Connection
from tests.support.layers import FaultySharedLayer
from tests.support.waiting import until

SHARED = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}


@pytest.fixture(autouse=True)
def site(settings, memory_history) -> Iterator[None]:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 600
    yield
    assert not list(registry.streams())


# Faults


@pytest.mark.parametrize("shared", [False, True])
async def test_a_dropped_event_arrives_with_the_next_history_check(settings, shared: bool):
    if shared:
        settings.CHANNEL_LAYERS = SHARED
    async with listen("t") as stream:
        await until(lambda: get_hub()._wake._waiters)  # the first history check is over
        with drop_layer_messages():
            await apublish("t", "ping", "a")
            await apublish("t", "ping", "b", StringEvent)
        if shared:
            layer = get_channel_layer()
            assert isinstance(layer, FaultySharedLayer)
            assert "group_send" not in layer.calls
        with move_time(601):
            assert (await stream.next("ping")).data == "a"
        await stream.assert_complete()
        assert len(stream.events) == 1


@pytest.mark.django_db
@pytest.mark.parametrize("kind", ["memory.MemoryHistory", "database.DatabaseHistory"])
def test_a_trimmed_history_contains_no_event(settings, kind: str):
    settings.EVENTSOURCE_HISTORY = {"BACKEND": f"django_eventsource.history.{kind}"}
    with capture_events():
        event = publish("t", "ping", "a")
    history, seq = get_history(), int(event.id or 0)
    trim_history()
    assert not history.read("t", seq - 1).complete
    assert history.read("t", seq).complete
    assert history.max_age == 86_400


def test_a_history_that_cannot_be_trimmed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("django_eventsource.testing.faults.get_history", lambda: object())
    with pytest.raises(TypeError, match="MemoryHistory, not a object"):
        trim_history()


async def test_a_recycled_server_accepts_streams_at_once():
    async with listen("t") as stream:
        await recycle_server()
        assert not shutdown.begun
        await stream.reconnect()
        assert stream.is_open


async def test_streams_are_served_after_a_recycled_server_that_could_not_end_its_streams(
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(loop: object) -> None:
        raise LookupError

    monkeypatch.setattr(shutdown, "end_streams", fail)
    with pytest.raises(LookupError):
        await recycle_server()
    assert not shutdown.begun


# Time


def test_both_kinds_of_clocks_are_moved_and_the_monotonic_one_stays():
    before = time.time(), timezone.now().timestamp(), time.monotonic()
    with move_time(1000), move_time(100):
        assert time.time() - before[0] >= 1100
        assert timezone.now().timestamp() - before[1] >= 1100
        assert time.monotonic() - before[2] >= 1100
    assert time.time() - before[0] < 1000
    assert timezone.now().timestamp() - before[1] < 1000
    assert time.monotonic() - before[2] >= 1100


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_time_moves_forward_only(seconds: float):
    with pytest.raises(ValueError, match="positive"), move_time(seconds):
        pass


def test_a_grant_expires():
    grant = make_grant("t", listen=True, seconds=60)
    with move_time(61), pytest.raises(InvalidGrant, match="expired"):
        read_grant(grant)
    assert read_grant(grant).listen


async def test_a_stream_ends_at_its_maximum_age(settings):
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 3600
    async with listen("t") as stream:
        with move_time(3601):
            await until(lambda: not stream.is_open)


async def test_a_keepalive_is_sent_at_the_second_of_two_ticks(settings):
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = 3600
    async with listen("t") as stream:
        with move_time(1801):
            await until(lambda: all(one._subscriber.quiet for one in registry.streams()))
        opening = stream.body
        with move_time(1801):
            await until(lambda: stream.body != opening)
        assert stream.body.removeprefix(opening).startswith(b":")


async def test_events_expire(settings):
    settings.EVENTSOURCE_PRUNE_SECONDS = 60
    async with listen("t") as stream:
        await apublish("t", "ping", "a")
        event = await stream.next("ping")
        with move_time(86_401):
            await until(lambda: not get_history().read("t", int(event.id) - 1).complete)


# A request


async def test_the_path_and_the_headers_reach_the_application():
    scopes: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        scopes.append((scope, await receive()))
        await send({"type": "http.response.start", "status": 204, "headers": [(b"X-A", b"b")]})
        await send({"type": "http.response.body"})

    connection = Connection(lambda data: None, lambda: None)
    connection.start(application, "/a%2Fb/%C3%A9?c=d", {"Last-Event-ID": "é"})
    await until(lambda: connection.has_ended)
    ((scope, message),) = scopes
    assert (scope["path"], scope["raw_path"]) == ("/a/b/é", b"/a%2Fb/%C3%A9")
    assert scope["query_string"] == b"c=d"
    assert (b"last-event-id", "é".encode()) in scope["headers"]
    assert message == {"type": "http.request", "body": b"", "more_body": False}
    assert (connection.status, connection.headers) == (204, {"x-a": "b"})


async def test_what_is_sent_after_the_disconnect_is_ignored():
    received: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"late"})

    connection = Connection(received.append, lambda: None)
    connection.start(application, "/", {})
    await asyncio.sleep(0)
    await connection.disconnect(10)
    assert received == []
