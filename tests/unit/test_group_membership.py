"""The membership of a hub in the channel layer: failures, lost groups and replaced layers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from django_eventsource.delivery import group_membership as module
from django_eventsource.delivery.group_membership import GroupMembership
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.history import get_history
from django_eventsource.protocol.messages import encode
from tests.support.events import add, draft
from tests.support.layers import FaultySharedLayer, layer_of
from tests.support.streams import StreamTask
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, settings) -> None:
    monkeypatch.setattr(FaultySharedLayer, "made", [])
    monkeypatch.setattr(Hub, "backoff_seconds", (0.01,))
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}


def live_message(token: str, text: str) -> dict[str, Any]:
    return encode(group_name(token), draft(text).batch())


# Silence


async def test_a_layer_that_delivers_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All groups are joined on the new instance, and no durable event is lost."""
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.2)
    reader = await StreamTask().live()
    hub = get_hub()
    first = layer_of(hub)
    first.silent = True
    add(get_history(), "while it is silent")
    await until(lambda: layer_of(hub) is not first)
    await until(lambda: group_name("t") in layer_of(hub).groups)
    assert "creating a new instance" in caplog.text
    await layer_of(hub).group_send(group_name("t"), live_message("t", "on the new one"))
    await until(lambda: b"on the new one" in reader.body)
    assert reader.body.count(b"while it is silent") == 1
    assert reader.stream.reason is None
    await reader.close()


async def test_the_groups_are_joined_again_if_the_layer_has_lost_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layer raises no error, and the instance is kept."""
    monkeypatch.setattr(GroupMembership, "answer_seconds", 0.05)
    reader = await StreamTask().live()
    hub = get_hub()
    layer = layer_of(hub)
    await until(lambda: len(layer.groups) == 2)
    layer.groups.clear()
    await until(lambda: len(layer.groups) == 2)
    await layer.group_send(group_name("t"), live_message("t", "a member again"))
    await until(lambda: b"a member again" in reader.body)
    assert layer_of(hub) is layer
    assert "lost the membership in its groups" in caplog.text
    await reader.close()


@pytest.mark.parametrize("lost", range(module.PROBES))
async def test_a_lost_probe_is_sent_again_before_the_groups_are_joined_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    reader = await StreamTask().live()
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


async def test_lost_probes_do_not_count_while_the_hub_does_not_receive(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failure the hub waits before it receives again."""
    monkeypatch.setattr(Hub, "backoff_seconds", (1_000,))
    reader = await StreamTask().live()
    hub = get_hub()
    layer = layer_of(hub)
    layer.failing.add("receive")
    await until(lambda: not hub._membership.receiving)
    get_hub()._membership.answer_seconds = 0
    before = layer.calls.count("group_send")
    await until(lambda: layer.calls.count("group_send") > before + 3 * module.PROBES)
    assert "lost the membership" not in caplog.text
    await reader.close()


async def test_probes_keep_a_working_layer_and_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "django_eventsource")
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.2)
    reader = await StreamTask().live()
    hub = get_hub()
    first = layer_of(hub)
    opening = reader.body
    await until(lambda: first.calls.count("send") >= 20)
    await asyncio.sleep(0.3)
    assert layer_of(hub) is first
    assert reader.body == opening
    assert "Skipped" not in caplog.text
    assert "new instance" not in caplog.text
    await reader.close()


async def test_a_working_layer_is_kept_if_history_checks_are_rare(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``EVENTSOURCE_POLL_SECONDS`` is longer than the silence that is allowed."""
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.05)
    settings.EVENTSOURCE_POLL_SECONDS = 0.1
    reader = await StreamTask().live()
    hub = get_hub()
    first = layer_of(hub)
    await until(lambda: layer_of(hub).calls.count("send") >= 4 or layer_of(hub) is not first)
    assert layer_of(hub) is first
    assert "creating a new instance" not in caplog.text
    await reader.close()


async def test_a_working_layer_is_kept_after_an_outage_of_the_history(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No probe is sent while the history cannot be checked."""
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.1)
    reader = await StreamTask().live()
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


