"""Tests of the threads that wake other processes, and that wake the hubs of this one."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import pytest

from django_eventsource import publish
from django_eventsource.delivery import wake_ups as module
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.delivery.wake_ups import News, Waker, Watcher, waker, watcher
from django_eventsource.history import get_history
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.history.wake_ups import Groups, WakeUps
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from tests.support.events import add
from tests.support.singles import Single
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


class Fake(WakeUps):
    """Wake-ups that a test controls."""

    most_groups = 3

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.connections = 0
        self.entered = threading.Event()
        self.failed = threading.Event()
        self.sent: list[Groups] = []
        self.failures = 0
        self.news: list[Any] = []
        self.watching = 0
        self.watched = 0

    def send(self, batches: Iterable[Groups]) -> None:
        self.entered.set()
        assert self.open.wait(PATIENCE_SECONDS)
        self._fail()
        self.connections += 1
        try:
            for groups in batches:
                self._fail()
                self.sent.append(groups if groups is None else set(groups))
        finally:
            self.connections -= 1

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("down")

    def watch(self) -> Generator[Groups, None, None]:
        self.watched += 1
        self.watching += 1
        try:
            while True:
                news = self.news.pop(0) if self.news else ()
                if isinstance(news, Exception):
                    raise news
                yield news
                time.sleep(0.001)
        finally:
            self.watching -= 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Give the memory history wake-ups."""
    fake = Fake()
    monkeypatch.setattr(MemoryHistory, "wake_ups", fake)
    return fake


# The waker


class Soon(Waker):
    """A waker that does not wait long."""

    backoff_seconds = (0.01,)
    idle_seconds = 60


@pytest.fixture
def soon() -> Iterator[Soon]:
    soon = Soon()
    yield soon
    thread = soon._thread
    soon.end()
    assert thread is None or not thread.is_alive()


def test_the_groups_that_wait_are_sent_in_one_wake_up(soon: Soon, fake: Fake) -> None:
    """They wait while the connection is opened, or while the one before is sent."""
    fake.open.clear()
    soon.put("a")
    assert fake.entered.wait(PATIENCE_SECONDS)
    for _ in range(100):
        soon.put("b")
    assert not soon.flush(0)
    fake.open.set()
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"a", "b"}]
    soon.put("c")
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"a", "b"}, {"c"}]


def test_a_failure_of_a_thread_that_has_ended_drops_nothing_of_the_next_one(
    soon: Soon, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[threading.Thread] = []
    send = fake.send

    def end(batches: Iterable[Groups]) -> None:
        if first:
            send(batches)
            return
        first.append(threading.current_thread())
        soon._end_thread()
        fake.open.clear()
        soon.put("b")
        fake.failed.set()
        raise ConnectionError("down")

    monkeypatch.setattr(fake, "send", end)
    soon.put("a")
    assert fake.failed.wait(PATIENCE_SECONDS)
    first[0].join(PATIENCE_SECONDS)
    fake.open.set()
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"b"}]


