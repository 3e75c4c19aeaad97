"""The hub: one channel and two tasks for all streams, and its behaviour after failures."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest

from django_eventsource import _runtime
from django_eventsource.delivery import hub as module
from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.group_membership import GroupMembership
from django_eventsource.delivery.hub import Hub, get_hub, hubs
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.subscription import Subscriber, share_of
from django_eventsource.history import Head, get_history
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.frames import KEEPALIVE, Decoder
from django_eventsource.protocol.messages import encode, encode_probe
from tests.support.events import FaultyHistory, add, draft
from tests.support.layers import FaultyLayer
from tests.support.singles import Single
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, settings) -> None:
    """Back off shortly, check heads often, and fail tests that hang."""
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultyLayer"}}


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
        hub.catch_up(subscriber.only, await hub.read(token, subscriber.seq))
    return subscriber


def message(token: str, seq: int | None, text: str = "x") -> dict[str, Any]:
    """Return the message of a publisher."""
    return encode(group_name(token), batch(seq, text))


def batch(seq: int | None, text: str = "x") -> Batch:
    """Encode an event."""
    return Batch([draft(text).frame(seq)], None if seq is None else [seq])


async def bring(hub: Hub, message: dict[str, Any]) -> None:
    """Send on the hub's layer."""
    await layer_of(hub).group_send(group_name("t"), message)


async def receive(subscriber: Subscriber, count: int) -> list[str]:
    """Return the data of the next events."""
    decoder = Decoder()
    events: list[str] = []
    while len(events) < count:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await subscriber.wait()
        while not subscriber.live:
            slice_ = await get_hub().read(subscriber.token, subscriber.seq)
            chunk = get_hub().catch_up(subscriber.only, slice_)
            events += [event.data for event in decoder.feed(chunk)]
        events += [event.data for event in decoder.feed(subscriber.take())]
    return events


# One for all


async def test_all_streams_of_an_event_loop_share_one_hub_and_its_channel(hub: Hub) -> None:
    """Each token is joined once."""
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


async def test_the_number_of_tasks_does_not_grow_with_the_streams(hub: Hub) -> None:
    """A hundred subscribers need the same two tasks as one."""
    await listen(hub)
    await until(lambda: len(hub._tasks) == 2)
    for _ in range(100):
        await listen(hub)
    await until(lambda: len(hub._tasks) == 2)


def test_hubs_drops_the_hub_of_a_closed_loop() -> None:
    """A delivery to a closed loop raises no error."""

    async def start() -> Hub:
        return get_hub()

    loop = asyncio.new_event_loop()
    hub = loop.run_until_complete(start())
    assert hub in hubs()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    hub.deliver(group_name("t"), [batch(None)])
    assert hub not in hubs()


def test_a_reset_drops_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hubs", {"a loop": "its hub"})
    _runtime.reset_all()
    assert hubs() == []


class SlowToName(FaultyLayer):
    """A layer that takes a moment to name a channel, as the pub/sub layer does."""

    async def new_channel(self, prefix: str = "specific.") -> str:
        await asyncio.sleep(0.01)
        return await super().new_channel(prefix)


