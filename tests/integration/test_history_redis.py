"""Tests of the Redis history beyond the contract, on real servers."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
import redis
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import transaction
from django.test import AsyncClient

from django_eventsource.delivery.hub import get_hub
from django_eventsource.delivery.notifier import notifier
from django_eventsource.history import Draft, Entry, Kind, get_history
from django_eventsource.history.redis.backend import CLOCK_MARGIN, RedisHistory
from django_eventsource.history.redis.scripts import APPEND, NOW, REMOVE, Script
from django_eventsource.history.redis.servers import Host
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.rewind import parse_rewind
from django_eventsource.protocol.tokens import key_digest
from django_eventsource.publishing import apublish, publish
from django_eventsource.streaming.stream import EventStream
from tests.support.events import add, draft, texts
from tests.support.histories import age, age_server, before_oldest
from tests.support.processes import start_python
from tests.support.valkey import ValkeyServer, valkey


@pytest.fixture
def history(valkey_server: ValkeyServer) -> RedisHistory:
    return RedisHistory(HOSTS=[valkey_server.url])


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may stop. It writes every command to disk."""
    with valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def of(server: ValkeyServer, **options: Any) -> RedisHistory:
    return RedisHistory(HOSTS=[server.url], **options)


def everything(history: RedisHistory, token: str = "t") -> list[str]:
    """Return the texts of all events that are kept."""
    return texts(history.read(token, before_oldest(history, token), max_events=10_000).entries)


def rewound(history: RedisHistory, text: str | int) -> list[str]:
    """Return the events that a listener without a cursor receives first."""
    position = history.locate("t", None, parse_rewind(text))
    return texts(history.read("t", position.seq, max_events=10_000).entries)


# Options


@pytest.mark.parametrize(
    "hosts",
    [None, "redis://127.0.0.1", [], [5], [("h",)], [("h", "1")], ["nonsense://h"], [{"a": 1}]],
)
def test_wrong_hosts_raise_an_error_that_names_the_forms(hosts: object) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"HOSTS must be .*URLs.*tuples.*dictionaries"):
        RedisHistory(HOSTS=hosts)


def test_an_error_shows_no_password() -> None:
    """The error about an unacceptable address leaves its password out."""
    url = "nonsense://u:secret@h"
    for hosts in (url, [url], [{"address": url, "password": "secret"}], [(url,)]):
        with pytest.raises(ImproperlyConfigured, match="nonsense://h'") as caught:
            RedisHistory(HOSTS=hosts)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", None, 5, "a{b", "a}b"])
def test_a_prefix_must_be_text_without_braces(prefix: object) -> None:
    """Braces decide on which node a cluster stores a key."""
    with pytest.raises(ImproperlyConfigured, match="PREFIX must be non-empty text without"):
        RedisHistory(PREFIX=prefix)


@pytest.mark.parametrize("timeout", [0, -1, None, True, "5", float("inf")])
def test_a_timeout_must_be_a_positive_number(timeout: object) -> None:
    with pytest.raises(ImproperlyConfigured, match="TIMEOUT must be a positive number"):
        RedisHistory(TIMEOUT=timeout)


def test_the_error_without_redis_py_names_the_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImproperlyConfigured, match="pip install redis"):
        RedisHistory()


def test_every_form_of_address_reaches_the_server(valkey_server: ValkeyServer) -> None:
    """Events are bytes with each of them."""
    port = valkey_server.port
    forms = [
        valkey_server.url,
        f"{valkey_server.url}?decode_responses=True",
        ("127.0.0.1", port),
        ["127.0.0.1", port],
        {"address": valkey_server.url, "socket_timeout": None},
        {"host": "127.0.0.1", "port": port, "decode_responses": True},
    ]
    for n, form in enumerate(forms):
        history = RedisHistory(HOSTS=[form])
        history.append("t", [Draft(action="ping", data=b"\xff\0%d" % n)])
    read = history.read("t", before_oldest(history))
    assert [entry.draft.data for entry in read.entries] == [b"\xff\0%d" % n for n in range(6)]
    assert RedisHistory()._hosts.all[0].name == "127.0.0.1:6379"


def test_a_unix_socket_url_reaches_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = ValkeyServer()
    server.options = ("--unixsocket", str(server.directory / "s"))
    try:
        server.start()
        history = RedisHistory(HOSTS=[f"unix://{server.directory}/s"])
        add(history, "a")
        assert everything(history) == ["a"]
        assert history._hosts.all[0].name == f"{server.directory}/s"
    finally:
        server.close()


def kept_connection(pool: Any) -> Any:
    """Return an open connection that a pool of redis-py keeps."""
    connection = pool.get_connection()
    pool.release(connection)
    assert connection.is_connected
    return connection


def test_sentinels_return_the_primary(own_server: ValkeyServer) -> None:
    sentinel = ValkeyServer()
    config = sentinel.directory / "sentinel.conf"
    config.write_text(
        f"port {sentinel.port}\nbind 127.0.0.1\n"
        f"sentinel monitor events 127.0.0.1 {own_server.port} 1\n"
    )
    sentinel.program = [str(config), "--sentinel"]
    try:
        sentinel.start()
        host = {"master_name": "events", "sentinels": [("127.0.0.1", sentinel.port)]}
        history = RedisHistory(HOSTS=[host])
        add(history, "a")
        assert everything(of(own_server)) == ["a"]
        assert history._hosts.all[0].name == "events"
        pool = history._hosts.all[0].client.connection_pool
        connections = [kept_connection(pool)]
        connections += [
            kept_connection(one.connection_pool) for one in pool.sentinel_manager.sentinels
        ]
        del history
        gc.collect()
        assert [one.is_connected for one in connections] == [False, False]
    finally:
        sentinel.close()


def test_a_history_that_is_dropped_closes_its_connections(valkey_server: ValkeyServer) -> None:
    """A socket that the garbage collector closes may warn, or not: its order is not defined."""
    history = RedisHistory(HOSTS=[valkey_server.url])
    add(history, "a")
    connection = kept_connection(history._hosts.all[0].client.connection_pool)
    del history
    gc.collect()
    assert not connection.is_connected


# Several hosts, and clusters


