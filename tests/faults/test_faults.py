"""The scenarios: listeners, publishers, a fault, and exact counts at the end."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest
from channels_redis.core import RedisChannelLayer

from django_eventsource.delivery.layer import group_name
from django_eventsource.protocol.messages import MESSAGE_TYPE
from tests.faults.cluster import EVENTS, PUBLISHERS, Away, Cluster

# The processes use these databases, which are wait_drained after each scenario.
pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


async def test_connections_cut_at_random() -> None:
    """Listeners lose their connections repeatedly, also in the middle of a line."""
    async with Cluster("connections cut", history="postgres", layer="pubsub") as cluster:
        await cluster.listen(cuts=True)
        await cluster.publish()
        await cluster.finish()
        assert min(one.connections for one in cluster.listeners) > 1


# Servers


async def test_servers_killed() -> None:
    """Each server is killed with SIGKILL once, and started again."""

    async def fault(cluster: Cluster) -> None:
        for share, server in zip((0.2, 0.4, 0.6), cluster.servers, strict=True):
            await cluster.until(share)
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            server.start()

    async with Cluster("servers killed", history="postgres", layer="pubsub") as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


async def test_servers_terminated() -> None:
    """Each server receives SIGTERM under load once, exits, and is started again."""

    async def fault(cluster: Cluster) -> None:
        for share, server in zip((0.2, 0.4, 0.6), cluster.servers, strict=True):
            await cluster.until(share)
            began = time.monotonic()
            await asyncio.to_thread(server.stop, signal.SIGTERM)
            assert time.monotonic() - began < 10
            server.start()

    async with Cluster("servers SIGTERM", history="postgres", layer=None) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


# Valkey


async def kill_valkey(cluster: Cluster, *, data: bool) -> None:
    """Kill the server, and start it again after a second."""
    valkey = cluster.valkey
    assert valkey is not None
    await asyncio.to_thread(valkey.kill)
    await asyncio.sleep(1)
    await asyncio.to_thread(valkey.restart, data=data)


async def test_valkey_killed_with_its_data() -> None:
    """History and layer are missing for a second, twice. No listener receives a reset."""

    async def fault(cluster: Cluster) -> None:
        for share in (0.3, 0.6):
            await cluster.until(share)
            await kill_valkey(cluster, data=True)

    async with Cluster(
        "Valkey killed, data kept", history="redis", layer="pubsub", durable=True
    ) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


async def test_valkey_killed_without_its_data() -> None:
    """The history is lost. Every listener receives a reset, and then every new event."""

    async def fault(cluster: Cluster) -> None:
        await cluster.until(0.5)
        await kill_valkey(cluster, data=False)

    async with Cluster(
        "Valkey killed, data lost", history="redis", layer="pubsub", loses=True
    ) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish(resets="all")


async def test_valkey_killed_while_transactions_wait_in_the_outbox() -> None:
    """The commits succeed meanwhile, and their events arrive after the restart."""

    async def fault(cluster: Cluster) -> None:
        valkey = cluster.valkey
        assert valkey is not None
        for share in (0.3, 0.6):
            await cluster.until(share)
            await asyncio.to_thread(valkey.kill)
            await asyncio.sleep(3)
            await asyncio.to_thread(valkey.start)

    async with Cluster(
        "Valkey killed, outbox",
        history="redis",
        layer="pubsub",
        durable=True,
        history_options={"OUTBOX": True, "USING": "postgres"},
        seconds=300,
    ) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()
        assert cluster.committed


async def test_a_layer_killed_without_its_data() -> None:
    """The layer loses all groups. The history is in another store, so no event is lost."""

    async def fault(cluster: Cluster) -> None:
        for share in (0.3, 0.6):
            await cluster.until(share)
            await kill_valkey(cluster, data=False)

    async with Cluster("layer killed", history="postgres", layer="core") as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


@pytest.mark.parametrize(("history", "layer"), [("postgres", "pubsub"), ("redis", "core")])
async def test_valkey_paused(history: str, layer: str) -> None:
    """The server does not run for 15 s, and receives only then what it was sent."""

    async def fault(cluster: Cluster) -> None:
        valkey = cluster.valkey
        assert valkey is not None
        await cluster.until(0.4)
        valkey.pause()
        await asyncio.sleep(15)
        valkey.resume()

    async with Cluster(
        f"Valkey paused, {history}",
        history=history,
        layer=layer,
        history_options={"TIMEOUT": 30} if history == "redis" else {},
        no_timeout=history == "redis",
    ) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


async def test_a_layer_of_capacity_one() -> None:
    """The layer drops nearly every message. Listeners receive the events from the history."""
    async with Cluster(
        "layer capacity 1", history="redis", layer="core", layer_options={"capacity": 1}
    ) as cluster:
        await cluster.listen()
        await cluster.publish()
        await cluster.finish()


@pytest.mark.parametrize("layer", ["pubsub", "core"])
async def test_garbage_in_the_groups(layer: str) -> None:
    """Another program sends messages of other shapes and bytes of any kind to the groups."""
    shapes: list[dict[str, Any]] = [
        {"type": "other"},
        {"type": MESSAGE_TYPE},
        {"type": MESSAGE_TYPE, "group": 1, "seq": "x", "closes": None, "frames": "text"},
        {"no": "type"},
        {},
    ]

    async def fault(cluster: Cluster) -> None:
        valkey = cluster.valkey
        assert valkey is not None
        groups = [group_name(token) for token in cluster.tokens]
        channel_layer = RedisChannelLayer(hosts=[valkey.url])
        client = valkey.client()
        for n in range(1, 10):
            await cluster.until(n / 10)
            junk = cluster.chance.randbytes(20)
            for group in groups:
                if layer == "pubsub":
                    for one in [junk, b"", *map(channel_layer.serialize, shapes)]:
                        client.publish(f"asgi__group__{group}", one)
                    continue
                for shape in shapes:
                    await channel_layer.group_send(group, {**shape, "group": group})
                for member in client.zrange(f"asgi:group:{group}", 0, -1):
                    name = member.decode().partition("!")[0]
                    client.zadd(f"asgi{name}!", {junk: time.time()})
        client.close()
        await channel_layer.close_pools()

    async with Cluster(f"garbage, {layer}", history="redis", layer=layer) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


# PostgreSQL


async def test_postgres_restarted() -> None:
    """The database crashes once, and is restarted in order once."""

    async def fault(cluster: Cluster) -> None:
        assert cluster.postgres is not None
        for share, mode in ((0.3, "immediate"), (0.6, "fast")):
            await cluster.until(share)
            await asyncio.to_thread(cluster.postgres.restart, mode)

    async with Cluster(
        "PostgreSQL restarted", history="postgres", layer="pubsub", own_postgres=True
    ) as cluster:
        await cluster.listen()
        await cluster.publish(fault)
        await cluster.finish()


# Publishers


async def test_publishers_killed_after_the_commit() -> None:
    """They die between the commit and the notification. New ones continue."""
    async with Cluster("publishers killed", history="postgres", layer="pubsub") as cluster:
        await cluster.listen()
        await cluster.publish(deaths=3)
        await cluster.finish()
        assert len(cluster.committed) >= 3 * PUBLISHERS


async def test_publishers_with_an_outbox_killed_after_the_commit() -> None:
    """Other processes move their events to Valkey."""
    async with Cluster(
        "publishers killed, outbox",
        history="redis",
        layer="pubsub",
        history_options={"OUTBOX": True, "USING": "postgres"},
        seconds=300,
    ) as cluster:
        await cluster.listen()
        await cluster.publish(deaths=3)
        await cluster.finish()
        assert len(cluster.committed) >= 3 * PUBLISHERS


async def test_a_clock_set_back() -> None:
    """The clocks of publishers go back by an hour, also before the first event of some tokens."""
    async with Cluster("clock set back", history="postgres", layer=None) as cluster:
        later = [f"{cluster.tokens[0]}-later-{n}" for n in range(2)]
        await cluster.listen(tokens=cluster.tokens + later)
        await cluster.publish(clock_back_at=EVENTS // 10, later_tokens=later)
        await cluster.finish(extra_tokens=later)


# Listeners


async def test_listeners_that_stall() -> None:
    """A third of the listeners does not read for 10 s, and then continues."""
    stalling: list[Away] = []

    async def fault(cluster: Cluster) -> None:
        await cluster.until(0.1)
        for one in stalling:
            one.stall()
        await asyncio.sleep(10)
        for one in stalling:
            assert one.place < max(cluster.acknowledged[one.token])
            one.go_on()

    async with Cluster(
        "readers that stall",
        history="redis",
        layer="core",
        EVENTSOURCE_STREAM_BUFFER_BYTES=32 * 1024,
    ) as cluster:
        await cluster.listen(16)
        stalling += await cluster.listen(8)
        await cluster.publish(fault, pad=1000)
        await cluster.finish()


@pytest.mark.parametrize("history", ["postgres", "redis"])
async def test_a_history_trimmed_while_listeners_are_disconnected(history: str) -> None:
    """They receive a reset that names what is lost. No listener has an unreported gap."""
    away: list[Away] = []

    async def fault(cluster: Cluster) -> None:
        await cluster.until(0.2)
        for one in away:
            one.go_away()
        await cluster.until(0.7)
        await asyncio.sleep(2)  # until a server has pruned
        for one in away:
            one.may_listen.set()

    async with Cluster(
        f"history trimmed, {history}",
        history=history,
        layer="pubsub",
        history_options={"MAX_EVENTS": 300},
        trims=True,
        EVENTSOURCE_PRUNE_SECONDS=1,
    ) as cluster:
        await cluster.listen(16)
        away += await cluster.listen(8)
        await cluster.publish(fault)
        await cluster.finish(resets="some", of=away)


async def test_a_thousand_tokens() -> None:
    """One listener each."""
    async with Cluster(
        "1,000 tokens", history="redis", layer="pubsub", tokens=1000, seconds=150
    ) as cluster:
        await cluster.listen(1000, roams=False)
        await cluster.publish()
        await cluster.finish()


async def test_a_thousand_listeners() -> None:
    """One token."""
    async with Cluster(
        "1,000 listeners", history="redis", layer="pubsub", tokens=1, seconds=150
    ) as cluster:
        await cluster.listen(1000, roams=False)
        await cluster.publish()
        await cluster.finish()
