"""Productions on all histories, with readers, several processes, and faults."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import SyncToAsync
from django.contrib.auth.models import Group
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.test.utils import CaptureQueriesContext
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt

from django_eventsource import (
    apublish,
    astart_production,
    astop_production,
    history,
    produce,
    start_production,
)
from django_eventsource.events import StringIdEvent
from django_eventsource.exceptions import ProductionRunning
from django_eventsource.history import History, get_history
from django_eventsource.operations import productions
from django_eventsource.operations.productions import Production, interrupt_dead, unended
from django_eventsource.producers.producer import FAILED_MESSAGE
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.frames import Decoder, ServerSentEvent
from django_eventsource.protocol.rewind import parse_rewind
from django_eventsource.streaming.stream import EventStream
from tests.integration.test_publish_once import setting
from tests.support.histories import ALIASES, MARIADB, NAMES, before_oldest, make
from tests.support.listeners import Connection
from tests.support.processes import Server, run_python, serve, start_python
from tests.support.valkey import shared_server, valkey
from tests.support.waiting import PATIENCE_SECONDS, PROCESS_PATIENCE_SECONDS, until

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)

ENDS = {"done", "failed", "stopped", "interrupted"}


@pytest.fixture(autouse=True)
def no_connections() -> Iterator[None]:
    """Close the connections of Django's thread for synchronous work, when no loop runs."""
    yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result(PATIENCE_SECONDS)


