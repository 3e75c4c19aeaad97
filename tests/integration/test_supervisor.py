"""The watch: streams end when they must, whatever fails; and who listens is told."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import OperationalError, connections
from django.http import Http404, HttpRequest
from django.test import AsyncClient
from django.urls import path

from django_eventsource import hub as hub_module
from django_eventsource import troubles
from django_eventsource import watch as module
from django_eventsource.control import CLOSE, ControlEvent, aclose_streams
from django_eventsource.events import JSONIdEvent
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.hub import get_hub
from django_eventsource.listeners import Listener, registry
from django_eventsource.policies import AllowAny
from django_eventsource.presence import host_and_pid
from django_eventsource.publishing import apublish, publish_event
from django_eventsource.shutdown import shutdown
from django_eventsource.streams import EventStream, Reason
from django_eventsource.tokens import CONTROL_TOKEN
from django_eventsource.views import EventSourceView
from django_eventsource.watch import Watch, get_watch
from tests.histories import ALIASES, add
from tests.listeners import Connection
from tests.processes import serve

SECONDS = 4

in_memory = pytest.mark.usefixtures("memory_history", "quick")
real_commits = pytest.mark.django_db(transaction=True)


class Moody(AllowAny):
    """A policy that changes its mind, raises and hangs when told; by token."""

    asked: list[str] = []
    answers: dict[str, Callable[[], Any]] = {}

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        self.asked.append(token)
        answer = self.answers.get(token)
        if answer is None:
            return True
        found = answer()
        return bool(await found) if asyncio.iscoroutine(found) else bool(found)


class LogsOut(EventSourceView):
    """Its streams are to end before they have begun."""

    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        await aclose_streams(token=token)
        await asyncio.sleep(0.2)  # every process has heard it
        return ()


urlpatterns = [
    path("late/<action>/<token>", LogsOut.as_view()),
    path("events/<action>/<token>", EventSourceView.as_view()),
]


@pytest.fixture
def quick(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and begin with nobody listening."""
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.02)
    monkeypatch.setattr(shutdown, "begun", False)
    monkeypatch.setattr(shutdown, "_server", None)
    monkeypatch.setattr(Moody, "asked", [])
    monkeypatch.setattr(Moody, "answers", {})
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLICY = f"{__name__}.Moody"
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.1


async def open_stream(token: str = "t", path: str = "events") -> EventStream:
    """Open a stream and read its first bytes."""
    response = await AsyncClient().get(f"/{path}/poll/{token}")
    stream = response._stream  # type: ignore[attr-defined]
    await anext(stream)
    return stream


async def read_to_end(stream: EventStream) -> bytes:
    async with asyncio.timeout(SECONDS):
        return b"".join([chunk async for chunk in stream])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def heard() -> None:
    """Wait until the watch hears the control token."""
    watch = get_watch()
    await until(
        lambda: (feed := watch.hub._feeds.get(CONTROL_TOKEN)) is not None and feed.last is not None
    )


# One per loop


@in_memory
async def test_one_watch_for_a_loop() -> None:
    """All streams of a loop have the same one, under the name of one lease."""
    watch = get_watch()
    assert get_watch() is watch
    assert host_and_pid(watch.process) == (socket.gethostname(), str(os.getpid()))


@in_memory
def test_the_watch_of_a_closed_loop_is_forgotten() -> None:
    """Several loops in one process, one after the other: nothing is left of the first."""

    async def start() -> Watch:
        return get_watch()

    first = asyncio.run(start())
    assert first.hub.loop.is_closed()
    second = asyncio.run(start())
    assert first is not second
    assert first not in module._watches.values()
    assert first.process != second.process


