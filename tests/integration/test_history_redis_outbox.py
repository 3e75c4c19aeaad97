"""Tests of the outbox of the Redis history, and of its log of changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
import redis
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, InterfaceError, connections, transaction
from django.test.utils import CaptureQueriesContext

from django_eventsource import publish
from django_eventsource.checks import check_outbox
from django_eventsource.history import Draft, Entry, History, Kind, get_history, outbox
from django_eventsource.history.outbox import Outbox
from django_eventsource.history.redis import backend
from django_eventsource.history.redis.backend import RedisHistory
from django_eventsource.models import PendingEvent
from django_eventsource.signals import event_published
from tests.integration.test_history_redis import everything, full
from tests.integration.test_history_statements import wait_for_waiter
from tests.support.events import add, draft, texts
from tests.support.histories import ALIASES, DATABASES, in_thread
from tests.support.processes import ROOT, run_python, start_python
from tests.support.valkey import ValkeyServer, valkey
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)

PATH = "django_eventsource.history.redis.RedisHistory"


@pytest.fixture(params=DATABASES)
def using(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    connections[request.param].close()


@pytest.fixture
def history(valkey_server: ValkeyServer, using: str) -> RedisHistory:
    return of(valkey_server, using)


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may stop. It writes every command to disk."""
    with valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def of(server: ValkeyServer, using: str = "default", **options: Any) -> RedisHistory:
    return RedisHistory(HOSTS=[server.url], OUTBOX=True, USING=using, **options)


def configured(server: ValkeyServer, using: str) -> dict[str, Any]:
    """Return the setting of such a history."""
    options = {"HOSTS": [server.url], "OUTBOX": True, "USING": using, "TIMEOUT": 1.5}
    return {"BACKEND": PATH, "OPTIONS": options}


def pending(using: str) -> int:
    return PendingEvent.objects.using(using).count()


def stage(history: RedisHistory, *drafts: Draft, token: str = "t") -> Callable[[], Any]:
    """Stage events in a transaction that commits, and return the function that settles them."""
    with transaction.atomic(using=history.using):
        return history.stage(token, drafts)


def forget_failures(history: History) -> None:
    """Call the server again, as after some time."""
    for host in cast("RedisHistory", history)._hosts.all:
        host._failure = None


# Options


@pytest.mark.parametrize("value", [1, 0, None, "yes", "default"])
def test_an_outbox_option_that_is_not_a_boolean_is_named(value: object) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"OUTBOX must be True or False, not "):
        RedisHistory(OUTBOX=value)  # type: ignore[arg-type]


def test_using_must_be_an_alias() -> None:
    with pytest.raises(ImproperlyConfigured, match="USING must be an alias in DATABASES"):
        RedisHistory(USING="nowhere")


def test_a_history_without_outbox_needs_neither_the_app_nor_a_database(
    valkey_server: ValkeyServer,
) -> None:
    """A process that only publishes may have neither."""
    code = f"""
from django.conf import settings
settings.configure(SECRET_KEY="tests")
import django; django.setup()
from django_eventsource.history import Draft
from django_eventsource.history.redis import RedisHistory
history = RedisHistory(HOSTS=["{valkey_server.url}"])
history.append("t", [Draft(action="ping", data=b"a")])
history.stage("t", [Draft(action="ping", data=b"b")])()
history.changes(history.changes(None)[0])
"""
    run_without_settings(code)
    assert everything(RedisHistory(HOSTS=[valkey_server.url])) == ["a", "b"]


def run_without_settings(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, timeout=PROCESS_PATIENCE_SECONDS
    )


# Transactions


def test_an_event_is_published_if_and_only_if_its_transaction_commits(
    settings, valkey_server: ValkeyServer, using: str
) -> None:
    settings.EVENTSOURCE_HISTORY = configured(valkey_server, using)
    history = cast("RedisHistory", get_history())
    with transaction.atomic(using=using):
        kept = publish("t", "ping", "a")
        assert pending(using) == 1
        assert everything(history) == []
    with pytest.raises(ZeroDivisionError), transaction.atomic(using=using):
        publish("t", "ping", "rolled back")
        _ = 1 / 0
    history.heads([])
    assert everything(history) == ["a"]
    assert kept.id == str(history.newest("t")[0])
    assert pending(using) == 0