@pytest.fixture(params=NAMES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> History:
    """Use each of the histories for the process."""
    found = make(request.param)
    monkeypatch.setattr(history, "_current", found)
    return found


def events(token: str = "t") -> list[tuple[str, str]]:
    """Return the action and the data of each event of a token."""
    store = get_history()
    found, after = [], before_oldest(store, token)
    while entries := store.read(token, after).entries:
        found += [(entry.draft.action, entry.draft.data.decode()) for entry in entries]
        after = entries[-1].seq
    return found


async def aevents(token: str = "t") -> list[tuple[str, str]]:
    """Return what :func:`events` returns."""
    return await get_history().call(events, token)


async def ends(token: str = "t") -> list[str]:
    """Return the actions of the ends of a token."""
    return [action for action, _ in await aevents(token) if action in ENDS]


class Page:
    """A page of the token ``t``: its text, and its stream, which it can open again."""

    def __init__(self) -> None:
        self.load()

    def load(self) -> None:
        """Begin without a text, as a page that is loaded again."""
        self.text = ""
        self.end = ""
        self.resets = 0
        self.cursor: str | None = None

    def apply(self, event: ServerSentEvent) -> None:
        """Do what the script of the documentation does."""
        if event.event == "delta":
            self.text = event.data if self.end else self.text + event.data
            self.end = ""
        elif event.event == "reset":
            self.resets += 1
        elif event.event in ENDS:
            self.end = event.event
            if event.event == "done" and event.data:
                self.text = event.data

    async def listen(self, most_events: float = float("inf")) -> None:
        """Read the stream, from the last event or from the beginning, up to an end."""
        store = get_history()
        position = await store.alocate("t", parse_cursor(self.cursor), parse_rewind("all"))
        stream = EventStream("t", position, asked=self.cursor)
        decoder = Decoder(self.cursor or "")
        try:
            async for chunk in stream:
                for event in decoder.feed(chunk):
                    self.apply(event)
                    most_events -= 1
                self.cursor = decoder.last_event_id
                if self.end or most_events <= 0:
                    return
        finally:
            await stream.aclose()


async def numbers(count: int) -> AsyncIterator[str]:
    for number in range(count):
        await asyncio.sleep(0.001)
        yield f"{number}\n"


def text_of(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


# All histories


async def test_a_page_that_joins_in_the_middle_receives_the_text_so_far(store: History) -> None:
    """A later page receives ``done`` alone."""
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await go_on.wait()
        yield "b"

    task = asyncio.ensure_future(produce("t", source(), interval_seconds=0.001))
    await until(aevents)
    page, late = Page(), Page()
    listening = asyncio.ensure_future(page.listen())
    await until(lambda: page.text == "a")
    go_on.set()
    await task
    await listening
    assert (page.text, page.end) == ("ab", "done")
    position = await store.alocate("t", None, parse_rewind("all"))
    entries = (await store.aread("t", position.seq)).entries
    assert [(entry.draft.action, entry.draft.data) for entry in entries] == [("done", b"ab")]
    await late.listen()
    assert (late.text, late.end) == ("ab", "done")


async def test_readers_that_join_reload_and_reconnect_at_random_have_the_same_text(
    store: History,
) -> None:
    count, chance = 150, random.Random(15)

    async def read(page: Page) -> None:
        await asyncio.sleep(chance.random() * 0.2)
        while not page.end:
            await page.listen(chance.randrange(1, 12))
            await asyncio.sleep(chance.random() * 0.02)
            if not page.end and chance.random() < 0.3:
                page.load()

    pages = [Page() for _ in range(10)]
    readers = [asyncio.ensure_future(read(page)) for page in pages]
    await produce("t", numbers(count), interval_seconds=0.001)
    await asyncio.gather(*readers)
    assert {(page.text, page.end, page.resets) for page in pages} == {(text_of(count), "done", 0)}
    found = await aevents()
    assert "".join(data for action, data in found if action == "delta") == text_of(count)
    assert await ends() == ["done"]


async def test_the_saved_answer_and_the_end_are_committed_together(store: History) -> None:
    """If the function raises, nothing is saved."""
    saved = Group.objects.using(store.using)

    async def names() -> list[str]:
        return [name async for name in saved.values_list("name", flat=True)]

    def save(whole: str) -> None:
        saved.create(name=whole)
        if whole == "bad":
            raise ValueError

    with pytest.raises(ValueError):
        await produce("t", ["bad"], on_complete=save)
    assert (await names(), (await aevents())[-1]) == ([], ("failed", FAILED_MESSAGE))
    await produce("t", ["good"], on_complete=save)
    assert (await names(), (await aevents())[-1]) == (["good"], ("done", "good"))
    assert await ends() == ["failed", "done"]


async def test_of_many_productions_at_the_same_time_one_begins(store: History) -> None:
    """The token is free after its end."""
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await go_on.wait()

    tasks = [asyncio.ensure_future(produce("t", source())) for _ in range(8)]
    await until(lambda: sum(task.done() for task in tasks) == 7)
    go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(one, ProductionRunning) for one in results) == 7
    assert await aevents() == [("delta", "a"), ("done", "a")]
    await produce("t", ["b"])
    assert await ends() == ["done", "done"]
    assert await store.call(unended, store) == []


def test_claims_of_many_threads_at_the_same_time_leave_one(store: History) -> None:
    """In each round the threads claim another token."""
    threads = 6
    barrier = threading.Barrier(threads)

    def claim(number: int) -> list[str]:
        claimed = []
        try:
            for turn in range(5):
                one = Production(id=f"{number}-{turn}", token=f"t{turn}", interrupted="")
                barrier.wait(PROCESS_PATIENCE_SECONDS)
                try:
                    one.claim()
                except ProductionRunning:
                    continue
                claimed.append(one.token)
        finally:
            connections.close_all()
        return claimed

    with ThreadPoolExecutor(threads) as executor:
        found = [token for tokens in executor.map(claim, range(threads)) for token in tokens]
    assert sorted(found) == [f"t{turn}" for turn in range(5)]


async def test_a_dead_production_is_interrupted_once_by_many_processes(store: History) -> None:
    def work() -> None:
        dead = Production(id="dead", token="t", interrupted="")
        dead.claim()
        store.withdraw(dead.lease)
        suspected = interrupt_dead(store, set())

        def look(_: int) -> None:
            try:
                interrupt_dead(store, suspected)
            finally:
                connections.close_all()

        with ThreadPoolExecutor(4) as executor:
            list(executor.map(look, range(8)))

    await store.call(work)
    assert await aevents() == [("interrupted", "")]


@pytest.mark.parametrize("store", ["sqlite", "postgres", MARIADB], indirect=True)
def test_a_check_for_dead_productions_is_one_query_if_none_runs(store: History) -> None:
    assert interrupt_dead(store, set()) == set()  # it connects
    with CaptureQueriesContext(connections[store.using]) as queries:
        interrupt_dead(store, set())
    assert [one["sql"].split()[0] for one in queries] == ["SELECT"]


def test_ends_of_two_processes_at_the_same_moment_are_one_end(store: History) -> None:
    """The first one that the history stores counts, also for the one that is not stored."""
    barrier = threading.Barrier(2)

    def end(action: str) -> list[str]:
        ids = []
        try:
            for turn in range(10):
                one = Production(id=str(turn), token=f"t{turn}", interrupted="")
                barrier.wait(PROCESS_PATIENCE_SECONDS)
                ids.append(one.publish_end(StringIdEvent(one.token, action)).id)
        finally:
            connections.close_all()
        return ids

    with ThreadPoolExecutor(2) as executor:
        done, interrupted = executor.map(end, ["done", "interrupted"])
    assert done == interrupted
    assert [len(events(f"t{turn}")) for turn in range(10)] == [1] * 10


async def test_a_request_to_stop_ends_a_production(store: History) -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        await asyncio.Event().wait()

    task = asyncio.ensure_future(produce("t", source()))
    await until(aevents)
    await astop_production("t")
    assert (await task).action == "stopped"
    assert await ends() == ["stopped"]


# Several processes

PRODUCER = """
import asyncio, sys
from django_eventsource import produce

async def source():
    yield "one"
    print("yielded", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    yield " two"

async def main():
    end = await produce("t", source(), interval_seconds=0.001)
    print(end.action, flush=True)

asyncio.run(main())
"""
SHARED = ["default", "postgres", MARIADB, "redis"]


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest, settings: Any) -> dict[str, Any]:
    """Use each of the histories that processes share; return the settings of a process."""
    settings.EVENTSOURCE_HISTORY = setting(request.param)
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.3
    return {
        "EVENTSOURCE_HISTORY": settings.EVENTSOURCE_HISTORY,
        "EVENTSOURCE_PRESENCE_SECONDS": 0.3,
        "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
        "EVENTSOURCE_POLL_SECONDS": 0.1,
        "ROOT_URLCONF": "tests.integration.test_presence",
    }