@in_memory
def test_a_stream_that_outlives_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted out when it is dropped, though nobody can be told."""
    # The handler of SIGINT before ours leads to the task of asyncio.run(), and to its result.
    monkeypatch.setattr(module, "install", lambda loop, farewell: None)

    async def start() -> EventStream:
        return await open_stream("outlives")

    stream = asyncio.run(start())
    assert registry.count("outlives") == 1
    del stream
    deadline = time.monotonic() + SECONDS
    while registry.count("outlives") and time.monotonic() < deadline:
        gc.collect()  # does nothing while another thread collects
    assert registry.count("outlives") == 0


# Age and stalled readers


@in_memory
async def test_a_stream_that_is_too_old(settings) -> None:
    """It ends by itself; its listener comes back with its last event id."""
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 0.1
    began = time.monotonic()
    stream = await open_stream()
    await read_to_end(stream)
    assert stream.reason is Reason.AGE
    assert time.monotonic() - began >= 0.05
    assert registry.count("t") == 0


@in_memory
async def test_a_stream_may_be_as_old_as_it_likes(settings) -> None:
    """None sets no age, no stall, no recheck."""
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = None
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = None
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    stream = await open_stream()
    await asyncio.sleep(0.2)
    assert stream.reason is None
    assert Moody.asked == ["t"]
    await stream.aclose()


@in_memory
async def test_a_reader_that_takes_nothing(settings) -> None:
    """A stream whose bytes nobody takes is cut off; one that merely is quiet is not."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.1
    quiet = await open_stream("quiet")
    reading = asyncio.ensure_future(anext(quiet))
    stalled = await open_stream("stalled")
    aborted = []
    stalled.on_abort = lambda: aborted.append(1)
    await until(lambda: stalled.reason)
    assert stalled.reason is Reason.STALLED
    assert aborted == [1]
    assert quiet.reason is None
    await apublish("quiet", "ping", "x")
    assert b"data: x" in await reading
    await quiet.aclose()


@in_memory
async def test_a_reader_that_takes_little(settings) -> None:
    """As long as it takes something it has not stalled; then it has."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.1
    slow = await open_stream("slow")
    left = [1000]

    def unsent() -> int:
        if left[0] > 500:
            left[0] -= 10
        return left[0]

    slow.unsent = unsent
    await until(lambda: left[0] == 500)
    assert slow.reason is None
    await until(lambda: slow.reason)
    assert slow.reason is Reason.STALLED


async def open_drip(token: str = "t", cursor: str | None = None) -> EventStream:
    """Open a stream whose listener always reads a little of the chunk that is being sent."""
    stream = EventStream(token, get_history().locate(token, cursor), asked=cursor)
    assert get_watch().admit(stream, Listener(tokens=(token,))) is None
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    if cursor is None:
        await until(lambda: stream._subscriber._waiter)
        await apublish(token, "ping", "x")
    await reading
    left = iter(range(10**6, 0, -1))
    stream.unsent = lambda: next(left)
    return stream


async def tell_to_end(stream: EventStream, how: str, settings: Any) -> None:
    """Let a stream end in one of the ways that leave what is buffered."""
    if how == "close":
        await apublish(stream.token, "close", "bye")
    elif how == "age":
        stream.listener.ends_at = 0
    else:
        stream.end(Reason.REFUSED)


@in_memory
@pytest.mark.parametrize("how", ["close", "age", "refusal"])
async def test_a_stream_that_was_told_to_end_is_aborted_whatever_its_listener_reads(
    how: str, settings
) -> None:
    """The listener has the time of a stalled one, and no more."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.3
    drip = await open_drip()
    aborted: list[float] = []
    drip.on_abort = lambda: aborted.append(time.monotonic())
    await asyncio.sleep(0.5)
    assert aborted == [], "it makes progress"
    began = time.monotonic()
    await tell_to_end(drip, how, settings)
    await until(lambda: aborted)
    assert aborted[0] - began >= 0.3
    assert registry.count("t") == 0
    assert drip.reason is {"close": Reason.STALLED, "age": Reason.AGE}.get(how, Reason.REFUSED)