async def test_a_hub_without_tokens_sends_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.05)
    hub = get_hub()
    first = layer_of(hub)
    await asyncio.sleep(0.2)
    assert layer_of(hub) is first
    assert "send" not in first.calls


async def test_a_failed_probe_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream receives events from the history."""
    reader = await StreamTask().live()
    layer = layer_of(get_hub())
    layer.failing.add("send")
    before = layer.calls.count("send")
    await until(lambda: layer.calls.count("send") >= before + 5)
    assert caplog.text.count("send failed") == 1
    add(get_history(), "a")
    await until(lambda: b"data: a" in reader.body)
    await reader.close()


async def test_a_layer_on_which_a_probe_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One probe runs at a time."""
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0.2)
    reader = await StreamTask().live()
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


# GroupMembership alone


async def join(membership: GroupMembership, group: str) -> None:
    """Join a group, and wait for the end of the attempt."""
    joining = membership.join(group)
    if joining is not None:
        await joining


async def rejoin(membership: GroupMembership, groups: Iterable[str]) -> None:
    """Join the groups that are missing, and wait for the end of the attempts."""
    membership.join_missing()
    joins = [membership.join(group) for group in groups]
    await asyncio.gather(*(joining for joining in joins if joining))


GROUP = "eventsource.group"


@pytest.fixture
async def membership() -> AsyncIterator[GroupMembership]:
    """One without a hub."""
    tasks: list[asyncio.Task[None]] = []

    def start(work: Any) -> asyncio.Task[None]:
        tasks.append(asyncio.ensure_future(work))
        return tasks[-1]

    yield GroupMembership(start)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def shared(one: GroupMembership) -> FaultySharedLayer:
    assert isinstance(one.layer, FaultySharedLayer)
    return one.layer


@pytest.fixture
async def group(membership: GroupMembership) -> str:
    """Return the only group that the hub is in."""
    await join(membership, GROUP)
    return GROUP


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Set the time of the module under test by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def checked(one: GroupMembership) -> bool:
    """Check, and wait until the probe has ended."""
    silent = one.check(shared=True)
    assert one._probing is not None
    await one._probing
    return silent


async def test_a_group_is_joined_on_the_new_layer_while_a_join_on_the_old_one_hangs(
    membership: GroupMembership,
) -> None:
    one = membership
    old = shared(one)
    old.hang = asyncio.Event()
    one.join(GROUP)
    await until(lambda: "group_add" in old.calls)
    one.replace()
    new = shared(one)
    old.hang.set()
    for _ in range(20):
        one.join_missing()
        await asyncio.sleep(0)
    assert one.is_joined(GROUP)
    assert GROUP in new.groups