@pytest.fixture
def servers(shared: dict[str, Any]) -> Iterator[tuple[Server, Server]]:
    """Run two processes that serve streams."""
    with serve("daphne", **shared) as one, serve("uvicorn", **shared) as two:
        yield one, two


async def start_producer(shared: dict[str, Any]) -> Any:
    """Start a process that produces, and wait until its first chunk is published."""
    process = start_python(PRODUCER, **shared)
    assert process.stdout
    assert await asyncio.to_thread(process.stdout.readline) == "yielded\n"
    await until(aevents, seconds=PROCESS_PATIENCE_SECONDS)
    return process


async def read_to_end(server: Server) -> tuple[Page, list[str]]:
    """Read a stream over HTTP up to an end; return the page and the actions."""
    page, actions, decoder = Page(), [], Decoder()
    stream = await Connection.open(server.address, "/events/poll/t?rewind=all")
    while not page.end and (data := await stream.read()):
        head, _, body = data.rpartition(b"\r\n\r\n")
        for event in decoder.feed(body if head.startswith(b"HTTP") else data):
            page.apply(event)
            actions.append(event.event)
    stream.close()
    return page, actions


async def test_a_production_whose_process_is_killed_is_interrupted_exactly_once(
    shared: dict[str, Any], servers: tuple[Server, Server]
) -> None:
    """The streams of two other processes receive it."""
    process = await start_producer(shared)
    readers = [asyncio.ensure_future(read_to_end(server)) for server in servers]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for page, actions in await asyncio.gather(*readers):
        assert (page.text, actions) == ("one", ["delta", "interrupted"])
    store = get_history()
    await until(lambda: store.call(lambda: not unended(store)), seconds=PROCESS_PATIENCE_SECONDS)
    for _ in range(3):
        assert await store.call(interrupt_dead, store, set()) == set()
    assert await aevents() == [("delta", "one"), ("interrupted", "")]
    await produce("t", ["three"])
    assert await ends() == ["interrupted", "done"]


async def test_a_production_is_stopped_by_another_process(shared: dict[str, Any]) -> None:
    process = await start_producer(shared)
    with pytest.raises(ProductionRunning):
        await produce("t", ["second"])
    await astop_production("t")
    assert await asyncio.to_thread(process.stdout.readline) == "stopped\n"
    out, err = await asyncio.to_thread(process.communicate, timeout=PROCESS_PATIENCE_SECONDS)
    assert (out, err) == ("", "")
    assert await aevents() == [("delta", "one"), ("stop", ""), ("stopped", "")]


async def test_a_post_of_stop_stops_a_production(
    shared: dict[str, Any], servers: tuple[Server, Server]
) -> None:
    """The action is one of the class of the URL, so a client may send it if the policy allows."""
    process = await start_producer(shared)
    refused = await Connection.open(
        servers[0].address, "/events/stop/t", method="POST", Content_Length="0"
    )
    assert refused.status == 404
    stopped = await Connection.open(
        servers[0].address, "/answers/stop/t", method="POST", Content_Length="0"
    )
    assert stopped.status == 200
    for connection in (refused, stopped):
        connection.close()
    assert await asyncio.to_thread(process.stdout.readline) == "stopped\n"
    out, err = await asyncio.to_thread(process.communicate, timeout=PROCESS_PATIENCE_SECONDS)
    assert (out, err) == ("", "")
    assert await ends() == ["stopped"]


async def test_a_script_that_ends_interrupts_the_productions_that_it_has_started(
    shared: dict[str, Any],
) -> None:
    """It does not wait for a source that blocks.

    The script ends after the first event. Before that, Python 3.12 can start no thread to publish
    in, and another process publishes the end when the lease has expired.
    """
    code = """
import threading
import time
from django_eventsource import read_history, start_production

one = threading.Event()

def source():
    yield "one"
    one.set()
    threading.Event().wait()

start_production("t", source(), interval_seconds=0.001)
one.wait()
while not read_history("t").events:
    time.sleep(0.001)
"""
    await asyncio.to_thread(run_python, code, **shared)
    assert (await aevents())[-1] == ("interrupted", "")
    assert await ends() == ["interrupted"]


