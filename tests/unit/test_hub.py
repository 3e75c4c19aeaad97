"""The hub: one channel, one receive task, however many streams; and what it survives."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from channels.layers import InMemoryChannelLayer

from django_eventsource import hub as module
from django_eventsource import membership
from django_eventsource.buffers import share_of
from django_eventsource.feeds import Feed
from django_eventsource.frames import KEEPALIVE, Decoder
from django_eventsource.history import Head, get_history
from django_eventsource.hub import Hub, get_hub, hubs
from django_eventsource.layers import MESSAGE_TYPE
from django_eventsource.subscribers import Subscriber
from django_eventsource.tokens import group_name
from tests.histories import add, draft
from tests.processes import run_python
from tests.singles import Single

pytestmark = pytest.mark.usefixtures("memory_history")

SECONDS = 10


class FaultyLayer(InMemoryChannelLayer):
    """A layer that fails when told: a real one cannot be made to on demand."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.calls: list[tuple[str, ...]] = []
        self.fail: dict[str, int] = {}
        self.hang: asyncio.Event | None = None

    def _call(self, *call: str) -> None:
        self.calls.append(call)
        if self.fail.get(call[0], 0):
            self.fail[call[0]] -= 1
            raise ConnectionError(f"{call[0]} failed")

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        return await super().receive(channel)

    async def group_add(self, group: str, channel: str) -> None:
        self._call("group_add", group, channel)
        if self.hang is not None:
            await self.hang.wait()
        await super().group_add(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        self._call("group_discard", group, channel)
        await super().group_discard(group, channel)


class FaultyHistory:
    """A history that fails as often as told, then asks the real one."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.real = get_history()

    def __getattr__(self, name: str) -> Any:
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise ConnectionError(f"{name} failed")
        return getattr(self.real, name)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, settings) -> None:
    """Back off shortly, check heads often, and fail tests that hang."""
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.FaultyLayer"}}


@pytest.fixture
async def hub() -> Hub:
    return get_hub()


def layer_of(hub: Hub) -> FaultyLayer:
    assert isinstance(hub._membership.layer, FaultyLayer)
    return hub._membership.layer


async def listen(
    hub: Hub, token: str = "t", *, position: int | None = None, keepalive: float | None = None
) -> Subscriber:
    """Subscribe, and catch up as a stream does."""
    if position is None:
        position = get_history().newest(token)[0]
    subscriber = Single(position, token=token, buffer_bytes=100_000, keepalive_seconds=keepalive)
    await hub.subscribe(subscriber)
    while not subscriber.live:
        subscriber.catch_up(await hub.read(token, subscriber.position))
    return subscriber


def message(token: str, seq: int | None, text: str = "x") -> dict[str, Any]:
    """What a publisher sends."""
    frame = draft(text).frame(seq)
    return {
        "type": MESSAGE_TYPE,
        "group": group_name(token),
        "seq": seq,
        "finish": False,
        "frames": [frame],
    }


async def bring(hub: Hub, message: dict[str, Any]) -> None:
    """Send on the hub's layer."""
    await layer_of(hub).group_send(group_name("t"), message)


async def receive(subscriber: Subscriber, count: int) -> list[str]:
    """Give the data of the next events."""
    decoder = Decoder()
    events: list[str] = []
    while len(events) < count:
        async with asyncio.timeout(SECONDS):
            await subscriber.wait()
        while not subscriber.live:
            chunk = subscriber.catch_up(
                await get_hub().read(subscriber.feed.token, subscriber.position)
            )
            events += [event.data for event in decoder.feed(chunk)]
        events += [event.data for event in decoder.feed(subscriber.take())]
    return events


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


# One for all


async def test_one_hub_for_a_loop(hub: Hub) -> None:
    """Everything on one event loop shares one hub, one channel and one membership."""
    assert get_hub() is hub
    assert hub in hubs()
    one, two = await listen(hub), await listen(hub)
    await listen(hub, "other")
    assert {call[1] for call in layer_of(hub).calls if call[0] == "group_add"} == {
        group_name("t"),
        group_name("other"),
    }
    assert len([call for call in layer_of(hub).calls if call[0] == "group_add"]) == 2
    assert len({call[-1] for call in layer_of(hub).calls}) == 1
    (entry,) = add(hub.history, "hello")
    await bring(hub, message("t", entry.seq, "hello"))
    assert await receive(one, 1) == await receive(two, 1) == ["hello"]


async def test_streams_cost_no_tasks(hub: Hub) -> None:
    """A hundred subscribers need the same tasks as one."""
    await listen(hub)
    await until(lambda: len(hub._tasks) == 2)
    for _ in range(100):
        await listen(hub)
    await until(lambda: len(hub._tasks) == 2)


def test_hubs_of_closed_loops_are_forgotten() -> None:
    """A loop that is closed takes its hub along."""

    async def start() -> Hub:
        return get_hub()

    loop = asyncio.new_event_loop()
    hub = loop.run_until_complete(start())
    assert hub in hubs()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    hub.deliver([{}])
    assert hub not in hubs()


FORK = """
import asyncio, os
from django_eventsource import hub
from django_eventsource.hub import get_hub, hubs

async def start():
    return get_hub()

loop = asyncio.new_event_loop()
parents = loop.run_until_complete(start())
ready = len(loop._ready)
child = os.fork()
if not child:
    for one in hubs():
        one.deliver([{"type": "for nobody"}])
    assert len(loop._ready) == ready, "nobody would ever take it"
    own = asyncio.new_event_loop()
    assert own.run_until_complete(start()) is not parents
    os._exit(7)
_, status = os.waitpid(child, 0)
assert hubs() == [parents]
loop.run_until_complete(asyncio.wait_for(asyncio.to_thread(int), 10))
print(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_has_hubs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it publishes is not for loops that only its parent runs; the parent's go on."""
    assert run_python(FORK).strip() == "7"
    monkeypatch.setattr(module, "_hubs", {"a loop": "its hub"})
    monkeypatch.setattr(module, "_parents", parents := [])
    module._leave_to_parent()
    assert hubs() == []
    assert parents == [{"a loop": "its hub"}], "and nothing is closed"


class SlowToName(FaultyLayer):
    """A layer that takes a moment to name a channel, as the pub/sub layer does."""

    async def new_channel(self, prefix: str = "specific.") -> str:
        await asyncio.sleep(0.01)
        return await super().new_channel(prefix)


async def test_what_is_joined_is_what_is_received_on(settings) -> None:
    """Two who need the channel at once get the same one."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.SlowToName"}}
    settings.EVENTSOURCE_POLL_SECONDS = 10_000
    hub = get_hub()
    subscriber = await listen(hub)
    assert len({call[-1] for call in layer_of(hub).calls}) == 1
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]


def test_tasks_on_a_loop_that_was_only_stopped_are_ended() -> None:
    """A server may leave its loop as it is: at exit nothing is pending on it."""

    async def start() -> Hub:
        return get_hub()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    assert asyncio.all_tasks(loop)
    module.end_tasks()
    assert not asyncio.all_tasks(loop)
    loop.close()


async def test_running_loops_are_left_alone(hub: Hub) -> None:
    """A loop that runs in another thread at exit is not ours to end."""
    module.end_tasks()
    assert not any(task.done() for task in hub._tasks)


# Delivery


async def test_delivery_from_another_thread(hub: Hub) -> None:
    """A plain thread's message wakes the loop; nothing waits for the next head check."""
    subscriber = await listen(hub)
    threading.Thread(target=hub.deliver, args=[[message("t", None, "live")]]).start()
    assert await receive(subscriber, 1) == ["live"]


async def test_messages_for_nobody_are_not_sent(hub: Hub) -> None:
    """A token without listeners here costs no channel-layer call, and no task."""
    await until(lambda: len(hub._tasks) == 2)
    calls = len(layer_of(hub).calls)
    hub.deliver([message("nobody", 1)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(hub._tasks) == 2
    assert len(layer_of(hub).calls) == calls


async def test_a_burst_beyond_the_layers_capacity(hub: Hub, settings) -> None:
    """What a full channel drops comes from the history: all, once, in order."""
    subscriber = await listen(hub)
    entries = add(hub.history, *[str(n) for n in range(300)])
    for n, entry in enumerate(entries):
        await bring(hub, message("t", entry.seq, str(n)))
    assert await receive(subscriber, 300) == [str(n) for n in range(300)]


async def test_events_that_the_layer_never_brought(hub: Hub) -> None:
    """The head check finds what another process appended."""
    subscriber = await listen(hub)
    add(hub.history, "a", "b")
    assert await receive(subscriber, 2) == ["a", "b"]


async def test_a_gap_is_closed_before_the_next_head_check(settings) -> None:
    """A message that is missing is read at once."""
    settings.EVENTSOURCE_POLL_SECONDS = 10_000
    hub = get_hub()
    subscriber = await listen(hub)
    await until(lambda: hub._wake._waiters)
    entries = add(hub.history, "a", "b")
    await bring(hub, message("t", entries[1].seq, "b"))
    assert await receive(subscriber, 2) == ["a", "b"]


async def test_listeners_of_an_empty_token_follow_the_floor(hub: Hub) -> None:
    """When the history forgets other tokens, an empty one's listeners can still resume."""
    subscriber = await listen(hub)
    hub.history._floor += 5
    await until(lambda: subscriber._buffer)
    assert subscriber.take() == f"id: {hub.history._floor}\n\n".encode()
    add(hub.history, "first")
    assert await receive(subscriber, 1) == ["first"]


async def test_a_second_listener_at_the_head_reads_nothing(hub: Hub) -> None:
    """Where a live feed stands, nothing needs to be read; before it is, it does."""
    waiting = Single(1, buffer_bytes=1000, keepalive_seconds=None)
    await asyncio.gather(hub.subscribe(waiting), hub.subscribe(waiting))
    await hub.subscribe(waiting)
    assert not waiting.live
    hub.unsubscribe(waiting)
    await listen(hub)
    subscriber = Single(hub.history.newest("t")[0], buffer_bytes=1000, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    assert subscriber.live


# What is not ours


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "chat.message"},
        {"seq": "5"},
        {"frames": "text"},
        {"frames": []},
        {"frames": [b"x", "text"]},
        {"finish": None},
        {"group": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_foreign_messages_are_skipped(
    hub: Hub, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    """A message that is not ours is logged, and the next one arrives."""
    subscriber = await listen(hub)
    await bring(hub, message("t", None) | changes)
    await bring(hub, message("t", None, "ours"))
    assert await receive(subscriber, 1) == ["ours"]
    assert "not ours" in caplog.text


async def test_a_message_for_a_token_that_was_left_is_skipped(hub: Hub) -> None:
    """Messages for a group without a feed do no harm."""
    hub._dispatch(message("nobody", 1))


async def test_a_message_that_breaks_something_is_logged(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message's error never ends the receive task."""
    subscriber = await listen(hub)
    broken = monkeypatch.context()
    with broken as patch:
        patch.setattr(hub, "_dispatch", lambda message: 1 / 0)
        await bring(hub, message("t", None, "lost"))
        await until(lambda: "could not be passed on" in caplog.text)
    await bring(hub, message("t", None, "next"))
    assert await receive(subscriber, 1) == ["next"]


# Failures


async def test_a_token_of_which_nothing_is_known_now(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose store is away waits; the others' events are found."""
    here, away = await listen(hub, "here"), await listen(hub, "away")
    real = get_history()

    async def aheads(tokens: list[str]) -> dict[str, Head]:
        return {token: head for token, head in real.heads(tokens).items() if token == "here"}

    monkeypatch.setattr(real, "aheads", aheads)
    add(real, "a", token="away")
    add(real, "b", token="here")
    assert await receive(here, 1) == ["b"]
    assert not away.has_news
    monkeypatch.undo()
    assert await receive(away, 1) == ["a"]


async def test_a_failing_layer_ends_no_stream(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """receive() that raises is tried again, and every group is joined again."""
    subscriber = await listen(hub)
    layer = layer_of(hub)
    layer.fail["receive"] = 3
    layer.groups.clear()
    await bring(hub, message("t", None, "wake"))
    await layer.group_send(group_name("t"), {})
    await layer.send(hub._membership.channel, message("t", None, "before"))
    assert await receive(subscriber, 1) == ["before"]
    await until(lambda: layer.fail["receive"] == 0 and group_name("t") in layer.groups)
    await until(lambda: subscriber.feed.joined)
    await bring(hub, message("t", None, "after"))
    assert await receive(subscriber, 1) == ["after"]
    assert "failed to receive" in caplog.text


async def test_a_group_that_cannot_be_joined_is_tried_again(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream opens although its group could not be joined, and is joined later."""
    layer_of(hub).fail["group_add"] = 2
    subscriber = await listen(hub)
    add(hub.history, "from the history")
    assert await receive(subscriber, 1) == ["from the history"]
    await until(lambda: subscriber.feed.joined)
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert "Could not join" in caplog.text


async def test_a_layer_that_hangs_delays_no_stream(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream waits for its group only so long, then reads the history."""
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.01)
    layer_of(hub).hang = asyncio.Event()
    add(hub.history, "a")
    subscriber = await listen(hub)
    assert not subscriber.feed.joined
    for text in ("b", "c", "d"):
        add(hub.history, text)
        assert await receive(subscriber, 1) == [text]
    assert not subscriber.feed.joined
    layer_of(hub).hang.set()
    await until(lambda: subscriber.feed.joined)


async def test_a_failing_history_ends_no_stream(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head checks and repairs that fail are logged and tried again."""
    subscriber = await listen(hub)
    faulty = FaultyHistory(aheads=2, aread=2)
    monkeypatch.setattr(module, "get_history", lambda: faulty)
    add(faulty.real, "a")
    assert await receive(subscriber, 1) == ["a"]
    assert faulty.failures == {"aheads": 0, "aread": 0}
    assert caplog.text.count("Tending the streams failed; trying again.") == 2
    assert caplog.text.count("Reading the history of 't' failed; trying again.") == 2


async def test_a_lost_store_is_told_to_who_has_seen_no_event(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a life there is only the epoch to tell that events may have come and gone."""
    subscriber = await listen(hub)
    real = get_history()
    epoch = "one"

    async def aheads(tokens: list[str]) -> dict[str, Head]:
        return {token: replace(head, epoch=epoch) for token, head in real.heads(tokens).items()}

    monkeypatch.setattr(real, "aheads", aheads)
    await hub._check_heads()
    await hub._check_heads()
    assert subscriber.take() == b""
    epoch = "two"
    await hub._check_heads()
    await hub._check_heads()
    (event,) = Decoder().feed(subscriber.take())
    assert event.event == "reset"
    assert event.id == str(real.newest("t")[0])
    add(real, "a")
    assert await receive(subscriber, 1) == ["a"]


async def test_groups_are_joined_again_on_a_timer(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that forgot the member without any error learns of it again."""
    settings.EVENTSOURCE_POLL_SECONDS = 600
    monkeypatch.setattr(membership, "REJOIN_SECONDS", 0.05)
    hub = get_hub()
    await listen(hub)
    await until(lambda: len([c for c in layer_of(hub).calls if c[0] == "group_add"]) >= 3)


async def test_one_token_that_fails_is_no_other_tokens_trouble(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A history that cannot be read for one token is read for the others."""
    bad, good = await listen(hub, "bad"), await listen(hub, "good")
    real = get_history()
    read = real.read

    def fail(token: str, *args: Any, **kwargs: Any) -> Any:
        return 1 / 0 if token == "bad" else read(token, *args, **kwargs)

    monkeypatch.setattr(real, "read", fail)
    add(real, "lost", token="bad")
    for text in ("a", "b", "c"):
        add(real, text, token="good")
        assert await receive(good, 1) == [text]
    monkeypatch.setattr(real, "read", read)
    assert await receive(bad, 1) == ["lost"]


async def test_pruning_that_takes_long_holds_up_nothing(
    hub: Hub, settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Events arrive while the history is pruned, which is done once at a time."""
    release = asyncio.Event()
    calls = []

    async def prune() -> int:
        calls.append(1)
        await release.wait()
        raise ConnectionError

    monkeypatch.setattr(get_history(), "aprune", prune)
    subscriber = await listen(hub)
    hub._begin_prune()
    await until(lambda: calls)
    hub._begin_prune()
    add(hub.history, "a")
    assert await receive(subscriber, 1) == ["a"]
    release.set()
    await until(lambda: "Pruning the history failed" in caplog.text)
    assert calls == [1]


async def test_a_bad_setting_does_not_end_the_tending(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system checks did not run, a bad setting is logged and events arrive."""
    settings.EVENTSOURCE_PRUNE_SECONDS = 0
    settings.EVENTSOURCE_POLL_SECONDS = -1
    hub = get_hub()
    subscriber = await listen(hub)
    for text in ("a", "b"):
        add(hub.history, text)
        assert await receive(subscriber, 1) == [text]
    assert "EVENTSOURCE_PRUNE_SECONDS must be a positive number" in caplog.text
    assert "EVENTSOURCE_POLL_SECONDS must be a positive number" in caplog.text


async def test_the_hub_holds_on_to_no_request(hub: Hub) -> None:
    """Neither its tasks nor its timers keep the context of the request that came first."""
    request = contextvars.ContextVar[object]("request")

    class Request:
        pass

    def handle(subscriber: Subscriber) -> weakref.ref[Request]:
        one = Request()
        request.set(one)
        hub._keep_alive(subscriber)
        hub.deliver([message("t", None, "live")])
        return weakref.ref(one)

    subscriber = await listen(hub)
    subscriber.keepalive_seconds = 1000
    gone = contextvars.copy_context().run(handle, subscriber)
    assert await receive(subscriber, 1) == ["live"]
    gc.collect()
    assert gone() is None


# Coming and going


async def test_a_token_without_listeners_is_left(hub: Hub) -> None:
    """When the last listener is gone, so are the feed and the membership."""
    one, two = await listen(hub), await listen(hub)
    hub.unsubscribe(one)
    hub.unsubscribe(one)
    await hub._check_heads()
    assert "t" in hub._feeds
    hub.unsubscribe(two)
    await until(
        lambda: ("group_discard", group_name("t"), hub._membership.channel) in layer_of(hub).calls
    )
    await until(lambda: not layer_of(hub).groups)
    assert not hub._feeds
    assert not hub._by_group


async def test_a_listener_that_comes_back_at_once_stays_a_member(hub: Hub) -> None:
    """Leaving and joining cannot overtake each other."""
    subscriber = await listen(hub)
    channel = hub._membership.channel
    hub.unsubscribe(subscriber)
    hub._leave_empty()
    again = await listen(hub)
    await until(lambda: len(hub._tasks) == 2)
    assert channel in layer_of(hub).groups[group_name("t")]
    await bring(hub, message("t", None, "live"))
    assert await receive(again, 1) == ["live"]


async def test_leaving_a_group_may_fail(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """A membership that cannot be ended is only logged."""
    subscriber = await listen(hub)
    layer_of(hub).fail["group_discard"] = 1
    hub.unsubscribe(subscriber)
    await until(lambda: "Could not leave" in caplog.text)


async def test_repair_of_a_feed_that_everybody_left(hub: Hub) -> None:
    """Nothing is read for nobody."""
    subscriber = await listen(hub)
    feed = subscriber.feed
    hub.unsubscribe(subscriber)
    add(hub.history, "a")
    await hub._repair(feed)
    assert feed.last < hub.history.newest("t")[0]


async def test_a_gap_is_closed_by_what_a_buffer_may_take(
    hub: Hub, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of more would be held over a stream's bound."""
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100_000
    subscriber = await listen(hub)
    feed = hub._feeds["t"]
    sizes: list[int] = []
    deliver = feed._deliver
    monkeypatch.setattr(
        Feed, "_deliver", lambda self, batch: sizes.append(len(batch.data)) or deliver(batch)
    )
    add(hub.history, *("x" * 2000 for _ in range(50)))
    await hub._repair(feed)
    assert feed.last == hub.history.newest("t")[0]
    feed.flush()
    assert sum(sizes) > 100_000
    assert max(sizes) < 1.1 * share_of(100_000), "with what frames add to the data"
    hub.unsubscribe(subscriber)


# Keepalives and pruning


async def test_keepalive_on_a_silent_stream(hub: Hub) -> None:
    """Silent streams get comment lines, from one timer."""
    quiet = await listen(hub, keepalive=0.02)
    other = await listen(hub, keepalive=0.02)
    never = await listen(hub)
    await until(lambda: quiet._buffer and other._buffer)
    assert quiet.take() == KEEPALIVE
    assert list(hub._keepalives) == [0.02]
    assert never.take() == b""
    hub.unsubscribe(quiet)
    hub.unsubscribe(other)
    await until(lambda: not hub._keepalives)


async def test_keepalives_cost_no_message(hub: Hub) -> None:
    """Receiving is never broken off to write a keepalive: that would lose messages."""
    subscriber = await listen(hub, keepalive=0.002)
    (receiving,) = [task for task in hub._tasks if "_receive" in repr(task)]
    for n in range(100):
        await bring(hub, message("t", None, str(n)))
        await asyncio.sleep(0.001)
    assert await receive(subscriber, 100) == [str(n) for n in range(100)]
    assert not receiving.done()


async def test_the_hub_prunes(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trimming runs in the background, off the publish path."""
    settings.EVENTSOURCE_PRUNE_SECONDS = 0.01
    pruned = []
    monkeypatch.setattr(get_history(), "prune", lambda: pruned.append(1))
    get_hub()
    await until(lambda: len(pruned) > 1)


async def test_pruning_can_be_left_to_the_command(settings) -> None:
    """None switches it off."""
    settings.EVENTSOURCE_PRUNE_SECONDS = None
    assert get_hub()._prune_seconds() == float("inf")


@pytest.mark.parametrize(
    ("setting", "local", "expected"),
    [(None, True, 0.5), (None, False, 5.0), (7, True, 7)],
)
async def test_time_between_head_checks(
    settings, monkeypatch: pytest.MonkeyPatch, setting: Any, local: bool, expected: float
) -> None:
    """Without a shared layer the history is asked more often."""
    settings.EVENTSOURCE_POLL_SECONDS = setting
    monkeypatch.setattr(module, "is_process_local", lambda: local)
    assert get_hub()._poll_seconds() == expected


def test_the_logger_is_the_packages() -> None:
    """Everything is logged below django_eventsource."""
    assert logging.getLogger("django_eventsource.hub") is module.logger


# Waits that time out


class RedisTimeoutError(Exception):
    """Stands for redis-py's own, by its name: it is no TimeoutError of Python's."""


RedisTimeoutError.__name__ = "TimeoutError"


class TimesOut(FaultyLayer):
    """A layer whose wait ends now and then, as redis-py's socket_timeout makes it."""

    error: type[Exception] = TimeoutError
    seconds = 0.06
    times = 3

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        if self.times:
            self.times -= 1
            if self.seconds:
                await asyncio.sleep(self.seconds)
            raise self.error("idle")
        return await super().receive(channel)


@pytest.mark.parametrize("error", [TimeoutError, RedisTimeoutError], ids=["python", "redis"])
async def test_a_wait_that_timed_out_is_no_failure(
    settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    """Nothing is logged, no group is joined anew, and the next message arrives."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.TimesOut"}}
    monkeypatch.setattr(TimesOut, "error", error)
    hub = get_hub()
    subscriber = await listen(hub)
    layer = layer_of(hub)
    await until(lambda: not layer.times)  # type: ignore[attr-defined]
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert caplog.text == ""
    assert len([call for call in layer.calls if call[0] == "group_add"]) == 1


async def test_time_outs_that_come_at_once(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that times out without waiting must not keep the loop busy with asking."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.TimesOut"}}
    monkeypatch.setattr(TimesOut, "seconds", 0)
    monkeypatch.setattr(TimesOut, "times", 5_000)
    hub = get_hub()
    await until(lambda: layer_of(hub).calls)
    await asyncio.sleep(0.05)
    assert len(layer_of(hub).calls) < 1_000


async def test_a_broker_that_is_away_for_long(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told at once, then only where the waits no longer become longer."""
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", (0.01,) * 10)
    await listen(hub)
    layer = layer_of(hub)
    layer.fail["receive"] = 12
    await layer.send(hub._membership.channel, message("t", None))
    await until(lambda: layer.fail["receive"] == 0)
    told = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(told) == 3  # the first, the eleventh, the twelfth


async def test_a_probe_is_no_foreign_message(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """What the hub sends itself is skipped without a word."""
    subscriber = await listen(hub)
    await layer_of(hub).send(hub._membership.channel, {"type": membership.PROBE_TYPE})
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert caplog.text == ""


async def test_a_hub_whose_loop_closes_while_it_delivers() -> None:
    """A publisher's thread that comes a moment too late is not told."""

    async def start() -> Hub:
        return get_hub()

    hub = await asyncio.to_thread(asyncio.run, start())
    await bring(hub, message("t", None))
    assert hub not in hubs()


async def test_a_shared_layer_that_forgot_a_group(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that only the head check finds, twice in a row: the group is joined again."""
    monkeypatch.setattr(module, "is_process_local", lambda: False)
    subscriber = await listen(hub)
    layer = layer_of(hub)
    layer.groups.clear()
    for text in ("a", "b", "c"):
        add(hub.history, text)
        assert await receive(subscriber, 1) == [text]
    await until(lambda: group_name("t") in layer.groups)
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]


async def test_a_token_that_is_finished_is_not_fed(hub: Hub) -> None:
    """Of several tokens the closed ones cost no group."""
    subscriber = Subscriber(buffer_bytes=1000, keepalive_seconds=None, joined=True)
    subscriber.add("closed", 5, finished=True)
    subscriber.add("open", 5)
    await hub.subscribe(subscriber)
    groups = {call[1] for call in layer_of(hub).calls if call[0] == "group_add"}
    assert groups == {group_name("open")}
    hub.unsubscribe(subscriber)


class TimesOutWhenCancelled(FaultyLayer):
    """A layer whose wait ends by a time-out in the moment in which it is cancelled."""

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        try:
            return await super().receive(channel)
        except asyncio.CancelledError:
            raise TimeoutError("at the same time") from None


async def test_a_cancellation_that_a_time_out_hides(settings) -> None:
    """The receive task ends all the same."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.TimesOutWhenCancelled"}}
    hub = get_hub()
    await until(lambda: [call for call in layer_of(hub).calls if call[0] == "receive"])
    hub._receiving.cancel()
    await asyncio.wait([hub._receiving], timeout=SECONDS)
    assert hub._receiving.cancelled()


class ReturnsWhenCancelled(FaultyLayer):
    """A layer that returns a message in place of the cancellation of a wait."""

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        try:
            return await super().receive(channel)
        except asyncio.CancelledError:
            return {"type": "eventsource.probe"}


async def test_the_receive_task_ends_although_the_layer_swallows_its_cancellation(
    settings,
) -> None:
    """The task receives no further message after it was cancelled."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.ReturnsWhenCancelled"}}
    hub = get_hub()
    await until(lambda: [call for call in layer_of(hub).calls if call[0] == "receive"])
    hub._receiving.cancel()
    await asyncio.wait([hub._receiving], timeout=SECONDS)
    assert hub._receiving.done()


class CancelsItsReceiver(FaultyLayer):
    """A layer whose receiver is cancelled in the moment in which a message arrives."""

    async def receive(self, channel: str) -> Any:
        message = await super().receive(channel)
        asyncio.current_task().cancel()
        return message


async def test_the_receive_task_passes_on_the_message_that_arrives_with_its_cancellation(
    settings,
) -> None:
    """It receives no other one."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.test_hub.CancelsItsReceiver"}}
    hub = get_hub()
    subscriber = Single(hub.history.newest("t")[0], buffer_bytes=1000, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    await asyncio.wait([hub._receiving], timeout=SECONDS)
    assert hub._receiving.done()
    assert len([call for call in layer_of(hub).calls if call[0] == "receive"]) == 1
