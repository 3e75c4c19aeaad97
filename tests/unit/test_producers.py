"""Productions with the memory history: the events, the ends, and bad input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Permission
from django.core.exceptions import ImproperlyConfigured
from django.db import IntegrityError, transaction

from django_eventsource import (
    apublish,
    astart_production,
    astop_production,
    produce,
    start_production,
    stop_production,
)
from django_eventsource.delivery import hub
from django_eventsource.events import (
    Event,
    EventId,
    JSONEvent,
    JSONIdEvent,
    StringEvent,
    StringIdEvent,
)
from django_eventsource.exceptions import InvalidEvent, InvalidToken, ProductionRunning
from django_eventsource.history import History, get_history
from django_eventsource.operations import productions
from django_eventsource.operations.productions import Production, interrupt_dead
from django_eventsource.operations.shutdown import shutdown
from django_eventsource.operations.supervisor import get_supervisor
from django_eventsource.producers import producer, sources, start
from django_eventsource.producers.chunks import JSONChunks, TextChunks
from django_eventsource.producers.producer import FAILED_MESSAGE, Producer
from django_eventsource.signals import Listener
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.registry import registry
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")

with_database = pytest.mark.django_db(transaction=True)

FAST = 0.001
"""An interval that a test does not wait for."""


def events(token: str = "t") -> list[tuple[str, str]]:
    """Return the action and the data of each event of a token."""
    history = get_history()
    found, after = [], 0
    while entries := history.read(token, after).entries:
        found += [(entry.draft.action, entry.draft.data.decode()) for entry in entries]
        after = entries[-1].seq
    return found


def deltas(token: str = "t") -> str:
    """Return the texts of the deltas of a token, joined."""
    return "".join(data for action, data in events(token) if action == "delta")


def ends(token: str = "t") -> list[tuple[str, str]]:
    """Return the events of a token, without deltas and requests."""
    return [event for event in events(token) if event[0] not in ("delta", "stop", "ping")]


def ended(token: str = "t") -> bool:
    """Return whether a token has an end, and no production runs that the test would leave."""
    return bool(ends(token)) and not shutdown._productions


def check_twice() -> None:
    """Look twice for dead productions, so that the second check interrupts them."""
    suspected = interrupt_dead(get_history(), set())
    interrupt_dead(get_history(), suspected)


class Source:
    """An asynchronous source of which each chunk is yielded when the test says so."""

    def __init__(self) -> None:
        self._chunks: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = False

    def put(self, *chunks: Any) -> None:
        """Let the source yield chunks. ``None`` ends it, and an exception is raised."""
        for chunk in chunks:
            self._chunks.put_nowait(chunk)

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while (chunk := await self._chunks.get()) is not None:
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
        finally:
            self.closed = True


class Closable(list[str]):
    """A synchronous source that can be closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


def admit_stream() -> OpenStream:
    """Return a stream that the running event loop serves as long as the test refers to it."""
    position = get_history().locate("x", None)
    stream = OpenStream("x", position, listener=Listener(tokens=("x",)))
    assert registry.admit(stream, loop=asyncio.get_running_loop()) is None
    return stream


async def words(*texts: str) -> AsyncIterator[str]:
    """Yield texts, each in its own round of the event loop."""
    for text in texts:
        await asyncio.sleep(0)
        yield text


# The events


@pytest.mark.parametrize("make", [words, lambda *texts: texts, lambda *texts: iter(texts)])
async def test_the_chunks_are_deltas_and_the_end_is_the_whole(make: Any) -> None:
    end = await produce("t", make("Hello", ", ", "world"), interval_seconds=FAST)
    assert (end.action, end.value) == ("done", ["Hello, world"])
    assert deltas() == "Hello, world"
    assert events()[-1] == ("done", "Hello, world")
    assert ends() == [("done", "Hello, world")]


async def test_a_source_that_yields_nothing_is_done_and_empty() -> None:
    await produce("t", [])
    assert events() == [("done", "")]
    await produce("u", ["", ""])
    assert events("u") == [("done", "")]
    await produce("v", [], event_class=JSONIdEvent)
    assert events("v") == [("done", "[]")]


async def test_chunks_of_one_interval_are_joined() -> None:
    """The first chunk is published at once."""
    source = Source()
    task = asyncio.ensure_future(produce("t", source, interval_seconds=0.2))
    source.put("a")
    await until(lambda: events() == [("delta", "a")])
    source.put("b", "c", "d", None)
    await task
    assert events() == [("delta", "a"), ("delta", "bcd"), ("done", "abcd")]


async def test_sequence_numbers_are_consecutive() -> None:
    end = await produce("t", words(*"abc"), interval_seconds=FAST)
    history = get_history()
    entries = history.read("t", 0).entries
    assert [entry.seq for entry in entries] == [
        entries[0].seq + number for number in range(len(entries))
    ]
    assert end.id == str(entries[-1].seq)


