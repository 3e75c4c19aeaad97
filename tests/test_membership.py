"""The hub's membership in the channel layer: what it survives, and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from channels.layers import BaseChannelLayer, get_channel_layer
from django.utils.module_loading import import_string

from django_eventsource import hub as hub_module
from django_eventsource import membership as module
from django_eventsource.background import background
from django_eventsource.events import StringEvent
from django_eventsource.feeds import Feed
from django_eventsource.history import get_history
from django_eventsource.hub import Hub, get_hub
from django_eventsource.layers import MESSAGE_TYPE
from django_eventsource.membership import Membership
from django_eventsource.publishing import apublish
from django_eventsource.streams import EventStream
from django_eventsource.tokens import group_name
from tests.histories import add, draft
from tests.valkey import ValkeyServer, valkey

pytestmark = pytest.mark.usefixtures("memory_history")

SECONDS = 10


class Shared(BaseChannelLayer):
    """A layer that stands for one that processes share; it fails, hangs and falls deaf."""

    made: list[Shared] = []

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.queues: dict[str, asyncio.Queue[Any]] = {}
        self.groups: dict[str, set[str]] = {}
        self.calls: list[str] = []
        self.failing: set[str] = set()
        self.hang: asyncio.Event | None = None
        self.deaf = False
        Shared.made.append(self)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise ConnectionError(f"{name} failed")

    async def new_channel(self, prefix: str = "specific.") -> str:
        name = f"{prefix}.{len(self.queues)}.{id(self)}"
        self.queues[name] = asyncio.Queue()
        return name

    async def receive(self, channel: str) -> Any:
        self._call("receive")
        return await self.queues[channel].get()

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        self._call("send")
        if not self.deaf:
            self.queues[channel].put_nowait(message)

    async def group_add(self, group: str, channel: str) -> None:
        self._call("group_add")
        if self.hang is not None:
            await self.hang.wait()
        self.groups.setdefault(group, set()).add(channel)

    async def group_discard(self, group: str, channel: str) -> None:
        self._call("group_discard")
        self.groups.get(group, set()).discard(channel)

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self._call("group_send")
        for channel in self.groups.get(group, ()):
            await self.send(channel, message)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, settings) -> None:
    monkeypatch.setattr(Shared, "made", [])
    monkeypatch.setattr(hub_module, "BACK_OFF_SECONDS", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_membership.Shared"}}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def layer_of(hub: Hub) -> Shared:
    assert isinstance(hub._membership.layer, Shared)
    return hub._membership.layer


class Reader:
    """Reads a stream in a task, so that it can be looked at any time."""

    def __init__(self, token: str = "t") -> None:
        self.stream = EventStream(token, get_history().locate(token, None))
        self.body = b""
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self.stream:
            self.body += chunk

    async def live(self) -> Reader:
        await until(lambda: self.stream._subscriber.subscriptions[0].live)
        return self

    async def close(self) -> None:
        await self.stream.aclose()
        await self.task


def live_message(token: str, text: str) -> dict[str, Any]:
    return {
        "type": MESSAGE_TYPE,
        "group": group_name(token),
        "seq": None,
        "finish": False,
        "frames": [draft(text).frame()],
    }


# Deafness


async def test_a_layer_that_brings_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new one is taken, with all groups; nothing that is durable is lost meanwhile."""
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.2)
    reader = await Reader().live()
    hub = get_hub()
    first = layer_of(hub)
    first.deaf = True
    add(get_history(), "while it is deaf")
    await until(lambda: layer_of(hub) is not first)
    await until(lambda: group_name("t") in layer_of(hub).groups)
    assert "taking a new one" in caplog.text
    await layer_of(hub).group_send(group_name("t"), live_message("t", "on the new one"))
    await until(lambda: b"on the new one" in reader.body)
    assert reader.body.count(b"while it is deaf") == 1
    assert reader.stream.reason is None
    await reader.close()


