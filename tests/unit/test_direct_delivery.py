"""Durable events reach the listeners of the publishing process without the channel layer."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest
from channels.layers import get_channel_layer

from django_eventsource import apublish, apublish_many
from django_eventsource import hub as hub_module
from django_eventsource.events import StringEvent
from django_eventsource.exceptions import DeliveryFailed
from django_eventsource.history import get_history
from django_eventsource.hub import get_hub
from django_eventsource.layers import MESSAGE_TYPE
from django_eventsource.publishing import apublish_posted
from django_eventsource.tokens import group_name
from tests.histories import add
from tests.test_membership import Reader, Shared, layer_of, until

pytestmark = pytest.mark.usefixtures("memory_history")


class Broker(Shared):
    """A layer whose messages are brought to the hub when the test says so."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.sent: list[tuple[str, dict[str, Any]]] = []

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        if self is not get_channel_layer():
            await super().group_send(group, message)  # the hub sends to itself
            return
        self._call("group_send")
        if self.hang is not None:
            await asyncio.Event().wait()
        self.sent.append((group, message))

    async def bring(self) -> None:
        """Bring what was sent, in its order."""
        for group, message in self.sent:
            await Shared.group_send(layer_of(get_hub()), group, message)
        self.sent.clear()


@pytest.fixture
def layer(settings) -> Broker:
    """The publishers' layer. Head checks bring nothing while a test runs."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_direct.Broker"}}
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


async def listen() -> Reader:
    """Open a stream, and wait until the hub's first head check is over."""
    reader = await Reader().live()
    await until(lambda: get_hub()._wake._waiters)
    return reader


def data(reader: Reader) -> list[str]:
    """The data of the events that a stream has sent."""
    return [line[6:] for line in reader.body.decode().split("\n") if line.startswith("data: ")]


def foreign(*texts: str) -> list[tuple[str, dict[str, Any]]]:
    """Append events as another process does, and return its messages, which are on their way."""
    return [
        (
            group_name("t"),
            {
                "type": MESSAGE_TYPE,
                "group": group_name("t"),
                "seq": entry.seq,
                "finish": False,
                "frames": [entry.frame()],
            },
        )
        for entry in add(get_history(), *texts)
    ]


@pytest.mark.parametrize("publisher", ["apublish", "apublish_many", "post"])
async def test_a_durable_event_arrives_at_once_in_its_process_while_the_layer_is_down(
    layer: Broker, publisher: str
) -> None:
    """It does not wait for the next head check."""
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


async def test_a_durable_event_arrives_while_its_publisher_waits_for_a_layer_that_hangs(
    layer: Broker,
) -> None:
    """The listeners of its process are served first."""
    reader = await listen()
    layer.hang = asyncio.Event()
    publishing = asyncio.create_task(apublish("t", "ping", "a"))
    await until(lambda: data(reader) == ["a"])
    assert not publishing.done()
    await publishing
    await reader.close()


async def test_the_copy_that_the_layer_brings_is_dropped(layer: Broker) -> None:
    """Its number is known already."""
    reader = await listen()
    await apublish("t", "ping", "a")
    await apublish_many([("t", "ping", "b"), ("t", "ping", "c")])
    assert len(layer.sent) == 2
    await layer.bring()
    await apublish("t", "ping", "d")
    await until(lambda: "d" in data(reader))
    assert data(reader) == ["a", "b", "c", "d"]
    await reader.close()


@pytest.mark.parametrize("down", [False, True])
async def test_a_live_only_event_goes_by_the_layer_alone(layer: Broker, down: bool) -> None:
    """It has no number by which a second copy could be dropped."""
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


async def test_an_event_without_a_listener_in_its_process_is_not_handed_to_the_hub(
    layer: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its publisher does not wake the loop."""
    reader = await listen()
    delivered: list[Any] = []
    monkeypatch.setattr(get_hub(), "deliver", delivered.append)
    await apublish("another", "ping", "a")
    assert (len(layer.sent), delivered) == (1, [])
    await apublish("t", "ping", "a")
    assert [message for _, message in layer.sent[1:]] == delivered[0]
    await reader.close()


# Next to other processes


async def test_an_event_of_another_process_that_arrives_a_moment_later_costs_no_read(
    layer: Broker, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event of the own process is the later one, but needs no time on the layer."""
    monkeypatch.setattr(hub_module, "REORDER_SECONDS", 0.5)
    add(get_history(), "before")
    reader = await listen()
    reads.clear()
    layer.sent += foreign("a")
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
    """Where two processes publish to one token all the time, some event is always on its way."""
    add(get_history(), "before")
    reader = await listen()
    reads.clear()
    hub = get_hub()
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
        await hub._close_gaps(gaps)  # as after REORDER_SECONDS
        assert hub._wake.is_set()
        layer.sent[:] = on_the_way
        await layer.bring()
        await until(lambda: not feed.has_gap)
        expected += [f"other {n}", f"own {n}", f"next {n}", f"after {n}"]
    await until(lambda: data(reader) == expected)
    assert reads == []
    await reader.close()


async def test_an_event_that_another_process_lost_on_the_layer_is_read_before_the_head_check(
    layer: Broker,
) -> None:
    """The event of the own process shows that one before it is missing."""
    reader = await listen()
    foreign("lost")
    await apublish("t", "ping", "b")
    await until(lambda: data(reader) == ["lost", "b"])
    await reader.close()


async def test_own_events_do_not_hide_that_the_layer_has_forgotten_a_group(
    settings, layer: Broker
) -> None:
    """Events that only head checks bring, twice in a row: the group is joined again."""
    reader = await listen()
    groups = layer_of(get_hub()).groups
    await until(lambda: groups.pop(group_name("t"), None))
    for text in ("a", "b"):
        foreign(text)
        await get_hub()._check_heads()
        await apublish("t", "ping", f"own {text}")
        await until(lambda text=text: data(reader)[-1:] == [f"own {text}"])
    await until(lambda: groups.get(group_name("t")))
    await reader.close()
