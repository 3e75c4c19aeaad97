"""Writers: one contract for each way to send a stream, and what only one of them does."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from django_eventsource.asgi import Receiver, serve
from django_eventsource.delivery.hub import get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.subscription import share_of
from django_eventsource.history import History, Kind, get_history
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.frames import Decoder
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming import writer as writers
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.writer import PIECE_BYTES, uvicorn_cycle
from tests.support.events import add, draft
from tests.support.waiting import until
from tests.support.wire import HIGH_WATER_BYTES, Cycle, Transport

WAYS = ["transport", "send", "task", "inside"]
"""Chunks to the transport, eager tasks of ``send``, the stream's task, and inside Django."""

needs_eager_tasks = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks"
)
Send = Callable[[dict[str, Any]], Awaitable[None]]


@pytest.fixture(autouse=True)
def history(memory_history: History) -> History:
    """Begin the history of each token, so that the next event leaves no gap."""
    for token in ("t", "a", "b"):
        add(memory_history, "before", token=token)
    return memory_history


@pytest.fixture(autouse=True)
def quick(settings: Any) -> None:
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


def pass_on(cycle: Cycle) -> Send:
    """Return middleware that changes nothing."""

    async def send(message: dict[str, Any]) -> None:
        await cycle.send(message)

    return send


class Serving:
    """One stream that is being sent."""

    def __init__(self, way: str, *, send: Send | None = None, tokens: tuple[str, ...] = ("t",)):
        self.cycle = Cycle()
        places = {token: get_history().locate(token, None) for token in tokens}
        first = places.pop(tokens[0])
        self.stream = OpenStream(tokens[0], first, others=places, listener=Listener(tokens=tokens))
        if way == "inside":
            work = self._iterate()
        else:
            send = send or (self.cycle.send if way == "transport" else pass_on(self.cycle))
            work = serve(self.stream, Receiver(self.cycle.receive), send)
        self.task = asyncio.ensure_future(work)

    async def _iterate(self) -> None:
        """Send the stream as Django does."""
        async for chunk in self.stream:
            for start in range(0, len(chunk), PIECE_BYTES):
                piece = chunk[start : start + PIECE_BYTES]
                await self.cycle.send(
                    {"type": "http.response.body", "body": piece, "more_body": True}
                )
        await self.cycle.send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def events(self) -> list[str]:
        return self.cycle.events

    @property
    def is_waiting(self) -> bool:
        """Whether the stream's task waits for events."""
        waiter = self.stream._subscriber._waiter
        return waiter is not None and not waiter.done()

    async def live(self) -> Serving:
        await until(lambda: self.is_waiting)
        return self

    async def close(self) -> None:
        if self.stream.reason is None:
            self.cycle.hang_up()
            self.stream.abort(Reason.CLIENT_DISCONNECTED)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "task":
        monkeypatch.setattr(writers, "EAGER", {})
    elif name == "send" and not writers.EAGER:
        # Without eager tasks, each write of the feed has to wait.
        monkeypatch.setattr(writers, "EAGER", {"name": "a write of the feed"})
    return name


@asynccontextmanager
async def serving(way: str, count: int = 1, **options: Any) -> AsyncIterator[list[Serving]]:
    """Serve streams during a block, all of which wait for events at its beginning."""
    found = [Serving(way, **options) for _ in range(count)]
    try:
        for one in found:
            await one.live()
        yield found
    finally:
        for one in found:
            await one.close()


def deliver(*texts: str, token: str = "t", kind: Kind = Kind.EVENT) -> None:
    """Store events, and deliver each one at once, as if no event was before it."""
    hub = get_hub()
    for text in texts:
        (entry,) = get_history().append(token, [draft(text, kind=kind)])
        hub._feeds[token]._coalescer._free_at = 0.0  # type: ignore[union-attr]
        hub._deliver(group_name(token), entry.batch())


def deliver_live(*texts: str) -> None:
    """Deliver live-only events."""
    hub = get_hub()
    for text in texts:
        hub._feeds["t"]._coalescer._free_at = 0.0  # type: ignore[union-attr]
        hub._deliver(group_name("t"), Batch([draft(text).frame(None)]))


def numbers(count: int) -> list[str]:
    return [str(n) for n in range(count)]


# The contract


async def test_every_listener_receives_every_event_once_in_order(way: str) -> None:
    """Single events with pauses, and bursts."""
    async with serving(way, 3) as streams:
        for n in range(0, 60, 3):
            deliver(str(n))
            await asyncio.sleep(0)
            deliver(str(n + 1), str(n + 2))
        for one in streams:
            await until(lambda one=one: len(one.events) == 60)
            assert one.events == numbers(60)