async def test_a_channel_created_on_a_replaced_layer_is_not_used(
    membership: GroupMembership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that wait for the channel receive the one of the new layer."""
    one = membership
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


async def test_rejoins_of_a_layer_that_drops_messages_become_rarer(
    membership: GroupMembership,
    group: str,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer over its capacity drops messages."""
    one = membership
    one.answer_seconds = 0
    layer = shared(one)
    layer.silent = True

    async def joins(seconds: int) -> list[int]:
        times = []
        for second in range(seconds):
            before = layer.calls.count("group_add")
            await checked(one)
            await join(one, group)
            one.note_received()  # the messages of other processes
            if layer.calls.count("group_add") > before:
                times.append(second)
            clock.now += 1
        return times

    assert await joins(75) == [0, 10, 30, 70]
    one.note_probe_echo()
    assert await joins(15) == [0, 10]


async def test_lost_groups_are_joined_without_waiting_for_the_next_history_check(
    membership: GroupMembership,
    group: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = membership
    one.answer_seconds = 0
    shared(one).groups.clear()
    shared(one).silent = True
    assert not await checked(one)
    await join(one, group)
    assert len(shared(one).groups) == 2


@pytest.mark.parametrize(
    ("error", "silent"), [(TimeoutError("slow"), True), (ConnectionError("refused"), False)]
)
async def test_a_probe_that_times_out_counts_as_silence_and_an_error_does_not(
    membership: GroupMembership,
    group: str,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    silent: bool,
) -> None:
    """A new instance of the layer would not help if the broker cannot be reached."""
    one = membership

    async def send(channel: str, message: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(one.layer, "send", send)
    monkeypatch.setattr(GroupMembership, "layer_silence_seconds", 0)
    assert not await checked(one)
    assert one.check(shared=True) is silent


async def test_silence_is_measured_from_the_first_lost_probe(
    membership: GroupMembership,
    group: str,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure afterwards does not change that."""
    one = membership
    one.answer_seconds = 0
    shared(one).silent = True
    assert not await checked(one)
    shared(one).failing.add("send")
    clock.now += one.layer_silence_seconds
    assert not await checked(one)
    clock.now += 1
    assert await checked(one)


@pytest.mark.parametrize(
    ("expiry", "after"), [(None, 600), (0, 600), (86_400, 600), (60, 30), (7, 3.5), (-1, 0.5)]
)
async def test_groups_are_joined_again_before_they_expire(
    membership: GroupMembership,
    group: str,
    clock: SimpleNamespace,
    expiry: int | None,
    after: float,
) -> None:
    """The layer states the time in ``group_expiry``."""
    one = membership
    layer: Any = one.layer
    if expiry is not None:
        layer.group_expiry = expiry
    one.assume_lost()
    await join(one, group)
    clock.now += after - 0.1
    one.join_missing()
    assert one.is_joined(group)
    clock.now += 0.1
    one.join_missing()
    assert not one.is_joined(group)


async def test_an_outage_of_the_broker_is_logged_once_for_all_groups(
    membership: GroupMembership, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged again after a join has succeeded."""
    one = membership
    layer = shared(one)
    layer.failing.add("group_add")
    groups = [f"group {n}" for n in range(20)]
    for _ in range(3):
        await rejoin(one, groups)
    assert layer.calls.count("group_add") == 60
    assert caplog.text.count("Could not join") == 1
    layer.failing.clear()
    await rejoin(one, groups)
    assert all(map(one.is_joined, groups))
    one.assume_lost()
    layer.failing.add("group_add")
    await rejoin(one, groups)
    assert caplog.text.count("Could not join") == 2


async def test_one_failed_leave_is_repeated_at_each_history_check(
    membership: GroupMembership, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged once, and all groups are left in the end."""
    one = membership
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


async def left(membership: GroupMembership) -> None:
    """Wait for the task that leaves groups."""
    assert membership._leaving is not None
    await membership._leaving


async def test_a_group_is_left_after_a_time_out_of_the_wait_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = await StreamTask("t").live()
    hub = get_hub()
    layer = layer_of(hub)
    await until(lambda: layer.groups[group_name("t")])
    hub._membership.layer_seconds = 0.05
    async with hub._membership._order:
        await reader.close()
        await until(lambda: "Could not leave" in caplog.text)
    await until(lambda: not layer.groups[group_name("t")])


async def test_a_group_that_is_left_twice_is_left_after_the_join_in_between(
    membership: GroupMembership,
) -> None:
    """A listener came and went while the group was being left."""
    one = membership
    layer = shared(one)
    proceed, discard = asyncio.Event(), layer.group_discard

    async def slow(group: str, channel: str) -> None:
        await proceed.wait()
        await discard(group, channel)

    layer.group_discard = slow  # type: ignore[method-assign]
    one.leave(GROUP)
    await asyncio.sleep(0)
    joining = one.join(GROUP)
    await asyncio.sleep(0)
    one.leave(GROUP)
    proceed.set()
    assert joining is not None
    await joining
    await left(one)
    assert layer.calls == ["group_discard", "group_add", "group_discard"]
    assert not layer.groups[GROUP]


async def test_a_group_that_is_joined_again_is_not_left(
    membership: GroupMembership,
) -> None:
    one = membership
    layer = shared(one)
    one.leave(GROUP)
    one.join(GROUP)
    await left(one)
    assert "group_discard" not in layer.calls
    one.leave(GROUP)
    await left(one)
    assert "group_discard" in layer.calls