async def test_the_hub_receives_on_the_channel_that_joins_the_groups(settings) -> None:
    """Two tasks that need the channel at once receive the same one."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.SlowToName"}}
    settings.EVENTSOURCE_POLL_SECONDS = 10_000
    hub = get_hub()
    subscriber = await listen(hub)
    assert len({call[-1] for call in layer_of(hub).calls}) == 1
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]


def test_end_tasks_cancels_the_tasks_of_a_stopped_loop() -> None:
    """A server may stop its event loop without closing it."""

    async def start() -> Hub:
        return get_hub()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    assert asyncio.all_tasks(loop)
    module.end_tasks()
    assert not asyncio.all_tasks(loop)
    loop.close()


async def test_end_tasks_does_not_cancel_the_tasks_of_a_running_loop(hub: Hub) -> None:
    """A loop may run in another thread at exit."""
    module.end_tasks()
    assert not any(task.done() for task in hub._tasks)


# Delivery


async def test_a_delivery_from_another_thread_wakes_the_loop(hub: Hub) -> None:
    """The event does not wait for the next history check."""
    subscriber = await listen(hub)
    threading.Thread(target=hub.deliver, args=[group_name("t"), [batch(None, "live")]]).start()
    assert await receive(subscriber, 1) == ["live"]


async def test_a_delivery_without_listeners_costs_no_call_and_no_task(hub: Hub) -> None:
    await until(lambda: len(hub._tasks) == 2)
    calls = len(layer_of(hub).calls)
    hub.deliver(group_name("nobody"), [batch(1)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(hub._tasks) == 2
    assert len(layer_of(hub).calls) == calls


async def test_a_burst_beyond_the_capacity_of_the_layer_loses_no_event(hub: Hub, settings) -> None:
    """The history contains the messages that a full channel drops."""
    subscriber = await listen(hub)
    entries = add(hub.history, *[str(n) for n in range(300)])
    for n, entry in enumerate(entries):
        await bring(hub, message("t", entry.seq, str(n)))
    assert await receive(subscriber, 300) == [str(n) for n in range(300)]


async def test_the_history_check_finds_events_that_the_layer_has_not_delivered(hub: Hub) -> None:
    """Another process may have appended them."""
    subscriber = await listen(hub)
    add(hub.history, "a", "b")
    assert await receive(subscriber, 2) == ["a", "b"]


async def test_a_gap_is_read_from_the_history_at_once(settings) -> None:
    """The read does not wait for the next history check."""
    settings.EVENTSOURCE_POLL_SECONDS = 10_000
    hub = get_hub()
    subscriber = await listen(hub)
    await until(lambda: hub._wake._waiters)
    entries = add(hub.history, "a", "b")
    await bring(hub, message("t", entries[1].seq, "b"))
    assert await receive(subscriber, 2) == ["a", "b"]


async def test_listeners_of_an_empty_token_receive_the_new_floor_as_their_cursor(hub: Hub) -> None:
    """They can resume after the history has dropped other tokens."""
    subscriber = await listen(hub)
    hub.history._floor += 5
    await until(lambda: subscriber._buffer)
    assert subscriber.take() == f"id: {hub.history._floor}\n\n".encode()
    add(hub.history, "first")
    assert await receive(subscriber, 1) == ["first"]


async def test_a_second_listener_at_the_head_is_live_without_a_read(hub: Hub) -> None:
    """Before the feed has a position, a read is needed."""
    waiting = Single(1, buffer_bytes=1000, keepalive_seconds=None)
    await asyncio.gather(hub.subscribe(waiting), hub.subscribe(waiting))
    await hub.subscribe(waiting)
    assert not waiting.live
    hub.unsubscribe(waiting)
    await listen(hub)
    subscriber = Single(hub.history.newest("t")[0], buffer_bytes=1000, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    assert subscriber.live


# Messages of another form


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "chat.message"},
        {"seq": "5"},
        {"frames": "text"},
        {"frames": []},
        {"frames": [b"x", "text"]},
        {"closes": None},
        {"group": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_messages_of_another_form_are_logged_and_skipped(
    hub: Hub, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    """The next message is delivered."""
    subscriber = await listen(hub)
    await bring(hub, message("t", None) | changes)
    await bring(hub, message("t", None, "ours"))
    assert await receive(subscriber, 1) == ["ours"]
    assert "Skipped a channel-layer message" in caplog.text


async def test_a_message_for_a_group_without_a_feed_is_skipped(hub: Hub) -> None:
    await hub._accept(message("nobody", 1))


async def test_an_error_of_one_message_does_not_end_the_receive_task(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is logged, and the next message is delivered."""
    subscriber = await listen(hub)
    broken = monkeypatch.context()
    with broken as patch:
        patch.setattr(Feed, "receive", lambda feed, batch: 1 / 0)
        await bring(hub, message("t", None, "lost"))
        await until(lambda: "Could not deliver events of token 't'" in caplog.text)
    await bring(hub, message("t", None, "next"))
    assert await receive(subscriber, 1) == ["next"]


# Failures


