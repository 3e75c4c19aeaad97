"""The supervisor: admission, the sweep, rechecks, close requests and the lease."""

from __future__ import annotations

import asyncio
import base64
import functools
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

from django_eventsource import _logging as troubles
from django_eventsource import _runtime
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.events import JSONIdEvent
from django_eventsource.grants import make_grant
from django_eventsource.history import Position, get_history
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.operations import control_receiver, recheck
from django_eventsource.operations import supervisor as module
from django_eventsource.operations.close_requests import aclose_streams
from django_eventsource.operations.control import ControlEvent
from django_eventsource.operations.control_receiver import ControlReceiver
from django_eventsource.operations.presence import Lease, host_and_pid
from django_eventsource.operations.recheck import Rechecker, request_rechecks
from django_eventsource.operations.shutdown import shutdown
from django_eventsource.operations.stream_timeouts import StreamTimeouts
from django_eventsource.operations.supervisor import StreamSupervisor, get_supervisor
from django_eventsource.policies import AllowAny
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.field_rules import CLOSE_STREAMS
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.publishing import apublish, publish_event
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.registry import registry
from django_eventsource.streaming.stream import EventStream
from django_eventsource.views import EventSourceView
from tests.support import waiting
from tests.support.events import add
from tests.support.histories import ALIASES
from tests.support.listeners import Connection
from tests.support.processes import serve

SECONDS = 4

in_memory = pytest.mark.usefixtures("memory_history", "quick")
real_commits = pytest.mark.django_db(transaction=True)


class ScriptedPolicy(AllowAny):
    """A policy whose result can be set for each token: it refuses, raises or hangs."""

    asked: list[str] = []
    answers: dict[str, Callable[[], Any]] = {}

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        self.asked.append(token)
        answer = self.answers.get(token)
        if answer is None:
            return True
        found = answer()
        return bool(await found) if asyncio.iscoroutine(found) else bool(found)


class ClosesWhileOpening(EventSourceView):
    """A view whose streams are closed while they open."""

    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        await aclose_streams(token=token)
        await asyncio.sleep(0.2)  # until every process has received it
        return ()


urlpatterns = [
    path("late/<action>/<token>", ClosesWhileOpening.as_view()),
    path("events/<action>/<token>", EventSourceView.as_view()),
]


