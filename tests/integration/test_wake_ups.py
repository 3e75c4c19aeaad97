"""Wake-ups between processes through PostgreSQL and SQLite, without a shared channel layer."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext

from django_eventsource import publish
from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.layer import group_name
from django_eventsource.delivery.wake_ups import Watcher, waker, watcher
from django_eventsource.history import History, get_history
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.database.postgresql_wake_ups import CHANNEL, PostgresWakeUps
from django_eventsource.history.wake_ups import Groups
from tests.support.events import add
from tests.support.histories import ALIASES, DATABASES, NAMES, make
from tests.support.processes import POSTGRES, run_python, start_python
from tests.support.singles import Single
from tests.support.waiting import PROCESS_PATIENCE_SECONDS, until

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)

SQLITE = {"BACKEND": POSTGRES["BACKEND"], "OPTIONS": {}}
CASES = ["postgres", "sqlite", "sqlite-wal"]

PUBLISHER = """
import logging, sys
logging.basicConfig()
from django_eventsource import publish
for line in sys.stdin:
    publish("t", "ping", line.strip())
    print("published", flush=True)
"""


def with_options(case: str, **options: object) -> dict[str, Any]:
    """Return the setting of the history."""
    base = POSTGRES if case == "postgres" else SQLITE
    return {**base, "OPTIONS": {**base["OPTIONS"], **options}}  # type: ignore[dict-item]


@pytest.fixture(autouse=True)
def only_wake_ups(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the history by the timer only once, and connect again soon."""
    settings.EVENTSOURCE_POLL_SECONDS = 3600
    monkeypatch.setattr(Watcher, "backoff_seconds", (0.05,))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """End the threads before the next test changes the databases."""
    yield
    end_threads()


def end_threads() -> None:
    """End the threads and their connections."""
    threads = [watcher._thread, waker._thread]
    watcher.reset()
    waker.reset()
    for thread in threads:
        if thread is not None:
            thread.join(PROCESS_PATIENCE_SECONDS)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, settings) -> Iterator[str]:
    """Use one of the databases."""
    settings.EVENTSOURCE_HISTORY = with_options(request.param)
    if request.param != "sqlite-wal":
        yield request.param
        return
    with connections["default"].cursor() as cursor:
        cursor.execute("PRAGMA journal_mode=WAL")
        assert cursor.fetchone() == ("wal",)
    yield request.param
    end_threads()
    with connections["default"].cursor() as cursor:
        cursor.execute("PRAGMA journal_mode=DELETE")
        assert cursor.fetchone() == ("delete",)


class Publisher:
    """Another process, which publishes."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.process = start_python(PUBLISHER, EVENTSOURCE_HISTORY=setting)

    def publish_now(self, text: str) -> None:
        """Publish, and return when ``publish()`` has returned."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "published\n"

    async def publish(self, text: str) -> None:
        await asyncio.to_thread(self.publish_now, text)

    def end(self) -> str:
        """End the process and return what it has logged."""
        _, logged = self.process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
        assert self.process.returncode == 0
        return logged


@contextmanager
def publisher(setting: dict[str, Any], *, logs: str = "") -> Iterator[Publisher]:
    """Run a publisher during a block.

    :param logs: a part of what it logs; ``""`` if it logs nothing.
    """
    process = Publisher(setting)
    try:
        yield process
        logged = process.end()
        assert logs in logged
        assert bool(logged) == bool(logs), logged
    finally:
        process.process.kill()
        process.process.communicate()


async def listen() -> Single:
    """Return a live subscriber of a hub whose first history check is over."""
    hub = get_hub()
    await until(
        lambda: hub._changes_since is not None and hub._wake._waiters,
        seconds=PROCESS_PATIENCE_SECONDS,
    )
    position = await hub.history.alocate("t", None)
    subscriber = Single(position.seq, buffer_bytes=2**20, keepalive_seconds=None)
    await hub.subscribe(subscriber)
    hub.catch_up(subscriber.only, await hub.read("t", subscriber.seq))
    assert subscriber.live
    return subscriber


async def receive(subscriber: Single, *texts: str) -> None:
    """Wait for events, which may arrive together."""
    data = b""
    while not all(f"data: {text}\n".encode() in data for text in texts):
        await until(lambda: subscriber.has_frames, seconds=PROCESS_PATIENCE_SECONDS)
        data += subscriber.take()


