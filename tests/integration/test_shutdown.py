"""Ending well: signals are taken once, streams end first, and then what was there before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.test import AsyncClient

from django_eventsource import shutdown as module
from django_eventsource.batches import Batch
from django_eventsource.frames import encode_event
from django_eventsource.history import History, get_history
from django_eventsource.listeners import Listener, registry
from django_eventsource.shutdown import call, end_streams, install, shutdown
from django_eventsource.streams import EventStream, Reason
from tests.lines import at_each_line
from tests.processes import DEADLINE, start_python

pytestmark = pytest.mark.usefixtures("memory_history")

SECONDS = 10


@pytest.fixture
def before() -> Iterator[list[int]]:
    """The signals that the handler of before got; everything is put back in the end."""
    got: list[int] = []
    old = {number: signal.getsignal(number) for number in module.SIGNALS}
    for number in module.SIGNALS:
        signal.signal(number, lambda number, frame: got.append(number))
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        shutdown.begun = False
        shutdown.loop = None


def open_stream(token: str = "t", loop: asyncio.AbstractEventLoop | None = None) -> EventStream:
    """A stream that is counted, as the watch does it."""
    stream = EventStream(token, get_history().locate(token, None))
    listener = Listener(tokens=(token,), loop=loop or asyncio.get_running_loop())
    assert registry.admit(stream, listener, lambda listener, stream: None) is None
    return stream


async def read_to_end(stream: EventStream) -> bytes:
    async with asyncio.timeout(SECONDS):
        return b"".join([chunk async for chunk in stream])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def comes_back_ms(body: bytes) -> int:
    """The reconnection time that a body ends with."""
    field, _, value = body.rstrip(b"\n").rpartition(b"\n")[2].partition(b": ")
    assert field == b"retry"
    assert body.endswith(b"\n\n")
    return int(value)


# The signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_streams_end_first(number: signal.Signals, before: list[int]) -> None:
    """Each listener is told to come back; then the handler of before is called, once."""
    install(asyncio.get_running_loop())
    streams = [open_stream(), open_stream("other")]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    await until(lambda: all(stream.is_open for stream in streams))
    os.kill(os.getpid(), number)
    assert before == []
    for body in bodies:
        assert 500 <= comes_back_ms(await body) <= 5000
    assert {stream.reason for stream in streams} == {Reason.SHUTDOWN}
    await until(lambda: before)
    assert before == [number]
    assert not list(registry.streams())


async def test_a_signal_ends_the_streams_while_the_garbage_collector_ends_others(
    before: list[int],
) -> None:
    """The handler walks over the streams, and any line of it may be where others are collected."""
    install(asyncio.get_running_loop())
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    await until(lambda: stream.is_open)
    dropped = [open_stream() for _ in range(100)]
    with at_each_line(lambda: dropped and dropped.pop()):
        signal.raise_signal(signal.SIGTERM)
    assert before == []
    assert 500 <= comes_back_ms(await body) <= 5000
    await until(lambda: before)


async def test_listeners_do_not_all_come_back_at_once(before: list[int]) -> None:
    """The reconnection times differ."""
    streams = [open_stream() for _ in range(20)]
    bodies = [asyncio.create_task(read_to_end(stream)) for stream in streams]
    await end_streams(asyncio.get_running_loop())
    assert len({comes_back_ms(await body) for body in bodies}) > 10


async def test_what_is_buffered_goes_first(before: list[int], settings) -> None:
    """An event that was received before the signal is delivered before the end."""
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    stream = open_stream()
    await stream.__anext__()
    reading = asyncio.ensure_future(stream.__anext__())
    await until(lambda: stream._subscriber._waiter)
    (subscription,) = stream._subscriber.subscriptions
    subscription.push(Batch([encode_event("ping", b"x", None)]))
    first = await reading
    subscription.push(Batch([encode_event("ping", b"y", None)]))
    ending = asyncio.create_task(end_streams(asyncio.get_running_loop()))
    await asyncio.sleep(0)
    rest = await read_to_end(stream)
    await ending
    assert (b"data: x" in first, b"data: y" in rest) == (True, True)
    assert 500 <= comes_back_ms(rest) <= 5000


async def test_what_was_interrupted_is_left_alone(before: list[int]) -> None:
    """The end runs in a context of its own: a database's thread may be waited for in that one."""
    install(asyncio.get_running_loop(), farewell=lambda: sync_to_async(time.monotonic)())
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    await until(lambda: stream.is_open)
    SyncToAsync.deadlock_context.set(True)
    signal.raise_signal(signal.SIGTERM)
    SyncToAsync.deadlock_context.set(False)
    await body
    await until(lambda: before)