async def test_a_layer_that_forgets_its_groups(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It raises nothing and brings the rest: the groups are joined again, and the layer kept."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    reader = await Reader().live()
    hub = get_hub()
    layer = layer_of(hub)
    await until(lambda: len(layer.groups) == 2)
    layer.groups.clear()
    await until(lambda: len(layer.groups) == 2)
    await layer.group_send(group_name("t"), live_message("t", "a member again"))
    await until(lambda: b"a member again" in reader.body)
    assert layer_of(hub) is layer
    assert "forgotten its groups" in caplog.text
    await reader.close()


@pytest.mark.parametrize("lost", range(module.PROBES))
async def test_a_probe_that_is_lost(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """One is sent again, before the layer is taken for forgetful."""
    reader = await Reader().live()
    layer = layer_of(get_hub())
    send = layer.group_send
    sent = []

    async def lose(group: str, message: dict[str, Any]) -> None:
        sent.append(group)
        if len(sent) > lost:
            await send(group, message)

    await until(lambda: len(layer.groups) == 2)
    monkeypatch.setattr(layer, "group_send", lose)
    await until(lambda: len(sent) > lost + 5)
    assert caplog.text == ""
    await reader.close()


async def test_no_verdict_while_nobody_receives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failure the hub waits before it receives again: that loses it no group."""
    reader = await Reader().live()
    hub = get_hub()
    layer = layer_of(hub)
    monkeypatch.setattr(hub_module, "BACK_OFF_SECONDS", (1_000,))
    layer.failing.add("receive")
    await until(lambda: not hub._membership.receiving)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0)
    before = layer.calls.count("group_send")
    await until(lambda: layer.calls.count("group_send") > before + 3 * module.PROBES)
    assert "forgotten" not in caplog.text
    await reader.close()


@pytest.mark.slow
async def test_waits_that_end_when_a_probe_comes(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The core layer loses what comes as redis-py gives up a wait: no group is lost by that."""
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 0.7}])
    settings.EVENTSOURCE_POLL_SECONDS = 0.7
    caplog.set_level(logging.DEBUG, "django_eventsource.hub")
    reader = await Reader().live()
    async with asyncio.timeout(60):
        while caplog.text.count("socket_timeout ended a wait") < 8:
            await asyncio.sleep(0.05)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
    await reader.close()
    await stop(get_hub())


async def test_probes_are_skipped_silently(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They keep a layer that hears, and show nowhere."""
    caplog.set_level(logging.DEBUG, "django_eventsource")
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.2)
    reader = await Reader().live()
    hub = get_hub()
    first = layer_of(hub)
    opening = reader.body
    await until(lambda: first.calls.count("send") >= 20)
    await asyncio.sleep(0.3)
    assert layer_of(hub) is first
    assert reader.body == opening
    assert "not ours" not in caplog.text
    assert "new one" not in caplog.text
    await reader.close()


async def test_head_checks_that_are_rare(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EVENTSOURCE_POLL_SECONDS longer than the deafness: a layer that hears is kept."""
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.05)
    settings.EVENTSOURCE_POLL_SECONDS = 0.1
    reader = await Reader().live()
    hub = get_hub()
    first = layer_of(hub)
    await until(lambda: layer_of(hub).calls.count("send") >= 4 or layer_of(hub) is not first)
    assert layer_of(hub) is first
    assert "taking a new one" not in caplog.text
    await reader.close()


async def test_a_history_that_was_away_for_long(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hub that could not ask its history for a while has not become deaf."""
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.1)
    reader = await Reader().live()
    hub = get_hub()
    first = layer_of(hub)
    history = get_history()
    heads = history.heads
    monkeypatch.setattr(history, "heads", lambda tokens: 1 / 0)
    await asyncio.sleep(0.3)
    monkeypatch.setattr(history, "heads", heads)
    add(history, "after")
    await until(lambda: b"after" in reader.body)
    await asyncio.sleep(0.05)
    assert layer_of(hub) is first
    await reader.close()


async def test_a_hub_without_tokens_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe is sent for nobody, and nothing is replaced."""
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.05)
    hub = get_hub()
    first = layer_of(hub)
    await asyncio.sleep(0.2)
    assert layer_of(hub) is first
    assert "send" not in first.calls


async def test_a_probe_that_cannot_be_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and the stream lives on the history."""
    reader = await Reader().live()
    layer = layer_of(get_hub())
    layer.failing.add("send")
    before = layer.calls.count("send")
    await until(lambda: layer.calls.count("send") >= before + 5)
    assert caplog.text.count("send failed") == 1
    add(get_history(), "a")
    await until(lambda: b"data: a" in reader.body)
    await reader.close()


async def test_a_probe_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is under way at a time; the layer that takes none is replaced."""
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.2)
    reader = await Reader().live()
    hub = get_hub()
    first = layer_of(hub)
    calls = []

    async def send(channel: str, message: dict[str, Any]) -> None:
        calls.append(channel)
        await asyncio.Event().wait()

    monkeypatch.setattr(first, "send", send)
    await until(lambda: layer_of(hub) is not first)
    assert len(calls) == 1
    await reader.close()


# Membership alone


def make_feed(token: str = "t") -> Feed:
    return Feed(token, group_name(token), lambda: None)