async def settled() -> None:
    """Wait until the first checks that wake-ups cause are over."""
    hub = get_hub()
    await until(lambda: hub._news._not_before > 0, seconds=PROCESS_PATIENCE_SECONDS)
    await until(
        lambda: hub._news.due_at == math.inf and hub._wake._waiters,
        seconds=PROCESS_PATIENCE_SECONDS,
    )


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine function on a loop. The database is used in the thread of the test."""
    async_to_sync(main)()


def execute(sql: str, *params: object) -> list[Any]:
    """Execute a statement at the PostgreSQL server."""
    with connections["postgres"].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def sessions(query: str) -> list[int]:
    """Return the PostgreSQL sessions whose last statement matches a pattern."""
    rows = execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s"
        " AND pid <> pg_backend_pid()",
        query,
    )
    return [pid for (pid,) in rows]


LISTENING = "LISTEN %"
NOTIFYING = "SELECT set_config%"


# Two processes


def test_the_event_of_another_process_arrives_before_the_history_check(case: str) -> None:
    """Each wake-up brings it, not only the first one."""

    async def main() -> None:
        subscriber = await listen()
        await settled()
        with publisher(with_options(case)) as other:
            for n in range(5):
                await other.publish(str(n))
                await receive(subscriber, str(n))

    run(main)


def test_a_script_that_exits_right_after_it_has_published_wakes_the_hubs(case: str) -> None:
    async def main() -> None:
        subscriber = await listen()
        await settled()
        code = "from django_eventsource import publish\npublish('t', 'ping', 'a')"
        setting = with_options(case)
        await asyncio.to_thread(run_python, code, EVENTSOURCE_HISTORY=setting)
        await receive(subscriber, "a")

    run(main)


def test_the_events_of_a_transaction_arrive_after_its_commit(case: str) -> None:
    async def main() -> None:
        subscriber = await listen()
        await settled()
        setting = with_options(case)
        using = setting["OPTIONS"].get("USING", "default")
        code = (
            "from django.db import transaction\nfrom django_eventsource import publish\n"
            f"with transaction.atomic(using={using!r}):\n    publish('t', 'ping', 'a')"
        )
        await asyncio.to_thread(run_python, code, EVENTSOURCE_HISTORY=setting)
        await receive(subscriber, "a")

    run(main)


@pytest.mark.parametrize("case", ["postgres", "sqlite"], indirect=True)
def test_without_wake_ups_the_event_arrives_at_the_history_check(case: str, settings) -> None:
    """No thread is started for them."""
    settings.EVENTSOURCE_HISTORY = setting = with_options(case, WAKE_UP=False)

    async def main() -> None:
        subscriber = await listen()
        with publisher(setting) as other:
            await other.publish("a")
        assert (watcher._thread, waker._thread) == (None, None)
        get_hub().flush(subscriber)
        assert not subscriber.has_frames
        await get_hub()._check_history()
        await receive(subscriber, "a")

    run(main)


FORK = """
import os, sys, threading
from django.db import connections
from django_eventsource import publish
from django_eventsource.delivery.wake_ups import waker, watcher
class Loop:
    running = True
    def is_running(self):
        return self.running
class Hub:
    loop = Loop()
    woken = threading.Event()
    def wake(self, groups):
        self.woken.set()
def awake():
    assert Hub.woken.wait(60)
    Hub.woken.clear()
hub = Hub()
watcher.add(hub)
publish("t", "ping", "parent")
assert waker.flush(60)
awake()
connections.close_all()
pid = os.fork()
if pid == 0:
    assert watcher._thread is None
    publish("t", "ping", "child")
    sys.exit()
