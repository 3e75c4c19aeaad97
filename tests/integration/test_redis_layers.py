"""Tests of the layers of channels_redis: the system check, and the waits of the hub's layer."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from channels.layers import BaseChannelLayer, get_channel_layer
from channels_redis.core import RedisChannelLayer
from channels_redis.pubsub import RedisPubSubChannelLayer
from django.core.checks import run_checks

from django_eventsource.checks import check_broker
from django_eventsource.delivery.layer import (
    Background,
    close_layer,
    group_name,
    make_hub_layer,
)
from django_eventsource.protocol.messages import decode
from tests.conftest import MEMORY
from tests.support.processes import run_python
from tests.support.valkey import ValkeyServer
from tests.support.waiting import PATIENCE_SECONDS

PUBLISH = """
from django_eventsource import publish
print(publish("t", "ping", "a").id)
"""
PUBLISH_LATE = f"""
import threading
from django_eventsource.delivery.layer import background, get_layer

ending = threading.Event()
threading._register_atexit(ending.set)

async def wait():
    ending.wait()

background.start(get_layer(), wait())
{PUBLISH}
"""
"""The event is sent when the interpreter has begun to end."""
IN_MEMORY = "channels.layers.InMemoryChannelLayer"


class SharedLayer(BaseChannelLayer):
    """A layer that several processes share, which is not one of channels_redis."""


class OwnPubSub(RedisPubSubChannelLayer):
    """A subclass of a project."""


@pytest.mark.parametrize(
    ("layer", "config", "ids"),
    [
        ("channels_redis.core.RedisChannelLayer", {}, ["eventsource.W005"]),
        ("channels_redis.pubsub.RedisPubSubChannelLayer", {}, ["eventsource.W005"]),
        (f"{__name__}.OwnPubSub", {}, ["eventsource.W005"]),
        ("channels_redis.core.RedisChannelLayer", {"symmetric_encryption_keys": ["x"]}, []),
        (
            "channels_redis.pubsub.RedisPubSubChannelLayer",
            {"symmetric_encryption_keys": ["x"]},
            [],
        ),
        (IN_MEMORY, {}, []),
        (f"{__name__}.SharedLayer", {}, []),
        ("nowhere.Layer", {}, []),
    ],
)
def test_check_deploy_warns_of_a_redis_layer_without_encryption(settings, layer, config, ids):
    """`manage.py check` without `--deploy` does not warn."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": layer, "CONFIG": config}}
    found = run_checks(tags=["eventsource"], include_deployment_checks=True)
    assert [message.id for message in found if message.id != "eventsource.E004"] == ids
    assert all("symmetric_encryption_keys" in message.hint for message in found if message.hint)
    plain = run_checks(tags=["eventsource"])
    assert [message.id for message in plain if message.id != "eventsource.E004"] == []


def test_check_deploy_checks_the_layer_of_the_setting(settings):
    """Other layers are not checked, and CONFIG may be missing."""
    settings.CHANNEL_LAYERS = {
        "default": {"BACKEND": IN_MEMORY},
        "events": {"BACKEND": "channels_redis.core.RedisChannelLayer"},
    }
    assert check_broker() == []
    settings.EVENTSOURCE_CHANNEL_LAYER = "events"
    (message,) = check_broker()
    assert "CHANNEL_LAYERS['events']" in message.msg


async def test_the_background_loop_ends_while_another_loop_runs_in_the_thread(
    settings, valkey_server: ValkeyServer
) -> None:
    """A pub/sub layer runs the loop again when it is closed."""
    url = valkey_server.url
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [url]},
        }
    }
    background = Background()
    layer = get_channel_layer()
    background.run(layer, layer.group_send("group", {"type": "news"}))
    loop, thread = background._loop, background._thread
    assert loop is not None
    assert thread is not None
    background.end()
    thread.join(PATIENCE_SECONDS)
    assert loop.is_closed()


class ShortWaits(RedisChannelLayer):
    """A layer of a project, whose waits are short already."""

    brpop_timeout = 1


@pytest.mark.parametrize(
    ("backend", "seconds"),
    [
        ("channels_redis.core.RedisChannelLayer", 2),
        (f"{__name__}.ShortWaits", 1),
    ],
)
def test_the_hub_shortens_waits_of_the_core_layer(settings, backend: str, seconds: int) -> None:
    """They end before redis-py's time-out. The instance of the project keeps its own."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": backend}}
    layer: Any = make_hub_layer()
    assert layer.brpop_timeout == seconds
    assert get_channel_layer().brpop_timeout == type(layer).brpop_timeout


# A process that ends


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("backend", ["pubsub.RedisPubSubChannelLayer", "core.RedisChannelLayer"])
async def test_a_script_that_ends_right_after_it_publishes_notifies_the_other_processes(
    settings: Any, valkey_server: ValkeyServer, backend: str, host: str
) -> None:
    """The name of a host is resolved in a pool of threads, which ends with the interpreter."""
    url = f"redis://{host}:{valkey_server.port}"
    layers = {
        "default": {"BACKEND": f"channels_redis.{backend}", "CONFIG": {"hosts": [url]}},
    }
    settings.CHANNEL_LAYERS = layers
    layer = make_hub_layer()
    channel = await layer.new_channel()
    await layer.group_add(group_name("t"), channel)
    overrides = {
        "CHANNEL_LAYERS": layers,
        "EVENTSOURCE_HISTORY": {
            "BACKEND": "django_eventsource.history.redis.RedisHistory",
            "OPTIONS": {"HOSTS": [valkey_server.url]},
        },
    }
    event_id = await asyncio.to_thread(run_python, PUBLISH_LATE, **overrides)
    async with asyncio.timeout(PATIENCE_SECONDS):
        message = await layer.receive(channel)
    decoded = decode(message)
    assert decoded is not None
    assert list(decoded[1].seqs or ()) == [int(event_id)]
    await close_layer(layer)


async def test_a_script_ends_although_the_broker_does_not_respond(settings: Any) -> None:
    """It waits for two seconds at most. The event is in the history."""
    layer = "channels_redis.pubsub.RedisPubSubChannelLayer"
    with socket.create_server(("127.0.0.1", 0)) as broker:
        hosts = [f"redis://127.0.0.1:{broker.getsockname()[1]}"]
        overrides = {
            "CHANNEL_LAYERS": {"default": {"BACKEND": layer, "CONFIG": {"hosts": hosts}}},
            "EVENTSOURCE_HISTORY": MEMORY,
        }
        assert int(await asyncio.to_thread(run_python, PUBLISH, **overrides))