def test_wake_ups_have_a_least_interval(
    soon: Soon, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put during the interval is sent after it, together."""
    intervals: list[float] = []

    def sleep(seconds: float) -> None:
        intervals.append(seconds)
        if len(intervals) == 1:
            soon.put("b")
            soon.put("c")

    monkeypatch.setattr(module.time, "sleep", sleep)
    soon.put("a")
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"a"}, {"b", "c"}]
    assert intervals == [Waker.interval_seconds] * 2


def test_more_groups_than_fit_into_a_wake_up_are_sent_as_any(soon: Soon, fake: Fake) -> None:
    """What waits has a bound too."""
    fake.open.clear()
    for n in range(100):
        soon.put(str(n))
    assert len(soon._groups) == fake.most_groups + 1
    fake.open.set()
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [None]


def test_exactly_as_many_groups_as_fit_are_sent_by_name(soon: Soon, fake: Fake) -> None:
    fake.open.clear()
    for group in "abc":
        soon.put(group)
    fake.open.set()
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"a", "b", "c"}]


@pytest.mark.parametrize("sent", [0, 1])
def test_a_failure_is_logged_and_what_waits_is_dropped(
    soon: Soon, fake: Fake, caplog: pytest.LogCaptureFixture, sent: int
) -> None:
    """Both the connection and the statement can fail. The next event is sent."""
    for n in range(sent):
        soon.put(f"sent{n}")
        assert soon.flush(PATIENCE_SECONDS)
    fake.failures = 1
    soon.put("lost")
    assert soon.flush(PATIENCE_SECONDS)
    soon.put("b")
    assert soon.flush(PATIENCE_SECONDS)
    assert {"lost"} not in fake.sent
    assert fake.sent[-1] == {"b"}
    assert "Cannot wake other processes" in caplog.text


def test_a_store_that_hangs_does_not_delay_a_publisher(fake: Fake) -> None:
    fake.open.clear()
    for n in range(100):
        publish("t", "ping", str(n))
    assert fake.sent == []
    assert not waker.flush(0)
    fake.open.set()
    assert waker.flush(PATIENCE_SECONDS)
    assert fake.sent == [{group_name("t")}]


def test_the_connection_is_closed_and_the_thread_ends_when_nothing_is_published(
    fake: Fake,
) -> None:
    """The next event starts another thread."""
    soon = Soon()
    soon.idle_seconds = 0.01
    for group in "ab":
        soon.put(group)
        thread = soon._thread
        assert thread is not None
        thread.join(PATIENCE_SECONDS)
        assert (fake.connections, soon._thread) == (0, None)
    assert fake.sent == [{"a"}, {"b"}]


def test_a_group_that_is_put_while_the_connection_closes_is_sent(fake: Fake) -> None:
    """The thread connects again."""
    soon = Soon()
    soon.idle_seconds = 0.01
    send = fake.send

    def put_at_the_end(batches: Iterable[Groups]) -> None:
        send(batches)
        if len(fake.sent) == 1:
            soon.put("late")

    fake.send = put_at_the_end  # type: ignore[method-assign]
    soon.put("a")
    thread = soon._thread
    assert thread is not None
    thread.join(PATIENCE_SECONDS)
    assert fake.sent == [{"a"}, {"late"}]


def test_the_end_of_the_process_sends_what_is_left(fake: Fake) -> None:
    soon = Soon()
    soon.put("a")
    thread = soon._thread
    assert thread is not None
    soon.end()
    assert not thread.is_alive()
    assert fake.sent == [{"a"}]
    soon.end()


def test_the_end_of_the_process_does_not_wait_for_a_store_that_hangs(fake: Fake) -> None:
    soon = Soon()
    soon.flush_seconds = 0.01
    fake.open.clear()
    soon.put("a")
    thread = soon._thread
    assert thread is not None
    soon.end()
    assert thread.is_alive()
    fake.open.set()
    thread.join(PATIENCE_SECONDS)
    assert fake.sent == []


def test_the_end_of_the_process_does_not_wait_for_the_next_attempt(fake: Fake) -> None:
    soon = Soon()
    soon.backoff_seconds = (3600,)
    fake.failures = 1
    soon.put("a")
    thread = soon._thread
    assert thread is not None
    assert soon.flush(PATIENCE_SECONDS)
    soon.end()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_a_reset_drops_what_waits_and_its_lock(fake: Fake) -> None:
    """The thread of before ends, and does not send what is put after it."""
    soon = Soon()
    fake.open.clear()
    soon.put("a")
    thread = soon._thread
    assert thread is not None
    assert fake.entered.wait(PATIENCE_SECONDS)
    soon.reset()
    assert soon.flush(0)
    fake.open.set()
    thread.join(PATIENCE_SECONDS)
    soon.put("b")
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"b"}]
    soon.end()


def test_only_the_thread_in_use_continues(soon: Soon, fake: Fake) -> None:
    """One of before a reset ends, and leaves the other one alone."""
    soon.put("a")
    assert soon.flush(PATIENCE_SECONDS)
    thread = soon._thread
    assert not soon._is_needed()
    assert thread is soon._thread is not None


def test_a_fork_does_not_wait_for_the_lock(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the parent may have held it."""
    soon = Soon()
    soon.put("a")
    assert soon.flush(PATIENCE_SECONDS)
    thread, lock = soon._thread, soon._condition
    monkeypatch.setattr(module._runtime, "_in_fork", True)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(PATIENCE_SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE_SECONDS)
    try:
        soon.reset()
        soon.put("b")
        assert soon.flush(PATIENCE_SECONDS)
    finally:
        release.set()
        holder.join()
        with lock:
            lock.notify_all()
    assert thread is not None
    thread.join(PATIENCE_SECONDS)
    soon.end()
    assert fake.sent == [{"a"}, {"b"}]


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_be_started_does_not_fail_a_publisher(
    soon: Soon, fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged. The next event starts another thread."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        soon.put("a")
    assert "No thread can be started for wake-ups" in caplog.text
    assert soon.flush(0)
    soon.put("b")
    assert soon.flush(PATIENCE_SECONDS)
    assert fake.sent == [{"b"}]


@pytest.mark.parametrize("case", ["no wake-ups", "the store reports commits", "shared layer"])
def test_nothing_is_sent_where_it_is_not_needed(
    case: str, fake: Fake, monkeypatch: pytest.MonkeyPatch, settings
) -> None:
    if case == "no wake-ups":
        monkeypatch.setattr(MemoryHistory, "wake_ups", None)
    elif case == "the store reports commits":
        fake.sends = False
    else:
        settings.CHANNEL_LAYERS = {
            "default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}
        }
    publish("t", "ping", "x")
    assert waker._thread is None
    assert waker.flush(0)


# The watcher


class FakeLoop:
    """A loop that runs until it is stopped or closed."""

    def __init__(self) -> None:
        self._running = True

    def is_running(self) -> bool:
        return self._running

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        self._running = False

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        if not self._running:
            raise RuntimeError("Event loop is closed")


class FakeHub:
    """A hub of which only the wake-ups are tested."""

    def __init__(self) -> None:
        self.loop: Any = FakeLoop()
        self.woken: list[Groups] = []
        self.awake = threading.Event()

    def wake(self, groups: Groups) -> None:
        self.woken.append(groups)
        self.awake.set()
        self.loop.call_soon_threadsafe(int)


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    fake_hub = FakeHub()
    yield fake_hub
    fake_hub.loop.close()


class Quick(Watcher):
    """A watcher that does not wait long after a failure."""

    backoff_seconds = (0.01,)


@pytest.fixture
def quick() -> Iterator[Quick]:
    quick = Quick()
    yield quick
    end(quick)


def end(quick: Quick) -> None:
    thread = quick._thread
    quick.reset()
    if thread is not None:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def test_a_wake_up_reaches_each_hub_with_streams(
    quick: Quick, fake: Fake, fake_hub: FakeHub
) -> None:
    """One thread watches for all of them. An empty wake-up reaches none."""
    other = FakeHub()
    quick.add(fake_hub)
    quick.add(other)
    quick.add(other)
    fake.news += [(), None, ["a"]]
    for one in (fake_hub, other):
        while len(one.woken) < 2:
            assert one.awake.wait(PATIENCE_SECONDS)
        assert one.woken == [None, ["a"]]
    assert fake.watched == 1
    other.loop.close()


def test_the_connection_is_closed_when_no_hub_has_streams(
    quick: Quick, fake: Fake, fake_hub: FakeHub
) -> None:
    """A stream that is opened later starts another thread."""
    for _ in range(2):
        quick.add(fake_hub)
        thread = quick._thread
        assert thread is not None
        quick.discard(fake_hub)
        thread.join(PATIENCE_SECONDS)
        assert (fake.watching, quick._thread) == (0, None)


@pytest.mark.parametrize("method", ["stop", "close"])
def test_the_thread_ends_when_the_loop_of_its_hub_was_stopped_or_closed(
    quick: Quick, fake: Fake, fake_hub: FakeHub, method: str
) -> None:
    """Streams were open. Some servers stop their loop and do not close it."""
    quick.add(fake_hub)
    thread = quick._thread
    assert thread is not None
    getattr(fake_hub.loop, method)()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert (fake.watching, quick._thread) == (0, None)


def test_a_loop_that_is_closed_during_a_wake_up_does_not_affect_other_hubs(
    quick: Quick, fake: Fake, fake_hub: FakeHub
) -> None:
    other = FakeHub()
    for one in (fake_hub, other):
        one.loop.close()
        quick._hubs.add(one)
    quick._wake(None)
    assert fake_hub.woken == other.woken == [None]


def test_a_failure_is_logged_and_the_database_is_watched_again(
    quick: Quick, fake: Fake, fake_hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    fake.news += [ConnectionError("down"), ConnectionError("down"), None]
    quick.add(fake_hub)
    assert fake_hub.awake.wait(PATIENCE_SECONDS)
    assert fake.watched == 3
    assert "Cannot watch the database for events of other processes" in caplog.text


def test_a_thread_that_cannot_be_started_does_not_fail_a_stream(
    quick: Quick, fake: Fake, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next stream, or the next history check, starts another one."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        quick.add(fake_hub)
    assert quick._thread is None
    quick.add(fake_hub)
    fake.news.append(None)
    assert fake_hub.awake.wait(PATIENCE_SECONDS)


def test_a_reset_ends_the_thread_and_drops_the_hubs(
    quick: Quick, fake: Fake, fake_hub: FakeHub
) -> None:
    quick.add(fake_hub)
    end(quick)
    assert fake.watching == 0
    assert quick._hubs == set()


@pytest.mark.parametrize("case", ["no wake-ups", "shared layer"])
def test_the_database_is_not_watched_where_it_is_not_needed(
    case: str, fake: Fake, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, settings
) -> None:
    """A shared layer carries the events."""
    quick = Quick()
    if case == "no wake-ups":
        monkeypatch.setattr(MemoryHistory, "wake_ups", None)
    else:
        settings.CHANNEL_LAYERS = {
            "default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}
        }
    quick.add(fake_hub)
    assert quick._thread is None


# The news of a hub


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the monotonic clock."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def set_clock(seconds: float) -> None:
        now[0] = 1000.0 + seconds

    return set_clock


def test_the_groups_of_several_wake_ups_are_checked_together(
    clock: Callable[[float], None],
) -> None:
    news = News()
    assert news.due_at == math.inf
    news.add(["a", "b"])
    clock(5)
    news.add(["b", "c"])
    assert news.due_at == 1000
    assert set(news.take() or ()) == {"a", "b", "c"}
    assert news.due_at == math.inf
    assert news.take() == frozenset()


@pytest.mark.parametrize("wake_ups", [[None, ["a"]], [["a"], None]])
def test_a_wake_up_for_any_token_includes_the_others(wake_ups: list[Groups]) -> None:
    news = News()
    for groups in wake_ups:
        news.add(groups)
    assert news.take() is None
    news.add(["b"])
    assert news.take() == {"b"}


@pytest.mark.parametrize("during", [True, False])
@pytest.mark.parametrize(("seconds", "pause"), [(0.001, News.pause_seconds), (0.5, 0.5)])
def test_a_check_is_followed_by_a_pause_that_is_as_long_at_least(
    clock: Callable[[float], None], seconds: float, pause: float, during: bool
) -> None:
    """So checks take half of the time at most, however many wake-ups there are."""
    news = News()
    clock(seconds)
    if during:
        news.add(None)
    news.checked(began=1000)
    if not during:
        news.add(None)
    assert news.due_at == pytest.approx(1000 + seconds + pause)
    clock(60)
    news.take()
    news.add(None)
    assert news.due_at == 1060


# In a hub


@pytest.fixture(autouse=True)
def only_wake_ups(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the history by the timer only once."""
    settings.EVENTSOURCE_POLL_SECONDS = 3600


class Counting(MemoryHistory):
    """Counts its calls."""

    calls: dict[str, int] = {}

    def _count(self, name: str) -> None:
        Counting.calls[name] = Counting.calls.get(name, 0) + 1

    def changes(self, since: Any) -> Any:
        self._count("changes")
        return super().changes(since)

    def heads(self, tokens: Any) -> Any:
        self._count("heads")
        return super().heads(tokens)

    def read(self, *args: Any, **kwargs: Any) -> Any:
        self._count("read")
        return super().read(*args, **kwargs)


@pytest.fixture
async def hub(fake: Fake, settings, monkeypatch: pytest.MonkeyPatch) -> Hub:
    settings.EVENTSOURCE_HISTORY = {"BACKEND": f"{__name__}.Counting"}
    Counting.calls.clear()
    hub = get_hub()
    await until(lambda: Counting.calls.get("heads") and hub._wake._waiters)
    return hub


async def listen(hub: Hub, token: str = "t") -> Subscriber:
    """Return a live subscriber."""
    subscriber = Single(
        get_history().newest(token)[0], token=token, buffer_bytes=2**20, keepalive_seconds=None
    )
    await hub.subscribe(subscriber)
    hub.catch_up(subscriber.only, await hub.read(token, subscriber.seq))
    assert subscriber.live
    Counting.calls.clear()
    return subscriber


async def checked(hub: Hub) -> None:
    """Wait until the hub has checked what its wake-ups have reported."""
    await until(lambda: hub._news.due_at == math.inf and hub._wake._waiters)


@pytest.mark.parametrize("groups", [None, [group_name("t")], [group_name("x"), group_name("t")]])
async def test_a_wake_up_passes_on_the_event_of_another_process(hub: Hub, groups: Groups) -> None:
    subscriber = await listen(hub)
    add(hub.history, "a")
    hub.wake(groups)
    await until(lambda: subscriber.has_frames)
    assert b"data: a\n" in subscriber.take()


async def test_a_wake_up_for_a_token_reads_its_events_without_a_check(hub: Hub) -> None:
    await listen(hub, "other")
    await listen(hub)
    add(hub.history, "a")
    hub.wake([group_name("t")])
    await until(lambda: Counting.calls)
    await checked(hub)
    assert Counting.calls == {"read": 1}


@pytest.mark.parametrize("groups", [None, [group_name("t"), group_name("u")]])
async def test_a_wake_up_during_the_first_read_of_a_token_causes_a_check_after_it(
    hub: Hub, groups: Groups
) -> None:
    """The read may have begun before the event was stored."""
    subscribers = {
        token: Single(
            get_history().newest(token)[0], token=token, buffer_bytes=2**20, keepalive_seconds=None
        )
        for token in "tu"
    }
    for one in subscribers.values():
        await hub.subscribe(one)
    early = {token: await hub.read(token, one.seq) for token, one in subscribers.items()}
    for token in subscribers:
        add(hub.history, "a", token=token)
    hub.wake(groups)
    await asyncio.sleep(0)
    await checked(hub)
    for token, one in subscribers.items():
        hub.catch_up(one.only, early[token])
        assert one.live
        await until(lambda one=one: one.has_frames)
        assert b"data: a\n" in one.take()
    assert not hub._unread


async def test_the_first_read_of_another_token_causes_no_check(hub: Hub) -> None:
    subscriber = Single(0, buffer_bytes=2**20, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    hub.wake([group_name("t")])
    await asyncio.sleep(0)
    await checked(hub)
    await listen(hub, "u")
    assert hub._unread == {group_name("t")}
    assert hub._news.due_at == math.inf


async def test_the_listeners_of_a_wake_up_during_the_first_read_may_leave(hub: Hub) -> None:
    subscriber = Single(0, buffer_bytes=2**20, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    hub.wake([group_name("t")])
    await asyncio.sleep(0)
    await checked(hub)
    assert hub._unread
    hub.unsubscribe(subscriber)
    hub._drop_idle_feeds()
    assert not hub._unread


async def test_a_wake_up_for_tokens_without_listeners_reads_nothing(hub: Hub) -> None:
    await listen(hub)
    hub.wake([group_name("x")])
    assert hub._news.due_at == math.inf
    await asyncio.sleep(0)
    assert hub._news.due_at == math.inf
    assert Counting.calls == {}


async def test_a_group_whose_listeners_left_before_the_check_is_skipped(hub: Hub) -> None:
    await listen(hub)
    hub._add_news([group_name("x")])
    await checked(hub)
    assert Counting.calls == {}


async def test_many_wake_ups_cause_one_check_in_each_interval(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is a check of all tokens, which the timer causes."""
    monkeypatch.setattr(Hub, "full_check_every", 2)
    monkeypatch.setattr(Hub, "full_check_seconds", 0)
    monkeypatch.setattr(Counting, "changes", lambda self, since: (since, {}))
    await listen(hub)
    checks = 0
    check = hub._check_history

    async def count(**kwargs: Any) -> None:
        nonlocal checks
        checks += 1
        await check(**kwargs)

    monkeypatch.setattr(hub, "_check_history", count)
    began = time.monotonic()
    for _ in range(200):
        hub.wake(None)
        await asyncio.sleep(0.001)
    await checked(hub)
    seconds = time.monotonic() - began
    assert 1 < checks <= seconds / News.pause_seconds + 2
    assert Counting.calls == {}


async def test_a_wake_up_checks_all_tokens_if_the_history_requires_it(hub: Hub) -> None:
    """The history cannot return the heads that have changed."""
    await listen(hub)
    hub.wake(None)
    await until(lambda: Counting.calls)
    await checked(hub)
    assert Counting.calls == {"changes": 1, "heads": 1}


async def test_the_database_is_watched_while_a_stream_is_open(hub: Hub, fake: Fake) -> None:
    assert watcher._thread is None
    subscriber = await listen(hub)
    thread = watcher._thread
    assert thread is not None
    fake.news.append(None)
    await until(lambda: Counting.calls)
    hub.unsubscribe(subscriber)
    hub.wake(None)  # the check drops the feed
    await until(lambda: not thread.is_alive())
    assert watcher._thread is None
    await listen(hub)
    assert watcher._thread is not None


async def test_the_stream_of_the_control_token_alone_is_not_watched(hub: Hub, fake: Fake) -> None:
    """The process has it even if its streams have ended."""
    await listen(hub, CONTROL_TOKEN)
    assert watcher._thread is None
    subscriber = await listen(hub)
    thread = watcher._thread
    assert thread is not None
    hub.unsubscribe(subscriber)
    await hub._check_history()
    await until(lambda: not thread.is_alive())