def test_events_of_a_transaction_are_settled_in_order_with_their_keys(
    history: RedisHistory,
) -> None:
    """An event with a key is appended alone."""
    drafts = [
        draft("a", own_id="own"),
        draft("b", kind=Kind.CLOSE),
        draft("c", key="k"),
        draft("d", key="k"),
        draft("e"),
    ]
    entries = stage(history, *drafts)()
    assert everything(history) == ["a", "b", "c", "e"]
    seq = entries[0].seq
    assert [entry.seq - seq for entry in entries] == [0, 1, 2, 2, 3]
    assert [entry.repeated for entry in entries] == [False, False, False, True, False]
    assert pending(history.using) == 0


@pytest.mark.parametrize("bound", ["MAX_EVENTS", "MAX_BYTES"])
@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7])])
def test_an_append_of_pending_events_trims_none_of_its_own(
    valkey_server: ValkeyServer, bound: str, most: int, sizes: list[int]
) -> None:
    """So a settler that repeats the append finds all of them."""
    history = of(valkey_server, **{bound: most})
    commands = record_appends(history)
    entries = stage(history, *map(draft, "abcdefg"))()
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(7))
    assert everything(history) == list("abcdefg")[-most:]
    assert [len(drafts) for _, _, drafts, *_ in commands] == sizes


def record_appends(history: RedisHistory) -> list[Any]:
    """Return a list that receives the arguments of each append."""
    commands: list[Any] = []
    append = history._append

    def record(*args: Any) -> list[Entry]:
        commands.append(args)
        return append(*args)

    history._append = record  # type: ignore[method-assign]
    return commands


def test_a_long_outbox_is_moved_in_batches(history: RedisHistory) -> None:
    entries = stage(history, *(draft(str(n)) for n in range(1_100)))()
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(1_100))
    assert everything(history) == [str(n) for n in range(1_100)]
    assert pending(history.using) == 0


# A server that fails


def test_events_are_kept_in_order_while_redis_has_no_memory(
    settings, own_server: ValkeyServer, using: str
) -> None:
    """The commits succeed, and each event is stored once when the server has memory."""
    settings.EVENTSOURCE_HISTORY = configured(own_server, using)
    history = cast("RedisHistory", get_history())
    publish("t", "ping", "before")
    with full(own_server):
        for text in "abc":
            with transaction.atomic(using=using):
                publish("t", "ping", text)
        history.heads([])
        assert pending(using) == 3
        assert everything(history) == ["before"]
    history.heads([])
    assert everything(history) == ["before", "a", "b", "c"]
    assert pending(using) == 0