_, status = os.waitpid(pid, 0)
assert status == 0
awake()
publish("t", "ping", "parent again")
Loop.running = False
"""


@pytest.mark.parametrize("case", ["postgres", "sqlite"], indirect=True)
def test_a_fork_does_not_use_the_threads_and_connections_of_its_parent(case: str) -> None:
    """Both wake the hubs, and the parent is still woken."""

    async def main() -> None:
        subscriber = await listen()
        await settled()
        setting = with_options(case)
        work = asyncio.to_thread(run_python, FORK, EVENTSOURCE_HISTORY=setting)
        task = asyncio.ensure_future(work)
        await receive(subscriber, "parent", "child", "parent again")
        await task

    run(main)


# The contract


@pytest.mark.parametrize("name", NAMES)
def test_a_history_has_wake_ups_or_none(name: str) -> None:
    """Those of a shared database find the event of another connection."""
    history = make(name)
    wake_ups = history.wake_ups
    if name in ("memory", "mariadb", "redis", "redis-outbox"):
        assert wake_ups is None
        return
    assert wake_ups is history.wake_ups is not None
    with closing(wake_ups.watch()) as news:
        while next(news) is not None:
            pass  # the first one is for what was published before
        assert next(news) == ()
        add(history, "a")
        if wake_ups.sends:
            other = make(name).wake_ups
            assert other is not None
            other.send(iter([["a"], None]))
            assert until_news(news) == ["a"]
        assert until_news(news) is None


def until_news(news: Generator[Groups, None, None]) -> Groups:
    """Return the next wake-up that is not empty."""
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while time.monotonic() < deadline:
        groups = next(news)
        if groups is None or groups:
            return groups
    raise TimeoutError


@pytest.mark.parametrize("name", ["sqlite", "postgres"])
def test_a_check_that_a_wake_up_causes_is_one_statement_if_nothing_has_changed(
    name: str, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wake-up may be due to a commit in any table."""
    settings.EVENTSOURCE_HISTORY = with_options(name)
    monkeypatch.setattr(watcher, "add", lambda hub: None)

    async def main() -> None:
        await listen()
        hub = get_hub()
        queries = await hub.history.call(capture)
        hub.wake(None)
        await settled()
        assert len(queries) == 1

    def capture() -> CaptureQueriesContext:
        return CaptureQueriesContext(connections[get_history().using]).__enter__()

    run(main)


# PostgreSQL


def own() -> PostgresWakeUps:
    """Return the wake-ups of one process more."""
    return PostgresWakeUps("postgres", {})


@contextmanager
def watching(wake_ups: PostgresWakeUps) -> Iterator[Generator[Groups, None, None]]:
    with closing(wake_ups.watch()) as news:
        assert next(news) is None
        assert next(news) == ()
        yield news


def test_a_process_is_not_woken_by_its_own_events() -> None:
    """They were delivered to its hubs directly."""
    one, other = own(), own()
    with watching(one) as news:
        one.send([["own"], None])
        other.send([["other"]])
        assert until_news(news) == ["other"]


def test_the_greatest_number_of_groups_fits_into_a_notification() -> None:
    groups = [group_name(str(n)) for n in range(PostgresWakeUps.most_groups)]
    with watching(own()) as news:
        own().send([groups])
        assert until_news(news) == groups


def test_a_notification_of_another_program_wakes_the_hubs_at_most() -> None:
    """It is text of any kind."""
    with watching(own()) as news:
        for payload in ("", "é", ",,"):
            execute("SELECT pg_notify(%s, %s)", CHANNEL, payload)
        assert until_news(news) is None
        assert until_news(news) is None
        assert until_news(news) == ["", ""]