async def test_json_chunks_are_lists() -> None:
    """A string is a value, not JSON text. A changed object is published as it was yielded."""
    row: dict[str, int] = {}

    def rows() -> Iterator[Any]:
        for number in range(3):
            row["n"] = number
            yield row
        yield "text"

    await produce("t", rows(), event_class=JSONIdEvent, interval_seconds=FAST)
    whole = [{"n": 0}, {"n": 1}, {"n": 2}, "text"]
    assert [json.loads(data) for _, data in ends()] == [whole]
    joined = [json.loads(data) for action, data in events() if action == "delta"]
    assert [one for chunks in joined for one in chunks] == whole


async def test_line_ends_are_one_also_across_chunks() -> None:
    texts = ["a\r", "\nb\r\n", "\rc\r"]
    await produce("t", words(*texts), interval_seconds=FAST)
    assert deltas() == "a\nb\n\nc\n"
    assert ends() == [("done", "a\nb\n\nc\n")]


@with_database
async def test_a_megabyte_at_once_is_published_in_parts() -> None:
    """The whole is too large for one event, so ``done`` is empty: a page keeps its text."""
    text = "x€" * 300_000
    seen = []
    end = await produce("t", [text], interval_seconds=FAST, on_complete=seen.append)
    assert deltas() == text
    assert len(events()) > 5
    assert ends() == [("done", "")]
    assert end.value == [""]
    assert seen == [text]


async def test_json_chunks_of_more_than_one_event_are_published_in_parts(settings: Any) -> None:
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 300
    chunks = ["x" * 90] * 5
    await produce("t", chunks, event_class=JSONIdEvent, interval_seconds=FAST)
    joined = [json.loads(data) for action, data in events() if action == "delta"]
    assert [one for part in joined for one in part] == chunks
    assert max(map(len, joined)) == 2
    assert ends() == [("done", "null")]


async def test_a_fast_source_is_read_only_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Producer, "WAITING_BYTES", 10)
    yielded = []

    async def source() -> AsyncIterator[str]:
        for number in range(8):
            yielded.append(number)
            yield "12345"

    task = asyncio.ensure_future(produce("t", source(), interval_seconds=0.1))
    await until(lambda: len(events()) == 1)
    assert len(yielded) <= 6  # three are published, and three wait
    await task
    assert deltas() == "12345" * 8


async def test_a_synchronous_source_does_not_block_the_event_loop() -> None:
    """All of its steps, and its end, are in one thread."""
    go_on = threading.Event()
    threads = []

    def source() -> Iterator[str]:
        try:
            threads.append(threading.current_thread())
            go_on.wait(PATIENCE_SECONDS)
            yield "a"
            threads.append(threading.current_thread())
            yield "b"
        finally:
            threads.append(threading.current_thread())

    task = asyncio.ensure_future(produce("t", source()))
    await until(lambda: threads)
    await asyncio.sleep(0)
    go_on.set()
    await task
    assert ends() == [("done", "ab")]
    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


# The other ends


async def test_a_source_that_raises_is_failed_with_a_safe_message() -> None:
    """What it yielded before is published. The error is raised."""

    async def source() -> AsyncIterator[str]:
        yield "a"
        raise OSError("password=hunter2")

    with pytest.raises(OSError, match="hunter2"):
        await produce("t", source())
    assert events() == [("delta", "a"), ("failed", FAILED_MESSAGE)]


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3)])
async def test_a_synchronous_source_that_raises_is_failed(error: BaseException) -> None:
    def source() -> Iterator[str]:
        yield "a"
        raise error

    with pytest.raises((ValueError, RuntimeError)):
        await produce("t", source())
    assert events() == [("delta", "a"), ("failed", FAILED_MESSAGE)]


async def test_an_iterable_whose_iterator_cannot_be_made_is_failed() -> None:
    class Broken:
        def __iter__(self) -> Iterator[str]:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await produce("t", Broken())
    assert events() == [("failed", FAILED_MESSAGE)]


async def test_the_project_can_describe_an_error() -> None:
    with pytest.raises(ValueError):
        await produce("t", [1], describe_error=lambda error: f"Bad: {type(error).__name__}")
    assert events() == [("failed", "Bad: InvalidEvent")]
    with pytest.raises(ValueError):
        await produce(
            "u", [object()], event_class=JSONIdEvent, describe_error=lambda error: "a\nb"
        )
    assert events("u") == [("failed", '"a\\nb"')]