def test_events_are_kept_in_order_while_redis_is_down(
    settings, own_server: ValkeyServer, using: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next transaction of the token, or a history check, moves them."""
    settings.EVENTSOURCE_HISTORY = configured(own_server, using)
    history = cast("RedisHistory", get_history())
    publish("t", "ping", "before")
    own_server.kill()
    for token, text in ("ta", "ub", "tc"):
        with transaction.atomic(using=using):
            publish(token, "ping", text)
    assert "stay in the outbox" in caplog.text
    assert pending(using) == 3
    with pytest.raises(redis.ConnectionError):
        history.heads(["t", "u"])
    own_server.start()
    forget_failures(history)
    with transaction.atomic(using=using):
        publish("t", "ping", "d")
    assert everything(history) == ["before", "a", "c", "d"]
    history.heads([])
    assert everything(history, "u") == ["b"]
    assert pending(using) == 0


def test_a_server_that_is_known_to_be_silent_is_tried_before_rows_are_locked(
    own_server: ValkeyServer, using: str
) -> None:
    """On SQLite the lock would stop every writer of the database."""
    history = of(own_server, using, TIMEOUT=1)
    settle = stage(history, draft("a"))
    own_server.pause()
    for _ in range(2):
        with pytest.raises(redis.RedisError):
            settle()
    for host in history._hosts.all:
        host._probe_at = 0
    with (
        CaptureQueriesContext(connections[using]) as queries,
        pytest.raises(redis.TimeoutError),
    ):
        settle()
    assert [one["sql"] for one in queries] == []
    own_server.resume()
    forget_failures(history)
    history.heads([])
    assert everything(history) == ["a"]


def test_tokens_of_another_host_are_settled_while_one_is_down(
    valkey_server: ValkeyServer, own_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The host that is down is tried once."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url], OUTBOX=True, TIMEOUT=0.5)
    names = [str(n) for n in range(20)]
    for name in names:
        stage(history, draft(name), token=name)
    own_server.kill()
    history.heads(names)
    there = [name for name in names if history._host(name) is history._hosts.all[0]]
    assert 3 < len(there) < 17
    assert all(everything(history, name) == [name] for name in there)
    assert pending("default") == 20 - len(there)
    assert caplog.text.count("Assigning sequence numbers to pending events") == 1
    own_server.start()
    forget_failures(history)
    history.heads([])
    assert all(everything(history, name) == [name] for name in names)


# Order


def test_an_event_outside_of_a_transaction_does_not_overtake_those_of_its_process(
    settings, own_server: ValkeyServer, using: str
) -> None:
    """It is stored after them, or raises."""
    settings.EVENTSOURCE_HISTORY = configured(own_server, using)
    history = cast("RedisHistory", get_history())
    own_server.kill()
    with transaction.atomic(using=using):
        publish("t", "ping", "a")
    with pytest.raises(redis.ConnectionError):
        publish("t", "ping", "lost")
    own_server.start()
    forget_failures(history)
    publish("t", "ping", "b")
    assert everything(history) == ["a", "b"]
    assert not history._unsettled
    with CaptureQueriesContext(connections[using]) as queries:
        publish("t", "ping", "c")
    assert not [one["sql"] for one in queries]


def test_a_failure_during_a_move_is_not_forgotten(own_server: ValkeyServer) -> None:
    """Another thread has failed meanwhile, and its event may be pending."""
    history = of(own_server)
    history._unsettled["t"] = object()
    later = object()
    settle_batch = history._settle_batch

    def fail_meanwhile(*args: Any) -> Any:
        history._unsettled["t"] = later
        return settle_batch(*args)

    history._settle_batch = fail_meanwhile  # type: ignore[method-assign]
    add(history, "a")
    assert history._unsettled == {"t": later}
    history._settle_batch = settle_batch  # type: ignore[method-assign]
    stage(history, draft("b"))()
    assert history._unsettled == {}


def test_failures_are_forgotten_when_the_outbox_is_empty(history: RedisHistory) -> None:
    """Another process may have settled the events."""
    history._unsettled["u"] = object()
    settle = stage(history, draft("a"))
    history.heads([])
    assert "u" in history._unsettled
    history.heads([])
    assert history._unsettled == {}
    assert texts(settle()) == ["a"]


# Processes that are killed

KILLED_AFTER_COMMIT = """
import os, signal, sys
from django.db import transaction
from django_eventsource import publish
using = sys.argv[1]
with transaction.atomic(using=using):
    transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL), using=using)
    publish("t", "ping", "a")
    publish("t", "ping", "b")
"""

KILLED_AFTER_APPEND = """
import os, signal, sys
from django.db import transaction
from django_eventsource import publish
from django_eventsource.history import get_history
history, (_, using, key) = get_history(), sys.argv
append = history._append

def append_and_die(*args):
    append(*args)
    os.kill(os.getpid(), signal.SIGKILL)

history._append = append_and_die
with transaction.atomic(using=using):
    publish("t", "ping", "a", key=key or None)
    publish("t", "ping", "b")