async def test_without_streams_nothing_is_delayed(before: list[int]) -> None:
    """The handler of before is called by the signal itself."""
    install(asyncio.get_running_loop())
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    assert not shutdown.begun


async def test_a_second_signal_goes_through_at_once(before: list[int]) -> None:
    """Who presses Ctrl-C twice does not want to wait."""
    install(asyncio.get_running_loop())
    stream = open_stream()
    signal.raise_signal(signal.SIGINT)
    assert before == []
    signal.raise_signal(signal.SIGINT)
    assert before == [signal.SIGINT]
    await until(lambda: stream.reason)
    await until(lambda: len(before) == 2)


async def test_a_loop_that_does_not_run(before: list[int]) -> None:
    """Nobody can end its streams any more."""
    loop = asyncio.new_event_loop()
    install(loop)
    stream = open_stream(loop=loop)
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    await stream.aclose()
    loop.close()


async def test_it_is_taken_once(before: list[int]) -> None:
    """However often streams begin, the handler of before is called once."""
    for _ in range(3):
        install(asyncio.get_running_loop())
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]


async def test_a_handler_that_was_put_on_top(before: list[int]) -> None:
    """Who took the signal after us is chained too, and may call us in turn."""
    loop = asyncio.get_running_loop()
    install(loop)
    ours = signal.getsignal(signal.SIGTERM)
    on_top: list[int] = []

    def handler(number: int, frame: Any) -> None:
        on_top.append(number)
        ours(number, frame)  # type: ignore[operator, misc]

    signal.signal(signal.SIGTERM, handler)
    install(loop)
    stream = open_stream()
    body = asyncio.create_task(read_to_end(stream))
    signal.raise_signal(signal.SIGTERM)
    assert (on_top, before) == ([], [])
    assert 500 <= comes_back_ms(await body) <= 5000
    await until(lambda: before)
    assert (on_top, before) == ([signal.SIGTERM], [signal.SIGTERM])


async def test_only_the_main_thread_takes_signals(before: list[int]) -> None:
    """In any other it would be an error: there the signals stay as they are."""
    handlers = [signal.getsignal(number) for number in module.SIGNALS]
    errors: list[BaseException] = []
    loop = asyncio.get_running_loop()

    def work() -> None:
        try:
            install(loop)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers
    assert shutdown.loop is None


# What was before


def test_the_default_does_what_it_does(before: list[int]) -> None:
    """The handler is put back before the signal is sent again: here one that is ignored."""
    old = signal.signal(signal.SIGWINCH, lambda number, frame: before.append(number))
    try:
        call(signal.SIG_DFL, signal.SIGWINCH, None)
        assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL
        assert before == []
    finally:
        signal.signal(signal.SIGWINCH, old)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_default_was_before(number: signal.Signals) -> None:
    """A process that nobody had taught otherwise dies of the signal, as it would have."""
    process = start_python(
        "import signal, sys\n"
        "from django_eventsource.shutdown import call\n"
        "signal.signal(int(sys.argv[1]), lambda *args: None)\n"
        "call(signal.SIG_DFL, int(sys.argv[1]), None)\n"
        "print('still here')",
        int(number),
    )
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (-number, "", "")


# Ending streams


