"""The test kit with real databases and brokers."""

from __future__ import annotations

from typing import Any

import pytest
from asgiref.sync import async_to_sync

from django_eventsource import apublish, publish
from django_eventsource.delivery.hub import get_hub
from django_eventsource.testing import (
    atrim_history,
    capture_events,
    drop_layer_messages,
    listen,
    recycle_server,
)
from tests.support import mariadb
from tests.support.histories import ALIASES
from tests.support.valkey import shared_server
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

HISTORIES = {
    "sqlite": {},
    "postgres": {"OPTIONS": {"USING": "postgres"}},
    "mariadb": {"OPTIONS": {"USING": "mariadb"}},
    "redis": {"BACKEND": "django_eventsource.history.redis.RedisHistory"},
}

MARIADB = pytest.param(
    "mariadb", marks=pytest.mark.skipif(bool(mariadb.MISSING), reason=mariadb.MISSING)
)


@pytest.fixture(params=["sqlite", "postgres", MARIADB, "redis"])
def history(request: pytest.FixtureRequest, settings: Any) -> str:
    """Use a history; with Redis also its channel layer."""
    settings.EVENTSOURCE_HISTORY = dict(HISTORIES[request.param])
    if request.param == "redis":
        url = shared_server().url
        settings.EVENTSOURCE_HISTORY["OPTIONS"] = {"HOSTS": [url]}
        settings.CHANNEL_LAYERS = {
            "default": {
                "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
                "CONFIG": {"hosts": [url]},
            }
        }
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.05
    return str(request.param)


async def survive_faults(history: str) -> None:
    async with listen("t", timeout_seconds=PROCESS_PATIENCE_SECONDS) as stream:
        await apublish("t", "ping", "1")
        await stream.next("ping")
        with drop_layer_messages():
            await apublish("t", "ping", "2")
            await stream.next("ping")
        await recycle_server()
        await apublish("t", "ping", "3")
        await stream.next("ping")
        stream.stall()
        await apublish("t", "ping", "4")
        await stream.cut()
        await stream.next("ping")
        await stream.assert_complete()
        assert [event.data for event in stream.events] == ["1", "2", "3", "4"]
        await stream.cut()
        await apublish("t", "ping", "5")
        if history == "redis":
            with pytest.raises(TypeError, match="not a RedisHistory"):
                await atrim_history()
            await stream.next("ping")
        else:
            await atrim_history()
            await stream.next("reset")
        await close_layer_of_hub()


async def close_layer_of_hub() -> None:
    """Close the connections to the broker, as the end of a process does."""
    hub = get_hub()
    for task in list(hub._tasks):
        task.cancel()
    flush = getattr(hub._membership.layer, "flush", None)
    assert flush is not None
    await flush()


@pytest.mark.django_db(transaction=True, databases=ALIASES)
def test_a_stream_is_complete_after_each_fault(history: str) -> None:
    async_to_sync(survive_faults)(history)


@pytest.mark.django_db(databases=ALIASES)
def test_events_are_captured_in_a_transaction_that_does_not_commit(history: str) -> None:
    with capture_events() as events:
        publish("t", "ping", "a")
    assert events == [("t", "ping", "a")]
    assert events[0].event.id is not None