@in_memory
async def test_a_slow_listener_has_the_age_of_a_stream_for_the_replay_of_a_closed_token(
    settings,
) -> None:
    """Otherwise it would be cut off at the same event whenever it reconnects."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.2
    (start,) = add(get_history(), "start")
    add(get_history(), "x")
    await apublish("t", "close", "bye")
    drip = await open_drip(cursor=str(start.seq))
    aborted: list[int] = []
    drip.on_abort = lambda: aborted.append(1)
    await asyncio.sleep(0.5)
    assert aborted == []
    drip.listener.ends_at = 0
    await until(lambda: aborted)


@in_memory
async def test_a_stream_that_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its response was dropped: it does not count for ever."""
    monkeypatch.setattr(module, "UNSERVED_SECONDS", 0.2)
    served = await open_stream("t")
    dropped = EventStream("t", get_history().locate("t", None))
    assert get_watch().admit(dropped, Listener(tokens=("t",))) is None
    assert registry.count("t") == 2
    await until(lambda: dropped.reason)
    assert registry.count("t") == 1
    assert served.reason is None
    await served.aclose()


# The server shuts down without a signal


@in_memory
async def test_streams_end_when_the_server_shuts_down_without_a_signal() -> None:
    """Each gets a reconnection time, and no new stream is opened."""
    streams = [await open_stream(), await open_stream("other")]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    ends = False
    shutdown.follow(lambda: ends)
    shutdown.follow(None)  # a stream whose server cannot be found changes nothing
    await until(lambda: all(stream.is_open for stream in streams))
    await asyncio.sleep(0.1)
    assert [stream.reason for stream in streams] == [None, None]
    ends = True
    for body in bodies:
        assert (await body).rpartition(b"retry: ")[1]
    assert {stream.reason for stream in streams} == {Reason.SHUTDOWN}
    response = await AsyncClient().get("/events/poll/t")
    assert not response.streaming
    assert b"\nretry: " in response.content


@in_memory
async def test_the_server_of_another_event_loop_is_not_followed() -> None:
    """Its streams belong to another thread."""

    async def follow() -> None:
        shutdown.follow(lambda: True)

    await asyncio.to_thread(asyncio.run, follow())
    stream = await open_stream()
    await asyncio.sleep(0.1)
    assert stream.reason is None
    assert not shutdown.begun
    await stream.aclose()


# Rights that are lost


@in_memory
async def test_a_policy_that_changes_its_mind(settings) -> None:
    """The stream ends at the next look, and only the one that is refused."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.1
    lost, kept = await open_stream("lost"), await open_stream("kept")
    Moody.answers["lost"] = lambda: False
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    await until(lambda: Moody.asked.count("kept") >= 4)
    assert kept.reason is None
    await kept.aclose()


@in_memory
async def test_a_policy_that_raises(settings, caplog: pytest.LogCaptureFixture) -> None:
    """The stream is kept: a database that is away throws nobody out. It is asked again."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = await open_stream()

    def away() -> None:
        raise OperationalError("away")

    Moody.answers["t"] = away
    await until(lambda: Moody.asked.count("t") >= 3 and "could not be checked" in caplog.text)
    assert stream.reason is None
    Moody.answers["t"] = lambda: False
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED


