"""Shutdown: streams end before the server does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.test import AsyncClient

from django_eventsource.history import History, get_history
from django_eventsource.operations.shutdown import SIGNALS, call_previous_handler, shutdown
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.frames import encode_event
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.registry import registry
from tests.support.lines import at_each_line
from tests.support.listeners import reconnection_ms
from tests.support.processes import start_python
from tests.support.waiting import PATIENCE_SECONDS, PROCESS_PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture
def before() -> Iterator[list[int]]:
    """The signals that the previous handler received. The handlers are restored at the end."""
    got: list[int] = []
    old = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: got.append(number))
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        shutdown.reset()


def open_stream(token: str = "t", loop: asyncio.AbstractEventLoop | None = None) -> OpenStream:
    """Return a stream that is registered, as the supervisor does it."""
    listener = Listener(tokens=(token,))
    stream = OpenStream(token, get_history().locate(token, None), listener=listener)
    assert registry.admit(stream, loop=loop or asyncio.get_running_loop()) is None
    return stream


async def read_to_end(stream: OpenStream) -> bytes:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return b"".join([chunk async for chunk in stream])


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_streams_end_before_the_previous_handler_is_called(
    number: signal.Signals, before: list[int]
) -> None:
    """Each sends a reconnection time."""
    shutdown.install(asyncio.get_running_loop())
    streams = [open_stream(), open_stream("other")]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    await until(lambda: all(stream.is_begun for stream in streams))
    os.kill(os.getpid(), number)
    assert before == []
    for body in bodies:
        assert 500 <= reconnection_ms(await body) <= 5000
    assert {stream.reason for stream in streams} == {Reason.SHUTDOWN}
    await until(lambda: before)
    assert before == [number]
    assert not list(registry.streams())


async def test_a_signal_ends_the_streams_while_the_garbage_collector_deletes_others(
    before: list[int],
) -> None:
    shutdown.install(asyncio.get_running_loop())
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    await until(lambda: stream.is_begun)
    dropped = [open_stream() for _ in range(100)]
    with at_each_line(lambda: dropped and dropped.pop()):
        signal.raise_signal(signal.SIGTERM)
    assert before == []
    assert 500 <= reconnection_ms(await body) <= 5000
    await until(lambda: before)


async def test_the_reconnection_times_differ(before: list[int]) -> None:
    streams = [open_stream() for _ in range(20)]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    await shutdown.end_streams(asyncio.get_running_loop())
    assert len({reconnection_ms(await body) for body in bodies}) > 10


async def test_buffered_events_are_sent_before_the_end(before: list[int], settings) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    stream = open_stream()
    await stream.__anext__()
    reading = asyncio.ensure_future(stream.__anext__())
    await until(lambda: stream._subscriber._waiter)
    (subscription,) = stream._subscriber.subscriptions
    subscription.push(Batch([encode_event("ping", b"x", None)]))
    first = await reading
    subscription.push(Batch([encode_event("ping", b"y", None)]))
    ending = asyncio.create_task(shutdown.end_streams(asyncio.get_running_loop()))
    await asyncio.sleep(0)
    rest = await read_to_end(stream)
    await ending
    assert (b"data: x" in first, b"data: y" in rest) == (True, True)
    assert 500 <= reconnection_ms(rest) <= 5000


async def test_the_shutdown_runs_in_a_context_separate_from_the_interrupted_code(
    before: list[int],
) -> None:
    shutdown.install(asyncio.get_running_loop(), on_ended=lambda: sync_to_async(time.monotonic)())
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    await until(lambda: stream.is_begun)
    SyncToAsync.deadlock_context.set(True)
    signal.raise_signal(signal.SIGTERM)
    SyncToAsync.deadlock_context.set(False)
    await body
    await until(lambda: before)


async def test_without_streams_the_previous_handler_is_called_at_once(before: list[int]) -> None:
    shutdown.install(asyncio.get_running_loop())
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    assert not shutdown.begun


async def test_a_second_signal_calls_the_previous_handler_at_once(before: list[int]) -> None:
    shutdown.install(asyncio.get_running_loop())
    stream = open_stream()
    signal.raise_signal(signal.SIGINT)
    assert before == []
    signal.raise_signal(signal.SIGINT)
    assert before == [signal.SIGINT]
    await until(lambda: stream.reason)
    await until(lambda: len(before) == 2)


async def test_a_stopped_loop_does_not_delay_the_previous_handler(before: list[int]) -> None:
    loop = asyncio.new_event_loop()
    shutdown.install(loop)
    stream = open_stream(loop=loop)
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    await stream.aclose()
    loop.close()


async def test_repeated_installation_calls_the_previous_handler_once(before: list[int]) -> None:
    for _ in range(3):
        shutdown.install(asyncio.get_running_loop())
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]


async def test_a_handler_installed_later_is_called_too(before: list[int]) -> None:
    loop = asyncio.get_running_loop()
    shutdown.install(loop)
    ours = signal.getsignal(signal.SIGTERM)
    on_top: list[int] = []

    def handler(number: int, frame: Any) -> None:
        on_top.append(number)
        ours(number, frame)  # type: ignore[operator, misc]

    signal.signal(signal.SIGTERM, handler)
    shutdown.install(loop)
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    signal.raise_signal(signal.SIGTERM)
    assert (on_top, before) == ([], [])
    assert 500 <= reconnection_ms(await body) <= 5000
    await until(lambda: before)
    assert (on_top, before) == ([signal.SIGTERM], [signal.SIGTERM])


async def test_other_threads_install_no_handlers(before: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    errors: list[BaseException] = []
    loop = asyncio.get_running_loop()

    def work() -> None:
        try:
            shutdown.install(loop)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert shutdown._loop is None


# The previous handler


def test_the_default_handler_is_restored_before_the_signal_is_sent_again(
    before: list[int],
) -> None:
    old = signal.signal(signal.SIGWINCH, lambda number, frame: before.append(number))
    try:
        call_previous_handler(signal.SIG_DFL, signal.SIGWINCH, None)
        assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL
        assert before == []
    finally:
        signal.signal(signal.SIGWINCH, old)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_with_the_default_handler_ends_by_the_signal(number: signal.Signals) -> None:
    process = start_python(
        "import signal, sys\n"
        "from django_eventsource.operations.shutdown import call_previous_handler as call\n"
        "signal.signal(int(sys.argv[1]), lambda *args: None)\n"
        "call(signal.SIG_DFL, int(sys.argv[1]), None)\n"
        "print('still here')",
        int(number),
    )
    out, err = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    assert (process.returncode, out, err) == (-number, "", "")


# Ending streams


async def test_a_stalled_stream_is_aborted_after_the_grace_time(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "GRACE_SECONDS", 0.1)
    stalled, reading = open_stream(), open_stream("other")
    await stalled.__anext__()
    aborts: list[float] = []
    task: Any = Mock(cancel=lambda: aborts.append(time.monotonic()))
    stalled.begin_sending(task)
    began = time.monotonic()
    body = asyncio.create_task(read_to_end(reading))
    await shutdown.end_streams(asyncio.get_running_loop())
    assert 500 <= reconnection_ms(await body) <= 5000
    assert len(aborts) == 1
    assert aborts[0] - began >= 0.1
    assert stalled.reason is Reason.SHUTDOWN
    assert list(registry.streams()) == [stalled], "the server still sends it"
    stalled.end_sending()
    assert not list(registry.streams())


async def test_the_shutdown_does_not_wait_for_the_whole_grace_time(before: list[int]) -> None:
    body = asyncio.create_task(read_to_end(open_stream()))
    await asyncio.sleep(0)
    began = time.monotonic()
    await shutdown.end_streams(asyncio.get_running_loop())
    assert time.monotonic() - began < shutdown.GRACE_SECONDS / 2
    await body


async def test_streams_of_another_loop_do_not_end(before: list[int]) -> None:
    other = asyncio.new_event_loop()
    stream = open_stream(loop=other)
    await shutdown.end_streams(asyncio.get_running_loop())
    assert stream.reason is None
    await stream.aclose()
    other.close()


# Listeners during the shutdown


async def get(token: str) -> bytes:
    response = await AsyncClient().get(f"/events/poll/{token}")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    if response.streaming:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return b"".join([chunk async for chunk in response])
    return bytes(response.content)


@pytest.fixture
def anyone(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"


@pytest.mark.usefixtures("anyone")
async def test_a_listener_during_the_shutdown_receives_a_reconnection_time(
    before: list[int],
) -> None:
    shutdown.begun = True
    assert 2000 <= reconnection_ms(await get("t")) <= 10_000
    assert not list(registry.streams())


@pytest.mark.usefixtures("anyone")
async def test_a_listener_whose_view_runs_at_the_signal_receives_a_reconnection_time(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown.install(asyncio.get_running_loop())
    other = open_stream("other")
    await other.__anext__()  # its client reads no more, so the process ends after the grace time
    reads, go_on = asyncio.Event(), asyncio.Event()
    alocate = History.alocate

    async def slow(self: History, *args: Any) -> Any:
        reads.set()
        await go_on.wait()
        return await alocate(self, *args)

    monkeypatch.setattr(type(get_history()), "alocate", slow)
    body = asyncio.create_task(get("t"))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await reads.wait()
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert other.reason is Reason.SHUTDOWN
    go_on.set()
    assert 500 <= reconnection_ms(await body) <= 10_000
    await until(lambda: before)


def test_importing_the_package_installs_no_handler() -> None:
    process = start_python(
        "import signal, django_eventsource.views\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)\n"
        "signal.pause()"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == -signal.SIGTERM


async def test_a_handler_not_installed_by_python_is_kept(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        shutdown.install(asyncio.get_running_loop())
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


async def test_an_ignored_signal_stays_ignored(before: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shutdown.install(asyncio.get_running_loop())
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


async def test_a_process_that_did_not_end_opens_streams_again(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "RESUME_SECONDS", 0.05)
    shutdown.install(asyncio.get_running_loop())
    stream = open_stream()
    reading = asyncio.ensure_future(read_to_end(stream))
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: shutdown.begun)
    await reading
    await until(lambda: before)
    await until(lambda: not shutdown.begun)