"""


def run_until_killed(code: str, *args: str, **overrides: Any) -> None:
    process = start_python(code, *args, **overrides)
    _, errors = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL, errors


def test_a_process_killed_after_the_commit_loses_nothing(
    valkey_server: ValkeyServer, using: str
) -> None:
    """Another process moves its events, each once."""
    overrides = {"EVENTSOURCE_HISTORY": configured(valkey_server, using)}
    run_until_killed(KILLED_AFTER_COMMIT, using, **overrides)
    history = of(valkey_server, using)
    assert pending(using) == 2
    assert everything(history) == []
    for _ in range(2):
        history.heads(["t"])
        assert everything(history) == ["a", "b"]
    assert pending(using) == 0


@pytest.mark.parametrize("key", ["", "k"])
def test_a_process_killed_between_append_and_delete_stores_each_event_once(
    valkey_server: ValkeyServer, using: str, key: str
) -> None:
    """Another process finds the events by their keys. Events that follow keep their order."""
    overrides = {"EVENTSOURCE_HISTORY": configured(valkey_server, using)}
    run_until_killed(KILLED_AFTER_APPEND, using, key, **overrides)
    history = of(valkey_server, using)
    assert pending(using) == 2
    before = everything(history)
    assert before == (["a"] if key else ["a", "b"])
    (entry,) = stage(history, draft("c"))()
    assert everything(history) == ["a", "b", "c"]
    assert entry.seq == history.newest("t")[0]
    assert pending(using) == 0


def test_a_rolled_back_move_is_repeated_with_more_events(history: RedisHistory) -> None:
    """The second append contains other events too, and stores only those."""
    settle = stage(history, draft("b"), draft("c"))
    with pytest.raises(ZeroDivisionError), transaction.atomic(using=history.using):
        settle()
        _ = 1 / 0
    assert everything(history) == ["b", "c"]
    stage(history, draft("d"))
    entries = settle()
    assert everything(history) == ["b", "c", "d"]
    assert texts(entries) == ["b", "c"]
    assert not any(entry.repeated for entry in entries)
    assert tuple(entries) == history.read("t", entries[0].seq - 1).entries[:2]


def test_an_append_that_arrives_after_the_move_stores_nothing(history: RedisHistory) -> None:
    """A server that was paused may execute the command of a settler that has given up."""
    commands = record_appends(history)
    first = stage(history, draft("a"), draft("b", key="k"))()
    add(history, "c")
    assert [history._append(*args) for args in commands[:2]] == [[entry] for entry in first]
    assert everything(history) == ["a", "b", "c"]


# Settlers at the same time


def test_a_publisher_whose_events_another_process_has_settled_finds_them(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    plain = stage(history, draft("a", own_id="own"), draft("b"))
    first = stage(history, draft("c", key="k"))
    second = stage(history, draft("d", key="k", own_id="unused"))
    of(valkey_server, history.using).heads([])
    assert everything(history) == ["a", "b", "c"]
    entries = [*plain(), *first(), *second()]
    seq = entries[0].seq
    assert [entry.seq - seq for entry in entries] == [0, 1, 2, 2]
    assert [entry.repeated for entry in entries] == [False, False, False, True]
    assert [entry.id for entry in entries] == ["own", *(str(entry.seq) for entry in entries[1:])]


def test_an_event_that_was_settled_and_trimmed_has_no_entry(
    valkey_server: ValkeyServer, using: str
) -> None:
    history = of(valkey_server, using, MAX_EVENTS=1)
    settle = stage(history, draft("a"), draft("b"))
    history.heads([])
    entries = settle()
    assert entries[0] is None
    assert texts(entries[1:]) == ["b"]


def test_a_settler_whose_rows_another_one_takes_while_it_reads_settles_nothing(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    settle = stage(history, draft("a"), draft("b"))
    reads: list[str] = []

    def take(execute: Any, sql: str, *args: Any) -> Any:
        reads.append(sql)
        if len(reads) == 2:
            in_thread(lambda: of(valkey_server, history.using).heads([]))
        return execute(sql, *args)

    with connections[history.using].execute_wrapper(take):
        entries = settle()
    assert len(reads) == 2
    assert texts(entries) == everything(history) == ["a", "b"]


def test_a_settler_whose_rows_another_one_has_taken_reads_again(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    other = of(valkey_server, history.using)
    settle = stage(history, draft("a"), draft("b"))
    box = cast("Outbox", history._outbox)
    oldest = box.oldest

    def read_late(token: str) -> Any:
        rows = oldest(token)
        if box.oldest is read_late:
            box.oldest = oldest  # type: ignore[method-assign]
            other.heads([])
            stage(history, draft("c"))
        return rows

    box.oldest = read_late  # type: ignore[method-assign]
    assert texts(settle()) == ["a", "b"]
    assert everything(history) == ["a", "b", "c"]


def test_a_settler_waits_for_one_that_moves_the_same_rows(valkey_server: ValkeyServer) -> None:
    """Otherwise it could append an event that was appended and trimmed meanwhile."""
    one, other = of(valkey_server, "postgres"), of(valkey_server, "postgres")
    settle = stage(one, draft("a"))
    commands = record_appends(other)
    append = one._append
    with ThreadPoolExecutor(max_workers=1) as executor:
        futures = []

        def append_late(*args: Any) -> list[Entry]:
            futures.append(executor.submit(in_thread, lambda: other.heads([])))
            in_thread(wait_for_waiter)
            return append(*args)

        one._append = append_late  # type: ignore[method-assign]
        assert texts(settle()) == ["a"]
        futures[0].result(PROCESS_PATIENCE_SECONDS)
    assert commands == []
    assert everything(one) == ["a"]
    connections["postgres"].close()


SETTLER = """
import sys, threading
from django_eventsource.history import get_history
history = get_history()
print("ready", flush=True)
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
while not done.is_set():
    history.heads(["t"])