@pytest.fixture
async def membership() -> AsyncIterator[tuple[Membership, dict[str, Feed]]]:
    """One without a hub."""
    feeds: dict[str, Feed] = {}
    tasks: list[asyncio.Task[None]] = []

    def start(work: Any) -> asyncio.Task[None]:
        tasks.append(asyncio.ensure_future(work))
        return tasks[-1]

    yield Membership(start, feeds), feeds
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def shared(one: Membership) -> Shared:
    assert isinstance(one.layer, Shared)
    return one.layer


@pytest.fixture
def feed(membership: tuple[Membership, dict[str, Feed]]) -> Feed:
    """The only one that somebody listens to."""
    _, feeds = membership
    feed = make_feed()
    feeds[feed.group] = feed
    return feed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the membership goes by, and nobody else."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def checked(one: Membership) -> bool:
    """Check, and wait until the probe has ended."""
    deaf = one.check(shared=True)
    assert one._probing is not None
    await one._probing
    return deaf


async def test_a_join_that_hangs_while_the_layer_is_replaced(
    membership: tuple[Membership, dict[str, Feed]], feed: Feed
) -> None:
    """The group is joined on the new layer at once; the old one's answer means nothing."""
    one, _ = membership
    old = shared(one)
    old.hang = asyncio.Event()
    one.begin_join(feed)
    await until(lambda: "group_add" in old.calls)
    one.replace()
    new = shared(one)
    old.hang.set()
    for _ in range(20):
        one.join_missing()
        await asyncio.sleep(0)
    assert feed.joined
    assert feed.group in new.groups


