"""The membership of a hub in the channel layer, with real brokers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.utils.module_loading import import_string

from django_eventsource.delivery.group_membership import GroupMembership
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.layer import background, group_name
from django_eventsource.events import StringEvent
from django_eventsource.history import get_history
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.messages import encode
from django_eventsource.publishing import apublish
from tests.support.events import add, draft
from tests.support.layers import FaultySharedLayer
from tests.support.streams import StreamTask
from tests.support.valkey import ValkeyServer, valkey
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, settings) -> None:
    monkeypatch.setattr(FaultySharedLayer, "made", [])
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}


def live_message(token: str, text: str) -> dict[str, Any]:
    return encode(group_name(token), draft(text).batch())


# Real brokers

CORE = "channels_redis.core.RedisChannelLayer"
PUBSUB = "channels_redis.pubsub.RedisPubSubChannelLayer"


def use(settings: Any, backend: str, **config: Any) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": backend, "CONFIG": config}}


async def close_layers(hub: Hub) -> None:
    """Close the connections, as the end of a process would."""
    await asyncio.to_thread(background.end)
    for layer in (hub._membership.layer, get_channel_layer()):
        close = getattr(layer, "close_pools", None) or layer.flush
        await close()


@pytest.fixture
def broker() -> Any:
    with valkey() as server:
        yield server


async def test_a_socket_timeout_of_redis_loses_no_event(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is shorter than the wait of the core layer, and the history contains the events."""
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 1}])
    settings.EVENTSOURCE_POLL_SECONDS = 1.3
    caplog.set_level(logging.DEBUG, "django_eventsource.delivery")
    reader = await StreamTask().live()
    await until(lambda: "socket_timeout ended a wait" in caplog.text)
    for n in range(3):
        await apublish("t", "ping", f"event {n}")
        await until(lambda n=n: f"event {n}".encode() in reader.body)
    await until(lambda: caplog.text.count("socket_timeout ended a wait") >= 2)
    for n in range(3, 6):
        await apublish("t", "ping", f"event {n}")
        await until(lambda n=n: f"event {n}".encode() in reader.body)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
    assert [reader.body.count(b"event %d" % n) for n in range(6)] == [1] * 6
    await reader.close()
    await stop(get_hub())


async def test_the_waits_of_the_core_layer_end_before_the_time_out_of_redis(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The layer loses no message."""
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 3}])
    settings.EVENTSOURCE_POLL_SECONDS = 600  # nothing but the layer brings anything
    caplog.set_level(logging.DEBUG, "django_eventsource.delivery")
    reader = await StreamTask().live()
    await asyncio.sleep(3.5)
    assert "ended a wait" not in caplog.text
    await apublish("t", "ping", "after the wait", StringEvent)
    await until(lambda: b"after the wait" in reader.body)
    await reader.close()
    # On Python 3.11 asyncio.wait_for(), in which redis-py sends, loses a cancellation that
    # comes when what it waits for is done: the next wait must have begun.
    await until(lambda: valkey_server.run("INFO", "clients")["blocked_clients"])
    for _ in range(10):
        await asyncio.sleep(0)
    await stop(get_hub())


async def stop(hub: Hub) -> None:
    """End the hub's tasks, then the layer's connections."""
    tasks = list(hub._tasks)
    for task in tasks:
        task.cancel()
    _, pending = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
    assert not pending, "the hub's tasks cannot be ended"
    async with asyncio.timeout(PATIENCE_SECONDS):
        await close_layers(hub)


async def test_live_only_events_arrive_again_after_the_broker_was_emptied(
    settings, broker: ValkeyServer
) -> None:
    """No connection breaks, and no durable event is published."""
    use(settings, CORE, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    reader = await StreamTask().live()
    for text in ("before", "after"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while text.encode() not in reader.body:
                await apublish("t", "ping", text, StringEvent)
                await asyncio.sleep(0.1)
        broker.run("FLUSHALL")
    await reader.close()
    await stop(get_hub())


@pytest.mark.parametrize("backend", [CORE, PUBSUB], ids=["core", "pubsub"])
async def test_live_only_events_arrive_again_after_the_broker_restarted_without_data(
    settings, broker: ValkeyServer, backend: str
) -> None:
    """Durable events arrive from the history meanwhile."""
    use(settings, backend, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    reader = await StreamTask().live()
    await apublish("t", "ping", "before")
    await until(lambda: b"before" in reader.body)
    broker.restart(data=False)
    await apublish("t", "ping", "durable")
    await until(lambda: b"durable" in reader.body)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while b"live" not in reader.body:
            with contextlib.suppress(Exception):
                await apublish("t", "ping", "live", StringEvent)
            await asyncio.sleep(0.1)
    assert reader.body.count(b"durable") == 1
    await reader.close()
    await stop(get_hub())


def subscribers(broker: ValkeyServer) -> int:
    """How many connections are subscribed to something."""
    with broker.client() as client:
        return len(client.client_list(_type="pubsub"))


async def test_a_pubsub_layer_whose_receiver_has_died_is_replaced(
    settings, broker: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connections of the old instance are closed."""
    use(settings, PUBSUB, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.1
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 1.0)
    reader = await StreamTask().live()
    hub = get_hub()
    first = hub._membership.layer
    first._get_layer()._shards[0]._receive_task.cancel()
    await apublish("t", "ping", "meanwhile")
    await until(lambda: hub._membership.layer is not first)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while b"live" not in reader.body:
            await apublish("t", "ping", "live", StringEvent)
            await asyncio.sleep(0.05)
    assert reader.body.count(b"meanwhile") == 1
    try:
        async with asyncio.timeout(2):
            while subscribers(broker) > 1:
                await asyncio.sleep(0.05)
    finally:
        await reader.close()
        await stop(hub)
        await first.flush()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [CORE, PUBSUB], ids=["core", "pubsub"])