@pytest.mark.parametrize("text", [None, "x" * 2**21, "\ud800"])
async def test_a_description_that_fails_is_replaced(
    text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It raises an error, or its text is too large or cannot be encoded."""

    def describe(error: Exception) -> str:
        if text is None:
            raise KeyError
        return text

    with pytest.raises(InvalidEvent):
        await produce("t", [1], describe_error=describe)
    assert events() == [("failed", FAILED_MESSAGE)]
    assert "describe_error of a production failed." in caplog.text


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (b"bytes", "The source yielded b'bytes'. For StringIdEvent it must yield texts"),
        (None, "The source yielded None."),
        ("\ud800", "lone surrogate"),
    ],
)
async def test_a_chunk_that_is_not_a_text_is_failed(chunk: Any, text: str) -> None:
    with pytest.raises(InvalidEvent, match=text):
        await produce("t", ["a", chunk, "b"])
    assert events() == [("delta", "a"), ("failed", FAILED_MESSAGE)]


async def test_a_chunk_that_is_not_json_is_failed() -> None:
    with pytest.raises(InvalidEvent, match="not JSON"):
        await produce("t", [1, float("nan")], event_class=JSONIdEvent)
    assert events() == [("delta", "[1]"), ("failed", json.dumps(FAILED_MESSAGE))]


async def test_a_source_that_yields_too_much_is_failed() -> None:
    with pytest.raises(InvalidEvent, match="more than max_bytes \\(10\\) bytes"):
        await produce("t", words(*["1234"] * 5), max_bytes=10)
    assert ends() == [("failed", FAILED_MESSAGE)]


async def test_a_request_to_stop_ends_a_source_that_never_ends() -> None:
    """The source is closed."""
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    source.put("a")
    await until(events)
    await astop_production("t")
    end = await task
    assert end.action == "stopped"
    assert events() == [("delta", "a"), ("stop", ""), ("stopped", "")]
    assert source.closed


async def test_a_source_that_never_suspends_does_not_stop_the_event_loop() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        while True:
            yield ""

    task = asyncio.ensure_future(produce("t", source()))
    await until(events)
    await astop_production("t")
    assert (await task).action == "stopped"
    assert ends() == [("stopped", "")]


async def test_a_request_to_stop_ends_a_synchronous_source_that_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is closed when it has returned."""
    go_on, closed = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield 1
            go_on.wait(PATIENCE_SECONDS)
            yield 2
        finally:
            closed.set()

    task = asyncio.ensure_future(produce("t", source(), event_class=JSONIdEvent))
    await until(events)
    await astop_production("t", event_class=JSONIdEvent)
    await task
    assert events() == [("delta", "[1]"), ("stop", "null"), ("stopped", "null")]
    go_on.set()
    await until(closed.is_set)


async def test_a_source_that_cannot_be_closed_does_not_delay_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Producer, "CLOSE_SECONDS", 0.01)
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()

    task = asyncio.ensure_future(produce("t", source()))
    await until(events)
    await astop_production("t")
    assert (await task).action == "stopped"
    assert "The source of a production of 't' does not end." in caplog.text
    go_on.set()


async def test_an_error_of_a_source_that_is_closed_is_ignored() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while closing")

    task = asyncio.ensure_future(produce("t", source()))
    await until(events)
    await astop_production("t")
    assert (await task).action == "stopped"


async def test_an_old_request_to_stop_does_not_stop_a_new_production() -> None:
    await astop_production("t")
    await produce("t", ["a"])
    assert ends() == [("done", "a")]


async def test_a_cancelled_production_is_interrupted() -> None:
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    source.put("a")
    await until(events)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events() == [("delta", "a"), ("interrupted", "")]
    assert source.closed
    await produce("t", ["b"])