def test_two_hosts_share_the_tokens(valkey_server: ValkeyServer, own_server: ValkeyServer) -> None:
    """Every method finds a token on its host."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    names = [f"token {n}" for n in range(40)]
    first = {name: add(history, name, token=name)[0] for name in names[:20]}
    heads = history.heads(names)
    assert {name for name in names if heads[name].has_epoch} == set(first)
    assert all(heads[name].seq == entry.seq for name, entry in first.items())
    assert len({head.generation for head in heads.values()}) == 2
    for server in (valkey_server, own_server):
        assert 5 < len(list(server.client().scan_iter("*:head"))) < 15
    for name in first:
        assert everything(history, name) == [name]
    assert not history.announce("p", {name: [name] for name in names}, 10)
    assert [history.present(name) for name in names] == [[name] for name in names]
    # The other process has the same hosts, in the same order.
    again = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    assert again.heads(names) == heads


def test_no_script_or_command_uses_keys_of_two_slots() -> None:
    with valkey("--cluster-enabled", "yes") as server:
        server.run("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 30
        while b"cluster_state:ok" not in server.run("CLUSTER", "INFO"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        at = {"host": "127.0.0.1", "port": server.port}
        forms: list[Any] = [at, {**at, "cluster": True}, {"address": server.url, "cluster": True}]
        for n, form in enumerate(forms):
            history = RedisHistory(HOSTS=[form], PREFIX=f"cluster-{n}")
            names = [f"token {n}" for n in range(20)]
            for name in names:
                history.append(name, [draft("a", own_id="u"), draft(kind=Kind.CLOSE)])
                history.append(name, [draft("b", key="k")])
                assert history.append(name, [draft("b", key="k")])[0].repeated
                assert history.locate(name, parse_cursor("u")).known
                assert history.read(name, before_oldest(history, name)).complete
            assert all(head.has_epoch for head in history.heads(names).values())
            assert not history.announce("p", {name: ["x"] for name in names}, 10)
            history.announce("q", {name: ["y"] for name in names}, 10)
            history._leases.clear()
            history.announce("q", {}, 10)
            history.prune()
            assert {tuple(history.present(name)) for name in names} == {("x",)}
            history.withdraw("p")
            history._hosts.all[0].client.close()


def test_each_token_is_stored_on_the_node_of_its_slot() -> None:
    with (
        valkey("--cluster-enabled", "yes") as one,
        valkey("--cluster-enabled", "yes") as two,
    ):
        one.run("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        two.run("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
        one.run("CLUSTER", "MEET", "127.0.0.1", two.port)
        deadline = time.monotonic() + 30
        while not all(
            b"cluster_state:ok" in server.run("CLUSTER", "INFO")
            and b"cluster_known_nodes:2" in server.run("CLUSTER", "INFO")
            for server in (one, two)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        history = RedisHistory(HOSTS=[{"host": "127.0.0.1", "port": two.port, "cluster": True}])
        names = [f"token {n}" for n in range(40)]
        for name in names:
            history.append(name, [draft("a"), draft("b")])
            assert everything(history, name) == ["a", "b"]
        assert all(head.has_epoch for head in history.heads(names).values())
        history.announce("p", {name: ["x"] for name in names}, 10)
        assert all(history.present(name) == ["x"] for name in names)
        for server in (one, two):
            assert 5 < len(list(server.client().scan_iter("*:head"))) < 35


def test_a_cluster_that_is_down_raises_a_connection_error() -> None:
    """The client connects for the first command."""
    for form in ({"host": "127.0.0.1", "port": 1}, {"address": "redis://:secret@127.0.0.1:1"}):
        history = RedisHistory(HOSTS=[{**form, "cluster": True}], TIMEOUT=0.2)
        with pytest.raises(redis.ConnectionError) as caught:
            history.heads(["t"])
        assert "127.0.0.1:1" in caught.value.__notes__[0]
        assert "secret" not in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"address": "http://127.0.0.1:1"}, "URL must specify"),
        ({"host": "127.0.0.1", "port": "redis"}, "invalid literal"),
    ],
)
def test_a_wrong_address_of_a_cluster_raises_improperly_configured(
    form: dict[str, Any], said: str
) -> None:
    """The first command raises it."""
    history = RedisHistory(HOSTS=[{**form, "password": "secret", "cluster": True}], TIMEOUT=0.2)
    with pytest.raises(ImproperlyConfigured, match=said) as caught:
        history.heads(["t"])
    assert "HOSTS" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_error_of_a_changing_cluster_is_retried(valkey_server: ValkeyServer) -> None:
    """What redis-py raises while slots move is not a subclass of RedisError."""
    history = of(valkey_server)
    (host,) = history._hosts.all
    failures = [redis.exceptions.RedisClusterException("slots are not covered")] * 2
    pipe = host._pipe

    def moving(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return pipe(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_pipe", moving)
        history.heads(["t"])
        failures += [redis.exceptions.RedisClusterException("slots are not covered")] * 99
        with pytest.raises(redis.ConnectionError, match="not covered"):
            history.heads(["t"])


# The project that uses a prefix


WAYS_OUT = r"'eventsource:project' .* set PREFIX .* to SECRET_KEY_FALLBACKS\. "


def test_a_second_project_with_the_same_prefix_is_refused(
    settings, valkey_server: ValkeyServer
) -> None:
    """Its first call raises an error that names the ways out."""
    add(of(valkey_server), "theirs")
    settings.SECRET_KEY = "of another project"
    history = of(valkey_server)
    began = time.monotonic()
    for call in (
        lambda: add(history, "ours"),
        lambda: history.locate("t", None),
        lambda: history.heads(["t"]),
        lambda: history.announce("p", {"t": [""]}, 10),
    ):
        with pytest.raises(ImproperlyConfigured, match=WAYS_OUT):
            call()
    assert time.monotonic() - began < 5, "not tried again for TIMEOUT"
    assert everything(of(valkey_server, PREFIX="ours")) == []
    settings.SECRET_KEY = "tests"
    assert everything(of(valkey_server)) == ["theirs"]


def test_the_marker_does_not_reveal_the_secret_key(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """The marker contains a keyed hash, and is the only key without a token or a lease."""
    add(history, "a")
    with valkey_server.client() as client:
        marker = client.get("eventsource:project")
        assert client.ttl("eventsource:project") == -1
    assert re.fullmatch(rb"[0-9a-f]{64}", marker)
    assert marker != hashlib.sha256(b"tests").hexdigest().encode()


def test_a_changed_secret_key_keeps_its_history(settings, valkey_server: ValkeyServer) -> None:
    """A marker of a key in SECRET_KEY_FALLBACKS is replaced with that of the current key."""
    add(of(valkey_server), "a")
    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new", ["older", "tests"]
    assert everything(of(valkey_server)) == ["a"]
    settings.SECRET_KEY_FALLBACKS = []
    assert everything(of(valkey_server)) == ["a"]
    settings.SECRET_KEY = "tests"
    with pytest.raises(ImproperlyConfigured, match="SECRET_KEY"):
        of(valkey_server).heads(["t"])


def test_the_marker_of_each_host_is_checked(
    settings, valkey_server: ValkeyServer, own_server: ValkeyServer
) -> None:
    """A prefix that is free on one server may be in use on another."""
    add(of(own_server), "theirs")
    settings.SECRET_KEY = "of another project"
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    with pytest.raises(ImproperlyConfigured, match=str(own_server.port)):
        history.heads(map(str, range(40)))


def test_the_marker_is_checked_once(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """An append sends no further command, and a running process ignores an emptied server."""
    add(history, "a")
    before = calls(valkey_server)
    for text in "bcd":
        add(history, text)
    # The script itself reads the marker of a retried append with GET.
    assert calls(valkey_server)["get"] - before["get"] == 3
    assert calls(valkey_server)["set"] == before["set"]
    valkey_server.run("FLUSHALL")
    add(history, "e")
    with valkey_server.client() as client:
        assert not client.exists("eventsource:project")
        add(of(valkey_server), "f")
        assert client.exists("eventsource:project")


def test_the_second_of_two_projects_that_start_together_is_refused(
    settings, valkey_server: ValkeyServer
) -> None:
    """Both find no marker, and the SET of one comes second."""
    history = of(valkey_server)
    (host,) = history._hosts.all
    host.client = RacingClient(host.client, lambda: claim_as(settings, valkey_server, "other"))
    with pytest.raises(ImproperlyConfigured, match="PREFIX"):
        add(history, "a")


def test_two_processes_of_a_project_that_start_together_are_accepted(
    settings, valkey_server: ValkeyServer
) -> None:
    history = of(valkey_server)
    (host,) = history._hosts.all
    host.client = RacingClient(host.client, lambda: claim_as(settings, valkey_server, "tests"))
    add(history, "a")
    assert everything(history) == ["a"]


def claim_as(settings: Any, server: ValkeyServer, secret_key: str) -> None:
    """Use the prefix as a project with another SECRET_KEY."""
    before, settings.SECRET_KEY = settings.SECRET_KEY, secret_key
    of(server).newest("t")
    settings.SECRET_KEY = before


class RacingClient:
    """A client after whose first GET another process sends its commands."""

    def __init__(self, client: Any, other: Callable[[], None]) -> None:
        self.client = client
        self.other: Callable[[], None] | None = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def get(self, key: str) -> Any:
        found = self.client.get(key)
        other, self.other = self.other, None
        if other is not None:
            other()
        return found


def test_the_marker_is_checked_once_the_server_is_up(own_server: ValkeyServer) -> None:
    """The check is retried like the call that needs it."""
    history = of(own_server)
    own_server.kill()
    timer = threading.Timer(0.3, own_server.start)
    timer.start()
    add(history, "a")
    timer.join()
    assert own_server.run("EXISTS", "eventsource:project") == 1


# Repeated appends


class Lossy:
    """A client that loses the first responses to some commands, although the commands run."""

    def __init__(self, client: Any, losses: int, error: Exception) -> None:
        self.client = client
        self.losses = losses
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def evalsha(self, *args: Any) -> Any:
        response = self.client.evalsha(*args)
        if args[0] == APPEND.sha and response is not None and self.losses:
            self.losses -= 1
            raise self.error
        return response


@pytest.mark.parametrize("before", [0, 3])
def test_an_append_whose_response_was_lost_is_stored_once(
    history: RedisHistory, before: int
) -> None:
    """The next attempt finds the events of the first one before those of other publishers."""
    for n in range(before):
        add(history, str(n))
    (host,) = history._hosts.all
    add(history, "known script", token="other")
    host.client = Lossy(host.client, 2, redis.TimeoutError("lost"))
    entries = add(history, "a", "b")
    assert everything(history)[before:] == ["a", "b"]
    assert history.read("t", entries[0].seq).entries == (entries[1],)
    assert history.newest("t")[0] == entries[1].seq


def test_a_trimmed_append_whose_response_was_lost_is_stored_once(
    history: RedisHistory,
) -> None:
    """The last event of the append is enough to find it."""
    history.max_events = 3
    add(history, "before", token="t")
    (host,) = history._hosts.all
    host.client = Lossy(host.client, 1, redis.TimeoutError("lost"))
    entries = add(history, *"abcdefgh")
    assert everything(history) == ["f", "g", "h"]
    assert history.newest("t")[0] == entries[-1].seq
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(8))


@pytest.mark.parametrize("script", [NOW, APPEND])
def test_an_append_is_stored_once_if_the_server_pauses_after_its_response_was_lost(
    own_server: ValkeyServer, script: Script
) -> None:
    """The next attempt is sent to the paused server, which runs it long after it was sent."""
    history = of(own_server, TIMEOUT=90)
    add(history, "known script", token="other")
    (host,) = history._hosts.all
    other_process = of(own_server)
    seconds = CLOCK_MARGIN + 0.2
    resume = threading.Timer(seconds, own_server.resume)

    class Pausing(Lossy):
        def evalsha(self, *args: Any) -> Any:
            if args[0] == script.sha and not self.losses and resume.ident is None:
                add(other_process, "b")
                own_server.pause()
                resume.start()
            return super().evalsha(*args)

    host.client = Pausing(host.client, 1, redis.TimeoutError("lost"))
    began = time.monotonic()
    add(history, "a")
    resume.join()
    assert time.monotonic() - began > seconds
    assert everything(history) == ["a", "b"]


def test_an_attempt_is_found_before_many_other_events(history: RedisHistory) -> None:
    """More events follow it than one step of the search reads."""
    (entry,) = add(history, "a")
    fields = _fields_of_first(history)
    add(history, *map(str, range(120)))
    assert int(_attempt(history, _ago(history, 1), fields[b"r"].decode())) == entry.seq
    assert len(everything(history)) == 121


def test_the_search_ends_at_the_time_of_the_first_attempt(history: RedisHistory) -> None:
    """An older event cannot be of this append."""
    add(history, "a")
    fields = _fields_of_first(history)
    (other,) = add(history, "b")
    age(history, 60)
    assert int(_attempt(history, _ago(history, 30), fields[b"r"].decode())) == other.seq + 1


def test_an_attempt_that_arrives_after_a_later_one_stores_nothing(history: RedisHistory) -> None:
    second = _attempt(history, _ago(history, 1), "ref")
    assert _attempt(history, "0", "ref") == second
    assert everything(history) == ["late"]


def test_an_append_with_a_key_whose_response_was_lost_is_stored_once(
    history: RedisHistory,
) -> None:
    """The next attempt finds the event by its reference, so its publisher is the first one."""
    (host,) = history._hosts.all
    add(history, "known script", token="other")
    host.client = Lossy(host.client, 2, redis.TimeoutError("lost"))
    (first,) = history.append("t", [draft("a", key="k")])
    assert not first.repeated
    host.client.losses = 2
    (again,) = history.append("t", [draft("b", key="k")])
    assert (again.repeated, again.seq) == (True, first.seq)
    assert everything(history) == ["a"]


def test_an_attempt_that_an_event_with_its_key_overtook_stores_nothing(
    history: RedisHistory,
) -> None:
    """It stores nothing also if that event has been trimmed since."""
    history.max_events = 1
    (first,) = history.append("t", [draft("a", own_id="own", key="k")])
    for since in (_ago(history, 1), "0"):
        assert _attempt(history, since, "ref", key="k") == b"%d own" % first.seq
        add(history, "b")
    assert everything(history) == ["b"]


def test_a_key_of_an_event_that_the_server_has_lost_is_free(history: RedisHistory) -> None:
    """The server may have evicted the events, or the head of the token."""
    (host,) = history._hosts.all
    for lost in ("events", "head"):
        history.append("t", [draft("a", key="k")])
        host.client.delete(*history._keys("t", lost))
        (entry,) = history.append("t", [draft(lost, key="k")])
        assert not entry.repeated
        assert texts(history.read("t", entry.seq - 1).entries) == [lost]
        assert history.append("t", [draft("b", key="k")])[0].repeated


def test_a_new_epoch_has_no_keys_of_an_evicted_one(history: RedisHistory) -> None:
    (host,) = history._hosts.all
    for n in range(3):
        history.append("t", [draft("a", key=str(n))])
    host.client.delete(*history._keys("t", "head", "events", "ids"))
    add(history, "b")
    assert not host.client.exists(*history._keys("t", "keys"))


def test_keys_are_trimmed_with_their_events_and_expire(history: RedisHistory) -> None:
    """So they are bounded by MAX_EVENTS and MAX_AGE. Own ids and the first event of an epoch or
    of a run do not disturb it."""
    history.max_events = 5
    (host,) = history._hosts.all
    (name,) = history._keys("t", "keys")
    for n in range(20):
        history.append("t", [draft(str(n), own_id=f"own-{n}" if n % 2 else None, key=str(n))])
        assert host.client.hlen(name) <= 5
    assert 0 < host.client.ttl(name) <= history.max_age
    add(history, *"abc")
    assert host.client.hlen(name) == 2
    add(history, *"defgh")
    assert not host.client.exists(name)


def test_an_expired_key_that_was_used_again_outlives_its_first_event(
    history: RedisHistory,
) -> None:
    """The append that stores the second event removes the first one, whose key is the same."""
    history.max_events = 1
    (host,) = history._hosts.all
    history.append("t", [draft("a", key="k")])
    host.client.delete(*history._keys("t", "keys"))
    (second,) = history.append("t", [draft("b", key="k")])
    assert not second.repeated
    assert everything(history) == ["b"]
    (again,) = history.append("t", [draft("c", key="k")])
    assert (again.repeated, again.seq) == (True, second.seq)


def test_events_without_a_key_are_appended_with_the_same_commands(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """Only an event with a key looks for it, and one that is not stored writes nothing."""
    add(history, "known script")

    def commands(*drafts: Draft) -> dict[str, int]:
        before = calls(valkey_server)
        history.append("t", drafts)
        names = ("evalsha", "xadd", "hset", "hget", "xrange", "pexpire", "set")
        after = calls(valkey_server)
        return {name: after[name] - before[name] for name in names if after[name] > before[name]}

    # One XADD is that of the log of changes.
    plain = {"evalsha": 1, "xadd": 2, "hset": 1, "pexpire": 2}
    assert commands(draft("a")) == plain
    assert commands(draft("b", key="k")) == {**plain, "hset": 2, "hget": 1, "pexpire": 3}
    assert commands(draft("c", key="k")) == {"evalsha": 1, "hget": 1, "xrange": 1}
    assert commands(draft("d")) == plain


def _fields_of_first(history: RedisHistory) -> dict[bytes, bytes]:
    (host,) = history._hosts.all
    ((_, fields),) = host.client.xrange(*history._keys("t", "events"), count=1)
    return dict(fields)


def _ago(history: RedisHistory, seconds: int) -> str:
    (host,) = history._hosts.all
    return str(int(host.run_once(NOW, ["any"], [])) - seconds * 1_000_000)


def _attempt(history: RedisHistory, since: str, ref: str, *, key: str = "") -> Any:
    (host,) = history._hosts.all
    digest = key_digest("", key) if key else ""
    keys = history._keys("t", "head", "events", "ids", f"ref:{ref}", "keys")
    numbers = f"1000 {10**9} {10**9} {10**9} {history.heads(['x'])['x'].seq} {since}"
    return host.run_once(APPEND, keys, [ref, "t", numbers, "4 4 5 0", b"pinglateevent", digest])


def test_attempts_at_a_paused_server_store_one_event(own_server: ValkeyServer) -> None:
    """The server runs all of them once it continues."""
    # By default redis-py retries on its own, unless the client is made from a URL.
    history = RedisHistory(HOSTS=[("127.0.0.1", own_server.port)], TIMEOUT=6)
    add(history, "before")
    with ThreadPoolExecutor(5) as pool:
        own_server.pause()
        began = time.monotonic()
        futures = [pool.submit(add, history, f"event {n}") for n in range(5)]
        time.sleep(2.5)  # longer than one attempt
        own_server.resume()
        entries = [future.result() for future in futures]
    assert time.monotonic() - began > 2.5
    assert sorted(everything(history)) == ["before", *(f"event {n}" for n in range(5))]
    for (entry,) in entries:
        assert history.read("t", entry.seq - 1).entries[0] == entry


def test_appends_continue_after_a_server_was_killed(own_server: ValkeyServer) -> None:
    """Each event is stored once."""
    history = of(own_server)
    stored: list[Entry] = []
    done = threading.Event()

    def publish() -> None:
        n = 0
        while not done.is_set():
            stored.extend(add(history, str(n)))
            n += 1

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        for _ in range(3):
            count = len(stored)
            own_server.restart()
            deadline = time.monotonic() + 20
            while len(stored) < count + 20:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        done.set()
        thread.join()
    assert everything(history) == [str(n) for n in range(len(stored))]
    read = history.read("t", before_oldest(history), max_events=10**6, max_bytes=10**9)
    assert list(read.entries) == stored


def test_an_unreachable_server_raises_an_error_after_the_timeout(own_server: ValkeyServer) -> None:
    """The error names the server and the seconds."""
    history = of(own_server, TIMEOUT=0.3)
    own_server.kill()
    for call in (lambda: history.heads(["t"]), lambda: add(history, "a")):
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError) as caught:
            call()
        assert 0.3 <= time.monotonic() - began < 3
        assert f"127.0.0.1:{own_server.port}. Tried for 0." in caught.value.__notes__[0]


def test_reads_fail_at_once_while_a_server_is_down(
    own_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them probes the server now and then, and an append tries for the time-out."""
    history = of(own_server, TIMEOUT=1.5)
    (entry,) = add(history, "a")
    (host,) = history._hosts.all
    own_server.kill()
    with pytest.raises(redis.ConnectionError):
        history.heads(["t"])
    tries: list[str] = []
    pipe = host._pipe
    monkeypatch.setattr(host, "_pipe", lambda *args: tries.append("") or pipe(*args))
    for _ in range(100):
        with pytest.raises(redis.ConnectionError, match="in an earlier call"):
            history.heads(["t"])
    assert tries == []
    host._probe_at = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        history.heads(["t"])
    assert tries
    appended = threading.Thread(target=add, args=[history, "b"])
    appended.start()
    own_server.start()
    appended.join(30)
    assert host._failure is None
    assert not history.heads(["t"])["t"].seq <= entry.seq, "it has lost what it held in memory"