async def test_events_arrive_from_the_history_while_the_broker_is_down(
    settings,
    broker: ValkeyServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Each failure is logged once, and live-only events arrive after the outage."""
    # Only the first failure is told for as long as the waits become longer.
    monkeypatch.setattr(Hub, "backoff_seconds", [0.05] * 100)
    use(settings, backend, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    broker.kill()
    readers = [await StreamTask(f"t{n}").live() for n in range(10)]
    add(get_history(), "a", token="t3")
    await until(lambda: b"data: a" in readers[3].body)
    await asyncio.sleep(1)
    told = [one for one in caplog.records if one.name == "django_eventsource.delivery"]
    told = [one for one in told if one.levelno >= logging.WARNING]
    broker.start()
    async with asyncio.timeout(PATIENCE_SECONDS * 2):
        while b"live" not in readers[7].body:
            with contextlib.suppress(Exception):
                await apublish("t7", "ping", "live", StringEvent)
            await asyncio.sleep(0.1)
    for reader in readers:
        await reader.close()
    await stop(get_hub())
    lines = [one.getMessage() for one in told]
    assert len(lines) == len(set(lines)), lines
    assert lines


# Foreign writers on the broker


async def forge(backend: str, server: ValkeyServer, seq: int, keys: list[str] | None) -> None:
    """Send an event on the broker as a client that is not part of the project."""
    layer = import_string(backend)(hosts=[server.url], symmetric_encryption_keys=keys)
    batch = Batch([draft("forged").frame(seq)], [seq])
    await layer.group_send(group_name("t"), encode(group_name("t"), batch))
    await (getattr(layer, "close_pools", None) or layer.flush)()


@pytest.mark.parametrize("backend", [CORE, PUBSUB])
async def test_a_forged_event_is_delivered_and_hides_a_real_one(
    settings, backend: str, valkey_server: ValkeyServer
) -> None:
    """docs/explanation/guarantees.rst states this for a broker with other writers."""
    settings.EVENTSOURCE_POLL_SECONDS = 600  # a history check would report the missed event
    use(settings, backend, hosts=[{"address": valkey_server.url, "socket_timeout": None}])
    reader = await StreamTask().live()
    first = await apublish("t", "ping", "first")
    await until(lambda: b"first" in reader.body)
    await forge(backend, valkey_server, int(first.id) + 1, None)
    await until(lambda: b"forged" in reader.body)
    await apublish("t", "ping", "hidden")
    await apublish("t", "ping", "next")
    await until(lambda: b"next" in reader.body)
    assert b"hidden" not in reader.body
    await reader.close()
    await stop(get_hub())


@pytest.mark.parametrize("backend", [CORE, PUBSUB])
async def test_a_forged_event_is_not_delivered_by_an_encrypted_layer(
    settings, backend: str, valkey_server: ValkeyServer
) -> None:
    """Neither plain text nor another key is accepted, and no event is missed."""
    hosts = [{"address": valkey_server.url, "socket_timeout": None}]
    use(settings, backend, hosts=hosts, symmetric_encryption_keys=["secret"])
    reader = await StreamTask().live()
    (first,) = add(get_history(), "first")
    await until(lambda: b"first" in reader.body)
    for keys in (None, ["guess"]):
        await forge(backend, valkey_server, first.seq + 1, keys)
    for n in range(3):
        await apublish("t", "ping", f"real {n}")
        await until(lambda n=n: f"real {n}".encode() in reader.body)
    assert b"forged" not in reader.body
    assert [reader.body.count(b"real %d" % n) for n in range(3)] == [1] * 3
    await reader.close()
    await stop(get_hub())


@pytest.mark.slow
async def test_probes_lost_to_time_outs_of_waits_do_not_cause_a_rejoin(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The core layer loses a message that arrives at the time-out of redis-py."""
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 0.7}])
    settings.EVENTSOURCE_POLL_SECONDS = 0.7
    caplog.set_level(logging.DEBUG, "django_eventsource.delivery")
    reader = await StreamTask().live()
    async with asyncio.timeout(60):
        while caplog.text.count("socket_timeout ended a wait") < 8:
            await asyncio.sleep(0.05)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
    await reader.close()
    await stop(get_hub())