def test_a_hundred_events_cause_few_notifications(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_HISTORY = with_options("postgres")
    monkeypatch.setattr(waker, "interval_seconds", 0.5)
    with watching(own()) as news:
        began = time.monotonic()
        for n in range(100):
            publish("t", "ping", str(n))
        assert waker.flush(PROCESS_PATIENCE_SECONDS)
        seconds = time.monotonic() - began
        own().send([["end"]])
        found = []
        while (groups := until_news(news)) != ["end"]:
            assert groups == [group_name("t")]
            found.append(groups)
    assert 1 <= len(found) <= seconds / 0.5 + 2


def test_many_tokens_wake_the_hubs_with_one_notification(settings) -> None:
    """It names none of them."""
    settings.EVENTSOURCE_HISTORY = with_options("postgres")
    with watching(own()) as news:
        with waker._condition:  # the thread waits for the lock
            for n in range(1000):
                waker.put(group_name(str(n)))
        assert waker.flush(PROCESS_PATIENCE_SECONDS)
        assert until_news(news) is None


def test_a_rollback_wakes_no_process(settings) -> None:
    settings.EVENTSOURCE_HISTORY = with_options("postgres")
    with pytest.raises(RuntimeError), transaction.atomic(using="postgres"):
        publish("t", "ping", "a")
        raise RuntimeError
    assert waker._thread is None


def test_a_publisher_does_not_notify_on_the_connection_of_the_user(settings) -> None:
    """It publishes with the same statements as without wake-ups."""
    settings.EVENTSOURCE_HISTORY = with_options("postgres")
    publish("t", "ping", "a")
    with CaptureQueriesContext(connections["postgres"]) as queries:
        publish("t", "ping", "b")
    assert waker.flush(PROCESS_PATIENCE_SECONDS)
    assert len(queries) == 1
    assert "notify" not in queries[0]["sql"]
    assert len(sessions(NOTIFYING)) == 1


def test_the_listening_connection_has_the_parameters_of_its_option() -> None:
    """The others are those of the database."""
    history = DatabaseHistory(USING="postgres", LISTEN_DSN="application_name=listener")
    other = make("postgres").wake_ups
    assert history.wake_ups is not None
    assert other is not None
    with closing(history.wake_ups.watch()) as news:
        assert next(news) is None
        assert execute(
            "SELECT query, datname = current_database() FROM pg_stat_activity"
            " WHERE application_name = 'listener'"
        ) == [(f"LISTEN {CHANNEL}", True)]
        other.send([["a"]])
        assert until_news(news) == ["a"]


@pytest.mark.parametrize("dsn", ["host", "nothing=1", 5, "", b"port=1"])
def test_a_listening_dsn_that_is_not_valid_is_an_error(dsn: Any) -> None:
    """The text contains no password."""
    with pytest.raises(ImproperlyConfigured, match="LISTEN_DSN must be a connection string"):
        DatabaseHistory(USING="postgres", LISTEN_DSN=dsn)


@pytest.mark.parametrize("using", [alias for alias in DATABASES if alias != "postgres"])
def test_a_listening_dsn_requires_postgresql(using: str) -> None:
    expected = rf"LISTEN_DSN requires PostgreSQL with psycopg 3, but DATABASES\['{using}'\] uses"
    with pytest.raises(ImproperlyConfigured, match=expected):
        DatabaseHistory(USING=using, LISTEN_DSN="port=5432")


def test_psycopg2_has_no_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module has another name."""
    monkeypatch.setattr(psycopg, "__name__", "psycopg2")
    assert DatabaseHistory(USING="postgres").wake_ups is None
    with pytest.raises(ImproperlyConfigured, match="uses psycopg2"):
        DatabaseHistory(USING="postgres", LISTEN_DSN="port=5432")


# PostgreSQL fails


def on_postgres(main: Callable[[Single, Publisher], Awaitable[None]], logs: str = "") -> None:
    """Run a test with a stream and a publisher in another process."""

    async def prepare() -> None:
        subscriber = await listen()
        await settled()
        with publisher(with_options("postgres"), logs=logs) as other:
            await main(subscriber, other)

    run(prepare)


@pytest.fixture
def postgres(settings) -> History:
    settings.EVENTSOURCE_HISTORY = with_options("postgres")
    return get_history()


def test_a_listening_connection_that_is_killed_is_opened_again(
    postgres: History, caplog: pytest.LogCaptureFixture
) -> None:
    """What was published meanwhile arrives with the new connection."""

    async def main(subscriber: Single, other: Publisher) -> None:
        for n in range(3):
            (pid,) = await postgres.call(sessions, LISTENING)
            await postgres.call(execute, "SELECT pg_terminate_backend(%s, 60000)", pid)
            await other.publish(str(n))
            await receive(subscriber, str(n))
            await until(lambda: watching_again(postgres), seconds=PROCESS_PATIENCE_SECONDS)

    on_postgres(main)
    assert "Cannot watch the database" in caplog.text


async def watching_again(history: History) -> bool:
    return len(await history.call(sessions, LISTENING)) == 1


def test_a_listening_connection_that_is_paused_delays_no_publisher(postgres: History) -> None:
    """The history check finds the events. Later the hub is woken again."""

    async def main(subscriber: Single, other: Publisher) -> None:
        (pid,) = await postgres.call(sessions, LISTENING)
        with paused(pid):
            for text in "ab":
                await other.publish(text)
            assert not subscriber.has_frames
            await get_hub()._check_history()
            await receive(subscriber, "b")
        await other.publish("c")
        await receive(subscriber, "c")

    on_postgres(main)


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process of the server during a block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_notifying_connection_that_is_paused_delays_no_publisher(postgres: History) -> None:
    async def main(subscriber: Single, other: Publisher) -> None:
        await other.publish("a")
        await receive(subscriber, "a")
        (pid,) = await postgres.call(sessions, NOTIFYING)
        with paused(pid):
            for text in "bcd":
                await other.publish(text)
            assert not subscriber.has_frames
            await get_hub()._check_history()
            await receive(subscriber, "d")
        await other.publish("e")
        await receive(subscriber, "e")

    on_postgres(main)


def test_a_notifying_connection_that_is_killed_is_opened_again(postgres: History) -> None:
    """The event whose notification failed arrives with the next one."""

    async def main(subscriber: Single, other: Publisher) -> None:
        await other.publish("a")
        await receive(subscriber, "a")
        (pid,) = await postgres.call(sessions, NOTIFYING)
        await postgres.call(execute, "SELECT pg_terminate_backend(%s, 60000)", pid)
        await other.publish("lost")
        for n in range(1000):
            await other.publish(str(n))
            await asyncio.sleep(0.01)
            if subscriber.has_frames:
                break
        await receive(subscriber, "lost")

    on_postgres(main, logs="Cannot wake other processes")


def test_an_event_whose_notification_is_lost_arrives_at_the_history_check(
    postgres: History,
) -> None:
    """Or with the next notification."""

    async def main(subscriber: Single, other: Publisher) -> None:
        with publisher(with_options("postgres", WAKE_UP=False)) as silent:
            await silent.publish("a")
            assert not subscriber.has_frames
            await get_hub()._check_history()
            await receive(subscriber, "a")
            await silent.publish("b")
        await other.publish("c")
        await receive(subscriber, "c")

    on_postgres(main)


def test_a_connection_that_cannot_listen_leaves_the_events_to_the_history_check(
    settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a pooler that refuses LISTEN."""
    settings.EVENTSOURCE_HISTORY = with_options("postgres", LISTEN_DSN="port=1")
    settings.EVENTSOURCE_POLL_SECONDS = 0.05
    monkeypatch.setattr(Hub, "full_check_seconds", 600)

    async def main() -> None:
        subscriber = await listen()
        with publisher(with_options("postgres")) as other:
            await until(lambda: caplog.text.count("Cannot watch the database") > 1)
            await other.publish("a")
            await receive(subscriber, "a")

    run(main)


def test_a_pooler_in_transaction_mode_leaves_the_events_to_the_history_check(
    settings, tmp_path: Path
) -> None:
    """It accepts LISTEN, but passes on no notifications."""

    async def main() -> None:
        subscriber = await listen()
        await settled()
        with publisher(with_options("postgres")) as other, watching(own()) as news:
            await other.publish("a")
            await asyncio.to_thread(until_news, news)
            get_hub().flush(subscriber)
            assert not subscriber.has_frames
            await get_hub()._check_history()
            await receive(subscriber, "a")

    with pooler(tmp_path) as host:
        settings.EVENTSOURCE_HISTORY = with_options("postgres", LISTEN_DSN=f"host={host}")
        run(main)
        end_threads()


NOTIFICATION = b"A"
"""The type of the message that contains a notification."""


@contextmanager
def pooler(directory: Path) -> Iterator[str]:
    """Run a proxy that drops notifications, and return its host."""
    name = ".s.PGSQL.5432"
    threads = []

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = server.accept()
                session = socket.socket(socket.AF_UNIX)
                session.connect(os.path.join(connections["postgres"].settings_dict["HOST"], name))
                for work, source, target in ((copy, client, session), (drop, session, client)):
                    threads.append(threading.Thread(target=work, args=[source, target]))
                    threads[-1].start()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / name))
        server.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        yield str(directory)
        server.shutdown(socket.SHUT_RDWR)
        for one in (thread, *threads):
            one.join(PROCESS_PATIENCE_SECONDS)


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on bytes, up to the end of the source."""
    with suppress(OSError):  # drop() has closed both sockets
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


def drop(source: socket.socket, target: socket.socket) -> None:
    """Pass on messages, except notifications, and close both sockets at the end."""
    with source, target, source.makefile("rb") as file, suppress(BrokenPipeError):
        while head := file.read(5):
            body = file.read(int.from_bytes(head[1:]) - 4)
            if head[:1] != NOTIFICATION:
                target.sendall(head + body)


# SQLite


def test_a_commit_of_another_table_costs_one_statement_at_most(settings) -> None:
    settings.EVENTSOURCE_HISTORY = with_options("sqlite")

    async def main() -> None:
        await listen()
        await settled()
        hub = get_hub()
        before = hub._news._not_before
        queries = await hub.history.call(capture)
        code = (
            "from django.contrib.sites.models import Site\n"
            "Site.objects.update_or_create(pk=7, defaults={'domain': 'd', 'name': 'n'})"
        )
        await asyncio.to_thread(run_python, code)
        await until(lambda: hub._news._not_before > before and hub._wake._waiters)
        statements = [query["sql"] for query in queries]
        assert statements
        assert all("EXISTS" in sql for sql in statements)

    def capture() -> CaptureQueriesContext:
        return CaptureQueriesContext(connections["default"]).__enter__()

    run(main)