@pytest.fixture
def quick(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep often, and start without listeners."""
    monkeypatch.setattr(StreamTimeouts, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(StreamSupervisor, "SERVER_CHECK_SECONDS", 0.02)
    monkeypatch.setattr(ControlReceiver, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(Lease, "DISABLED_SECONDS", 0.02)
    shutdown.reset()
    monkeypatch.setattr(ScriptedPolicy, "asked", [])
    monkeypatch.setattr(ScriptedPolicy, "answers", {})
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLICY = f"{__name__}.ScriptedPolicy"
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.1


class CancelRecorder:
    """Stands for the task that sends a stream; records when it is cancelled."""

    def __init__(self, cancelled: list[float]) -> None:
        self.cancelled = cancelled

    def cancel(self) -> bool:
        self.cancelled.append(time.monotonic())
        return True


class Transport:
    """A transport that reports unsent bytes."""

    def __init__(self, unsent: Callable[[], int]) -> None:
        self.get_write_buffer_size = unsent

    def get_extra_info(self, name: str) -> Transport:
        return self

    def fileno(self) -> int:
        return 10**6  # no file is open under it


def make_stream(
    token: str, position: Position | None = None, *, session: str = "", asked: str | None = None
) -> OpenStream:
    """Make a stream as the view does it."""
    position = position or get_history().locate(token, None)
    listener = Listener(tokens=(token,), session=session)
    return OpenStream(token, position, listener=listener, asked=asked)


async def open_stream(token: str = "t", path: str = "events") -> OpenStream:
    """Open a stream and read its first bytes."""
    response = await AsyncClient().get(f"/{path}/poll/{token}")
    stream = response._stream  # type: ignore[attr-defined]
    await anext(stream)
    return stream


async def read_to_end(stream: OpenStream) -> bytes:
    async with asyncio.timeout(SECONDS):
        return b"".join([chunk async for chunk in stream])


until = functools.partial(waiting.until, seconds=SECONDS)


async def receiver_is_ready() -> None:
    """Wait until the control token is read."""
    supervisor = get_supervisor()
    await until(
        lambda: (
            (feed := supervisor.hub._feeds.get(CONTROL_TOKEN)) is not None
            and feed.last is not None
        )
    )


# One per loop


@in_memory
async def test_an_event_loop_has_one_supervisor_with_one_lease() -> None:
    supervisor = get_supervisor()
    assert get_supervisor() is supervisor
    assert host_and_pid(supervisor.lease.process) == (socket.gethostname(), str(os.getpid()))


@in_memory
def test_the_supervisor_of_a_closed_loop_is_removed() -> None:
    async def start() -> StreamSupervisor:
        return get_supervisor()

    first = asyncio.run(start())
    assert first.hub.loop.is_closed()
    second = asyncio.run(start())
    assert first is not second
    assert first not in module._supervisors.values()
    assert first.lease.process != second.lease.process


@in_memory
def test_a_stream_that_outlives_its_loop_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The previous handler of SIGINT refers to the task of asyncio.run() and to its result.
    monkeypatch.setattr(shutdown, "install", lambda loop, on_ended: None)

    async def start() -> EventStream:
        return await open_stream("outlives")

    stream = asyncio.run(start())
    assert registry.count("outlives") == 1
    del stream
    deadline = time.monotonic() + SECONDS
    while registry.count("outlives") and time.monotonic() < deadline:
        gc.collect()  # does nothing while another thread collects
    assert registry.count("outlives") == 0


@in_memory
def test_a_fork_drops_supervisors_streams_and_a_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forked process calls reset_all()."""
    monkeypatch.setattr(shutdown, "install", lambda loop, on_ended: None)

    async def start() -> OpenStream:
        return await open_stream("forked")

    stream = asyncio.run(start())
    shutdown.begun = True
    _runtime.reset_all()
    assert registry.count("forked") == 0
    assert module._supervisors == {}
    assert not shutdown.begun
    del stream
    assert registry.count("forked") == 0


# Age and stalled clients


@in_memory
async def test_a_stream_ends_at_its_maximum_age(settings) -> None:
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 0.1
    began = time.monotonic()
    stream = await open_stream()
    await read_to_end(stream)
    assert stream.reason is Reason.MAX_AGE
    assert time.monotonic() - began >= 0.05
    assert registry.count("t") == 0


@in_memory
async def test_settings_of_none_disable_age_stall_and_recheck(settings) -> None:
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = None
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = None
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    stream = await open_stream()
    await asyncio.sleep(0.2)
    assert stream.reason is None
    assert ScriptedPolicy.asked == ["t"]
    await stream.aclose()


@in_memory
async def test_a_stalled_stream_is_aborted_and_a_silent_one_is_not(settings) -> None:
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.1
    quiet = await open_stream("quiet")
    reading = asyncio.ensure_future(anext(quiet))
    stalled = await open_stream("stalled")
    aborted: list[float] = []
    stalled.begin_sending(CancelRecorder(aborted))
    await until(lambda: stalled.reason)
    assert stalled.reason is Reason.STALLED
    assert len(aborted) == 1
    assert quiet.reason is None
    await apublish("quiet", "ping", "x")
    assert b"data: x" in await reading
    await quiet.aclose()


@in_memory
async def test_a_stream_is_aborted_when_its_client_stops_making_progress(settings) -> None:
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.1
    slow = await open_stream("slow")
    left = [1000]

    def unsent() -> int:
        if left[0] > 500:
            left[0] -= 10
        return left[0]

    slow.transport = Transport(unsent)
    await until(lambda: left[0] == 500)
    assert slow.reason is None
    await until(lambda: slow.reason)
    assert slow.reason is Reason.STALLED


async def open_drip(token: str = "t", cursor: str | None = None) -> OpenStream:
    """Open a stream whose client reads a little of the current chunk at each sweep."""
    position = get_history().locate(token, parse_cursor(cursor))
    stream = make_stream(token, position, asked=cursor)
    assert get_supervisor().admit(stream) is None
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    if cursor is None:
        await until(lambda: stream._subscriber._waiter)
        await apublish(token, "ping", "x")
    await reading
    left = iter(range(10**6, 0, -1))
    stream.transport = Transport(lambda: next(left))
    return stream


async def tell_to_end(stream: OpenStream, how: str, settings: Any) -> None:
    """End a stream in one of the ways that send its buffer first."""
    if how == "close":
        await apublish(stream.token, "close", "bye")
    elif how == "age":
        stream.ends_at = 0
    else:
        stream.end(Reason.REFUSED)


@in_memory
@pytest.mark.parametrize("how", ["close", "age", "refusal"])
async def test_a_stream_that_was_ended_is_aborted_although_its_client_reads(
    how: str, settings
) -> None:
    """It has EVENTSOURCE_STREAM_STALL_SECONDS."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.3
    drip = await open_drip()
    aborted: list[float] = []
    drip.begin_sending(CancelRecorder(aborted))
    await asyncio.sleep(0.5)
    assert aborted == [], "it makes progress"
    began = time.monotonic()
    await tell_to_end(drip, how, settings)
    await until(lambda: aborted)
    assert aborted[0] - began >= 0.3
    drip.end_sending()
    assert registry.count("t") == 0
    assert drip.reason is {"close": Reason.STALLED, "age": Reason.MAX_AGE}.get(how, Reason.REFUSED)


@in_memory
async def test_a_replay_of_a_closed_token_may_take_the_maximum_age(
    settings,
) -> None:
    """Otherwise the client would be disconnected at the same event whenever it reconnects."""
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.2
    (start,) = add(get_history(), "start")
    add(get_history(), "x")
    await apublish("t", "close", "bye")
    drip = await open_drip(cursor=str(start.seq))
    aborted: list[float] = []
    drip.begin_sending(CancelRecorder(aborted))
    await asyncio.sleep(0.5)
    assert aborted == []
    drip.ends_at = 0
    await until(lambda: aborted)


@in_memory
async def test_a_stream_that_is_never_sent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its response may have been dropped."""
    monkeypatch.setattr(StreamTimeouts, "UNSERVED_SECONDS", 0.2)
    served = await open_stream("t")
    dropped = make_stream("t")
    assert get_supervisor().admit(dropped) is None
    assert registry.count("t") == 2
    await until(lambda: dropped.reason)
    assert registry.count("t") == 1
    assert served.reason is None
    await served.aclose()


# The server shuts down without a signal


@in_memory
async def test_streams_end_when_the_server_shuts_down_without_a_signal() -> None:
    """Each sends a reconnection time, and no new stream is opened."""
    streams = [await open_stream(), await open_stream("other")]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    ends = False
    shutdown.watch_server(lambda: lambda: True)  # a server that has ended
    shutdown.watch_server(lambda: lambda: ends)
    shutdown.watch_server(lambda: None)  # an unknown server changes nothing
    shutdown.watch_server(lambda: lambda: True)  # one that is watched is not looked for
    await until(lambda: all(stream.is_begun for stream in streams))
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
async def test_the_server_of_another_event_loop_is_not_checked() -> None:
    async def follow() -> None:
        shutdown.watch_server(lambda: lambda: True)

    await asyncio.to_thread(asyncio.run, follow())
    stream = await open_stream()
    await asyncio.sleep(0.1)
    assert stream.reason is None
    assert not shutdown.begun
    await stream.aclose()


# Rechecks


@in_memory
async def test_a_stream_ends_at_the_recheck_that_refuses_it(settings) -> None:
    """Other streams continue."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.1
    lost, kept = await open_stream("lost"), await open_stream("kept")
    ScriptedPolicy.answers["lost"] = lambda: False
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    await until(lambda: ScriptedPolicy.asked.count("kept") >= 4)
    assert kept.reason is None
    await kept.aclose()


@in_memory
async def test_a_stream_continues_if_the_database_fails_during_a_recheck(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy is asked again."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = await open_stream()

    def away() -> None:
        raise OperationalError("away")

    ScriptedPolicy.answers["t"] = away
    await until(
        lambda: (
            ScriptedPolicy.asked.count("t") >= 3 and "The policy could not check" in caplog.text
        )
    )
    assert stream.reason is None
    ScriptedPolicy.answers["t"] = lambda: False
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED


@in_memory
@pytest.mark.parametrize(("error", "is_logged"), [(LookupError, True), (Http404, False)])
async def test_a_stream_ends_if_the_policy_itself_fails(
    settings, caplog: pytest.LogCaptureFixture, error: type[Exception], is_logged: bool
) -> None:
    """``Http404`` is a refusal."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = await open_stream()

    def fail() -> None:
        raise error("the room is gone")

    ScriptedPolicy.answers["t"] = fail
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED
    assert ("The policy failed" in caplog.text) is is_logged


@in_memory
async def test_a_policy_that_is_cancelled_ends_its_own_stream_only(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    lost, kept = await open_stream("lost"), await open_stream("kept")

    async def cancelled() -> bool:
        task = asyncio.ensure_future(asyncio.Event().wait())
        task.cancel()
        return await task

    ScriptedPolicy.answers["lost"] = cancelled
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    assert "The policy failed" in caplog.text
    asked = ScriptedPolicy.asked.count("kept")
    await until(lambda: ScriptedPolicy.asked.count("kept") > asked + 2)
    await kept.aclose()


@in_memory
async def test_a_timeout_inside_the_policy_does_not_abandon_its_thread(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    given_up: list[str] = []
    monkeypatch.setattr(recheck, "abandon_thread", lambda: given_up.append(""))
    stream = await open_stream()

    def away() -> None:
        raise TimeoutError("the directory server is away")

    ScriptedPolicy.answers["t"] = away
    await until(
        lambda: (
            ScriptedPolicy.asked.count("t") >= 3 and "The policy could not check" in caplog.text
        )
    )
    assert (stream.reason, given_up) == (None, [])
    await stream.aclose()


@in_memory
async def test_a_policy_that_hangs_does_not_delay_the_sweep(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    hanging = await open_stream("hanging")
    asked = ScriptedPolicy.asked.count("hanging")
    ScriptedPolicy.answers["hanging"] = lambda: asyncio.Event().wait()
    await until(lambda: ScriptedPolicy.asked.count("hanging") > asked)
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 0.1
    other = await open_stream("other")
    await until(lambda: other.reason)
    assert other.reason is Reason.MAX_AGE
    await hanging.aclose()
    await other.aclose()


@in_memory
async def test_a_recheck_requested_during_a_recheck_runs_again(settings) -> None:
    """The first one may have read older data."""
    settings.EVENTSOURCE_RECHECK_SECONDS = 600
    stream = await open_stream()
    await receiver_is_ready()
    answers = [asyncio.Event(), asyncio.Event()]

    async def answer() -> bool:
        mine = ScriptedPolicy.asked.count("t") - 2  # the first call was when the stream was opened
        await answers[mine].wait()
        return mine == 0

    ScriptedPolicy.answers["t"] = answer
    request_rechecks(asyncio.get_running_loop())
    await until(lambda: ScriptedPolicy.asked.count("t") == 2)
    request_rechecks(asyncio.get_running_loop())
    for one in answers:
        one.set()
    await read_to_end(stream)
    assert stream.reason is Reason.REFUSED


@in_memory
async def test_a_connection_that_cannot_be_closed_does_not_stop_rechecks(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    monkeypatch.setattr(Rechecker, "MAX_THREADS", 1)
    streams = [await open_stream(f"t{n}") for n in range(3)]

    def fail() -> None:
        raise OperationalError("broken")

    monkeypatch.setattr(connections, "close_all", fail)
    await until(lambda: min(ScriptedPolicy.asked.count(f"t{n}") for n in range(3)) >= 3)
    assert "A database connection could not be closed." in caplog.text
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_a_policy_that_blocks_its_thread_does_not_delay_delivery(settings) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    blocked, free = threading.Event(), threading.Event()

    def block() -> bool:
        blocked.set()
        return free.wait(20)

    stream = await open_stream()
    ScriptedPolicy.answers["t"] = sync_to_async(block)
    await until(blocked.is_set)
    async with asyncio.timeout(10):
        assert await sync_to_async(lambda: "done")() == "done"
    free.set()
    await stream.aclose()


@in_memory
async def test_rechecks_continue_in_another_thread_if_a_policy_blocks(
    settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Rechecker, "TIMEOUT_SECONDS", 0.2)
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    free = threading.Event()
    stuck = await open_stream("stuck")
    others = [await open_stream(f"other {n}") for n in range(3)]
    ScriptedPolicy.answers["stuck"] = sync_to_async(lambda: free.wait(20))
    for n in range(3):
        ScriptedPolicy.answers[f"other {n}"] = sync_to_async(lambda: False)
    for stream in others:
        await read_to_end(stream)
        assert stream.reason is Reason.REFUSED
    await until(lambda: "The policy could not check" in caplog.text)
    assert stuck.reason is None
    free.set()
    await stuck.aclose()


@in_memory
async def test_twenty_streams_are_rechecked_in_one_thread(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    streams = [await open_stream("t") for _ in range(50)]
    threads: list[int] = []
    ScriptedPolicy.answers["t"] = sync_to_async(lambda: not threads.append(threading.get_ident()))
    mine = [stream for stream in registry.streams() if stream in streams]
    await get_supervisor().timeouts.rechecker.recheck(mine)
    assert len(threads) == 50
    assert len(set(threads)) <= 3
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_a_stream_without_a_recheck_continues(settings) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    stream = make_stream("t")
    assert get_supervisor().admit(stream) is None
    await anext(stream)
    await asyncio.sleep(0.2)
    assert stream.reason is None
    await stream.aclose()


@in_memory
async def test_a_stream_over_a_limit_is_not_registered(settings) -> None:
    supervisor = get_supervisor()
    first, second = make_stream("most"), make_stream("most")
    settings.EVENTSOURCE_MAX_STREAMS_PER_TOKEN = 1
    assert supervisor.admit(first) is None
    limit = supervisor.admit(second)
    assert limit == "EVENTSOURCE_MAX_STREAMS_PER_TOKEN"
    await second.aclose()
    assert registry.count("most") == 1
    await first.aclose()
    assert registry.count("most") == 0


@in_memory
async def test_the_number_of_simultaneous_rechecks_is_bounded(settings) -> None:
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
    ScriptedPolicy.asked.clear()
    ScriptedPolicy.answers["many"] = slow
    await until(lambda: len(ScriptedPolicy.asked) >= 40)
    assert 1 < most <= Rechecker.MAX_THREADS
    for stream in streams:
        await stream.aclose()


@in_memory
async def test_a_sweep_that_fails_is_logged_and_repeated(
    settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await open_stream()
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0
    await until(lambda: "The sweep over the streams failed" in caplog.text)
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.05
    await until(lambda: stream.reason)
    assert stream.reason is Reason.STALLED


@pytest.mark.django_db(transaction=True, databases=["default", "postgres"])
@in_memory
async def test_a_broken_database_connection_is_replaced_at_the_next_recheck(settings) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0.05
    asked: list[int] = []
    """The database processes that responded; 0 for a failure."""

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
    ScriptedPolicy.answers["t"] = lambda: sync_to_async(ask)()
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
async def test_streams_end_with_the_permission_session_password_or_account(kind: str) -> None:
    """A grant stays valid for its stream."""
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
        (await Connection.open(server.address, "/events/poll/t")).close()  # the server runs
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
        await asyncio.sleep(2.5)  # until the grant has expired and all streams were rechecked
        await apublish("t", "ping", "kept")
        for name, stream in streams.items():
            assert b"data: kept" in await stream.read(), name
            stream.close()
    assert server.log.read_text().count("Traceback") == 0


# Close requests


@in_memory
async def test_an_invalid_close_request_is_logged_and_the_next_is_applied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream, kept = await open_stream(), await open_stream("kept")
    await receiver_is_ready()
    await sync_to_async(publish_event)(
        ControlEvent(CONTROL_TOKEN, CLOSE_STREAMS, {"unheard-of": "x"})
    )
    await sync_to_async(publish_event)(
        type("Other", (JSONIdEvent,), {"ACTIONS": ["other"]})(CONTROL_TOKEN, "other", 1)
    )
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSE_REQUESTED
    assert kept.reason is None
    assert caplog.text.count("Cannot read control messages") <= 1
    await kept.aclose()


@in_memory
async def test_close_requests_are_received_once_the_history_can_be_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alocate = MemoryHistory.alocate
    failures = 2

    async def fail(self: MemoryHistory, token: str, *args: Any) -> Any:
        nonlocal failures
        if token == CONTROL_TOKEN and failures:
            failures -= 1
            raise ConnectionError("away")
        return await alocate(self, token, *args)

    monkeypatch.setattr(MemoryHistory, "alocate", fail)
    stream = await open_stream()
    await receiver_is_ready()
    assert caplog.text.count("Cannot read control messages") == 2
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSE_REQUESTED


@in_memory
async def test_the_receiver_resumes_if_its_own_stream_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = []

    class Seen(EventStream):
        __slots__ = ()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            streams.append(self)

    monkeypatch.setattr(control_receiver, "EventStream", Seen)
    stream = await open_stream()
    await receiver_is_ready()
    streams[0].end(Reason.FAILED)
    await read_to_end(streams[0])
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSE_REQUESTED
    assert len(streams) == 2


@in_memory
async def test_all_streams_are_rechecked_if_close_requests_were_missed(settings) -> None:
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
        "OPTIONS": {"MAX_EVENTS": 1},
    }
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    lost, kept = await open_stream("lost"), await open_stream("kept")
    await receiver_is_ready()
    ScriptedPolicy.answers["lost"] = lambda: False
    add(get_history(), "{}", "{}", "{}", token=CONTROL_TOKEN)
    await read_to_end(lost)
    assert lost.reason is Reason.REFUSED
    await until(lambda: ScriptedPolicy.asked.count("kept") >= 2)
    assert kept.reason is None
    await kept.aclose()


@in_memory
async def test_a_stream_is_rechecked_if_a_close_request_came_while_it_opened(settings) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 600
    await open_stream("other")
    await receiver_is_ready()
    ScriptedPolicy.asked.clear()
    stream = await open_stream("t", "late")
    reading = asyncio.ensure_future(read_to_end(stream))
    try:
        async with asyncio.timeout(2):
            while stream.reason is None and ScriptedPolicy.asked.count("t") < 2:
                await asyncio.sleep(0.01)
    finally:
        await stream.aclose()
        await reading


# The lease


@in_memory
async def test_all_listeners_are_written_again_after_the_lease_was_lost() -> None:
    streams = [await open_stream("a"), await open_stream("b")]
    history = get_history()
    await until(lambda: history.present("a") and history.present("b"))
    history.withdraw(get_supervisor().lease.process)
    assert history.present("a") == []
    await until(lambda: history.present("a") and history.present("b"))
    for stream in streams:
        await stream.aclose()
    await until(lambda: not history.present("a") and not history.present("b"))


@in_memory
async def test_a_list_that_cannot_be_written_is_logged_and_written_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
async def test_a_process_without_listeners_writes_no_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = get_history()
    stream = await open_stream("idle")
    await until(lambda: history.present("idle"))
    # Streams of other tests in this process belong to other loops.
    await stream.aclose()
    await until(lambda: not history.present("idle"))
    calls = []
    monkeypatch.setattr(history, "announce", lambda *args: calls.append(args) or True)
    await asyncio.sleep(0.35)
    assert calls == []


@in_memory
async def test_without_presence_nothing_is_written_and_only_local_listeners_count(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    calls = []
    monkeypatch.setattr(get_history(), "announce", lambda *args: calls.append(args) or True)
    supervisor = get_supervisor()
    assert not await supervisor.lease.has_listener("t")
    stream = await open_stream("t")
    assert await supervisor.lease.has_listener("t")
    await stream.aclose()
    await asyncio.sleep(0.1)
    assert not await supervisor.lease.has_listener("t")
    assert calls == []
    assert not supervisor.lease._changed, "tokens pile up for ever"


@in_memory
async def test_an_invalid_setting_does_not_stop_the_renewals(
    settings, caplog: pytest.LogCaptureFixture
) -> None:
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
async def test_a_renewal_that_fails_loses_no_change(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = 600
    supervisor = get_supervisor()
    other = await open_stream("other")  # without a listener there is no lease to renew
    await supervisor.lease.renew()
    stream = await open_stream("t")

    def fail(loop: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(registry, "streams", fail)
        await supervisor.lease.renew()
    assert not get_history().present("t")
    await supervisor.lease.renew()
    assert get_history().present("t")
    await stream.aclose()
    await other.aclose()


@in_memory
async def test_a_stream_that_could_not_be_opened_is_not_counted(settings) -> None:
    settings.EVENTSOURCE_RECHECK_SECONDS = 0
    client = AsyncClient(raise_request_exception=False)
    assert (await client.get("/events/poll/uncounted")).status_code == 500
    gc.collect()
    assert registry.count("uncounted") == 0


@in_memory
async def test_has_listener_uses_the_current_streams_of_this_process(settings) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = 600
    supervisor = get_supervisor()
    history = get_history()
    stream = await open_stream("t")
    await supervisor.lease.renew()
    assert history.present("t")
    await stream.aclose()
    await until(lambda: "t" in supervisor.lease._changed)
    assert not await supervisor.lease.has_listener("t")
    # The listeners of another process count.
    history.announce("another", {"t": ["7"]}, 60)
    assert await supervisor.lease.has_listener("t")


@in_memory
async def test_unknown_actions_and_unmatched_requests_end_no_stream() -> None:
    supervisor = get_supervisor()
    stream = make_stream("t", session="mine")
    assert supervisor.admit(stream) is None
    supervisor.control.apply("another", "{}")
    supervisor.control.apply(CLOSE_STREAMS, '{"session": "other"}')
    assert stream.reason is None
    supervisor.control.apply(CLOSE_STREAMS, '{"session": "mine"}')
    assert stream.reason is Reason.CLOSE_REQUESTED
    await stream.aclose()


@in_memory
async def test_a_close_request_that_could_not_be_applied_is_received_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await open_stream()
    await receiver_is_ready()
    apply = ControlReceiver.apply
    failures = [ConnectionError("away")]

    def fail(self: ControlReceiver, action: str, data: str) -> None:
        if failures:
            raise failures.pop()
        apply(self, action, data)

    monkeypatch.setattr(ControlReceiver, "apply", fail)
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSE_REQUESTED
    assert caplog.text.count("Cannot read control messages") == 1


@in_memory
async def test_the_lease_is_withdrawn_at_shutdown() -> None:
    stream = await open_stream()
    await get_supervisor().lease.renew()
    assert get_history().present("t") == [""]
    await shutdown.end(asyncio.get_running_loop())
    assert get_history().present("t") == []
    assert stream.reason is Reason.SHUTDOWN


@in_memory
async def test_a_lease_that_cannot_be_withdrawn_does_not_stop_the_shutdown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    get_supervisor()

    async def fail(self: MemoryHistory, process: str) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(MemoryHistory, "awithdraw", fail)
    await shutdown.end(asyncio.get_running_loop())
    assert "The lease could not be withdrawn." in caplog.text


@in_memory
async def test_without_presence_no_lease_is_withdrawn(settings) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = None
    await get_supervisor().lease.withdraw()


# Missing tables


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of the history by the tasks."""
    calls: Counter[str] = Counter()
    for name in ("achanges", "aannounce", "alocate"):
        method = getattr(DatabaseHistory, name)

        async def call(*args: Any, _name: str = name, _method: Any = method) -> Any:
            calls[_name] += 1
            return await _method(*args)

        monkeypatch.setattr(DatabaseHistory, name, call)
    return calls


@pytest.mark.usefixtures("quick")
@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("using", ALIASES)
async def test_missing_tables_are_logged_in_one_line_and_need_no_restart(
    settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls: Counter[str],
    using: str,
) -> None:
    """Streams work after `manage.py migrate`."""

    def migrate(*target: str) -> None:
        call_command("migrate", "django_eventsource", *target, database=using, verbosity=0)

    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"USING": using}}
    troubles._logged_at.clear()
    monkeypatch.setattr(Hub, "backoff_seconds", (0.02,))
    await sync_to_async(migrate)("zero")
    try:
        response = await AsyncClient().get("/events/poll/t")
        assert b"\nretry: " in response.content, "the listener comes back later"
        get_supervisor().lease._changed.add("t")
        names = ("achanges", "aannounce", "alocate")
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
    await receiver_is_ready()
    await aclose_streams(token="t")
    await read_to_end(stream)
    assert stream.reason is Reason.CLOSE_REQUESTED
    tasks = list(get_hub()._tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await sync_to_async(connections.close_all)()
