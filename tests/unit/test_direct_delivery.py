"""Durable events reach the listeners of the publishing process without the channel layer."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest
from channels.layers import get_channel_layer

from django_eventsource import apublish, apublish_many
from django_eventsource.delivery.hub import get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.notifier import notifier
from django_eventsource.events import StringEvent
from django_eventsource.exceptions import DeliveryFailed
from django_eventsource.history import get_history
from django_eventsource.protocol.messages import encode
from django_eventsource.publishing import apublish_posted
from tests.support.events import add
from tests.support.layers import FaultySharedLayer, layer_of
from tests.support.streams import StreamTask
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


class Broker(FaultySharedLayer):
    """A layer whose messages are brought to the hub when the test says so."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._sent: list[tuple[str, dict[str, Any]]] = []

    @property
    def sent(self) -> list[tuple[str, dict[str, Any]]]:
        """What was sent, after all publishers have sent it."""
        assert notifier.flush(PATIENCE_SECONDS)
        return self._sent

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        if self is not get_channel_layer():
            await super().group_send(group, message)  # the hub sends to itself
            return
        self._call("group_send")
        if self.hang is not None:
            await asyncio.Event().wait()
        self._sent.append((group, message))

    async def bring(self) -> None:
        """Bring what was sent, in its order."""
        for group, message in self.sent:
            await FaultySharedLayer.group_send(layer_of(get_hub()), group, message)
        self.sent.clear()


@pytest.fixture
def layer(settings) -> Broker:
    """The publishers' layer. History checks deliver nothing while a test runs."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.unit.test_direct_delivery.Broker"}}
    settings.EVENTSOURCE_POLL_SECONDS = 600
    layer = get_channel_layer()
    assert isinstance(layer, Broker)
    return layer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places from which the history was read."""
    history, reads = get_history(), []
    read = history.read

    def noted(token: str, after: int, **bounds: int) -> Any:
        reads.append(after)
        return read(token, after, **bounds)

    monkeypatch.setattr(history, "read", noted)
    return reads


async def listen() -> StreamTask:
    """Open a stream, and wait until the hub's first history check is over."""
    reader = await StreamTask().live()
    await until(lambda: get_hub()._wake._waiters)
    return reader


def data(reader: StreamTask) -> list[str]:
    """The data of the events that a stream has sent."""
    return [line[6:] for line in reader.body.decode().split("\n") if line.startswith("data: ")]


def foreign(*texts: str) -> list[tuple[str, dict[str, Any]]]:
    """Append events as another process does, and return its messages, which are on their way."""
    group = group_name("t")
    return [(group, encode(group, entry.batch())) for entry in add(get_history(), *texts)]


@pytest.mark.parametrize("publisher", ["apublish", "apublish_many", "post"])
async def test_a_durable_event_arrives_at_once_in_its_process_while_the_layer_is_down(
    layer: Broker, publisher: str
) -> None:
    """It does not wait for the next history check."""
    reader = await listen()
    layer.failing.add("group_send")
    if publisher == "apublish":
        await apublish("t", "ping", "a")
    elif publisher == "apublish_many":
        await apublish_many([("t", "ping", "a")])
    else:
        await apublish_posted("t", "ping", "a", type(await apublish("t", "ping", "before")))
    await until(lambda: "a" in data(reader))
    await reader.close()


async def test_a_durable_event_arrives_while_the_layer_hangs(layer: Broker) -> None:
    """Neither the publisher nor the listeners of its process wait for the layer."""
    reader = await listen()
    layer.hang = asyncio.Event()
    await apublish("t", "ping", "a")
    await until(lambda: data(reader) == ["a"])
    assert not notifier.flush(0)
    await reader.close()


async def test_the_copy_that_the_layer_delivers_is_dropped(layer: Broker) -> None:
    """The sequence number is known already."""
    reader = await listen()
    await apublish("t", "ping", "a")
    await apublish_many([("t", "ping", "b"), ("t", "ping", "c")])
    assert sum(len(message["frames"]) for _, message in layer.sent) == 3
    await layer.bring()
    await apublish("t", "ping", "d")
    await until(lambda: "d" in data(reader))
    assert data(reader) == ["a", "b", "c", "d"]
    await reader.close()


@pytest.mark.parametrize("down", [False, True])
async def test_a_live_only_event_is_sent_over_the_layer_alone(layer: Broker, down: bool) -> None:
    """Without a sequence number a second copy could not be dropped."""
    reader = await listen()
    if down:
        layer.failing.add("group_send")
    with pytest.raises(DeliveryFailed) if down else nullcontext():
        await apublish("t", "ping", "live", StringEvent)
    await apublish("t", "ping", "a")
    await until(lambda: "a" in data(reader))
    assert data(reader) == ["a"]
    await layer.bring()
    await until(lambda: ("live" in data(reader)) != down)
    assert data(reader).count("live") == int(not down)
    await reader.close()


async def test_an_event_without_a_listener_in_its_process_does_not_wake_the_loop(
    layer: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = await listen()
    delivered: list[Any] = []
    monkeypatch.setattr(get_hub()._queue, "put", lambda *call: delivered.append(call))
    await apublish("another", "ping", "a")
    assert (len(layer.sent), delivered) == (1, [])
    await apublish("t", "ping", "a")
    ((group, batches),) = delivered
    assert [encode(group, batch) for batch in batches] == [one for _, one in layer.sent[1:]]
    await reader.close()


# Next to other processes


async def test_an_event_of_another_process_that_arrives_a_moment_later_costs_no_read(
    layer: Broker, reads: list[int]
) -> None:
    """The event of the own process has overtaken it."""
    get_hub().reorder_seconds = 0.5
    add(get_history(), "before")
    reader = await listen()
    reads.clear()
    layer.sent.extend(foreign("a"))
    await apublish("t", "ping", "b")
    feed = get_hub()._feeds["t"]
    await until(lambda: feed.has_gap)
    assert data(reader) == []
    await layer.bring()
    await until(lambda: data(reader) == ["a", "b"])
    await asyncio.sleep(0.6)
    assert reads == []
    await reader.close()


async def test_gaps_that_close_in_time_cost_no_read_however_many_follow_each_other(
    layer: Broker, reads: list[int]
) -> None:
    """Two processes publish to one token all the time."""
    add(get_history(), "before")
    reader = await listen()
    reads.clear()
    hub = get_hub()
    hub.reorder_seconds = 0.5
    feed = hub._feeds["t"]
    expected = []
    for n in range(5):
        on_the_way = foreign(f"other {n}")
        await apublish("t", "ping", f"own {n}")
        await until(lambda: feed.has_gap)
        gaps = hub._gaps()
        layer.sent[:] = on_the_way
        on_the_way = foreign(f"next {n}")
        await apublish("t", "ping", f"after {n}")
        await layer.bring()
        layer.sent[:] = []
        await until(lambda n=n: data(reader)[-1:] == [f"own {n}"])
        assert feed.has_gap
        await hub._close_gaps(gaps)  # as after reorder_seconds
        assert hub._wake.is_set()
        layer.sent[:] = on_the_way
        await layer.bring()
        await until(lambda: not feed.has_gap)
        expected += [f"other {n}", f"own {n}", f"next {n}", f"after {n}"]
    await until(lambda: data(reader) == expected)
    assert reads == []
    await reader.close()


async def test_an_event_lost_on_the_layer_is_read_before_the_history_check(
    layer: Broker,
) -> None:
    """An event of the own process shows that one before it is missing."""
    reader = await listen()
    foreign("lost")
    await apublish("t", "ping", "b")
    await until(lambda: data(reader) == ["lost", "b"])
    await reader.close()