# Servers

HEAD = {"method": "POST", "Content_Length": "0"}


async def source_of_a_view() -> AsyncIterator[str]:
    yield "one"
    await asyncio.Event().wait()


async def start_async(request: HttpRequest) -> HttpResponse:
    await astart_production("t", source_of_a_view())
    return HttpResponse(status=204)


def start_sync(request: HttpRequest) -> HttpResponse:
    start_production("t", source_of_a_view())
    return HttpResponse(status=204)


urlpatterns = [
    path("async/", csrf_exempt(start_async)),
    path("sync/", csrf_exempt(start_sync)),
    path("events/", include("django_eventsource.urls")),
]


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("hypercorn", "granian", "gunicorn")
]


@pytest.mark.parametrize("kind", ["daphne", "uvicorn", *SLOW])
@pytest.mark.parametrize("view", ["async", "sync"])
async def test_a_production_survives_its_client_and_is_interrupted_at_the_shutdown(
    kind: str, view: str
) -> None:
    """A stream that is open then receives the end, if the event loop serves both."""
    changes = {
        "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
        "ROOT_URLCONF": "tests.integration.test_producers",
    }
    with serve(kind, **changes) as server:
        started = await Connection.open(server.address, f"/{view}/", **HEAD)
        started.close()
        assert started.status == 204
        await until(aevents, seconds=PROCESS_PATIENCE_SECONDS)
        reading = asyncio.ensure_future(read_to_end(server))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.stop, signal.SIGTERM)
        assert await aevents() == [("delta", "one"), ("interrupted", "")]
        page, actions = await reading
        if view == "async" and actions:
            assert (page.text, actions[-1]) == ("one", "interrupted")
    store = get_history()

    def interrupt_all() -> None:
        # A process that is slow exits before it has withdrawn the leases.
        for one in unended(store):
            one.interrupt()

    await store.call(interrupt_all)
    assert await aevents() == [("delta", "one"), ("interrupted", "")]
    assert await store.call(unended, store) == []


# Faults


async def test_a_store_that_is_emptied_in_the_middle_sends_reset_and_then_the_whole(
    settings: Any,
) -> None:
    """The production continues. Pages have the whole text after ``done``."""
    settings.EVENTSOURCE_HISTORY = setting("redis")
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.1
    settings.EVENTSOURCE_POLL_SECONDS = 0.05
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "one"
        await go_on.wait()
        yield " two"

    task = asyncio.ensure_future(produce("t", source(), interval_seconds=0.001))
    page = Page()
    listening = asyncio.ensure_future(page.listen())
    await until(lambda: page.text == "one")
    shared_server().run("FLUSHALL")
    await until(lambda: page.resets)
    store = get_history()
    await until(lambda: store.call(lambda: len(unended(store)) == 1))
    assert await store.call(interrupt_dead, store, set()) == set()
    go_on.set()
    assert (await task).action == "done"
    await listening
    assert (page.text, page.end, page.resets) == ("one two", "done", 1)
    assert await aevents() == [("delta", " two"), ("done", "one two")]


async def test_a_store_that_is_restarted_in_the_middle_loses_nothing(settings: Any) -> None:
    """The production waits for it."""
    with valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        settings.EVENTSOURCE_HISTORY = {
            "BACKEND": "django_eventsource.history.redis.RedisHistory",
            "OPTIONS": {"HOSTS": [server.url], "TIMEOUT": 1},
        }
        go_on = asyncio.Event()

        async def source() -> AsyncIterator[str]:
            yield "one"
            await go_on.wait()
            yield " two"

        task = asyncio.ensure_future(produce("t", source(), interval_seconds=0.001))
        await until(aevents)
        await asyncio.to_thread(server.kill)
        go_on.set()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.restart, data=True)
        assert (await task).action == "done"
        assert await aevents() == [("delta", "one"), ("delta", " two"), ("done", "one two")]


async def test_other_events_of_the_token_are_kept(store: History) -> None:
    """A rewind begins with the newest ``done``."""
    await apublish("t", "ping", "before")
    await produce("t", ["a"])
    await apublish("t", "ping", "after")
    position = await store.alocate("t", None, parse_rewind("all"))
    entries = (await store.aread("t", position.seq)).entries
    assert [entry.draft.action for entry in entries] == ["done", "ping"]
    assert [action for action, _ in await aevents()] == ["ping", "delta", "done", "ping"]
    assert productions.renewal_seconds() == 5