"""


def test_two_settlers_and_twenty_publishers_store_each_event_once(
    settings, valkey_server: ValkeyServer, using: str
) -> None:
    """The numbers are consecutive, and each publisher's events keep their order. The settlers are
    other processes."""
    settings.EVENTSOURCE_HISTORY = configured(valkey_server, using)
    history = cast("RedisHistory", get_history())
    settlers = [
        start_python(SETTLER, EVENTSOURCE_HISTORY=settings.EVENTSOURCE_HISTORY) for _ in range(2)
    ]
    steps = 5
    barrier = threading.Barrier(20)

    def publisher(n: int) -> None:
        barrier.wait(60)
        for step in range(steps):
            if (n + step) % 3 == 0:
                publish("t", "ping", f"{n} {step}")
            else:
                with transaction.atomic(using=using):
                    publish("t", "ping", f"{n} {step}")

    try:
        for settler in settlers:
            assert settler.stdout is not None
            assert settler.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(max_workers=20) as executor:
            works = [executor.submit(in_thread, partial(publisher, n)) for n in range(20)]
            for work in works:
                work.result(120)
    finally:
        for settler in settlers:
            _, errors = settler.communicate(timeout=PROCESS_PATIENCE_SECONDS)
            assert settler.returncode == 0, errors
    history.heads([])
    seq = history.newest("t")[0] - 20 * steps
    slice_ = history.read("t", seq, max_events=1000)
    assert [entry.seq - seq for entry in slice_.entries] == list(range(1, 20 * steps + 1))
    published = [tuple(map(int, text.split())) for text in texts(slice_.entries)]
    for n in range(20):
        assert [step for m, step in published if m == n] == list(range(steps))
    assert pending(using) == 0


# History checks


@pytest.mark.parametrize("error", [DatabaseError, InterfaceError])
def test_a_failure_of_the_database_does_not_hide_the_heads(
    history: RedisHistory,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (entry,) = add(history, "a")

    def fail() -> list[str]:
        raise error("away")

    monkeypatch.setattr(history._outbox, "tokens", fail)
    assert history.heads(["t"])["t"].seq == entry.seq
    assert "Reading the outbox of the Redis history failed" in caplog.text


def test_an_event_of_a_newer_version_stays_pending(
    history: RedisHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of other tokens are settled."""
    stage(history, draft("a"))
    PendingEvent.objects.using(history.using).update(kind="newer")
    stage(history, draft("b"), token="u")
    history.heads([])
    assert "Assigning sequence numbers to pending events of 't' failed" in caplog.text
    assert everything(history, "u") == ["b"]
    assert pending(history.using) == 1


def test_changes_finds_pending_events(history: RedisHistory) -> None:
    add(history, "a")
    since, _ = history.changes(None)
    stage(history, draft("b"), token="u")
    since, heads = history.changes(since)
    assert heads is not None
    assert {token: head.seq for token, head in heads.items()} == {"u": history.newest("u")[0]}
    assert history.changes(since)[1] == {}