async def test_a_reader_that_takes_nothing_is_aborted(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' last bytes are waited for; who takes nothing is not, after the grace."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    stalled, reading = open_stream(), open_stream("other")
    await stalled.__anext__()
    aborts = []
    stalled.on_abort = lambda: aborts.append(time.monotonic())
    began = time.monotonic()
    body = asyncio.create_task(read_to_end(reading))
    await end_streams(asyncio.get_running_loop())
    assert 500 <= comes_back_ms(await body) <= 5000
    assert len(aborts) == 1
    assert aborts[0] - began >= 0.1
    assert stalled.reason is Reason.SHUTDOWN
    assert not list(registry.streams())


async def test_readers_that_read_are_not_kept_waiting(before: list[int]) -> None:
    """The grace is the longest time, not the least."""
    body = asyncio.create_task(read_to_end(open_stream()))
    await asyncio.sleep(0)
    began = time.monotonic()
    await end_streams(asyncio.get_running_loop())
    assert time.monotonic() - began < module.GRACE_SECONDS / 2
    await body


async def test_streams_of_another_loop_are_not_touched(before: list[int]) -> None:
    """They belong to another thread."""
    other = asyncio.new_event_loop()
    stream = open_stream(loop=other)
    await end_streams(asyncio.get_running_loop())
    assert stream.reason is None
    await stream.aclose()
    other.close()


# Listeners that come while it ends


async def get(token: str) -> bytes:
    response = await AsyncClient().get(f"/events/poll/{token}")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    if response.streaming:
        async with asyncio.timeout(SECONDS):
            return b"".join([chunk async for chunk in response])
    return bytes(response.content)


@pytest.fixture
def anyone(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"


@pytest.mark.usefixtures("anyone")
async def test_no_stream_begins_while_it_ends(before: list[int]) -> None:
    """Who comes now gets a whole answer, and is told to come back."""
    shutdown.begun = True
    assert 2000 <= comes_back_ms(await get("t")) <= 10_000
    assert not list(registry.streams())


@pytest.mark.usefixtures("anyone")
async def test_a_listener_whose_view_runs_when_it_begins_to_end(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to come back as well: never is a stream left to be torn off."""
    install(asyncio.get_running_loop())
    other = open_stream("other")
    await other.__anext__()  # and takes no more: the process ends after the grace
    reads, go_on = asyncio.Event(), asyncio.Event()
    alocate = History.alocate

    async def slow(self: History, *args: Any) -> Any:
        reads.set()
        await go_on.wait()
        return await alocate(self, *args)

    monkeypatch.setattr(type(get_history()), "alocate", slow)
    body = asyncio.create_task(get("t"))
    async with asyncio.timeout(SECONDS):
        await reads.wait()
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert other.reason is Reason.SHUTDOWN
    go_on.set()
    assert 500 <= comes_back_ms(await body) <= 10_000
    await until(lambda: before)


def test_a_process_without_streams_ends_as_ever() -> None:
    """Importing it changes nothing: signals are taken at the first stream."""
    process = start_python(
        "import signal, django_eventsource.views\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)\n"
        "signal.pause()"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == -signal.SIGTERM


async def test_a_handler_that_is_not_pythons_keeps_its_signal(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be called from here, so the signal would have no effect."""
    handlers = [signal.getsignal(number) for number in module.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        install(asyncio.get_running_loop())
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers


async def test_a_signal_that_is_ignored_stays_so(before: list[int]) -> None:
    """As with nohup: it is not taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    install(asyncio.get_running_loop())
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


async def test_a_process_that_did_not_end_opens_streams_again(
    before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler before may have something else in mind."""
    monkeypatch.setattr(module, "RESUME_SECONDS", 0.05)
    install(asyncio.get_running_loop())
    stream = open_stream()
    reading = asyncio.ensure_future(read_to_end(stream))
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: shutdown.begun)
    await reading
    await until(lambda: before)
    await until(lambda: not shutdown.begun)