async def test_a_channel_that_is_named_while_the_layer_is_replaced(
    membership: tuple[Membership, dict[str, Feed]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one, the new layer's: to be received on and to join groups with."""
    one, _ = membership
    old = one.layer
    go_on = asyncio.Event()

    async def new_channel(prefix: str) -> str:
        await go_on.wait()
        return "old"

    monkeypatch.setattr(old, "new_channel", new_channel)
    early = [asyncio.ensure_future(one.get_channel()) for _ in range(2)]
    await asyncio.sleep(0)
    one.replace()
    late = await one.get_channel()
    go_on.set()
    assert await asyncio.gather(*early) == [late, late]
    assert one.channel == late
    assert list(shared(one).queues) == [late]


async def test_a_layer_that_drops_messages(
    membership: tuple[Membership, dict[str, Feed]],
    feed: Feed,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over its capacity it does that: joining again is tried less and less often."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0)
    one, _ = membership
    layer = shared(one)
    layer.deaf = True

    async def joins(seconds: int) -> list[int]:
        times = []
        for second in range(seconds):
            before = layer.calls.count("group_add")
            await checked(one)
            if feed.joining is not None:
                await feed.joining
            one.hear()  # of others, whose messages come
            if layer.calls.count("group_add") > before:
                times.append(second)
            clock.now += 1
        return times

    assert await joins(75) == [0, 10, 30, 70]
    one.answer()
    assert await joins(15) == [0, 10]


async def test_who_was_forgotten_joins_at_once(
    membership: tuple[Membership, dict[str, Feed]], feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only at the next head check, which may be far."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0)
    one, _ = membership
    feed.joined = True
    assert not await checked(one)
    assert feed.joining is not None
    await feed.joining
    assert len(shared(one).groups) == 2


@pytest.mark.parametrize(
    ("error", "deaf"), [(TimeoutError("slow"), True), (ConnectionError("refused"), False)]
)
async def test_a_probe_that_fails(
    membership: tuple[Membership, dict[str, Feed]],
    feed: Feed,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    deaf: bool,
) -> None:
    """A broker that answers late may be deaf to us; one that is not there says nothing."""
    one, _ = membership

    async def send(channel: str, message: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(one.layer, "send", send)
    monkeypatch.setattr(module, "DEAF_SECONDS", 0)
    assert not await checked(one)
    assert one.check(shared=True) is deaf


async def test_a_probe_that_fails_after_one_that_was_lost(
    membership: tuple[Membership, dict[str, Feed]],
    feed: Feed,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that was lost still counts: deafness is measured from there."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0)
    one, _ = membership
    shared(one).deaf = True
    assert not await checked(one)
    shared(one).failing.add("send")
    clock.now += module.DEAF_SECONDS
    assert not await checked(one)
    clock.now += 1
    assert await checked(one)


@pytest.mark.parametrize(
    ("expiry", "after"), [(None, 600), (0, 600), (86_400, 600), (60, 30), (7, 3.5), (-1, 0.5)]
)
async def test_groups_are_joined_again_before_they_expire(
    membership: tuple[Membership, dict[str, Feed]],
    feed: Feed,
    clock: SimpleNamespace,
    expiry: int | None,
    after: float,
) -> None:
    """The layer's ``group_expiry`` says when it forgets its members."""
    one, _ = membership
    layer: Any = one.layer
    if expiry is not None:
        layer.group_expiry = expiry
    one.forget()
    feed.joined = True
    clock.now += after - 0.1
    one.join_missing()
    assert feed.joined
    clock.now += 0.1
    one.join_missing()
    assert not feed.joined


async def test_a_broker_that_is_down_is_told_once(
    membership: tuple[Membership, dict[str, Feed]], caplog: pytest.LogCaptureFixture
) -> None:
    """Not for each of many tokens; and again only after it has worked."""
    one, feeds = membership
    layer = shared(one)
    layer.failing.add("group_add")
    for n in range(20):
        feed = make_feed(f"t{n}")
        feeds[feed.group] = feed
    for _ in range(3):
        one.join_missing()
        await asyncio.gather(*(feed.joining for feed in feeds.values() if feed.joining))
    assert layer.calls.count("group_add") == 60
    assert caplog.text.count("Could not join") == 1
    layer.failing.clear()
    one.join_missing()
    await asyncio.gather(*(feed.joining for feed in feeds.values() if feed.joining))
    assert all(feed.joined for feed in feeds.values())
    one.forget()
    layer.failing.add("group_add")
    one.join_missing()
    await asyncio.gather(*(feed.joining for feed in feeds.values() if feed.joining))
    assert caplog.text.count("Could not join") == 2


async def test_leaving_many_groups_of_a_broker_that_is_down(
    membership: tuple[Membership, dict[str, Feed]], caplog: pytest.LogCaptureFixture
) -> None:
    """One of them is tried at each head check, which is logged once; none is forgotten."""
    one, _ = membership
    layer = shared(one)
    channel = await one.get_channel()
    groups = [group_name(f"t{n}") for n in range(20)]
    for group in groups:
        await layer.group_add(group, channel)
    layer.failing.add("group_discard")
    for group in groups:
        one.leave(group)
    await left(one)
    for _ in range(2):
        one.join_missing()
        await left(one)
    assert layer.calls.count("group_discard") == 3
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    layer.failing.clear()
    one.join_missing()
    await left(one)
    assert not any(layer.groups.values())


async def left(membership: Membership) -> None:
    """Wait for the task that leaves groups."""
    assert membership._leaving is not None
    await membership._leaving


async def test_a_group_is_left_after_a_time_out_of_the_wait_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a load peak a process has no subscriptions without listeners."""
    reader = await Reader("t").live()
    hub = get_hub()
    layer = layer_of(hub)
    await until(lambda: layer.groups[group_name("t")])
    monkeypatch.setattr(module, "LAYER_SECONDS", 0.05)
    async with hub._membership._order:
        await reader.close()
        await until(lambda: "Could not leave" in caplog.text)
    await until(lambda: not layer.groups[group_name("t")])


async def test_a_group_that_is_left_twice_is_left_after_the_join_in_between(
    membership: tuple[Membership, dict[str, Feed]],
) -> None:
    """A listener came and went while the group of the one before it was being left."""
    one, feeds = membership
    layer = shared(one)
    feed = make_feed()
    proceed, discard = asyncio.Event(), layer.group_discard

    async def slow(group: str, channel: str) -> None:
        await proceed.wait()
        await discard(group, channel)

    layer.group_discard = slow  # type: ignore[method-assign]
    one.leave(feed.group)
    await asyncio.sleep(0)
    feeds[feed.group] = feed
    joining = one.begin_join(feed)
    await asyncio.sleep(0)
    del feeds[feed.group]
    one.leave(feed.group)
    proceed.set()
    await joining
    await left(one)
    assert layer.calls == ["group_discard", "group_add", "group_discard"]
    assert not layer.groups[feed.group]


async def test_a_group_that_is_wanted_again_is_not_left(
    membership: tuple[Membership, dict[str, Feed]],
) -> None:
    """Somebody came while the last one was leaving."""
    one, feeds = membership
    layer = shared(one)
    feed = make_feed()
    feeds[feed.group] = feed
    one.leave(feed.group)
    await left(one)
    assert "group_discard" not in layer.calls
    del feeds[feed.group]
    one.leave(feed.group)
    await left(one)
    assert "group_discard" in layer.calls


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


async def test_an_idle_connection_that_times_out(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """redis-py's socket_timeout, shorter than the core layer's wait: no error, no loss.

    What comes as a wait is given up the layer loses, and the history brings.
    """
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 1}])
    settings.EVENTSOURCE_POLL_SECONDS = 1.3
    caplog.set_level(logging.DEBUG, "django_eventsource.hub")
    reader = await Reader().live()
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


async def test_waits_end_before_redis_gives_them_up(
    settings, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """As they do with redis-py's default of 5 s: the layer loses nothing."""
    use(settings, CORE, hosts=[{"address": valkey_server.url, "socket_timeout": 3}])
    settings.EVENTSOURCE_POLL_SECONDS = 600  # nothing but the layer brings anything
    caplog.set_level(logging.DEBUG, "django_eventsource.hub")
    reader = await Reader().live()
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
    _, pending = await asyncio.wait(tasks, timeout=SECONDS)
    assert not pending, "the hub's tasks cannot be ended"
    async with asyncio.timeout(SECONDS):
        await close_layers(hub)


async def test_a_broker_that_was_emptied(settings, broker: ValkeyServer) -> None:
    """No connection breaks, and nothing durable is published: live-only events come again."""
    use(settings, CORE, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    reader = await Reader().live()
    for text in ("before", "after"):
        async with asyncio.timeout(SECONDS):
            while text.encode() not in reader.body:
                await apublish("t", "ping", text, StringEvent)
                await asyncio.sleep(0.1)
        broker.run("FLUSHALL")
    await reader.close()
    await stop(get_hub())


@pytest.mark.parametrize("backend", [CORE, PUBSUB], ids=["core", "pubsub"])
async def test_a_broker_that_forgets(settings, broker: ValkeyServer, backend: str) -> None:
    """Restarted without its data: events arrive, first by the history, then live again."""
    use(settings, backend, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    reader = await Reader().live()
    await apublish("t", "ping", "before")
    await until(lambda: b"before" in reader.body)
    broker.restart(data=False)
    await apublish("t", "ping", "durable")
    await until(lambda: b"durable" in reader.body)
    async with asyncio.timeout(SECONDS):
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


async def test_a_pubsub_layer_that_fell_deaf(
    settings, broker: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its receiver has died: a new layer takes over, and nothing of the old one is left."""
    use(settings, PUBSUB, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.1
    monkeypatch.setattr(module, "DEAF_SECONDS", 1.0)
    reader = await Reader().live()
    hub = get_hub()
    first = hub._membership.layer
    first._get_layer()._shards[0]._receive_task.cancel()
    await apublish("t", "ping", "meanwhile")
    await until(lambda: hub._membership.layer is not first)
    async with asyncio.timeout(SECONDS):
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
async def test_a_real_broker_that_is_down(
    settings,
    broker: ValkeyServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Many tokens, one line; events arrive by the history; and when it is back, live."""
    # Only the first failure is told for as long as the waits become longer.
    monkeypatch.setattr(hub_module, "BACK_OFF_SECONDS", [0.05] * 100)
    use(settings, backend, hosts=[broker.url])
    settings.EVENTSOURCE_POLL_SECONDS = 0.2
    broker.kill()
    readers = [await Reader(f"t{n}").live() for n in range(10)]
    add(get_history(), "a", token="t3")
    await until(lambda: b"data: a" in readers[3].body)
    await asyncio.sleep(1)
    told = [one for one in caplog.records if one.name == "django_eventsource.hub"]
    told = [one for one in told if one.levelno >= logging.WARNING]
    broker.start()
    async with asyncio.timeout(SECONDS * 2):
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
    """Send an event on the broker as somebody who is not part of the project."""
    layer = import_string(backend)(hosts=[server.url], symmetric_encryption_keys=keys)
    message = {**live_message("t", ""), "seq": seq, "frames": [draft("forged").frame(seq)]}
    await layer.group_send(group_name("t"), message)
    await (getattr(layer, "close_pools", None) or layer.flush)()


@pytest.mark.parametrize("backend", [CORE, PUBSUB])
async def test_a_forged_event_is_delivered_and_hides_a_real_one(
    settings, backend: str, valkey_server: ValkeyServer
) -> None:
    """What docs/guarantees.rst says of a broker with foreign writers."""
    settings.EVENTSOURCE_POLL_SECONDS = 600  # a history check would report the missed event
    use(settings, backend, hosts=[{"address": valkey_server.url, "socket_timeout": None}])
    reader = await Reader().live()
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
    """Neither plain text nor another key is accepted, and no real event is missed."""
    hosts = [{"address": valkey_server.url, "socket_timeout": None}]
    use(settings, backend, hosts=hosts, symmetric_encryption_keys=["secret"])
    reader = await Reader().live()
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