async def test_an_awaited_check_settles_pending_events(valkey_server: ValkeyServer) -> None:
    history = of(valkey_server)
    await sync_to_async(stage)(history, draft("a"))
    (head,) = (await history.aheads(["t"])).values()
    assert head.has_epoch
    since, _ = await history.achanges(None)
    await sync_to_async(stage)(history, draft("b"))
    _, heads = await history.achanges(since)
    assert list(heads or ()) == ["t"]
    await sync_to_async(connections.close_all)()


def test_tokens_that_cannot_be_settled_do_not_hide_others(
    using: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call returns other tokens, and begins again after the last one."""
    monkeypatch.setattr(outbox, "BATCH", 2)
    box = Outbox(using)
    for token in "abcde":
        box.add(token, [draft(), draft()])
    calls = [box.tokens() for _ in range(6)]
    assert [len(tokens) for tokens in calls] == [2, 2, 1] * 2
    assert sorted(token for tokens in calls[:3] for token in tokens) == list("abcde")
    assert calls[:3] == calls[3:]


@pytest.mark.parametrize("tokens", ["ab", "abcd"])
def test_a_full_last_part_is_not_followed_by_an_empty_outbox(
    using: str, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    """The history would forget which tokens it could not settle."""
    monkeypatch.setattr(outbox, "BATCH", 2)
    box = Outbox(using)
    for token in tokens:
        box.add(token, [draft()])
    calls = [box.tokens() for _ in range(2 * len(tokens))]
    assert [len(call) for call in calls] == [2] * 2 * len(tokens)
    assert {token for call in calls[: len(tokens) // 2] for token in call} == set(tokens)
    assert Outbox(using).tokens() == calls[0]


def test_an_outbox_that_was_emptied_in_the_middle_is_empty(
    using: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BATCH", 2)
    box = Outbox(using)
    for token in "ab":
        box.add(token, [draft()])
    assert len(box.tokens()) == 2
    PendingEvent.objects.using(using).all().delete()
    assert box.tokens() == []


@pytest.mark.parametrize("on", [True, False])
def test_pending_events_are_reported_after_the_outbox_was_turned_off(
    settings: Any, using: str, on: bool
) -> None:
    """They would wait for ever."""
    Outbox(using).add("t", [draft()])
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.redis.RedisHistory",
        "OPTIONS": {"USING": using, "OUTBOX": on},
    }
    found = check_outbox(databases=[using])
    assert [message.id for message in found] == ([] if on else ["eventsource.W010"])


# The log of changes


@pytest.fixture
def plain(valkey_server: ValkeyServer) -> RedisHistory:
    return RedisHistory(HOSTS=[valkey_server.url])


def test_changes_returns_the_heads_that_have_changed(plain: RedisHistory) -> None:
    add(plain, "a", token="old")
    since, heads = plain.changes(None)
    assert heads is None
    assert plain.changes(since)[1] == {}
    add(plain, "b", token="new")
    entries = add(plain, "c", "d", token="new")
    again, heads = plain.changes(since)
    assert heads == plain.heads(["new"])
    assert heads["new"].seq == entries[1].seq
    assert plain.changes(again)[1] == {}
    assert plain.changes(since)[1] == heads, "an earlier value is valid too"


@pytest.mark.parametrize("count", [1, 1000])
def test_a_check_without_changes_is_one_round_trip_to_each_host(
    valkey_server: ValkeyServer, own_server: ValkeyServer, count: int
) -> None:
    """The number of tokens does not matter."""
    plain = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    for n in range(count + 40):
        add(plain, "a", token=str(n))
    since, _ = plain.changes(None)
    trips: list[str] = []
    for host in plain._hosts.all:
        pipe = host._pipe

        def count_trips(*args: Any, pipe: Any = pipe, name: str = host.name) -> Any:
            trips.append(name)
            return pipe(*args)

        host._pipe = count_trips  # type: ignore[method-assign]
    assert plain.changes(since)[1] == {}
    assert sorted(trips) == sorted(host.name for host in plain._hosts.all)


def test_an_event_with_a_known_key_is_not_a_change(plain: RedisHistory) -> None:
    plain.append("t", [draft("a", key="k")])
    since, _ = plain.changes(None)
    plain.append("t", [draft("b", key="k")])
    assert plain.changes(since)[1] == {}


def test_many_changes_require_a_look_at_all_tokens(
    plain: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """The log is bounded."""
    add(plain, "a")
    since, _ = plain.changes(None)
    for n in range(backend.CHANGES):
        add(plain, "b", token=str(n))
    assert len(plain.changes(since)[1] or ()) == backend.CHANGES
    add(plain, "c")
    later, heads = plain.changes(since)
    assert heads is None
    assert plain.changes(later)[1] == {}
    for _ in range(2_000):
        add(plain, "d")
    assert plain.changes(since)[1] is None
    assert valkey_server.run("XLEN", "eventsource:changes") < 1_500


@pytest.mark.parametrize("lost", ["FLUSHALL", "DEL eventsource:changes"])
def test_a_lost_log_requires_a_look_at_all_tokens(
    plain: RedisHistory, valkey_server: ValkeyServer, lost: str
) -> None:
    add(plain, "a")
    since, _ = plain.changes(None)
    valkey_server.run(*lost.split())
    assert plain.changes(since) == ({}, None)
    add(plain, "b")
    later, heads = plain.changes(since)
    assert heads is None
    assert plain.changes(later)[1] == {}


def test_a_host_that_is_down_requires_a_look_at_all_tokens(
    valkey_server: ValkeyServer, own_server: ValkeyServer
) -> None:
    """The heads of the other hosts are returned then."""
    plain = RedisHistory(HOSTS=[valkey_server.url, own_server.url], TIMEOUT=0.5)
    for n in range(40):
        add(plain, "a", token=str(n))
    since, _ = plain.changes(None)
    own_server.kill()
    since, heads = plain.changes(since)
    assert (list(since), heads) == ([plain._hosts.all[0]], None)
    own_server.start()
    forget_failures(plain)
    since, heads = plain.changes(since)
    assert heads is None
    assert plain.changes(since)[1] == {}


def test_a_cluster_has_no_log_of_changes() -> None:
    """Its node is not that of the token."""
    with valkey("--cluster-enabled", "yes") as server:
        server.run("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 30
        while b"cluster_state:ok" not in server.run("CLUSTER", "INFO"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        at = {"host": "127.0.0.1", "port": server.port}
        for form in (at, {**at, "cluster": True}):
            history = RedisHistory(HOSTS=[form], OUTBOX=True)
            add(history, "a")
            stage(history, draft("b"), draft("c", key="k"))()
            settle = stage(history, draft("d"))
            history.heads([])
            assert texts(settle()) == ["d"]
            assert history.changes(None) == ({}, None)
            assert server.run("EXISTS", "eventsource:changes") == 0
            assert "".join(everything(history)).startswith("abcd")
            history._hosts.all[0].client.close()


def test_the_signal_is_not_sent_for_an_event_that_is_pending(
    settings, own_server: ValkeyServer
) -> None:
    """It has not been published yet."""
    settings.EVENTSOURCE_HISTORY = configured(own_server, "default")
    sent: list[Any] = []

    def receive(event: Any, **kwargs: Any) -> None:
        sent.append(event.id)

    event_published.connect(receive)
    try:
        own_server.kill()
        with transaction.atomic():
            publish("t", "ping", "a")
        assert sent == []
    finally:
        event_published.disconnect(receive)
    own_server.start()


def test_an_event_with_a_key_is_stored_once_in_transactions_and_outside(
    settings, valkey_server: ValkeyServer, using: str
) -> None:
    settings.EVENTSOURCE_HISTORY = configured(valkey_server, using)
    with transaction.atomic(using=using):
        first = publish("t", "ping", "a", key="k")
        same = publish("t", "ping", "b", key="k")
    again = publish("t", "ping", "c", key="k")
    assert everything(cast("RedisHistory", get_history())) == ["a"]
    assert first.id == same.id == again.id
    code = "import sys; from django_eventsource import publish; publish('t', 'ping', 'd', key='k')"
    run_python(code, EVENTSOURCE_HISTORY=settings.EVENTSOURCE_HISTORY)
    assert everything(cast("RedisHistory", get_history())) == ["a"]