async def test_events_that_wait_for_a_slow_client_are_sent_in_order(way: str) -> None:
    """What is written directly overtakes nothing that is buffered, read or being written."""
    async with serving(way, 2) as (slow, fast):
        for n in range(20):
            if n % 5 == 1:
                slow.cycle.transport.stall()
            deliver(f"{n} " + "x" * 20_000)
            await asyncio.sleep(0)
            if n % 5 == 4:
                slow.cycle.transport.resume()
                await asyncio.sleep(0)
        for one in (fast, slow):
            await until(lambda one=one: len(one.events) == 20)
            assert [event.split()[0] for event in one.events] == numbers(20)


async def test_a_client_that_stalls_costs_a_bounded_amount_and_loses_nothing(
    way: str, settings: Any
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100_000
    async with serving(way, 2) as (slow, fast):
        slow.cycle.transport.stall()
        for n in range(50):
            deliver(f"{n} " + "x" * 10_000)
            await asyncio.sleep(0)
            subscriber = slow.stream._subscriber
            assert subscriber._size + subscriber.in_flight <= share_of(100_000)
        await until(lambda: len(fast.events) == 50)
        assert slow.cycle.transport.buffered < HIGH_WATER_BYTES + 2 * PIECE_BYTES
        assert len(slow.events) < 50
        slow.cycle.transport.resume()
        await until(lambda: len(slow.events) == 50)
        assert [event.split()[0] for event in slow.events] == numbers(50)


async def test_live_only_events_that_a_slow_client_misses_are_reported(
    way: str, settings: Any
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100_000
    async with serving(way) as (one,):
        deliver_live("first")
        await until(lambda: one.events == ["first"])
        one.cycle.transport.stall()
        for n in range(50):
            deliver_live(f"{n} " + "x" * 10_000)
            await asyncio.sleep(0)
        one.cycle.transport.resume()
        await until(lambda: "overflow" in "".join(one.events))
        kinds = [event.event for event in Decoder().feed(one.cycle.body)]
        assert kinds.count("reset") == 1
        deliver_live("last")
        await until(lambda: one.events[-1] == "last")


async def test_no_reset_follows_live_only_events_that_were_written(
    way: str, settings: Any
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 100_000
    async with serving(way) as (one,):
        deliver_live("live")
        await until(lambda: one.events == ["live"] and one.is_waiting)
        one.cycle.transport.stall()
        for n in range(20):
            deliver(f"{n} " + "x" * 10_000)
            await asyncio.sleep(0)
        one.cycle.transport.resume()
        await until(lambda: len(one.events) == 21)
        assert [event.split()[0] for event in one.events] == ["live", *numbers(20)]


async def test_an_event_that_is_larger_than_a_piece_is_delivered(way: str) -> None:
    async with serving(way) as (one,):
        deliver("x" * 3 * PIECE_BYTES, "after")
        await until(lambda: len(one.events) == 2)
        assert [len(event) for event in one.events] == [3 * PIECE_BYTES, 5]


async def test_a_close_ends_the_stream_after_the_events_before_it(way: str) -> None:
    async with serving(way) as (one,):
        deliver("a")
        deliver("bye", kind=Kind.CLOSE)
        await asyncio.wait_for(one.task, 10)
        assert one.events == ["a", "bye"]
        assert one.cycle.transport.data.endswith(b"\r\n0\r\n\r\n")
        assert one.stream.reason is Reason.TOKEN_CLOSED


async def test_a_stream_that_ends_sends_its_buffer_and_a_reconnection_time(way: str) -> None:
    async with serving(way) as (one,):
        one.cycle.transport.stall()
        deliver(*(f"{n} " + "x" * 20_000 for n in range(4)))
        one.stream.end(Reason.SHUTDOWN, 1234)
        await asyncio.sleep(0)
        one.cycle.transport.resume()
        await asyncio.wait_for(one.task, 10)
        assert [event.split()[0] for event in one.events[:4]] == numbers(4)
        assert one.cycle.body.endswith(b"retry: 1234\n\n")
        assert one.cycle.transport.data.endswith(b"\r\n0\r\n\r\n")


async def test_a_stream_of_several_tokens_has_the_cursor_of_all_in_each_event(way: str) -> None:
    async with serving(way, tokens=("a", "b")) as (one,):
        deliver("1", token="a")
        deliver("2", token="b")
        deliver("3", token="a")
        await until(lambda: len(one.events) == 3)
        events = Decoder().feed(one.cycle.body)
        assert [event.data for event in events] == ["1", "2", "3"]
        assert len({event.id for event in events}) == 3
        assert events[-1].id == one.stream._subscriber.subscriptions[0].cursor


async def test_a_written_event_is_not_read_again_after_an_overflow(
    way: str, settings: Any
) -> None:
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 10_000
    async with serving(way) as (one,):
        deliver("written")
        await until(lambda: one.events == ["written"] and one.is_waiting)
        one.cycle.transport.stall()
        deliver(*(f"{n} " + "x" * 3_000 for n in range(40)))
        one.cycle.transport.resume()
        await until(lambda: len(one.events) == 41)
        assert [event.split()[0] for event in one.events] == ["written", *numbers(40)]


async def test_an_event_of_any_kind_ends_the_silence_before_a_keepalive(way: str) -> None:
    async with serving(way) as (one,):
        subscriber = one.stream._subscriber
        subscriber.quiet = True
        deliver("a")
        assert not subscriber.quiet
        subscriber.quiet = True
        deliver_live("b")
        assert not subscriber.quiet
        await until(lambda: len(one.events) == 2)


# Faults


async def test_a_client_that_disconnects_while_it_is_written_to_affects_no_other(
    way: str,
) -> None:
    async with serving(way, 3) as (one, gone, other):
        gone.cycle.transport.stall()
        deliver("0 " + "x" * 60_000, "1 " + "x" * 60_000)
        gone.cycle.hang_up()
        deliver("2")
        if way == "inside":
            await gone.close()
        await asyncio.wait_for(asyncio.gather(gone.task, return_exceptions=True), 10)
        deliver("3")
        for stream in (one, other):
            await until(lambda stream=stream: len(stream.events) == 4)
            assert [event[0] for event in stream.events] == numbers(4)
        assert gone.stream.reason is Reason.CLIENT_DISCONNECTED
        assert len(get_hub()._feeds["t"].subscriptions) == 2


@pytest.mark.parametrize("way", WAYS[:3], indirect=True)
async def test_a_write_that_fails_ends_its_stream_with_the_error_and_no_other(way: str) -> None:
    """The exception is raised to the server, as if the stream's task had called ``send``."""
    async with serving(way, 5) as streams:
        broken = streams[2]
        broken.cycle.transport.error = OSError("the socket is broken")
        deliver("a")
        with pytest.raises(OSError, match="the socket is broken"):
            await asyncio.wait_for(asyncio.shield(broken.task), 10)
        deliver("b")
        for one in streams:
            if one is not broken:
                await until(lambda one=one: len(one.events) == 2)
                assert one.events == ["a", "b"]
        assert broken.events == []


@pytest.mark.parametrize("way", WAYS[:3], indirect=True)
async def test_a_stream_is_aborted_while_a_write_waits_or_has_failed(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is logged, and no task is left."""
    before = asyncio.all_tasks()
    async with serving(way, 3) as (waits, failed, both):
        for one in (waits, both):
            one.cycle.transport.writable.clear()
            one.cycle.transport.buffered = HIGH_WATER_BYTES
        failed.cycle.transport.error = OSError("broken")
        deliver("a")
        for one in (waits, failed, both):
            one.stream.abort(Reason.STALLED)
        await asyncio.wait_for(
            asyncio.gather(*(one.task for one in (waits, failed, both)), return_exceptions=True),
            10,
        )
        assert waits.stream.reason is Reason.STALLED
    await until(
        lambda: not any("SendWriter.send" in repr(task) for task in asyncio.all_tasks() - before)
    )
    assert caplog.text == ""


async def test_a_send_that_waits_at_every_write_delivers_everything_in_order(way: str) -> None:
    """As middleware with a queue does, or a server whose ``send`` runs in another thread."""
    if way == "inside":
        pytest.skip("Django calls send from the stream's task only")
    cycle = Cycle()
    active = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal active
        active += 1
        assert active == 1, "two calls at the same time"
        await asyncio.sleep(0.001)
        await cycle.send(message)
        active -= 1

    one = await Serving(way, send=send).live()
    one.cycle = cycle
    for n in range(0, 40, 2):
        # The second one is buffered before the stream's task runs.
        deliver(str(n), str(n + 1))
        await asyncio.sleep(0.0004 if n % 4 else 0)
        if n % 8 == 6:
            await one.live()
    await until(lambda: len(one.events) == 40)
    assert one.events == numbers(40)
    await one.close()


@pytest.mark.parametrize("way", WAYS[:3], indirect=True)
async def test_a_third_of_three_thousand_listeners_is_slow(way: str, settings: Any) -> None:
    """The others receive each event at once, and the slow ones receive everything later."""
    settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 20_000
    settings.EVENTSOURCE_POLL_SECONDS = 0.5
    async with serving(way, 3000) as streams:
        slow, fast = streams[::3], [*streams[1::3], *streams[2::3]]
        for one in slow:
            one.cycle.transport.stall()
            one.cycle.transport.buffered = HIGH_WATER_BYTES
            one.cycle.transport.writable.clear()
        for n in range(12):
            deliver(f"{n} " + "x" * 2_000)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert all(len(one.events) == 12 for one in fast)
        assert all(
            one.stream._subscriber._size + one.stream._subscriber.in_flight <= share_of(20_000)
            and one.events == []
            for one in slow
        )
        for one in slow:
            one.cycle.transport.resume()
        for one in slow:
            await until(lambda one=one: len(one.events) == 12, seconds=60)
        assert all([event.split()[0] for event in one.events] == numbers(12) for one in streams)


# Write-through


@pytest.mark.parametrize(
    "way", ["transport", pytest.param("send", marks=needs_eager_tasks)], indirect=True
)
async def test_an_event_is_written_before_deliver_returns(way: str) -> None:
    """No task of a stream runs in between."""
    async with serving(way, 10) as streams:
        for text in ("a", "b", "c"):
            deliver(text)
        deliver_live("d")
        for one in streams:
            assert one.events == ["a", "b", "c", "d"]
            assert one.is_waiting


async def test_all_streams_share_one_chunk() -> None:
    batch = Batch([b"data: a\n\n"])
    assert batch.chunk == b"9\r\ndata: a\n\n\r\n"
    assert batch.chunk is batch.chunk


async def test_the_transport_is_written_to_without_send() -> None:
    async with serving("transport") as (one,):
        before = one.cycle.sends
        deliver("a", "b")
        assert one.cycle.sends == before
        assert one.events == ["a", "b"]


async def test_middleware_around_the_wrapper_receives_every_event() -> None:
    """Also if it changes nothing at first."""
    cycle = Cycle()
    changes = False

    async def send(message: dict[str, Any]) -> None:
        await cycle.send({**message, "body": message["body"].upper()} if changes else message)

    one = await Serving("transport", send=send).live()
    one.cycle = cycle
    deliver("a")
    await until(lambda: one.events == ["a"])
    changes = True
    deliver("b")
    await until(lambda: one.cycle.body.endswith(b"DATA: B\n\n"))
    await one.close()


async def test_the_setting_turns_the_writes_to_the_transport_off(settings: Any) -> None:
    settings.EVENTSOURCE_WRITE_TO_TRANSPORT = False
    async with serving("transport") as (one,):
        before = one.cycle.sends
        deliver("a", "b")
        await until(lambda: one.events == ["a", "b"])
        assert one.cycle.sends > before


async def test_a_body_without_chunks_is_sent_by_the_server() -> None:
    """HTTP/1.0, for example."""
    one = Serving("transport")
    one.cycle.chunked = False
    await one.live()
    before = one.cycle.sends
    deliver("a")
    await until(lambda: b"data: a\n\n" in one.cycle.transport.data)
    assert one.cycle.sends > before
    assert b"\r\n" not in one.cycle.transport.data
    await one.close()


async def test_a_server_that_changes_its_framing_sends_by_itself_from_then_on() -> None:
    """What the stream's task sends shows the change."""
    async with serving("transport") as (one,):
        deliver("a")
        chunked = one.cycle.transport.data
        one.cycle.chunked = False
        one.stream._subscriber.write(b": keepalive\n")
        await until(lambda: one.cycle.transport.data.endswith(b": keepalive\n"))
        await one.live()
        one.cycle.chunked = True  # the writer does not trust it again
        before = one.cycle.sends
        deliver("b")
        await until(lambda: one.cycle.transport.data.endswith(b"data: b\n\n\r\n"))
        assert one.cycle.sends > before
        one.cycle.transport.data = chunked


async def test_a_server_that_changes_its_transport_sends_by_itself_from_then_on() -> None:
    async with serving("transport") as (one,):
        another = one.cycle.transport = Transport()
        one.stream._subscriber.write(b": keepalive\n")
        await until(lambda: b": keepalive\n" in another.data)
        await one.live()
        deliver("b")
        await until(lambda: b"data: b\n\n" in another.data)
        assert one.cycle.transport is another


@pytest.mark.parametrize("state", ["closing", "complete"])
async def test_nothing_is_written_to_a_transport_after_the_end_of_its_response(
    state: str,
) -> None:
    """Another response may follow on the connection."""
    async with serving("transport") as (one,):
        written = one.cycle.transport.data
        one.cycle.transport.closing = state == "closing"
        one.cycle.response_complete = state == "complete"
        deliver("a")
        assert one.cycle.transport.data == written


async def test_uvicorns_transport_is_its_own_again_after_each_send() -> None:
    async with serving("transport") as (one,):
        assert type(one.cycle.transport) is Transport
        assert one.stream.transport is one.cycle.transport
        one.cycle.transport.error = OSError("broken")
        one.stream._subscriber.write(b": keepalive\n")
        with pytest.raises(OSError, match="broken"):
            await one.task
        assert type(one.cycle.transport) is Transport


class Counting(Cycle):
    """A cycle of a subclass that replaces ``send``."""

    async def send(self, message: dict[str, Any]) -> None:
        await super().send(message)


class Other:
    """An object of another server or of middleware."""

    async def send(self, message: dict[str, Any]) -> None:
        """Send nothing."""


class Proxy:
    """An object of a tool that has the attributes of the method that it stands for."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


@functools.wraps(Cycle.send)
async def patched(self: Cycle, message: dict[str, Any]) -> None:
    """Stand for a tool that replaces uvicorn's method."""


async def test_only_the_send_of_uvicorn_itself_is_recognized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cycle = Cycle()
    assert uvicorn_cycle(cycle.send) is cycle
    assert uvicorn_cycle(pass_on(cycle)) is None
    assert uvicorn_cycle(functools.partial(cycle.send)) is None
    assert uvicorn_cycle(Counting().send) is None
    assert uvicorn_cycle(Other().send) is None
    assert uvicorn_cycle(None) is None
    assert uvicorn_cycle(Proxy(cycle.send)) is None
    monkeypatch.setattr(Other.send, "__module__", Cycle.send.__module__)
    assert uvicorn_cycle(Other().send) is None, "it has no transport"
    monkeypatch.setattr(Cycle, "send", patched)
    assert uvicorn_cycle(cycle.send) is None


@needs_eager_tasks
async def test_a_write_of_the_feed_runs_in_the_context_of_the_stream() -> None:
    """Middleware finds its own context variables."""
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="none")
    found: list[str] = []
    cycle = Cycle()

    async def send(message: dict[str, Any]) -> None:
        found.append(variable.get())
        await cycle.send(message)

    variable.set("the stream's")
    one = await Serving("send", send=send).live()
    variable.set("another")
    deliver("a")
    assert found[-1] == "the stream's"
    await one.close()


@pytest.mark.parametrize("way", WAYS[1:3], indirect=True)
@pytest.mark.parametrize("token", ["a", "b"])
async def test_an_event_that_is_delivered_during_a_write_follows_it(way: str, token: str) -> None:
    """Middleware may run code that delivers: an event of the same token, or of another one."""
    cycles = [Cycle() for _ in range(3)]
    begun = False

    def sending(cycle: Cycle) -> Send:
        async def send(message: dict[str, Any]) -> None:
            nonlocal begun
            if b"data: first" in message["body"] and not begun:
                begun = True
                deliver("second", token=token)
            await cycle.send(message)

        return send

    streams = [await Serving(way, send=sending(one), tokens=("a", "b")).live() for one in cycles]
    deliver("first", token="a")
    for cycle in cycles:
        await until(lambda cycle=cycle: len(cycle.events) == 2)
    orders = [cycle.events for cycle in cycles]
    if token == "a":
        assert orders == [["first", "second"]] * 3
    for cycle in cycles:
        assert sorted(cycle.events) == ["first", "second"]
    for one in streams:
        await one.close()


async def test_the_stall_of_a_write_counts_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving("send") as (one,):
        one.cycle.transport.writable.clear()
        deliver("x")
        await until(lambda: one.stream.sending_since is not None)
        begun = one.stream.sending_since
        assert one.stream._subscriber.in_flight > 0
        await asyncio.sleep(0.01)
        assert one.stream.sending_since == begun
        one.cycle.transport.resume()
        await one.live()
        assert one.stream.sending_since is None
        assert one.stream._subscriber.in_flight == 0