async def test_stop_and_done_at_the_same_moment_are_one_end() -> None:
    """In each round the request is a few steps of the event loop earlier or later."""
    found = set()
    for number in range(200):
        source, token = Source(), f"t{number}"
        task = asyncio.ensure_future(produce(token, source, interval_seconds=FAST))
        source.put("a")
        await until(lambda: events(token))  # noqa: B023
        for _ in range(number % 20):
            await asyncio.sleep(0)
        source.put(None)
        for _ in range(number // 20):
            await asyncio.sleep(0)
        await astop_production(token)
        end = await task
        (one,) = ends(token)
        assert one[0] == end.action
        found.add(end.action)
    assert found == {"done", "stopped"}


# on_complete


@with_database
async def test_on_complete_receives_the_whole_in_a_transaction() -> None:
    found = []

    def save(whole: str) -> None:
        found.append((whole, transaction.get_connection().in_atomic_block, ends()))

    await produce("t", ["a", "b\r\n"], on_complete=save)
    assert found == [("ab\n", True, [])]
    assert ends() == [("done", "ab\n")]


@with_database
async def test_on_complete_receives_the_chunks_of_a_json_class() -> None:
    found: list[Any] = []
    await produce("t", [1, (2,)], event_class=JSONIdEvent, on_complete=found.append)
    assert found == [[1, (2,)]]


@with_database
async def test_on_complete_that_raises_is_failed() -> None:
    def save(whole: str) -> None:
        raise LookupError(whole)

    with pytest.raises(LookupError):
        await produce("t", ["a"], on_complete=save)
    assert events() == [("delta", "a"), ("failed", FAILED_MESSAGE)]


async def test_on_complete_is_not_called_for_another_end() -> None:
    called: list[str] = []
    source = Source()
    task = asyncio.ensure_future(produce("t", source, on_complete=called.append))
    source.put("a")
    await until(events)
    await astop_production("t")
    await task
    with pytest.raises(InvalidEvent):
        await produce("t", [1], on_complete=called.append)
    assert called == []


@with_database
async def test_a_cancellation_during_on_complete_waits_for_its_end() -> None:
    """The answer is saved, so the end is ``done``."""
    started, go_on = threading.Event(), threading.Event()

    def save(whole: str) -> None:
        started.set()
        go_on.wait(PATIENCE_SECONDS)

    task = asyncio.ensure_future(produce("t", ["a"], on_complete=save))
    await until(started.is_set)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends() == [("done", "a")]


def swallow(whole: str) -> None:
    """Handle a database error without a savepoint, so that the transaction cannot commit."""
    with contextlib.suppress(IntegrityError):
        Permission.objects.create(name="p", content_type_id=None, codename="p")


@with_database
@pytest.mark.parametrize("save", [swallow, lambda whole: transaction.set_rollback(True)])
async def test_a_transaction_that_is_rolled_back_silently_is_failed(save: Any) -> None:
    """The history is outside of the database, so the end could be ``done``."""
    with pytest.raises(transaction.TransactionManagementError, match="rolled back"):
        await produce("t", ["a"], on_complete=save)
    assert events() == [("delta", "a"), ("failed", FAILED_MESSAGE)]


async def never(self: Producer) -> None:
    """Receive no end of another process, as between two checks of the history."""
    await asyncio.Event().wait()


@with_database
@pytest.mark.parametrize("saves", [True, False])
async def test_an_end_of_another_process_that_is_not_received_yet_counts(
    saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is saved, and the end is returned. Deltas may follow it."""
    monkeypatch.setattr(Producer, "_listen", never)
    called: list[str] = []
    source = Source()
    task = asyncio.ensure_future(
        produce("t", source, on_complete=called.append if saves else None, interval_seconds=FAST)
    )
    source.put("a")
    await until(events)
    (running,) = productions.unended(get_history())
    get_history().withdraw(running.lease)
    check_twice()
    source.put("b", None)
    end = await task
    assert (end.action, end.id) == ("interrupted", str(get_history().read("t", 0).entries[1].seq))
    assert events() == [("delta", "a"), ("interrupted", ""), ("delta", "b")]
    assert called == []
    assert productions.unended(get_history()) == []


@with_database
async def test_a_lease_that_was_dropped_does_not_prevent_the_end() -> None:
    called: list[str] = []
    source = Source()
    task = asyncio.ensure_future(produce("t", source, on_complete=called.append))
    source.put("a")
    await until(events)
    productions.unended(get_history())[0].release()
    source.put(None)
    assert (await task).action == "done"
    assert called == ["a"]


# Bad arguments


class Callable:
    """An object that is called as an asynchronous function."""

    async def __call__(self, whole: str) -> None:
        pass


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"token": ""}, InvalidToken, "empty"),
        ({"source": "text"}, TypeError, "must be an iterator .* not 'text'"),
        ({"source": b"bytes"}, TypeError, "must be an iterator"),
        ({"source": {"a": 1}}, TypeError, "must be an iterator"),
        ({"source": 5}, TypeError, "must be an iterator"),
        ({"source": words}, TypeError, "Call a generator function"),
        ({"event_class": StringEvent}, InvalidEvent, "StringEvent are live only"),
        ({"event_class": JSONEvent}, InvalidEvent, "durable"),
        ({"on_complete": asyncio.sleep}, TypeError, "on_complete must be a synchronous"),
        ({"on_complete": Callable()}, TypeError, "on_complete must be a synchronous"),
        ({"interval_seconds": 0}, ValueError, "interval_seconds must be a positive number, not 0"),
        ({"interval_seconds": True}, ValueError, "interval_seconds"),
        ({"interval_seconds": float("inf")}, ValueError, "interval_seconds"),
        ({"interval_seconds": "1"}, ValueError, "interval_seconds"),
        ({"max_bytes": -1}, ValueError, "max_bytes must be a positive number, not -1"),
    ],
)
async def test_a_wrong_argument_is_refused(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    arguments: dict[str, Any] = {"token": "t", "source": ["a"], **changes}
    for function in (produce, astart_production):
        with pytest.raises(error, match=text):
            await function(arguments.pop("token"), arguments.pop("source"), **arguments)
        arguments = {"token": "t", "source": ["a"], **changes}
    assert events() == []


async def test_a_class_with_wrong_actions_is_refused() -> None:
    class Wrong(StringIdEvent):
        ACTIONS = "delta"  # type: ignore[assignment]

    with pytest.raises(ImproperlyConfigured, match="must be a list"):
        await produce("t", ["a"], event_class=Wrong)


async def test_the_default_class_must_be_durable(settings: Any) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    with pytest.raises(InvalidEvent, match="pass event_class=StringIdEvent"):
        await produce("t", ["a"])
    with pytest.raises(InvalidEvent, match="live only"):
        await astop_production("t")


async def test_a_class_with_a_computed_id_can_be_used() -> None:
    class Numbered(EventId, StringEvent):
        ACTIONS: list[str] = []
        id = property(lambda event: f"{event.action}-{id(event)}")

    end = await produce("t", ["a"], event_class=Numbered)
    assert end.id.startswith("done-")


async def test_a_class_whose_close_action_is_an_end_closes_the_token() -> None:
    class Closing(StringIdEvent):
        FINISH = "done"
        ACTIONS = ["stop", "done"]

    await produce("t", ["a"], event_class=Closing)
    assert [entry.draft.kind for entry in get_history().read("t", 0).entries] == ["event", "close"]


async def test_clients_may_not_post_the_events_of_a_production() -> None:
    for event_class in (StringIdEvent, JSONIdEvent):
        assert not {"delta", "done", "failed", "stop", "stopped", "interrupted"} & set(
            event_class.ACTIONS
        )


# Two productions


async def test_a_second_production_of_a_token_is_refused() -> None:
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    source.put("a")
    await until(events)
    with pytest.raises(ProductionRunning, match="'t' is running") as caught:
        await produce("t", ["b"])
    assert caught.value.token == "t"
    await produce("other", ["c"])
    source.put(None)
    await task
    assert events() == [("delta", "a"), ("done", "a")]
    await produce("t", ["d"])
    assert ends() == [("done", "a"), ("done", "d")]


@pytest.mark.parametrize("how", [produce, astart_production, "sync"])
@pytest.mark.parametrize("kind", ["aclose", "async close", "mixed", "close", "none"])
async def test_the_source_of_a_refused_production_is_closed(how: Any, kind: str) -> None:
    """It is not read. An error of closing does not replace the refusal."""
    calls: list[str] = []

    class Response:
        """The response of a model, as clients of several kinds return it."""

        if kind in ("close", "none"):

            def __iter__(self) -> Iterator[str]:
                calls.append("read")
                return iter("b")

        else:

            def __aiter__(self) -> AsyncIterator[str]:
                calls.append("read")
                return words("b")

        if kind == "aclose":

            async def aclose(self) -> None:
                calls.append("closed")
                raise OSError("the connection is closed already")

        if kind == "async close":

            async def close(self) -> None:
                calls.append("closed")

        if kind in ("close", "mixed"):

            def close(self) -> None:
                calls.append("closed")
                if kind == "close":
                    raise OSError("the connection is closed already")

    running = Production(id="running", token="t", interrupted="")
    running.claim()
    start = sync_to_async(start_production) if how == "sync" else how
    with pytest.raises(ProductionRunning):
        await start("t", Response())
    assert calls == ([] if kind == "none" else ["closed"])
    running.release()
    calls.clear()
    await produce("t", Response())
    assert ends() == [("done", "b")]
    await until(lambda: calls == (["read"] if kind == "none" else ["read", "closed"]))


async def test_a_claim_before_the_own_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process claims the token after this one has looked for its productions."""
    other = Production(id="other", token="t", interrupted="")
    unrelated = Production(id="unrelated", token="u", interrupted="")
    unended = productions.unended

    def look(history: History) -> Any:
        found = unended(history)
        monkeypatch.setattr(productions, "unended", unended)
        unrelated.claim()
        other.claim()
        return found

    monkeypatch.setattr(productions, "unended", look)
    with pytest.raises(ProductionRunning):
        await produce("t", ["a"])
    assert [one.id for one in unended(get_history())] == ["unrelated", "other"]
    monkeypatch.undo()
    other.release()
    await produce("t", ["a"])


async def test_a_later_claim_of_another_process_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Production(id="other", token="t", interrupted="")
    publish_event = productions.publish_event

    def publish(event: Event, *args: Any) -> Event:
        published = publish_event(event, *args)
        if event.action == "claim":
            monkeypatch.setattr(productions, "publish_event", publish_event)
            publish_event(type(event)(event.token, "claim", {"id": "other", "token": "t"}))
        return published

    monkeypatch.setattr(productions, "publish_event", publish)
    await produce("t", ["a"])
    assert ends() == [("done", "a")]
    assert other.lease != other.record


# Leases


def test_the_fields_of_a_newer_version_are_ignored() -> None:
    """During an upgrade, processes of both versions run."""
    one = Production(id="one", token="t", interrupted="")
    newer = json.dumps({**json.loads(one.text), "added": [1]})
    assert Production.read(newer) == one
    get_history().announce(one.record, {"\ufffdproductions": [newer]}, 60)
    assert productions.unended(get_history()) == [one]
    check_twice()
    assert events() == [("interrupted", "")]
    assert productions.unended(get_history()) == []


def test_a_renewal_keeps_a_production_alive(settings: Any) -> None:
    """It is the only write of a production that waits for its source."""
    one = Production(id="one", token="t", interrupted="")
    one.claim()
    one.renew()
    check_twice()
    assert productions.unended(get_history()) == [one]
    assert events() == []


async def test_a_production_whose_process_died_is_interrupted_once() -> None:
    """Another production of its token begins after that."""
    dead = Production(id="dead", token="t", interrupted="null")
    dead.claim()
    get_history().withdraw(dead.lease)
    for _ in range(2):
        check_twice()
    assert events() == [("interrupted", "null")]
    Production(id="second", token="t", interrupted="").claim()
    get_history().withdraw("\ufffdproduction:second")
    await produce("t", ["a"])
    assert events()[1:] == [("interrupted", ""), ("delta", "a"), ("done", "a")]


async def test_every_process_with_streams_looks_for_dead_productions(
    settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure does not end the task."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.01
    dead = Production(id="dead", token="t", interrupted="")
    dead.claim()
    get_history().withdraw(dead.lease)
    failures = []

    def fail(history: History, suspected: Any) -> None:
        failures.append(history)
        raise OSError("no store")

    stream = admit_stream()
    with monkeypatch.context() as patch:
        patch.setattr(productions, "interrupt_dead", fail)
        get_supervisor()
        await until(lambda: len(failures) > 1)
    await until(events)
    assert events() == [("interrupted", "")]
    assert "Productions whose process died cannot be ended; retrying." in caplog.text
    await stream.aclose()


async def test_a_process_without_streams_does_not_look_for_dead_productions(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that are opened later begin with the first of two checks."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.00123
    checks: list[set[str]] = []
    sleeps: list[float] = []  # of the task under test
    sleep = asyncio.sleep

    def check(history: History, suspected: Any) -> set[str]:
        checks.append(set(suspected))
        return {"one"}

    async def note(seconds: float) -> None:
        await sleep(seconds)
        if seconds == 0.00123:
            sleeps.append(seconds)

    monkeypatch.setattr(productions, "interrupt_dead", check)
    monkeypatch.setattr(productions.asyncio, "sleep", note)
    task = asyncio.ensure_future(productions.interrupt_dead_forever())

    async def wait_for_sleeps(count: int) -> None:
        begin = len(sleeps)
        await until(lambda: len(sleeps) >= begin + count)

    await wait_for_sleeps(5)
    assert checks == []
    for _ in range(2):
        stream = admit_stream()
        await until(lambda: {"one"} in checks)
        await stream.aclose()
        await wait_for_sleeps(2)
        assert checks[0] == set()
        checks.clear()
    task.cancel()


async def test_a_wrong_setting_does_not_end_the_task(settings: Any) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = "x"
    task = asyncio.ensure_future(productions.interrupt_dead_forever())
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()


async def test_a_lease_that_the_history_dropped_is_announced_again(
    settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.05
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    source.put("a")
    await until(events)
    (running,) = productions.unended(get_history())
    running.release()
    assert productions.unended(get_history()) == []
    await until(lambda: productions.unended(get_history()) == [running])
    check_twice()
    with monkeypatch.context() as patch:
        patch.setattr(Production, "renew", lambda self: 1 / 0)
        await until(lambda: "The lease of a production could not be renewed" in caplog.text)
    source.put(None)
    await task
    assert ends() == [("done", "a")]
    assert productions.unended(get_history()) == []


async def test_a_renewal_that_is_under_way_at_the_end_does_not_announce_the_leases_again(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.001
    renew, begun, go_on = Production.renew, threading.Event(), threading.Event()

    def wait(self: Production) -> bool:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)
        return renew(self)

    monkeypatch.setattr(Production, "renew", wait)
    monkeypatch.setattr(get_history(), "call", asyncio.to_thread)  # as a history that blocks
    monkeypatch.setattr(get_history(), "call_for", lambda token, *work: asyncio.to_thread(*work))
    source = Source()
    one = Producer("t", source)
    await one.aclaim()
    task = asyncio.ensure_future(one.run())
    await until(begun.is_set)
    source.put(None)
    await until(lambda: one._renewing.cancelling())
    go_on.set()
    await task
    assert productions.unended(get_history()) == []


async def test_a_renewal_is_repeated_sooner_after_a_failure(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_PRESENCE_SECONDS = 3
    renew, slept = Production.renew, []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds >= 1:
            slept.append(seconds)
            seconds = 0
        await sleep(seconds)

    def fail(self: Production) -> bool:
        if len(slept) < 2:
            raise OSError("no store")
        return renew(self)

    monkeypatch.setattr(Production, "renew", fail)
    monkeypatch.setattr(Producer, "_listen", never)
    monkeypatch.setattr(producer.asyncio, "sleep", note)
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    await until(lambda: len(slept) > 2)
    source.put(None)
    await task
    assert slept[:3] == [3, 1, 3]


async def test_a_production_that_another_process_ended_stops() -> None:
    """It happens if its process did not run for longer than its lease."""
    called: list[str] = []
    source = Source()
    task = asyncio.ensure_future(produce("t", source, on_complete=called.append))
    source.put("a")
    await until(events)
    (running,) = productions.unended(get_history())
    get_history().withdraw(running.lease)
    check_twice()
    end = await task
    assert end.action == "interrupted"
    assert events() == [("delta", "a"), ("interrupted", "")]
    assert called == []


def test_a_production_whose_lease_is_renewed_between_two_checks_is_not_interrupted() -> None:
    """After a failure of the store, all leases have expired."""
    one = Production(id="one", token="t", interrupted="")
    one.claim()
    get_history().withdraw(one.lease)
    suspected = interrupt_dead(get_history(), set())
    assert suspected == {"one"}
    assert not one.renew()
    assert interrupt_dead(get_history(), suspected) == set()
    get_history().withdraw(one.lease)
    assert interrupt_dead(get_history(), set()) == {"one"}
    assert events() == []


async def test_a_check_that_fails_is_none_of_the_two(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may have failed since the check before it, and with it the renewals."""
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.001
    given = []

    def check(history: History, suspected: Any) -> Any:
        given.append(set(suspected))
        if len(given) == 2:
            raise OSError("no store")
        return {"one"}

    stream = admit_stream()
    monkeypatch.setattr(productions, "interrupt_dead", check)
    task = asyncio.ensure_future(productions.interrupt_dead_forever())
    await until(lambda: len(given) >= 4)
    task.cancel()
    await stream.aclose()
    assert given[:4] == [set(), {"one"}, set(), {"one"}]


def test_a_dead_production_that_cannot_be_ended_does_not_delay_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not prevent a claim of another token."""
    history: Any = get_history()
    for token in "abc":
        Production(id=token, token=token, interrupted="").claim()
        history.withdraw(f"\ufffdproduction:{token}")
    append = history.append

    def fail(token: str, drafts: Any) -> Any:
        if token == "a":
            raise history.storage_errors[0]("this server is down")
        return append(token, drafts)

    monkeypatch.setattr(history, "append", fail)
    check_twice()
    assert [events(token) for token in "abc"] == [[], [("interrupted", "")], [("interrupted", "")]]
    assert "A production whose process died cannot be ended; retrying." in caplog.text
    Production(id="d", token="d", interrupted="").claim()
    with pytest.raises(history.storage_errors[0]):
        Production(id="e", token="a", interrupted="").claim()


# Claims that fail


@pytest.mark.parametrize("name", ["append", "read", "locate", "announce"])
async def test_a_claim_that_fails_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one succeeds. The failure of the store ends before or after the release."""
    for withdraw_fails in (False, True):
        token = f"t{withdraw_fails}"
        history: Any = get_history()

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError("no store")

        with monkeypatch.context() as patch:
            patch.setattr(history, name, fail)
            if withdraw_fails:
                patch.setattr(history, "withdraw", fail)
            with pytest.raises(OSError, match="no store"):
                await produce(token, ["a"])
        for one in productions.unended(history):
            assert withdraw_fails
            history.withdraw(one.lease)  # it expires
        check_twice()
        assert events(token) == []
        await produce(token, ["b"])


def test_the_end_of_a_process_that_claims_is_no_end_of_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A claim that has not won is not interrupted. Until its lease expires, it counts."""

    def die(*args: Any) -> Any:
        raise KeyboardInterrupt

    one = Production(id="one", token="t", interrupted="")
    with monkeypatch.context() as patch:
        patch.setattr(productions, "publish_event", die)
        patch.setattr(Production, "release", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            one.claim()
    with pytest.raises(ProductionRunning):
        Production(id="two", token="t", interrupted="").claim()
    get_history().withdraw(one.lease)
    Production(id="two", token="t", interrupted="").claim()
    check_twice()
    assert events() == []


@pytest.mark.parametrize("start", [produce, astart_production])
async def test_a_caller_that_is_cancelled_during_the_claim_leaves_nothing(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, begun, go_on = Production.claim, threading.Event(), threading.Event()
    source = Closable("a")

    def wait(self: Production) -> Any:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)
        return claim(self)

    with monkeypatch.context() as patch:
        patch.setattr(Production, "claim", wait)
        patch.setattr(get_history(), "call", asyncio.to_thread)  # as a history that blocks
        task = asyncio.ensure_future(start("t", source))
        await until(begun.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert source.closed
    assert productions.unended(get_history()) == []
    await produce("t", ["b"])
    assert ends() == [("done", "b")]


# Failures of the history


async def test_a_delta_is_published_again_while_the_history_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stored once, although the first attempt may have been stored."""
    monkeypatch.setattr(Producer, "BACKOFF_SECONDS", (0.001,))
    history: Any = get_history()
    append, failures = history.append, []

    def fail(token: str, drafts: Any) -> Any:
        entries = append(token, drafts)
        if token == "t" and len(failures) < 3:
            failures.append(drafts)
            raise history.storage_errors[0]("the response was lost")
        return entries

    monkeypatch.setattr(history, "append", fail)
    await produce("t", ["a"])
    assert events() == [("delta", "a"), ("done", "a")]
    assert "An event of a production could not be published; retrying." in caplog.text


async def test_a_history_that_fails_for_long_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is not withdrawn, so another process publishes the end later."""
    monkeypatch.setattr(Producer, "PATIENCE_SECONDS", -1)
    history: Any = get_history()
    append = history.append

    def fail(token: str, drafts: Any) -> Any:
        if token == "t":
            raise history.storage_errors[0]("down")
        return append(token, drafts)

    monkeypatch.setattr(history, "append", fail)
    with pytest.raises(history.storage_errors[0]):
        await produce("t", ["a"])
    monkeypatch.undo()
    (left,) = productions.unended(history)
    history.withdraw(left.lease)
    check_twice()
    assert events() == [("interrupted", "")]


async def test_requests_to_stop_are_received_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that ends, as at a close of the token, is opened again."""
    monkeypatch.setattr(Producer, "LISTEN_SECONDS", 0.01)
    history = get_history()
    alocate, failures = history.alocate, []

    async def fail(token: str, *args: Any) -> Any:
        if token == "t" and len(failures) < 2 and args != (None,):
            failures.append(token)
            raise OSError("no store")
        return await alocate(token, *args)

    monkeypatch.setattr(history, "alocate", fail)
    source = Source()
    task = asyncio.ensure_future(produce("t", source))
    source.put("a")
    await until(events)
    await apublish("t", "close")
    await until(lambda: len(failures) == 2)
    await astop_production("t")
    assert (await task).action == "stopped"
    assert "Cannot receive requests to stop a production; retrying." in caplog.text


# Detached productions


async def test_a_started_production_runs_as_a_task() -> None:
    source = Source()
    await astart_production("t", source)
    with pytest.raises(ProductionRunning):
        await astart_production("t", ["b"])
    source.put("a", None)
    await until(ended)
    assert events() == [("delta", "a"), ("done", "a")]


async def test_the_error_of_a_started_production_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await astart_production("t", [1])
    await until(ended)
    await until(lambda: "The production of 't' failed." in caplog.text)
    assert caplog.records[-1].levelno == logging.ERROR
    assert ends() == [("failed", FAILED_MESSAGE)]


async def test_the_shutdown_interrupts_the_productions_of_its_loop() -> None:
    source = Source()
    await astart_production("t", source)
    source.put("a")
    await until(events)
    try:
        await shutdown.end(asyncio.get_running_loop())
        assert events() == [("delta", "a"), ("interrupted", "")]
    finally:
        shutdown.reset()


async def test_a_production_that_starts_during_a_shutdown_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutdown, "begun", True)
    await astart_production("t", Source())
    await until(ended)
    assert ends() == [("interrupted", "")]


def test_synchronous_code_starts_a_production_in_a_thread() -> None:
    go_on = threading.Event()

    def source() -> Iterator[str]:
        yield "a"
        go_on.wait(PATIENCE_SECONDS)

    start_production("t", source())
    with pytest.raises(ProductionRunning):
        start_production("t", ["b"])
    go_on.set()
    asyncio.run(until(ended))
    assert events() == [("delta", "a"), ("done", "a")]


def test_the_hub_of_the_thread_ends_with_the_last_production() -> None:
    """A process without streams does not read the history for ever. The next one has a hub."""
    asyncio.run(hub.end_hub())  # without a hub, nothing happens
    for _ in range(2):
        start_production("t", Source())
        start_production("u", ["a"])
        asyncio.run(until(lambda: ends("u")))
        assert len(hub.hubs()) == 1
        stop_production("t")
        asyncio.run(until(lambda: not hub.hubs()))
        asyncio.run(until(lambda: not shutdown._productions))
    assert ends() == [("stopped", "")] * 2


def test_synchronous_code_stops_a_production() -> None:
    start_production("t", Source())
    stop_production("t")
    asyncio.run(until(ended))
    assert ends() == [("stopped", "")]


@with_database
def test_a_stop_in_a_transaction_is_published_after_the_commit() -> None:
    with transaction.atomic():
        stop_production("t")
        assert events() == []
    assert events() == [("stop", "")]


@with_database
@pytest.mark.parametrize(
    "start", [start_production, async_to_sync(astart_production), async_to_sync(produce)]
)
def test_a_start_in_a_transaction_is_refused(start: Any, settings: Any) -> None:
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.database.DatabaseHistory"
    }
    with (
        transaction.atomic(),
        pytest.raises(transaction.TransactionManagementError, match="on_commit"),
    ):
        start("t", ["a"])
    assert productions.unended(get_history()) == []


@with_database
async def test_a_production_can_be_started_in_the_thread_for_synchronous_work() -> None:
    """The event loop of the production needs the same thread."""
    await sync_to_async(start_production)("t", ["a"])
    await until(ended)

    def save(whole: str) -> None:
        transaction.on_commit(lambda: start_production("v", [whole]))

    await sync_to_async(start_production)("u", ["b"], on_complete=save)
    await until(lambda: ended("v"))
    assert events("v") == [("delta", "b"), ("done", "b")]


def test_a_thread_that_cannot_be_started_leaves_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = Closable("a")
    start.end_background()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            start_production("t", source)
    assert source.closed
    assert productions.unended(get_history()) == []


def test_the_end_of_the_process_interrupts_the_productions_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start.end_background()
    start_production("t", Source())
    start.end_background()
    assert ends() == [("interrupted", "")]


# Sources and chunks


async def test_an_iterator_that_cannot_be_closed_can_be_a_source() -> None:
    class Numbers:
        left = 3

        def __aiter__(self) -> Numbers:
            return self

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return str(self.left)

    await produce("t", Numbers())
    assert ends() == [("done", "210")]


def test_a_chunk_that_is_not_needed_any_more_is_not_requested() -> None:
    requests: Any = SimpleQueue()
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    for request in (cancelled, None):
        requests.put(request)
    source = iter("a")
    sources._serve(source, requests)
    assert list(source) == ["a"]


def test_a_tiny_limit_takes_one_character_at_a_time(settings: Any) -> None:
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1
    chunks = TextChunks(StringIdEvent)
    chunks.add("ab")
    assert [chunks.take(), chunks.take(), chunks.take()] == ["a", "b", ""]
    values = JSONChunks(JSONIdEvent)
    values.add("a")
    values.add("b")
    assert [values.take(), values.take(), values.take()] == ['["a"]', '["b"]', "[]"]