async def test_a_token_without_a_head_waits_and_the_others_are_checked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store of the token cannot be reached."""
    here, away = await listen(hub, "here"), await listen(hub, "away")
    real = get_history()

    async def aheads(tokens: list[str]) -> dict[str, Head]:
        return {token: head for token, head in real.heads(tokens).items() if token == "here"}

    monkeypatch.setattr(real, "aheads", aheads)
    add(real, "a", token="away")
    add(real, "b", token="here")
    assert await receive(here, 1) == ["b"]
    assert not away.is_ready
    monkeypatch.undo()
    assert await receive(away, 1) == ["a"]


async def test_every_group_is_joined_again_after_receive_has_failed(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """No stream ends."""
    subscriber = await listen(hub)
    layer = layer_of(hub)
    layer.fail["receive"] = 3
    layer.groups.clear()
    await bring(hub, message("t", None, "wake"))
    await layer.group_send(group_name("t"), {})
    await layer.send(hub._membership.channel, message("t", None, "before"))
    assert await receive(subscriber, 1) == ["before"]
    await until(lambda: layer.fail["receive"] == 0 and group_name("t") in layer.groups)
    await until(lambda: hub._membership.is_joined(group_name("t")))
    await bring(hub, message("t", None, "after"))
    assert await receive(subscriber, 1) == ["after"]
    assert "Receiving from the channel layer failed" in caplog.text


async def test_a_failed_join_is_repeated(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The stream opens and receives events from the history meanwhile."""
    layer_of(hub).fail["group_add"] = 2
    subscriber = await listen(hub)
    add(hub.history, "from the history")
    assert await receive(subscriber, 1) == ["from the history"]
    await until(lambda: hub._membership.is_joined(group_name("t")))
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert "Could not join" in caplog.text


async def test_a_stream_waits_only_a_limited_time_for_a_layer_that_hangs(
    hub: Hub,
) -> None:
    """After that it reads the history."""
    hub.join_seconds = 0.01
    layer_of(hub).hang = asyncio.Event()
    add(hub.history, "a")
    subscriber = await listen(hub)
    assert not hub._membership.is_joined(group_name("t"))
    for text in ("b", "c", "d"):
        add(hub.history, text)
        assert await receive(subscriber, 1) == [text]
    assert not hub._membership.is_joined(group_name("t"))
    layer_of(hub).hang.set()
    await until(lambda: hub._membership.is_joined(group_name("t")))