@in_memory
@pytest.mark.parametrize("error", [LookupError, Http404])
async def test_a_policy_that_fails(
    settings, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    """Its error is none of the database's: as a new listener would, this one gets nothing."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = await open_stream()

    def fail() -> None:
        raise error("the room is gone")

    Moody.answers["t"] = fail
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED
    assert "The policy failed" in caplog.text


@in_memory
async def test_a_policy_that_waits_for_what_is_cancelled(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    """That is its failure, and nobody else's: the others are asked again and again."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    lost, kept = await open_stream("lost"), await open_stream("kept")

    async def cancelled() -> bool:
        task = asyncio.ensure_future(asyncio.Event().wait())
        task.cancel()
        return await task

    Moody.answers["lost"] = cancelled
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    assert "The policy failed" in caplog.text
    asked = Moody.asked.count("kept")
    await until(lambda: Moody.asked.count("kept") > asked + 2)
    await kept.aclose()


@in_memory
async def test_a_policy_whose_own_time_is_up(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A socket's time-out is the network's: its thread is not given up for stuck."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    given_up: list[str] = []
    monkeypatch.setattr(module, "leave_thread", lambda: given_up.append(""))
    stream = await open_stream()

    def away() -> None:
        raise TimeoutError("the directory server is away")

    Moody.answers["t"] = away
    await until(lambda: Moody.asked.count("t") >= 3 and "could not be checked" in caplog.text)
    assert (stream.reason, given_up) == (None, [])
    await stream.aclose()


@in_memory
async def test_a_policy_that_hangs(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One policy that never answers does not keep the others from being looked after."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    hanging = await open_stream("hanging")
    asked = Moody.asked.count("hanging")
    Moody.answers["hanging"] = lambda: asyncio.Event().wait()
    await until(lambda: Moody.asked.count("hanging") > asked)
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 0.1
    other = await open_stream("other")
    await until(lambda: other.reason)
    assert other.reason is Reason.AGE
    await hanging.aclose()
    await other.aclose()


@in_memory
async def test_a_look_that_is_wanted_during_one(settings) -> None:
    """What the one under way has seen may be older than the reason for the next."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 600
    stream = await open_stream()
    await heard()
    answers = [asyncio.Event(), asyncio.Event()]

    async def answer() -> bool:
        mine = Moody.asked.count("t") - 2  # the first was when the stream was opened
        await answers[mine].wait()
        return mine == 0

    Moody.answers["t"] = answer
    get_watch()._recheck_everybody()
    await until(lambda: Moody.asked.count("t") == 2)
    get_watch()._recheck_everybody()
    for one in answers:
        one.set()
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED


@in_memory
async def test_a_connection_that_cannot_be_closed(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for a turn gets it."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    monkeypatch.setattr(module, "RECHECKS_AT_ONCE", 1)
    streams = [await open_stream(f"t{n}") for n in range(3)]

    def fail() -> None:
        raise OperationalError("broken")

    monkeypatch.setattr(connections, "close_all", fail)
    await until(lambda: min(Moody.asked.count(f"t{n}") for n in range(3)) >= 3)
    assert "A connection could not be closed." in caplog.text
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_policies_that_work_in_threads_hold_up_no_delivery(settings) -> None:
    """What they block is not the thread in which histories are read."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    blocked, free = threading.Event(), threading.Event()

    def block() -> bool:
        blocked.set()
        return free.wait(20)

    stream = await open_stream()
    Moody.answers["t"] = sync_to_async(block)
    await until(blocked.is_set)
    async with asyncio.timeout(10):
        assert await sync_to_async(lambda: "done")() == "done"
    free.set()
    await stream.aclose()


@in_memory
async def test_a_policy_that_is_stuck_in_its_thread(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others go on in another thread, and it is asked again."""
    monkeypatch.setattr(module, "RECHECK_SECONDS", 0.2)
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    free = threading.Event()
    stuck = await open_stream("stuck")
    others = [await open_stream(f"other {n}") for n in range(3)]
    Moody.answers["stuck"] = sync_to_async(lambda: free.wait(20))
    for n in range(3):
        Moody.answers[f"other {n}"] = sync_to_async(lambda: False)
    for stream in others:
        await read_to_end(stream)
        assert stream.reason is Reason.REFUSED
    await until(lambda: "could not be checked" in caplog.text)
    assert stuck.reason is None
    free.set()
    await stuck.aclose()


@in_memory
async def test_many_are_rechecked_with_few_threads(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for twenty: each has a connection of its own to the database."""
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    streams = [await open_stream("t") for _ in range(50)]
    threads: list[int] = []
    Moody.answers["t"] = sync_to_async(lambda: not threads.append(threading.get_ident()))
    watch = get_watch()
    mine = [pair for pair in registry.streams() if pair[0] in streams]
    await watch._recheck_all(mine)
    assert len(threads) == 50
    assert len(set(threads)) <= 3
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_a_listener_without_a_recheck(settings) -> None:
    """Who admits a listener by hand need not bring one."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = EventStream("t", get_history().locate("t", None))
    assert get_watch().admit(stream, Listener(tokens=("t",))) is None
    await anext(stream)
    await asyncio.sleep(0.2)
    assert stream.reason is None
    await stream.aclose()


@in_memory
async def test_a_limit_leaves_nothing_behind(settings) -> None:
    """A stream that may not begin is not counted, watched or told of."""
    watch = get_watch()
    first, second = (EventStream("most", get_history().locate("most", None)) for _ in range(2))
    settings.EVENTSOURCE_MAX_STREAMS_PER_TOKEN = 1
    assert watch.admit(first, Listener(tokens=("most",))) is None
    limit = watch.admit(second, Listener(tokens=("most",)))
    assert limit == "EVENTSOURCE_MAX_STREAMS_PER_TOKEN"
    await second.aclose()
    assert registry.count("most") == 1
    await first.aclose()
    assert registry.count("most") == 0


@in_memory
async def test_many_rechecks_at_once(settings) -> None:
    """A hundred streams that are due are asked about a few at a time."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.1
    at_once = most = 0

    async def slow() -> bool:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.002)
        at_once -= 1
        return True

    streams = [await open_stream("many") for _ in range(40)]
    Moody.asked.clear()
    Moody.answers["many"] = slow
    await until(lambda: len(Moody.asked) >= 40)
    assert 1 < most <= module.RECHECKS_AT_ONCE
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_a_sweep_that_fails(
    settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a setting that is wrong ends nothing: it is logged and tried again."""
    stream = await open_stream()
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0
    await until(lambda: "Looking after the streams failed" in caplog.text)
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.05
    await until(lambda: stream.reason)
    assert stream.reason is Reason.STALLED


@pytest.mark.django_db(transaction=True, databases=["default", "postgres"])
@in_memory
async def test_a_database_connection_that_broke(settings) -> None:
    """A database that was restarted is asked again by the next look."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    asked: list[int] = []
    """Which of the database's processes answered; 0 for a failure."""

    def ask() -> bool:
        asked.append(0)
        with connections["postgres"].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            asked[-1] = cursor.fetchone()[0]
        return True

    def cut(pid: int) -> None:
        with connections["postgres"].cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
        connections["postgres"].close()

    stream = await open_stream()
    Moody.answers["t"] = lambda: sync_to_async(ask)()
    await until(lambda: asked and asked[-1])
    first = asked[-1]
    await asyncio.to_thread(cut, first)
    try:
        async with asyncio.timeout(2):
            while asked[-1] in (0, first):
                await asyncio.sleep(0.01)
    finally:
        await stream.aclose()
        await sync_to_async(lambda: connections["postgres"].close())()


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


@real_commits
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uvicorn", "daphne plain"])
async def test_users_who_lose_their_right(kind: str) -> None:
    """A permission, a session, a password, an account: the stream ends. A grant is good."""
    may = await Permission.objects.aget(codename="listen_event")
    users = {}
    cookies = {}
    for name in ("permission", "session", "password", "inactive", "kept"):
        users[name] = await User.objects.acreate_user(name, password="secret")
        await users[name].user_permissions.aadd(may)
        client = AsyncClient()
        await client.aforce_login(users[name])
        cookies[name] = client
    headers: dict[str, dict[str, str]] = {
        name: {"Cookie": f"sessionid={cookies[name].cookies['sessionid'].value}"}
        for name in ("permission", "session", "kept")
    }
    headers["password"] = basic("password", "secret")
    headers["inactive"] = basic("inactive", "secret")
    headers["basic"] = basic("kept", "secret")
    with serve(kind, EVENTSOURCE_RECHECK_SECONDS=0.5, EVENTSOURCE_POLL_SECONDS=0.1) as server:
        (await Connection.open(server.address, "/events/poll/t")).close()  # it is up
        grant = make_grant("t", listen=True, seconds=1)
        headers = {"grant": {"Authorization": f"Bearer {grant}"}, **headers}
        streams = {}
        for name, fields in headers.items():
            streams[name] = await Connection.open(server.address, "/events/poll/t", **fields)
            assert streams[name].status == 200, name
            await streams[name].read()
        await users["permission"].user_permissions.aclear()
        session = await cookies["session"].asession()
        await session.adelete(session.session_key)
        users["password"].set_password("new")
        users["inactive"].is_active = False
        for name in ("password", "inactive"):
            await users[name].asave()
        for name in ("permission", "session", "password", "inactive"):
            stream = streams.pop(name)
            assert await stream.read() == b"", name
            stream.close()
        await asyncio.sleep(2.5)  # the grant has expired, and everybody was asked again
        await apublish("t", "ping", "kept")
        for name, stream in streams.items():
            assert b"data: kept" in await stream.read(), name
            stream.close()
    assert server.log.read_text().count("Traceback") == 0


# What other processes say


@in_memory
async def test_a_word_that_is_not_understood(caplog: pytest.LogCaptureFixture) -> None:
    """What a newer version says, or nobody, is logged and passed over: the next is heard."""
    stream, kept = await open_stream(), await open_stream("kept")
    await heard()
    await sync_to_async(publish_event)(ControlEvent(CONTROL_TOKEN, CLOSE, {"unheard-of": "x"}))
    await sync_to_async(publish_event)(
        type("Other", (JSONIdEvent,), {"ACTIONS": ["other"]})(CONTROL_TOKEN, "other", 1)
    )
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSED
    assert kept.reason is None
    assert caplog.text.count("cannot be heard") <= 1
    await kept.aclose()


@in_memory
async def test_a_history_that_fails_at_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other processes say is heard once the history can be read."""
    alocate = MemoryHistory.alocate
    failures = 2

    async def fail(self: MemoryHistory, token: str, cursor: str | None) -> Any:
        nonlocal failures
        if token == CONTROL_TOKEN and failures:
            failures -= 1
            raise ConnectionError("away")
        return await alocate(self, token, cursor)

    monkeypatch.setattr(MemoryHistory, "alocate", fail)
    stream = await open_stream()
    await heard()
    assert caplog.text.count("cannot be heard") == 2
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSED


@in_memory
async def test_a_stream_of_the_watch_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should its stream end, it goes on from where it was: nothing is missed."""
    streams = []

    class Seen(EventStream):
        __slots__ = ()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            streams.append(self)

    monkeypatch.setattr(module, "EventStream", Seen)
    stream = await open_stream()
    await heard()
    streams[0].end(Reason.FAILED)
    await read_to_end(streams[0])
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSED
    assert len(streams) == 2


@in_memory
async def test_words_that_were_missed(settings) -> None:
    """Who missed some cannot know which: everybody's rights are looked at."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
        "OPTIONS": {"MAX_EVENTS": 1},
    }
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    lost, kept = await open_stream("lost"), await open_stream("kept")
    await heard()
    Moody.answers["lost"] = lambda: False
    add(get_history(), "{}", "{}", "{}", token=CONTROL_TOKEN)
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    await until(lambda: Moody.asked.count("kept") >= 2)
    assert kept.reason is None
    await kept.aclose()


@in_memory
async def test_a_word_that_comes_while_a_stream_opens(settings) -> None:
    """Rights that were checked before it came are checked again: nobody slips through."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 600
    await open_stream("other")
    await heard()
    Moody.asked.clear()
    stream = await open_stream("t", "late")
    reading = asyncio.ensure_future(read_to_end(stream))
    try:
        async with asyncio.timeout(2):
            while stream.reason is None and Moody.asked.count("t") < 2:
                await asyncio.sleep(0.01)
    finally:
        await stream.aclose()
        await reading


# Who listens


@in_memory
async def test_a_lease_that_was_lost() -> None:
    """Everything is told anew, also of tokens where nothing has changed."""
    streams = [await open_stream("a"), await open_stream("b")]
    history = get_history()
    await until(lambda: history.present("a") and history.present("b"))
    history.withdraw(get_watch().process)
    assert history.present("a") == []
    await until(lambda: history.present("a") and history.present("b"))
    for stream in streams:
        await stream.aclose()
    await until(lambda: not history.present("a") and not history.present("b"))


@in_memory
async def test_a_list_that_cannot_be_written(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and what changed meanwhile is told when it can."""
    history = get_history()
    announce = history.announce

    def fail(*args: Any) -> bool:
        raise ConnectionError("away")

    gone = await open_stream("gone")
    await until(lambda: history.present("gone"))
    monkeypatch.setattr(history, "announce", fail)
    stream = await open_stream("new")
    await gone.aclose()
    await until(lambda: "list of listeners could not be written" in caplog.text)
    monkeypatch.setattr(history, "announce", announce)
    await until(lambda: history.present("new") and not history.present("gone"))
    await stream.aclose()


@in_memory
async def test_a_process_without_listeners_needs_no_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the last one has left, that is told, and then nothing more."""
    history = get_history()
    stream = await open_stream("idle")
    await until(lambda: history.present("idle"))
    # Streams of other tests in this process that are still referenced belong to other loops.
    await stream.aclose()
    await until(lambda: not history.present("idle"))
    calls = []
    monkeypatch.setattr(history, "announce", lambda *args: calls.append(args) or True)
    await asyncio.sleep(0.35)
    assert calls == []


@in_memory
async def test_without_presence(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: nothing is written or remembered, and only this process's listeners are known."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    calls = []
    monkeypatch.setattr(get_history(), "announce", lambda *args: calls.append(args) or True)
    watch = get_watch()
    assert not await watch.is_listened("t")
    stream = await open_stream("t")
    assert await watch.is_listened("t")
    await stream.aclose()
    await asyncio.sleep(0.1)
    assert not await watch.is_listened("t")
    assert calls == []
    assert not watch._changed, "tokens pile up for ever"


@in_memory
async def test_a_bad_setting_does_not_end_the_beating(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system checks did not run, it is logged, and the list is written later."""
    stream = await open_stream("t")
    history = get_history()
    await until(lambda: history.present("t"))
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0
    await asyncio.sleep(0.3)
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.1
    async with asyncio.timeout(2):
        while not history.present("t"):
            await asyncio.sleep(0.01)
    await stream.aclose()


@in_memory
async def test_a_change_whose_list_could_not_be_made_is_announced_with_the_next_beat(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat that fails before it reaches the history loses no change."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = 600
    watch = get_watch()
    other = await open_stream("other")  # without a listener there is no lease to renew
    await watch.beat()
    stream = await open_stream("t")

    def fail(loop: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(registry, "streams", fail)
        await watch.beat()
    assert not get_history().present("t")
    await watch.beat()
    assert get_history().present("t")
    await stream.aclose()
    await other.aclose()


@in_memory
async def test_a_bad_setting_leaves_nothing_counted(settings) -> None:
    """A stream that could not be opened is not counted for ever."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0
    client = AsyncClient(raise_request_exception=False)
    assert (await client.get("/events/poll/uncounted")).status_code == 500
    gc.collect()
    assert registry.count("uncounted") == 0


@in_memory
async def test_who_has_just_left_is_not_listened_to(settings) -> None:
    """Whoever asks gets today's answer of this process, not that of the last beat."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = 600
    watch = get_watch()
    history = get_history()
    stream = await open_stream("t")
    await watch.beat()
    assert history.present("t")
    await stream.aclose()
    await until(lambda: "t" in watch._changed)
    assert not await watch.is_listened("t")
    # Another process's listeners count.
    history.announce("another", {"t": ["7"]}, 60)
    assert await watch.is_listened("t")


@in_memory
async def test_words_that_mean_nothing_here() -> None:
    """Another action, and a session that nobody has: no stream ends."""
    watch = get_watch()
    stream = EventStream("t", get_history().locate("t", None))
    assert watch.admit(stream, Listener(tokens=("t",), session="mine")) is None
    watch._hear("another", "{}")
    watch._hear(CLOSE, '{"session": "other"}')
    assert stream.reason is None
    watch._hear(CLOSE, '{"session": "mine"}')
    assert stream.reason is Reason.CLOSED
    await stream.aclose()


@in_memory
async def test_a_word_that_could_not_be_obeyed_is_heard_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails on the way is taken up where it was left."""
    stream = await open_stream()
    await heard()
    hear = Watch._hear
    failures = [ConnectionError("away")]

    def fail(self: Watch, action: str, data: str) -> None:
        if failures:
            raise failures.pop()
        hear(self, action, data)

    monkeypatch.setattr(Watch, "_hear", fail)
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSED
    assert caplog.text.count("cannot be heard") == 1


@in_memory
async def test_the_lease_is_given_up_at_the_end() -> None:
    """A process that is told to end leaves no listener behind in the list."""
    stream = await open_stream()
    await get_watch().beat()
    assert get_history().present("t") == [""]
    assert shutdown.farewell is not None
    await shutdown.end(asyncio.get_running_loop())
    assert get_history().present("t") == []
    assert stream.reason is Reason.SHUTDOWN


@in_memory
async def test_a_lease_that_cannot_be_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process ends all the same."""
    get_watch()

    async def fail(self: MemoryHistory, process: str) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(MemoryHistory, "awithdraw", fail)
    await shutdown.end(asyncio.get_running_loop())
    assert "The lease could not be given up." in caplog.text


@in_memory
async def test_without_presence_there_is_no_lease(settings) -> None:
    """Nothing is written then, at the end neither."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    await get_watch().withdraw()


# Missing tables


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of the history by the tasks."""
    calls: Counter[str] = Counter()
    for name in ("aheads", "aannounce", "alocate"):
        method = getattr(DatabaseHistory, name)

        async def call(*args: Any, _name: str = name, _method: Any = method) -> Any:
            calls[_name] += 1
            return await _method(*args)

        monkeypatch.setattr(DatabaseHistory, name, call)
    return calls


@pytest.mark.usefixtures("quick")
@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("using", ALIASES)
async def test_missing_tables_are_one_line_and_no_restart(
    settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls: Counter[str],
    using: str,
) -> None:
    """Three tasks and a request fail; the log names the command, after which streams work."""

    def migrate(*target: str) -> None:
        call_command("migrate", "django_eventsource", *target, database=using, verbosity=0)

    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"USING": using}}
    monkeypatch.setattr(troubles, "_last_line", -troubles.UNMIGRATED_SECONDS)
    monkeypatch.setattr(hub_module, "BACK_OFF_SECONDS", (0.02,))
    await sync_to_async(migrate)("zero")
    try:
        response = await AsyncClient().get("/events/poll/t")
        assert b"\nretry: " in response.content, "the listener comes back later"
        get_watch()._changed.add("t")
        names = ("aheads", "aannounce", "alocate")
        await until(lambda: all(calls[name] >= 3 for name in names))
    finally:
        await sync_to_async(migrate)()
    lines = [record for record in caplog.records if record.name.startswith("django_eventsource")]
    assert [record.exc_info for record in lines] == [None]
    assert lines[0].getMessage().endswith(": run `manage.py migrate`.")
    stream = await open_stream()
    await apublish("t", "ping", "works")
    body = b""
    while b"works" not in body:
        body += await anext(stream)
    await heard()
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSED
    tasks = list(get_hub()._tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await sync_to_async(connections.close_all)()
