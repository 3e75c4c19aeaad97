"""Attacks by another tenant of the broker, who publishes on the channels of the layer."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import msgpack
import pytest

from django_eventsource import apublish
from django_eventsource.delivery.hub import Hub
from django_eventsource.delivery.layer import get_layer, group_name
from django_eventsource.events import StringEvent
from django_eventsource.history.redis.backend import RedisHistory
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.frames import encode_event
from django_eventsource.protocol.messages import encode, encode_probe
from django_eventsource.testing import listen
from django_eventsource.testing.listening import ClientStream
from tests.support.events import draft, texts
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history")

FORGED = encode_event("ping", b"forged")
NESTED = b"\x91" * 1020 + b"\xc0"
"""As many lists, each in the one before it, as msgpack decodes."""


def of_group(**changes: Any) -> bytes:
    return bytes(msgpack.packb(encode(group_name("t"), Batch([FORGED])) | changes))


POISON = [
    b"",
    b"\xc1",
    b"not msgpack",
    NESTED,
    b"\x81\xa4type" + NESTED,
    b"\x82\xa4type\xb1eventsource.frame\xa6frames" + NESTED,
    msgpack.packb({"type": "x\r\n\x1b[31m" * 100_000}),
    msgpack.packb({"type": "eventsource.frame"}),
    msgpack.packb(encode_probe() | {"group": group_name("t")}),
    msgpack.packb(["eventsource.frame"]),
    of_group(frames=[b""]),
    of_group(frames=[FORGED, b"", FORGED]),
    of_group(frames="data: forged\n\n"),
    of_group(frames={"0": FORGED}),
    of_group(seq="1"),
    of_group(seq=[1]),
    of_group(group=None),
    of_group(group="eventsource." + "0" * 40),
    of_group(closes=1),
    of_group(seq=2**64 - 1),
    of_group(seq=-1),
]
"""Messages that cannot be events of the token, or are far from its position."""


@pytest.fixture
def layer(settings: Any, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use the pub/sub layer of channels_redis, with which the test may change its settings."""
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,))
    config: dict[str, Any] = {"hosts": [valkey_server.url]}
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": config,
        }
    }
    return config


async def attack(server: ValkeyServer, messages: list[bytes]) -> None:
    """Publish messages on the channel of the token's group."""
    layer: Any = get_layer()
    channel = layer._get_group_channel_name(group_name("t"))
    with server.client() as client:
        await until(lambda: client.publish(channel, b"\xc0"))
        for message in messages:
            assert client.publish(channel, message) == 1


async def receive_live(stream: ClientStream) -> None:
    """Publish live-only events until the stream receives one. The messages before it are read.

    After a message that the layer cannot decode, the process joins its groups again, and one may
    be lost.
    """
    receiving = asyncio.create_task(stream.next())
    while not receiving.done():
        await apublish("t", "ping", "live", StringEvent)
        await asyncio.wait([receiving], timeout=0.05)
    assert receiving.result().data == "live"


async def test_no_message_of_another_tenant_stops_the_events_of_a_process(
    layer: Any, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is skipped, and logged in one line without control characters."""
    caplog.set_level(logging.WARNING, "django_eventsource")
    async with listen("t") as stream:
        await attack(valkey_server, POISON)
        await receive_live(stream)
        await apublish("t", "ping", "durable")
        while (await stream.next("ping")).data != "durable":
            pass
        assert stream.is_open
    assert b"forged" not in stream.body
    skipped = [one for one in caplog.records if "Skipped a channel-layer" in one.getMessage()]
    assert len(skipped) >= 15
    assert all(len(one.getMessage()) < 300 for one in skipped)
    assert all(one.getMessage().isprintable() for one in skipped)


async def test_with_encryption_keys_no_forged_event_is_delivered(
    layer: Any, valkey_server: ValkeyServer
) -> None:
    """Without them, a message in the right form is an event for the listeners."""
    layer["symmetric_encryption_keys"] = ["a key"]
    async with listen("t") as stream:
        await attack(valkey_server, [of_group(), of_group(closes=True), *POISON])
        await receive_live(stream)
    assert b"forged" not in stream.body


TOKENS = ["}", "{t}", "a}:head", "*", "\r\nFLUSHALL\r\n", "é" * 255]


def test_no_token_changes_the_names_of_the_keys_in_redis(valkey_server: ValkeyServer) -> None:
    """The names contain hashes of tokens, of keys of events and of names of processes."""
    history = RedisHistory(HOSTS=[valkey_server.url])
    for token in TOKENS:
        history.append(token, [draft("x", key=token)])
        history.announce(token, {token: [token]}, 60)
        assert texts(history.read(token, 0).entries) == ["x"]
        assert history.present(token) == [token]
    with valkey_server.client() as client:
        names = {name.decode() for name in client.keys("*")}
    of_token = re.compile(r"[\w-]+:\{[0-9a-f]{32}\}:[a-z]+(:[0-9a-f]+)?")
    of_server = re.compile(r"[\w-]+:(lease:[0-9a-f]{32}|[a-z]+)")
    assert not [one for one in names if not (of_token.fullmatch(one) or of_server.fullmatch(one))]
    assert len({name for name in names if name.endswith(":head")}) == len(TOKENS)