async def test_failed_history_checks_and_reads_are_logged_and_repeated(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream ends."""
    subscriber = await listen(hub)
    faulty = FaultyHistory(aheads=2, aread=2)
    monkeypatch.setattr(module, "get_history", lambda: faulty)
    add(faulty.real, "a")
    assert await receive(subscriber, 1) == ["a"]
    assert faulty.failures == {"aheads": 0, "aread": 0}
    assert caplog.text.count("The maintenance of the hub failed; retrying.") == 2
    assert caplog.text.count("Reading the history of 't' failed; retrying.") == 2


async def test_a_lost_store_resets_listeners_that_have_received_no_event(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the marker of the store shows that events may have been lost."""
    subscriber = await listen(hub)
    real = get_history()
    epoch = "one"

    async def aheads(tokens: list[str]) -> dict[str, Head]:
        return {
            token: replace(head, generation=epoch) for token, head in real.heads(tokens).items()
        }

    monkeypatch.setattr(real, "aheads", aheads)
    await hub._check_history()
    await hub._check_history()
    assert subscriber.take() == b""
    epoch = "two"
    await hub._check_history()
    await hub._check_history()
    (event,) = Decoder().feed(subscriber.take())
    assert event.event == "reset"
    assert event.id == str(real.newest("t")[0])
    add(real, "a")
    assert await receive(subscriber, 1) == ["a"]


async def test_groups_are_joined_again_on_a_timer(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer may lose a member without an error."""
    settings.EVENTSOURCE_POLL_SECONDS = 600
    monkeypatch.setattr(GroupMembership, "rejoin_seconds", 0.05)
    hub = get_hub()
    await listen(hub)
    await until(lambda: len([c for c in layer_of(hub).calls if c[0] == "group_add"]) >= 3)


async def test_a_failed_read_of_one_token_does_not_delay_the_others(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_events_arrive_while_the_history_is_pruned(
    hub: Hub, settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One prune runs at a time."""
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


async def test_an_invalid_setting_is_logged_and_does_not_end_the_maintenance(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The system checks may not have run."""
    settings.EVENTSOURCE_PRUNE_SECONDS = 0
    settings.EVENTSOURCE_POLL_SECONDS = -1
    hub = get_hub()
    subscriber = await listen(hub)
    for text in ("a", "b"):
        add(hub.history, text)
        assert await receive(subscriber, 1) == [text]
    assert "EVENTSOURCE_PRUNE_SECONDS must be a positive number" in caplog.text
    assert "EVENTSOURCE_POLL_SECONDS must be a positive number" in caplog.text


async def test_tasks_and_timers_do_not_keep_the_context_of_a_request(hub: Hub) -> None:
    request = contextvars.ContextVar[object]("request")

    class Request:
        pass

    def handle(subscriber: Subscriber) -> weakref.ref[Request]:
        one = Request()
        request.set(one)
        hub._keep_alive(subscriber)
        hub.deliver(group_name("t"), [batch(None, "live")])
        return weakref.ref(one)

    subscriber = await listen(hub)
    subscriber.keepalive_seconds = 1000
    gone = contextvars.copy_context().run(handle, subscriber)
    assert await receive(subscriber, 1) == ["live"]
    gc.collect()
    assert gone() is None


# Coming and going


async def test_the_group_is_left_after_the_last_listener_has_gone(hub: Hub) -> None:
    """The feed is dropped too."""
    one, two = await listen(hub), await listen(hub)
    hub.unsubscribe(one)
    hub.unsubscribe(one)
    await hub._check_history()
    assert "t" in hub._feeds
    hub.unsubscribe(two)
    await until(
        lambda: ("group_discard", group_name("t"), hub._membership.channel) in layer_of(hub).calls
    )
    await until(lambda: not layer_of(hub).groups)
    assert not hub._feeds
    assert not hub._by_group


async def test_a_listener_that_reconnects_at_once_is_in_the_group(hub: Hub) -> None:
    """The leave does not overtake the join."""
    subscriber = await listen(hub)
    channel = hub._membership.channel
    hub.unsubscribe(subscriber)
    hub._drop_idle_feeds()
    again = await listen(hub)
    await until(lambda: len(hub._tasks) == 2)
    assert channel in layer_of(hub).groups[group_name("t")]
    await bring(hub, message("t", None, "live"))
    assert await receive(again, 1) == ["live"]


async def test_a_failed_leave_is_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    subscriber = await listen(hub)
    layer_of(hub).fail["group_discard"] = 1
    hub.unsubscribe(subscriber)
    await until(lambda: "Could not leave" in caplog.text)


async def test_a_feed_without_listeners_is_not_read(hub: Hub) -> None:
    subscriber = await listen(hub)
    feed = hub._feeds["t"]
    hub.unsubscribe(subscriber)
    add(hub.history, "a")
    await hub._repair(feed)
    assert feed.last < hub.history.newest("t")[0]


async def test_a_gap_is_read_in_batches_that_fit_into_a_buffer(
    hub: Hub, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger batch would exceed the bound of a stream."""
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100_000
    subscriber = await listen(hub)
    feed = hub._feeds["t"]
    sizes: list[int] = []
    deliver = feed._deliver
    monkeypatch.setattr(
        feed._coalescer, "_deliver", lambda one: sizes.append(len(one.data)) or deliver(one)
    )
    add(hub.history, *("x" * 2000 for _ in range(50)))
    await hub._repair(feed)
    assert feed.last == hub.history.newest("t")[0]
    feed.flush()
    assert sum(sizes) > 100_000
    assert max(sizes) < 1.1 * share_of(100_000), "with what frames add to the data"
    hub.unsubscribe(subscriber)


# Keepalives and pruning


async def test_silent_streams_receive_keepalives_from_one_timer(hub: Hub) -> None:
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


async def test_keepalives_do_not_interrupt_the_receive_task(hub: Hub) -> None:
    """An interruption would lose messages."""
    subscriber = await listen(hub, keepalive=0.002)
    (receiving,) = [task for task in hub._tasks if "_receive" in repr(task)]
    for n in range(100):
        await bring(hub, message("t", None, str(n)))
        await asyncio.sleep(0.001)
    assert await receive(subscriber, 100) == [str(n) for n in range(100)]
    assert not receiving.done()


async def test_the_hub_prunes_the_history(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning runs in the background, and not while events are published."""
    settings.EVENTSOURCE_PRUNE_SECONDS = 0.01
    pruned = []
    monkeypatch.setattr(get_history(), "prune", lambda: pruned.append(1))
    get_hub()
    await until(lambda: len(pruned) > 1)


async def test_the_hub_does_not_prune_if_the_setting_is_none(settings) -> None:
    settings.EVENTSOURCE_PRUNE_SECONDS = None
    assert get_hub()._prune_seconds() == float("inf")


@pytest.mark.parametrize(
    ("setting", "local", "expected"),
    [(None, True, 0.5), (None, False, 5.0), (7, True, 7)],
)
async def test_the_history_is_checked_more_often_without_a_shared_layer(
    settings, monkeypatch: pytest.MonkeyPatch, setting: Any, local: bool, expected: float
) -> None:
    """``EVENTSOURCE_POLL_SECONDS`` replaces both defaults."""
    settings.EVENTSOURCE_POLL_SECONDS = setting
    monkeypatch.setattr(module, "is_process_local", lambda: local)
    assert get_hub()._poll_seconds() == expected


def test_the_logger_is_below_the_logger_of_the_package() -> None:
    assert logging.getLogger("django_eventsource.delivery") is module.logger


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
async def test_a_time_out_of_a_wait_is_not_a_failure(
    settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    """Nothing is logged, no group is joined again, and the next message arrives."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.TimesOut"}}
    monkeypatch.setattr(TimesOut, "error", error)
    hub = get_hub()
    subscriber = await listen(hub)
    layer = layer_of(hub)
    await until(lambda: not layer.times)  # type: ignore[attr-defined]
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert caplog.text == ""
    assert len([call for call in layer.calls if call[0] == "group_add"]) == 1


async def test_time_outs_without_a_wait_do_not_keep_the_loop_busy(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub waits before it receives again."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.TimesOut"}}
    monkeypatch.setattr(TimesOut, "seconds", 0)
    monkeypatch.setattr(TimesOut, "times", 5_000)
    hub = get_hub()
    await until(lambda: layer_of(hub).calls)
    await asyncio.sleep(0.05)
    assert len(layer_of(hub).calls) < 1_000


async def test_an_outage_is_logged_at_first_and_after_the_longest_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures in between are logged at the level DEBUG."""
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,) * 10)
    hub = get_hub()
    await listen(hub)
    layer = layer_of(hub)
    layer.fail["receive"] = 12
    await layer.send(hub._membership.channel, message("t", None))
    await until(lambda: layer.fail["receive"] == 0)
    logged = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(logged) == 3  # the first, the eleventh, the twelfth


async def test_a_probe_is_not_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    subscriber = await listen(hub)
    await layer_of(hub).send(hub._membership.channel, encode_probe())
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    assert caplog.text == ""


async def test_a_hub_whose_loop_has_closed_is_dropped() -> None:

    async def start() -> Hub:
        return get_hub()

    hub = await asyncio.to_thread(asyncio.run, start())
    await bring(hub, message("t", None))
    assert hub not in hubs()


async def test_a_closed_token_of_a_stream_is_not_joined(hub: Hub) -> None:
    subscriber = Subscriber(buffer_bytes=1000, keepalive_seconds=None, joined=True)
    subscriber.add("closed", 5, closed=True)
    subscriber.add("open", 5)
    await hub.subscribe(subscriber)
    groups = {call[1] for call in layer_of(hub).calls if call[0] == "group_add"}
    assert groups == {group_name("open")}
    hub.flush(subscriber)
    hub.unsubscribe(subscriber)


class TimesOutWhenCancelled(FaultyLayer):
    """A layer whose wait ends by a time-out in the moment in which it is cancelled."""

    async def receive(self, channel: str) -> Any:
        self._call("receive", channel)
        try:
            return await super().receive(channel)
        except asyncio.CancelledError:
            raise TimeoutError("at the same time") from None


async def test_the_receive_task_ends_although_a_time_out_replaces_its_cancellation(
    settings,
) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.TimesOutWhenCancelled"}}
    hub = get_hub()
    await until(lambda: [call for call in layer_of(hub).calls if call[0] == "receive"])
    hub._receiving.cancel()
    await asyncio.wait([hub._receiving], timeout=PATIENCE_SECONDS)
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
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.ReturnsWhenCancelled"}}
    hub = get_hub()
    await until(lambda: [call for call in layer_of(hub).calls if call[0] == "receive"])
    hub._receiving.cancel()
    await asyncio.wait([hub._receiving], timeout=PATIENCE_SECONDS)
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
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.CancelsItsReceiver"}}
    hub = get_hub()
    subscriber = Single(hub.history.newest("t")[0], buffer_bytes=1000, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    await bring(hub, message("t", None, "live"))
    assert await receive(subscriber, 1) == ["live"]
    await asyncio.wait([hub._receiving], timeout=PATIENCE_SECONDS)
    assert hub._receiving.done()
    assert len([call for call in layer_of(hub).calls if call[0] == "receive"]) == 1