def test_an_error_response_does_not_block_later_calls(own_server: ValkeyServer) -> None:
    """A server that responds is not treated as down."""
    history = of(own_server, TIMEOUT=1.5)
    own_server.kill()
    with pytest.raises(redis.ConnectionError):
        history.heads(["t"])
    own_server.start()
    own_server.run("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(redis.RedisError, match="maxmemory"):
        add(history, "a")
    own_server.run("CONFIG", "SET", "maxmemory", 0)
    history.heads(["t"])


def test_an_internal_event_does_not_wait_for_a_server_that_is_down(
    own_server: ValkeyServer,
) -> None:
    """A logout, which publishes an internal event, does not take the whole time-out."""
    history = of(own_server, TIMEOUT=60)
    add(history, "a")
    internal = Draft(action="ping", data=b"", internal=True)
    own_server.kill()
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        history.append("t", [internal])
    assert time.monotonic() - began < 20


def test_one_call_probes_a_server_that_does_not_respond(own_server: ValkeyServer) -> None:
    """The other calls fail at once."""
    history = of(own_server, TIMEOUT=3)
    own_server.pause()
    with pytest.raises(redis.TimeoutError):
        history.newest("t")
    (host,) = history._hosts.all
    host._probe_at = time.monotonic()
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(history.newest, "t")
        while host._probe_at < time.monotonic() + 1:
            time.sleep(0.001)
        with pytest.raises(redis.RedisError, match="in an earlier call"):
            history.newest("t")
        own_server.resume()
        first.result(30)
    history.newest("t")


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_host_that_is_down_does_not_affect_other_hosts(
    valkey_server: ValkeyServer, own_server: ValkeyServer, how: str
) -> None:
    """Heads, presence and reads of tokens on the other host work."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url], TIMEOUT=1)
    there, down = (
        [name for name in map(str, range(40)) if history._host(name) is host]
        for host in history._hosts.all
    )
    listeners = {name: ["ada"] for name in (*there, *down)}
    history.announce("p", listeners, 60)
    entries = {name: add(history, name, token=name)[0] for name in listeners}
    getattr(own_server, how)()
    # More calls than threads. They wait only for their own host.
    waiting = [asyncio.ensure_future(history.alocate(name, None)) for name in down * 2]
    await asyncio.sleep(0)
    began = time.monotonic()
    for _ in range(3):
        heads = await history.aheads(listeners)
        assert heads.keys() == set(there)
        assert history.heads(listeners) == heads
        position = await history.alocate(there[0], None)
        assert position.seq == entries[there[0]].seq
        assert history.announce("p", {there[0]: ["bob"]}, 60)
        assert history.present(there[0]) == ["bob"]
    assert time.monotonic() - began < 15
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, redis.RedisError) for result in results)
    history.prune()
    history.withdraw("p")
    assert history.present(there[1]) == []
    for call in (lambda: history.heads(down), lambda: history.present(down[0])):
        with pytest.raises(redis.RedisError):
            call()
    own_server.resume() if how == "pause" else own_server.start()
    for host in history._hosts.all:
        host._probe_at = 0
    assert not history.announce("p", {}, 60), "the other host asks for everything"
    assert history.announce("p", listeners, 60)
    assert history.present(down[0]) == ["ada"]


async def test_an_error_that_is_not_of_a_server_is_raised(
    valkey_server: ValkeyServer, own_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    heads = history._heads

    def fail(host: Host, names: Sequence[str]) -> Any:
        return 1 / 0 if host is history._hosts.all[0] else heads(host, names)

    monkeypatch.setattr(history, "_heads", fail)
    with pytest.raises(ZeroDivisionError):
        await history.aheads(map(str, range(40)))
    with pytest.raises(ZeroDivisionError):
        history.heads(map(str, range(40)))


def test_a_call_waits_until_a_replica_becomes_the_primary(own_server: ValkeyServer) -> None:
    """If it stays read-only, the error names the way out."""
    history = of(own_server)
    add(history, "a")
    own_server.run("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(redis.exceptions.ReadOnlyError) as caught:
        add(of(own_server, TIMEOUT=1), "x")
    assert "must name the primary" in caught.value.__notes__[0]
    timer = threading.Timer(0.3, own_server.run, ["REPLICAOF", "NO", "ONE"])
    timer.start()
    add(history, "b")
    timer.join()
    assert everything(history) == ["a", "b"]


@contextmanager
def full(server: ValkeyServer, seconds: float | None = None) -> Iterator[None]:
    """Set the server's memory limit to 1 byte; reset it at the end, or after some seconds."""
    server.run("CONFIG", "SET", "maxmemory", "1")
    timer = threading.Timer(seconds or 60, server.run, ["CONFIG", "SET", "maxmemory", "0"])
    timer.start()
    try:
        yield
    finally:
        if seconds is None:
            timer.cancel()
            timer.function(*timer.args)
        timer.join()


def test_an_append_waits_for_a_server_without_memory(own_server: ValkeyServer) -> None:
    """It is retried until the server has memory."""
    history = of(own_server)
    add(history, "a")
    with full(own_server, 0.3):
        for token in ("t", "new"):
            add(history, "b", "c", token=token)
    assert everything(history) == ["a", "b", "c"]
    assert everything(history, "new") == ["b", "c"]


def test_an_append_to_a_server_without_memory_fails_after_the_timeout(
    own_server: ValkeyServer,
) -> None:
    """Nothing of the append is stored, and the error names the way out."""
    history = of(own_server, TIMEOUT=0.5)
    add(history, "a")
    with full(own_server):
        began = time.monotonic()
        with pytest.raises(redis.ResponseError, match="maxmemory") as caught:
            add(history, "b", "c")
        assert time.monotonic() - began >= 0.5
        assert re.search(r"Tried for \d\.\d s\. Raise its memory limit", caught.value.__notes__[0])
        assert everything(history) == ["a"]
    add(history, "d")
    assert everything(history) == ["a", "d"]


def test_the_error_of_an_old_server_without_memory_is_retried(history: RedisHistory) -> None:
    """Redis 5 and 6 report it as an error of the script."""
    (host,) = history._hosts.all
    add(history, "known script", token="other")
    error = redis.ResponseError(
        "Error running script (call to f_3): @user_script:60: @user_script: 60: "
        "-OOM command not allowed when used memory > 'maxmemory'."
    )
    host.client = Lossy(host.client, 2, error)
    add(history, "a")
    assert everything(history) == ["a"]


@pytest.mark.django_db(transaction=True)
def test_a_committed_event_survives_a_server_without_memory(
    settings, own_server: ValkeyServer
) -> None:
    """An event whose transaction has committed is appended once the server has memory."""
    settings.EVENTSOURCE_HISTORY = {**UNREACHABLE, "OPTIONS": {"HOSTS": [own_server.url]}}
    publish("t", "ping", "before")
    with full(own_server, 0.3), transaction.atomic():
        publish("t", "ping", "committed")
    assert everything(cast("RedisHistory", get_history())) == ["before", "committed"]


def test_an_append_waits_for_a_server_that_cannot_write_to_disk() -> None:
    """If the server stays so, the error names the way out."""
    with valkey("--save", "1000 1000") as server:
        history = of(server, TIMEOUT=0.5)
        add(history, "a")
        shutil.rmtree(server.directory)
        server.run("BGSAVE")
        deadline = time.monotonic() + 20
        while server.client().info("persistence")["rdb_last_bgsave_status"] != "err":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(redis.ResponseError, match="MISCONF") as caught:
            add(history, "b")
        assert re.search(r"Tried for .* Check its log", caught.value.__notes__[0])
        timer = threading.Timer(0.3, server.run, ["CONFIG", "SET", "save", ""])
        timer.start()
        add(of(server), "c")
        timer.join()
        assert everything(history) == ["a", "c"]


def test_a_wrong_password_is_not_retried() -> None:
    with valkey("--requirepass", "right") as server:
        history = RedisHistory(HOSTS=[f"redis://:wrong@127.0.0.1:{server.port}"])
        began = time.monotonic()
        with pytest.raises(redis.AuthenticationError):
            history.heads(["t"])
        assert time.monotonic() - began < 5
        server.kill()


def test_an_error_of_a_single_command_is_raised(history: RedisHistory) -> None:
    """A key of another type is an error and not an empty result."""
    (host,) = history._hosts.all
    host.client.set(*history._keys("t", "head"), "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE") as caught:
        history.heads(["t"])
    assert caught.value.__notes__ == [f"Redis server of the history: {host.name}."]


def test_a_script_that_the_server_has_not_cached_is_sent_again(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: add(history, "a"),
        lambda: history.read("t", 0),
        lambda: history.heads(["t", "u"]),
        lambda: history.newest("t"),
        lambda: history.announce("p", {"t": ["x"]}, 10),
    ]
    for call in calls:
        valkey_server.run("SCRIPT", "FLUSH")
        call()
    assert everything(history) == ["a"]


WRITER = """
import sys
from django_eventsource.history import Draft
from django_eventsource.history.redis import RedisHistory
url, name = sys.argv[1:]
history = RedisHistory(HOSTS=[url])
for n in range(500):
    history.append("t", [Draft(action="ping", data=f"{name} {n}".encode())])
"""


def test_four_processes_get_consecutive_numbers(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """No number is assigned twice, and the order of each process is kept."""
    writers = [start_python(WRITER, valkey_server.url, n) for n in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    entries = history.read("t", before_oldest(history), max_events=5000, max_bytes=10**7).entries
    first = entries[0].seq
    assert [entry.seq for entry in entries] == list(range(first, first + 2000))
    for n in range(4):
        mine = [text for text in texts(entries) if text.startswith(f"{n} ")]
        assert mine == [f"{n} {m}" for m in range(500)]


# Lost data


def test_numbers_continue_above_all_assigned_ones_after_a_restart(
    own_server: ValkeyServer,
) -> None:
    """The server has its data, and no listener is reset."""
    history = of(own_server)
    floor = history.newest("t")[0]
    old = add(history, "a", "b")
    before = history.heads(["t"])["t"]
    own_server.restart()
    assert history.heads(["t"])["t"] == before
    assert history.read("t", old[1].seq).complete
    restarted_at = time.time_ns() // 1000
    new = add(history, "c", "d")
    assert new[0].seq > restarted_at
    assert new[1].seq == new[0].seq + 1
    for after, rest in ((floor, "abcd"), (old[0].seq, "bcd"), (old[1].seq, "cd")):
        slice_ = history.read("t", after)
        assert (slice_.complete, texts(slice_.entries)) == (True, list(rest))
    # This sequence number may have been assigned to an event that was lost.
    assert not history.read("t", old[1].seq + 1).complete
    assert history.locate("t", parse_cursor(str(old[1].seq))).known
    own_server.restart()
    add(history, "e")
    assert texts(history.read("t", old[1].seq).entries) == ["c", "d", "e"]


def test_a_rewind_counts_events_from_before_a_restart(own_server: ValkeyServer) -> None:
    """The sequence numbers of a token with restarts have gaps."""
    history = of(own_server)
    add(history, "a", "b")
    own_server.restart()
    add(history, "c")
    own_server.restart()
    add(history, "d", "e")
    for count in range(1, 6):
        assert rewound(history, count) == list("abcde")[-count:]
    assert rewound(history, "all") == rewound(history, "1h") == list("abcde")
    age(history, 100)
    add(history, "f")
    assert rewound(history, "90s") == ["f"]
    assert rewound(history, "2m") == list("abcdef")


def test_a_rewind_ends_although_entries_were_deleted_by_hand(history: RedisHistory) -> None:
    entries = add(history, *"abcde")
    (host,) = history._hosts.all
    for entry in entries[2:4]:
        host.client.xdel(*history._keys("t", "events"), f"{entry.seq}-0")
    assert rewound(history, 2) == ["e"]
    assert rewound(history, "all") == ["a", "b", "e"]


@pytest.mark.parametrize(("text", "count"), [("all", 3000), ("2000", 2000), ("90s", 1000)])
def test_a_rewind_reads_few_entries_of_a_long_history(
    history: RedisHistory, valkey_server: ValkeyServer, text: str, count: int
) -> None:
    """Other clients wait while the server runs the script."""
    history.append("t", [draft("old")] * 2000)
    age(history, 100)
    history.append("t", [draft("new")] * 1000)
    before = calls(valkey_server)
    position = history.locate("t", None, parse_rewind(text))
    after = calls(valkey_server)
    assert sum(after.values()) - sum(before.values()) < 50
    assert len(history.read("t", position.seq, max_events=10_000).entries) == count


def test_a_restart_without_data_changes_the_generation(own_server: ValkeyServer) -> None:
    """No earlier sequence number is continued."""
    history = of(own_server)
    floor = history.newest("t")[0]
    old = add(history, "a", "b")
    generation = history.heads(["t"])["t"].generation
    own_server.restart(data=False)
    lost = history.heads(["t"])["t"]
    assert (lost.has_epoch, lost.generation == generation) == (False, False)
    for _ in range(2):
        for after in (floor, old[0].seq, old[1].seq):
            assert not history.read("t", after).complete
        (new,) = add(history, "c")
        assert new.seq > old[1].seq
    assert history.heads(["t"])["t"].generation == lost.generation


def test_flushall_changes_the_generation(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """A listener at the newest position receives a reset."""
    (old,) = add(history, "a")
    generation = history.heads(["t"])["t"].generation
    valkey_server.run("FLUSHALL")
    add(history, "b")
    assert not history.read("t", old.seq).complete
    assert history.heads(["t"])["t"].generation != generation


def test_numbers_of_lost_events_are_not_assigned_again(own_server: ValkeyServer) -> None:
    """A listener that has received a lost event receives a reset."""
    history = of(own_server)
    kept = add(history, "a", "b")
    copy = own_server.directory.with_name(own_server.directory.name + "-copy")
    shutil.copytree(own_server.directory / "appendonlydir", copy)
    try:
        lost = add(history, "lost", "lost too")
        (other,) = add(history, "lost epoch", token="u")
        own_server.kill()
        shutil.rmtree(own_server.directory / "appendonlydir")
        shutil.copytree(copy, own_server.directory / "appendonlydir")
        own_server.start()
    finally:
        shutil.rmtree(copy)
    heads = history.heads(["t", "u"])
    assert heads["t"].seq == kept[1].seq
    assert (heads["u"].has_epoch, heads["u"].seq < other.seq) == (False, True)
    for _ in range(2):
        for entry in lost:
            assert not history.read("t", entry.seq).complete
        assert not history.read("u", other.seq).complete
        assert history.read("t", kept[1].seq).complete
        add(history, "c", "d", "e")
        (new,) = add(history, "c", token="u")
        assert new.seq > other.seq


def test_numbers_skip_a_distance_after_a_restart_with_an_earlier_clock(
    history: RedisHistory,
) -> None:
    (old,) = add(history, "a")
    (host,) = history._hosts.all
    (head,) = history._keys("t", "head")
    ahead = old.seq + 10**10
    host.client.hset(head, mapping={"last": ahead, "run": "another"})
    (new,) = add(history, "b")
    assert new.seq == ahead + 10**9


def test_a_replica_without_the_last_events_skips_their_numbers(own_server: ValkeyServer) -> None:
    with valkey("--replicaof", "127.0.0.1", str(own_server.port)) as replica:
        history = of(own_server)
        (kept,) = add(history, "a")
        deadline = time.monotonic() + 30
        while of(replica, TIMEOUT=1)._hosts.all[0].client.dbsize() < own_server.client().dbsize():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        replica.run("REPLICAOF", "NO", "ONE")
        (lost,) = add(history, "lost")
        taken_over = of(replica)
        (new,) = add(taken_over, "b")
        assert new.seq > lost.seq
        assert not taken_over.read("t", lost.seq).complete
        assert texts(taken_over.read("t", kept.seq).entries) == ["b"]


@pytest.mark.parametrize("lost", ["head", "events"])
def test_listeners_of_an_evicted_key_receive_a_reset(history: RedisHistory, lost: str) -> None:
    """The server may evict any of a token's keys."""
    old = add(history, "a", "b")
    (host,) = history._hosts.all
    host.client.delete(*history._keys("t", lost))
    assert not history.read("t", old[0].seq).complete
    (new,) = history.append("t", [draft("c", own_id="u")])
    assert new.seq > old[1].seq
    assert not history.read("t", old[0].seq).complete
    assert everything(history) == ["c"]


# The floor


def test_the_floor_is_renewed_before_a_head_expires(valkey_server: ValkeyServer) -> None:
    """A position from before an epoch is unknown once the server has dropped the epoch."""
    history = of(valkey_server, MAX_AGE=100, TOKEN_MAX_AGE=200)
    floor = history.newest("t")[0]
    age(history, 99)
    assert history.newest("t")[0] == floor
    add(history, "gone")
    age(history, 2)
    renewed = history.heads(["u"])["u"].seq
    assert floor < renewed
    assert texts(history.read("t", floor).entries) == ["gone"]
    age(history, 200)
    assert not history.heads(["t"])["t"].has_epoch
    for after in (floor, renewed):
        assert not history.read("t", after).complete


def test_the_floor_rises_if_the_clock_is_set_back(valkey_server: ValkeyServer) -> None:
    """It rises above all sequence numbers that begin from it."""
    history = of(valkey_server, TOKEN_MAX_AGE=100_000)
    (host,) = history._hosts.all
    floor = history.newest("t")[0]
    ahead = floor + 80_000 * 10**6
    host.client.hset("eventsource:floor", mapping={"floor": ahead, "made": ahead})
    assert history.newest("t")[0] == ahead + 50_000 * 10**6
    assert history.newest("t")[0] == ahead + 50_000 * 10**6
    (entry,) = add(history, "a")
    assert entry.seq == ahead + 50_000 * 10**6 + 1


def test_a_listener_at_a_newer_floor_than_the_epoch_receives_a_reset(
    history: RedisHistory,
) -> None:
    """It then continues without a gap."""
    floor = history.newest("t")[0]
    (host,) = history._hosts.all
    host.client.hset("eventsource:floor", "floor", floor + 5)
    host.client.hset("eventsource:floor", "floor", floor)
    (entry,) = add(history, "a")
    assert not history.read("t", floor + 5).complete
    assert texts(history.read("t", floor).entries) == ["a"]
    assert entry.seq > floor + 5


# Bounds


def test_an_append_trims_events_beyond_the_bounds(valkey_server: ValkeyServer) -> None:
    """MAX_EVENTS and MAX_AGE are the bounds."""
    history = of(valkey_server, MAX_EVENTS=300, MAX_AGE=100)
    history.append("t", [draft(str(n), own_id=f"id {n}") for n in range(1000)])
    assert everything(history) == [str(n) for n in range(700, 1000)]
    (host,) = history._hosts.all
    assert host.client.hlen(*history._keys("t", "ids")) == 300
    age(history, 60)
    add(history, "younger")
    age(history, 60)
    add(history, "new")
    assert everything(history) == ["younger", "new"]
    age(history, 60)
    add(history, "newest")
    assert everything(history) == ["new", "newest"]
    assert host.client.hlen(*history._keys("t", "ids")) == 0


def test_an_append_trims_the_events_of_an_earlier_version(history: RedisHistory) -> None:
    """Its script has not written when the oldest event was stored."""
    history.max_age = 100
    add(history, "old")
    (host,) = history._hosts.all
    assert host.client.hdel(*history._keys("t", "head"), "oldest") == 1
    add(history, "younger")
    assert everything(history) == ["old", "younger"]
    age(history, 60)
    add(history, "new")
    age(history, 60)
    host.client.hdel(*history._keys("t", "head"), "oldest")
    add(history, "newest")
    assert everything(history) == ["new", "newest"]


def test_all_keys_of_a_token_expire(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """Only the floor, the marker and the log of changes stay, and a token's events expire before
    its head."""
    history.append("t", [draft(own_id="u")])
    history.announce("p", {"t": ["x"]}, 10)
    with valkey_server.client() as client:
        expiries = {key: client.ttl(key) for key in client.scan_iter("*")}
    assert expiries.pop(b"eventsource:floor") == -1
    assert expiries.pop(b"eventsource:project") == -1
    assert expiries.pop(b"eventsource:changes") == -1
    assert len(expiries) == 5
    assert all(seconds > 0 for seconds in expiries.values())
    events, head = history._keys("t", "events", "head")
    assert expiries[events] < expiries[head]


def test_a_read_transfers_only_the_events_it_returns(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    history.append("t", [Draft(action="ping", data=b"x" * 100_000) for _ in range(50)])
    start = before_oldest(history)

    def sent() -> int:
        return int(valkey_server.client().info("stats")["total_net_output_bytes"])

    before = sent()
    slice_ = history.read("t", start, max_bytes=250_000)
    assert len(slice_.entries) == 2
    assert slice_.more
    assert sent() - before < 230_000


def test_each_method_takes_a_fixed_number_of_round_trips(history: RedisHistory) -> None:
    """The heads of a thousand tokens take one, and so does a listener without a cursor."""
    (host,) = history._hosts.all
    add(history, "a")
    counted = Counting(host.client)
    host.client = counted
    for call, trips in (
        (lambda: history.heads([f"token {n}" for n in range(1000)]), 1),
        (lambda: history.locate("t", None), 1),
        (lambda: add(history, "b"), 1),
        (lambda: history.read("t", 0), 1),
        (lambda: history.announce("p", {f"token {n}": ["x"] for n in range(1000)}, 10), 3),
        (lambda: history.announce("p", {}, 10), 1),
    ):
        counted.trips = 0
        call()
        assert counted.trips == trips


class Counting:
    """A client that counts round trips."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.trips = 0

    def evalsha(self, *args: Any) -> Any:
        self.trips += 1
        return self.client.evalsha(*args)

    def eval(self, *args: Any) -> Any:
        return self.client.eval(*args)  # once for each server

    def pipeline(self, **kwargs: Any) -> Any:
        pipeline = self.client.pipeline(**kwargs)
        pipeline.command_stack  # noqa: B018 - fails should redis-py's pipeline change
        self.trips += 1
        return pipeline


# Presence


def test_listeners_are_present_until_they_or_their_process_end(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    other = of(valkey_server)
    assert not history.announce("p", {"t": ["ann", "", "ann"], "u": ["bob"]}, 10)
    assert not other.announce("q", {"t": ["été"]}, 10)
    assert sorted(history.present("t")) == ["", "ann", "ann", "été"]
    assert history.announce("p", {"t": ["ann"]}, 10)
    assert other.announce("q", {}, 10)
    assert sorted(other.present("t")) == ["ann", "été"]
    assert history.announce("p", {"t": []}, 10)
    assert history.present("t") == ["été"]
    assert history.present("u") == ["bob"]
    other.withdraw("q")
    assert history.present("t") == []
    assert history.present("nobody") == []
    assert not other.announce("q", {}, 10)


def test_listeners_from_before_an_expired_lease_do_not_count(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    history.announce("p", {"t": ["ann"], "u": ["bob"]}, 100)
    age(history, 101)
    assert history.present("t") == []
    assert not history.announce("p", {"t": ["eve"]}, 100)
    assert history.present("t") == ["eve"]
    assert history.present("u") == []
    assert history.announce("p", {}, 100)


def test_a_lease_of_another_process_with_the_same_name_does_not_count(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    of(valkey_server).announce("p", {"t": ["ann"]}, 100)
    assert not history.announce("p", {}, 100)
    assert history.present("t") == []


def test_listeners_written_during_their_removal_stay(history: RedisHistory) -> None:
    """Only fields with an unchanged value are removed."""
    history.announce("p", {"t": ["ann"], "u": ["bob"]}, 100)
    (host,) = history._hosts.all
    for token, value in (
        ("t", "another"),
        ("u", host.client.hget(_present_key(history, "u"), "p")),
    ):
        host.run(REMOVE, [_present_key(history, token)], ["p", value])
    assert (history.present("t"), history.present("u")) == (["ann"], [])


def _present_key(history: RedisHistory, token: str) -> bytes:
    return history._keys(token, "present")[0]


def test_each_announcement_renews_the_lease(history: RedisHistory) -> None:
    history.announce("p", {"t": ["ann"]}, 100)
    age(history, 60)
    assert history.announce("p", {}, 100)
    age(history, 60)
    assert history.present("t") == ["ann"]


def test_a_process_must_announce_again_after_the_server_lost_its_data(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    history.announce("p", {"t": ["ann"]}, 10)
    valkey_server.run("FLUSHALL")
    assert not history.announce("p", {}, 10)
    assert history.present("t") == []


def test_a_process_must_announce_again_after_a_restart(own_server: ValkeyServer) -> None:
    """The server may have lost the last announcements."""
    history = of(own_server)
    history.announce("p", {"t": ["ann"]}, 100)
    own_server.restart()
    assert not history.announce("p", {}, 100)
    assert history.present("t") == []


def test_a_process_must_announce_again_before_the_listeners_expire(history: RedisHistory) -> None:
    """Its listeners count in the meantime."""
    history.announce("p", {"t": ["ann"]}, 100)
    (host,) = history._hosts.all
    host.client.hincrby(history._lease_key("p"), "made", -43_200 * 10**6)
    assert not history.announce("p", {}, 100)
    assert history.present("t") == ["ann"]
    assert history.announce("p", {}, 100)


def test_a_process_must_announce_again_after_a_failed_call(
    valkey_server: ValkeyServer, own_server: ValkeyServer
) -> None:
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url], TIMEOUT=1)
    history.announce("p", {"t": ["ann"]}, 10)
    own_server.pause()
    assert history.announce("p", {"t": ["bob"]}, 10), "the other host has all it needs"
    own_server.resume()
    for host in history._hosts.all:
        host._probe_at = 0
    assert not history.announce("p", {"t": ["bob"]}, 10)
    assert history.announce("p", {}, 10)
    assert history.present("t") == ["bob"]


def test_prune_removes_listeners_of_dead_processes(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """A live process removes them from its own tokens."""
    dead = of(valkey_server)
    dead.announce("dead", {"t": ["ann"]}, 10)
    history.announce("p", {"t": ["bob"]}, 100)
    (host,) = history._hosts.all
    (key,) = history._keys("t", "present")
    assert history.prune() == 0
    assert set(host.client.hgetall(key)) == {b"dead", b"p"}
    host.client.delete(history._lease_key("dead"))
    assert history.prune() == 0
    assert set(host.client.hgetall(key)) == {b"p"}
    history.withdraw("p")
    assert not host.client.exists(key)


async def test_awaited_presence_returns_what_the_blocking_methods_return(
    history: RedisHistory,
) -> None:
    assert not await history.aannounce("p", {"t": ["ann"]}, 10)
    assert await history.apresent("t") == ["ann"]
    await history.awithdraw("p")
    assert await history.apresent("t") == []


# Threads and forks


async def test_a_paused_server_delays_nothing_else(own_server: ValkeyServer) -> None:
    """Neither the event loop nor Django's thread for synchronous work waits for it."""
    history = of(own_server)
    await history.aheads(["t"])
    threads = {await history.call(threading.get_ident) for _ in range(3)}
    assert threading.get_ident() not in threads
    own_server.pause()
    waiting = asyncio.create_task(history.aheads(["t"]))
    began = time.monotonic()
    await asyncio.sleep(0.05)
    assert await history.call(lambda: 5) == 5
    assert time.monotonic() - began < 2
    own_server.resume()
    assert not (await waiting)["t"].has_epoch


async def test_a_forked_process_has_a_history_with_its_own_threads(
    settings, valkey_server: ValkeyServer
) -> None:
    """The child makes a new history. The parent's connections stay open."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.redis.RedisHistory",
        "OPTIONS": {"HOSTS": [valkey_server.url]},
    }
    history = get_history()
    await history.aheads(["t"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            gc.collect()
            loop = asyncio.new_event_loop()
            asyncio.events._set_running_loop(None)
            loop.run_until_complete(get_history().call(add, get_history(), "child"))
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        await asyncio.sleep(0.01)
    assert ended == (child, 0)
    assert get_history() is history
    await history.call(add, history, "parent")
    assert everything(history) == ["child", "parent"]


def test_age_server_ages_every_key_with_an_expiry(history: RedisHistory) -> None:
    """Other tests rely on it."""
    add(history, "a")
    (host,) = history._hosts.all
    assert isinstance(host, Host)
    age_server(host.client, 86_401)
    assert everything(history) == []
    assert history.heads(["t"])["t"].has_epoch


# Commands, views and checks

UNREACHABLE = {
    "BACKEND": "django_eventsource.history.redis.RedisHistory",
    "OPTIONS": {"HOSTS": ["redis://127.0.0.1:1"], "TIMEOUT": 0.05},
}


@pytest.mark.parametrize(
    "arguments", [("send_event", "t", "ping", "x"), ("prune_events",)], ids=lambda a: a[0]
)
def test_a_command_reports_a_server_that_is_down_in_one_line(
    settings, arguments: tuple[str, ...]
) -> None:
    """The line names the failure and the way out, and no traceback is printed."""
    settings.EVENTSOURCE_HISTORY = UNREACHABLE
    if arguments == ("prune_events",):
        get_history()._announced["p"] = {"t"}  # type: ignore[attr-defined]
    with pytest.raises(CommandError) as caught:
        call_command(*arguments)
    text = str(caught.value)
    assert text.startswith("The history's store failed: Error 111 connecting to 127.0.0.1:1.")
    assert "migrate" not in text
    assert "\n" not in text


@pytest.mark.django_db
async def test_a_post_responds_with_503_while_the_server_is_down(settings) -> None:
    settings.EVENTSOURCE_HISTORY = UNREACHABLE
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    response = await AsyncClient().post("/events/ping/t", "x", content_type="text/plain")
    assert response.status_code == 503
    assert b"may not have been published" in response.content


@pytest.fixture
def foreign(settings, valkey_server: ValkeyServer) -> None:
    """Another project uses the prefix."""
    claim_as(settings, valkey_server, "other")
    settings.EVENTSOURCE_HISTORY = {**UNREACHABLE, "OPTIONS": {"HOSTS": [valkey_server.url]}}
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"


@pytest.mark.usefixtures("foreign")
def test_send_event_names_the_prefix_of_another_project() -> None:
    """It prints one line with the way out, and no traceback."""
    with pytest.raises(CommandError, match=r"^The key 'eventsource:project' .* set PREFIX in"):
        call_command("send_event", "t", "ping", "x")
    get_history()._announced["p"] = {"t"}  # type: ignore[attr-defined]
    with pytest.raises(CommandError, match=r"^The key 'eventsource:project' .* set PREFIX in"):
        call_command("prune_events")


@pytest.mark.django_db
@pytest.mark.usefixtures("foreign")
async def test_a_listener_gets_a_retry_while_another_project_uses_the_prefix(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names the way out."""
    response = await AsyncClient().get("/events/poll/t")
    assert response.status_code == 200
    assert b"\nretry: " in response.content
    assert "set PREFIX in" in caplog.text


@pytest.mark.usefixtures("foreign")
def test_system_checks_need_no_server_for_the_prefix() -> None:
    """`manage.py check` does not read the marker."""
    assert [message.id for message in run_checks(tags=["eventsource"])] == []


@pytest.mark.parametrize("listeners", [1, 30])
async def test_a_publish_takes_one_script_and_one_publish_command(
    settings, valkey_server: ValkeyServer, listeners: int
) -> None:
    """The number of listeners does not matter."""
    settings.EVENTSOURCE_HISTORY = {**UNREACHABLE, "OPTIONS": {"HOSTS": [valkey_server.url]}}
    settings.EVENTSOURCE_POLL_SECONDS = 600
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [{"address": valkey_server.url, "socket_timeout": None}]},
        }
    }
    hub = get_hub()
    began = hub._checked_at
    async with asyncio.timeout(10):
        while hub._checked_at == began:
            await asyncio.sleep(
                0.01
            )  # the next head check, with its own message, is far in the future
    streams = [EventStream("t", await get_history().alocate("t", None)) for _ in range(listeners)]
    await apublish("t", "ping", "0")
    for stream in streams:
        await until_it_has(stream, b"data: 0")
    assert await asyncio.to_thread(notifier.flush)
    before = calls(valkey_server)
    for n in range(1, 11):
        await apublish("t", "ping", str(n))
        # Without a pause between them, several events are sent in one message.
        assert await asyncio.to_thread(notifier.flush)
    for stream in streams:
        await until_it_has(stream, b"data: 10\n")
    after = calls(valkey_server)
    assert after["evalsha"] - before["evalsha"] == 10
    assert after["publish"] - before["publish"] == 10
    tasks = list(hub._tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await hub._membership.layer.flush()  # type: ignore[attr-defined]


async def until_it_has(stream: EventStream, text: bytes) -> None:
    async with asyncio.timeout(10):
        body = b""
        while text not in body:
            body += await anext(stream)


def calls(server: ValkeyServer) -> Counter[str]:
    """Return how often each command was run, 0 for those that were never run."""
    stats = server.run("INFO", "commandstats")
    return Counter({name.removeprefix("cmdstat_"): of["calls"] for name, of in stats.items()})
