"""The Redis history, on real servers: what the contract's tests do not show."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
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

from django_eventsource.history import Draft, Entry, Kind, get_history
from django_eventsource.history.redis import RedisHistory
from django_eventsource.history.redis_hosts import Host
from django_eventsource.history.redis_scripts import APPEND, FORGET
from django_eventsource.hub import get_hub
from django_eventsource.publishing import apublish, publish
from django_eventsource.streams import EventStream
from django_eventsource.tokens import CONTROL_TOKEN
from tests.histories import add, age, age_server, draft, texts
from tests.processes import start_python
from tests.valkey import ValkeyServer, valkey


@pytest.fixture
def history(valkey_server: ValkeyServer) -> RedisHistory:
    return RedisHistory(HOSTS=[valkey_server.url])


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may harm; it writes every command to disk."""
    with valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def of(server: ValkeyServer, **options: Any) -> RedisHistory:
    return RedisHistory(HOSTS=[server.url], **options)


def everything(history: RedisHistory, token: str = "t") -> list[str]:
    """Give the texts of all events that are kept."""
    return texts(history.read(token, history.oldest(token), max_events=10_000).entries)


# Options


@pytest.mark.parametrize(
    "hosts",
    [None, "redis://127.0.0.1", [], [5], [("h",)], [("h", "1")], ["nonsense://h"], [{"a": 1}]],
)
def test_bad_hosts(hosts: object) -> None:
    """What is no list of addresses is an error that names the option and the forms."""
    with pytest.raises(ImproperlyConfigured, match=r"HOSTS must be .*URLs.*tuples.*dictionaries"):
        RedisHistory(HOSTS=hosts)


def test_an_error_shows_no_password() -> None:
    """The password of an address that does not fit is left out."""
    url = "nonsense://u:secret@h"
    for hosts in (url, [url], [{"address": url, "password": "secret"}], [(url,)]):
        with pytest.raises(ImproperlyConfigured, match="nonsense://h'") as caught:
            RedisHistory(HOSTS=hosts)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", None, 5, "a{b", "a}b"])
def test_bad_prefix(prefix: object) -> None:
    """A prefix is text, without what decides on the place in a cluster."""
    with pytest.raises(ImproperlyConfigured, match="PREFIX must be non-empty text without"):
        RedisHistory(PREFIX=prefix)


@pytest.mark.parametrize("timeout", [0, -1, None, True, "5", float("inf")])
def test_bad_timeout(timeout: object) -> None:
    """A timeout is a positive number of seconds."""
    with pytest.raises(ImproperlyConfigured, match="TIMEOUT must be a positive number"):
        RedisHistory(TIMEOUT=timeout)


def test_without_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where redis-py is not installed, the error says how to install it."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImproperlyConfigured, match="pip install redis"):
        RedisHistory()


def test_forms_of_addresses(valkey_server: ValkeyServer) -> None:
    """Whatever form the address has, it is the same server, and events are bytes."""
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
    read = history.read("t", history.oldest("t"))
    assert [entry.draft.data for entry in read.entries] == [b"\xff\0%d" % n for n in range(6)]
    assert RedisHistory()._hosts.all[0].name == "127.0.0.1:6379"


def test_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A server on a unix socket is reached by its URL."""
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


def test_sentinel(own_server: ValkeyServer) -> None:
    """The primary is found by its name, from sentinels."""
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
    finally:
        sentinel.close()


# Several hosts, and clusters


def test_two_hosts(valkey_server: ValkeyServer, own_server: ValkeyServer) -> None:
    """Each token is on one of the hosts, and every call finds it there."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    names = [f"token {n}" for n in range(40)]
    first = {name: add(history, name, token=name)[0] for name in names[:20]}
    heads = history.heads(names)
    assert {name for name in names if heads[name].life} == set(first)
    assert all(heads[name].seq == entry.seq for name, entry in first.items())
    assert len({head.epoch for head in heads.values()}) == 2
    for server in (valkey_server, own_server):
        assert 5 < len(list(server.client().scan_iter("*:head"))) < 15
    for name in first:
        assert everything(history, name) == [name]
    assert not history.announce("p", {name: [name] for name in names}, 10)
    assert [history.present(name) for name in names] == [[name] for name in names]
    # The other process has the same hosts, in the same order.
    again = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    assert again.heads(names) == heads


def test_cluster() -> None:
    """On a cluster no script or command touches keys of two slots."""
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
                history.append(name, [draft("a", own_id="u"), draft(kind=Kind.FINISH)])
                assert history.locate(name, "u").known
                assert history.read(name, history.oldest(name)).complete
            assert all(head.life for head in history.heads(names).values())
            assert not history.announce("p", {name: ["x"] for name in names}, 10)
            history.announce("q", {name: ["y"] for name in names}, 10)
            history._leases.clear()
            history.announce("q", {}, 10)
            history.prune()
            assert {tuple(history.present(name)) for name in names} == {("x",)}
            history.withdraw("p")
            history._hosts.all[0].client.close()


def test_a_cluster_of_two() -> None:
    """Each token is on the node that has its slot; redis-py finds it."""
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
        assert all(head.life for head in history.heads(names).values())
        history.announce("p", {name: ["x"] for name in names}, 10)
        assert all(history.present(name) == ["x"] for name in names)
        for server in (one, two):
            assert 5 < len(list(server.client().scan_iter("*:head"))) < 35
        history._hosts.all[0].client.close()


def test_a_cluster_that_is_away() -> None:
    """It is asked for when it is first needed; then it is a server that cannot be reached."""
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
def test_a_cluster_that_is_named_wrongly(form: dict[str, Any], said: str) -> None:
    """It is no server that is away: whoever wrote the settings is told at the first use."""
    history = RedisHistory(HOSTS=[{**form, "password": "secret", "cluster": True}], TIMEOUT=0.2)
    with pytest.raises(ImproperlyConfigured, match=said) as caught:
        history.heads(["t"])
    assert "HOSTS" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_cluster_that_changes(valkey_server: ValkeyServer) -> None:
    """What its client raises while slots move is no RedisError: it is tried again as one."""
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


def test_two_projects_do_not_share_a_prefix(settings, valkey_server: ValkeyServer) -> None:
    """The second project is refused at its first call, and the error names the ways out."""
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


def test_each_host_is_checked(
    settings, valkey_server: ValkeyServer, own_server: ValkeyServer
) -> None:
    """A prefix that is free on one server may be in use on another."""
    add(of(own_server), "theirs")
    settings.SECRET_KEY = "of another project"
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    with pytest.raises(ImproperlyConfigured, match=str(own_server.port)):
        history.heads(map(str, range(40)))


def test_the_marker_is_checked_once(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """An append costs no further command, and a running process ignores an emptied server."""
    add(history, "a")
    before = calls(valkey_server)
    for text in "bcd":
        add(history, text)
    # The script itself looks for the reference of a retried append with GET.
    assert calls(valkey_server)["get"] - before["get"] == 3
    assert calls(valkey_server)["set"] == before["set"]
    valkey_server.run("FLUSHALL")
    add(history, "e")
    with valkey_server.client() as client:
        assert not client.exists("eventsource:project")
        add(of(valkey_server), "f")
        assert client.exists("eventsource:project")


def test_two_projects_that_start_together(settings, valkey_server: ValkeyServer) -> None:
    """Of two that find no marker, the one whose SET came second is refused."""
    history = of(valkey_server)
    (host,) = history._hosts.all
    host.client = Overtaken(host.client, lambda: claim_as(settings, valkey_server, "other"))
    with pytest.raises(ImproperlyConfigured, match="PREFIX"):
        add(history, "a")


def test_two_processes_of_a_project_that_start_together(
    settings, valkey_server: ValkeyServer
) -> None:
    """Both may use the prefix."""
    history = of(valkey_server)
    (host,) = history._hosts.all
    host.client = Overtaken(host.client, lambda: claim_as(settings, valkey_server, "tests"))
    add(history, "a")
    assert everything(history) == ["a"]


def claim_as(settings: Any, server: ValkeyServer, secret_key: str) -> None:
    """Use the prefix as a project with another SECRET_KEY."""
    before, settings.SECRET_KEY = settings.SECRET_KEY, secret_key
    of(server).newest("t")
    settings.SECRET_KEY = before


class Overtaken:
    """A client behind whose first GET another process comes in."""

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


def test_a_server_that_is_away_at_first_is_checked_later(own_server: ValkeyServer) -> None:
    """The check is retried like the call that needs it."""
    history = of(own_server)
    own_server.kill()
    timer = threading.Timer(0.3, own_server.start)
    timer.start()
    add(history, "a")
    timer.join()
    assert own_server.run("EXISTS", "eventsource:project") == 1


# Appends that are tried again


class Lossy:
    """A client whose first answers of some kind get lost: the commands do run."""

    def __init__(self, client: Any, losses: int, error: Exception) -> None:
        self.client = client
        self.losses = losses
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def evalsha(self, *args: Any) -> Any:
        answer = self.client.evalsha(*args)
        if args[0] == APPEND.sha and answer is not None and self.losses:
            self.losses -= 1
            raise self.error
        return answer


@pytest.mark.parametrize("before", [0, 3])
def test_an_append_whose_answer_was_lost(history: RedisHistory, before: int) -> None:
    """The next attempts find the events of the first one, behind those of others."""
    for n in range(before):
        add(history, str(n))
    (host,) = history._hosts.all
    add(history, "known script", token="other")
    host.client = Lossy(host.client, 2, redis.TimeoutError("lost"))
    entries = add(history, "a", "b")
    assert everything(history)[before:] == ["a", "b"]
    assert history.read("t", entries[0].seq).entries == (entries[1],)
    assert history.newest("t")[0] == entries[1].seq


def test_an_append_that_is_trimmed_at_once_and_whose_answer_was_lost(
    history: RedisHistory,
) -> None:
    """What is left of it is enough to find it again."""
    history.max_events = 3
    add(history, "before", token="t")
    (host,) = history._hosts.all
    host.client = Lossy(host.client, 1, redis.TimeoutError("lost"))
    entries = add(history, *"abcdefgh")
    assert everything(history) == ["f", "g", "h"]
    assert history.newest("t")[0] == entries[-1].seq
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(8))


def test_the_next_attempt_looks_behind_the_events_of_others(history: RedisHistory) -> None:
    """An attempt is found although more came after it than are looked at at once."""
    (entry,) = add(history, "a")
    fields = _fields_of_first(history)
    add(history, *map(str, range(120)))
    assert int(_attempt(history, "1000000", fields[b"r"].decode())) == entry.seq
    assert len(everything(history)) == 121


def test_looking_back_ends_at_the_first_attempt(history: RedisHistory) -> None:
    """What is older than the first attempt is not looked at: it cannot be it."""
    add(history, "a")
    fields = _fields_of_first(history)
    (other,) = add(history, "b")
    age(history, 60)
    assert int(_attempt(history, "30000000", fields[b"r"].decode())) == other.seq + 1


def test_an_attempt_that_arrives_late(history: RedisHistory) -> None:
    """An attempt that overtakes the one before it leaves nothing for that one to do."""
    second = _attempt(history, "1000000", "ref")
    assert _attempt(history, "", "ref") == second
    assert everything(history) == ["late"]


def _fields_of_first(history: RedisHistory) -> dict[bytes, bytes]:
    (host,) = history._hosts.all
    ((_, fields),) = host.client.xrange(*history._keys("t", "events"), count=1)
    return dict(fields)


def _attempt(history: RedisHistory, elapsed: str, ref: str) -> bytes:
    (host,) = history._hosts.all
    keys = history._keys("t", "head", "events", "ids", f"ref:{ref}")
    bounds = [1000, 10**9, 10**12, 10**9, 10**9]
    floor = history.heads(["x"])["x"].seq
    answer: bytes = host.run_once(
        APPEND, keys, [floor, elapsed, ref, *bounds, "ping", b"late", "event", ""]
    )
    return answer


def test_a_paused_server(own_server: ValkeyServer) -> None:
    """Attempts that a paused server has in its sockets give one event all together."""
    # redis-py tries again by itself by default, where it is not given a URL.
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


def test_a_killed_server(own_server: ValkeyServer) -> None:
    """Appends go on when the server is back, and each event is there once."""
    history = of(own_server)
    told: list[Entry] = []
    done = threading.Event()

    def publish() -> None:
        n = 0
        while not done.is_set():
            told.extend(add(history, str(n)))
            n += 1

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        for _ in range(3):
            count = len(told)
            own_server.restart()
            deadline = time.monotonic() + 20
            while len(told) < count + 20:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        done.set()
        thread.join()
    assert everything(history) == [str(n) for n in range(len(told))]
    read = history.read("t", history.oldest("t"), max_events=10**6, max_bytes=10**9)
    assert list(read.entries) == told


def test_nobody_there(own_server: ValkeyServer) -> None:
    """After TIMEOUT the error is raised, and says which server and for how long."""
    history = of(own_server, TIMEOUT=0.3)
    own_server.kill()
    for call in (lambda: history.heads(["t"]), lambda: add(history, "a")):
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError) as caught:
            call()
        assert 0.3 <= time.monotonic() - began < 3
        assert f"127.0.0.1:{own_server.port}. tried for 0." in caught.value.__notes__[0]


def test_reads_do_not_wait_for_a_server_that_is_away(
    own_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them tries now and then, and the others are told at once; an append tries on."""
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
        with pytest.raises(redis.ConnectionError, match="a moment ago"):
            history.heads(["t"])
    assert tries == []
    host._look_again_at = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        history.heads(["t"])
    assert tries
    appended = threading.Thread(target=add, args=[history, "b"])
    appended.start()
    own_server.start()
    appended.join(30)
    assert host._failure is None
    assert not history.heads(["t"])["t"].seq <= entry.seq, "it has lost what it held in memory"


def test_a_server_that_answers_is_not_away(own_server: ValkeyServer) -> None:
    """Whatever it says: what it is asked next is not refused unasked."""
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


def test_a_logout_does_not_wait_for_a_server_that_is_away(own_server: ValkeyServer) -> None:
    """What ends streams gives up where events are tried on with."""
    history = of(own_server, TIMEOUT=60)
    add(history, "a")
    own_server.kill()
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        add(history, "close", token=CONTROL_TOKEN)
    assert time.monotonic() - began < 20


def test_only_one_tries_again(own_server: ValkeyServer) -> None:
    """While it waits for a server that hangs, the others are told at once."""
    history = of(own_server, TIMEOUT=3)
    own_server.pause()
    with pytest.raises(redis.TimeoutError):
        history.newest("t")
    (host,) = history._hosts.all
    host._look_again_at = time.monotonic()
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(history.newest, "t")
        while host._look_again_at < time.monotonic() + 1:
            time.sleep(0.001)
        with pytest.raises(redis.RedisError, match="a moment ago"):
            history.newest("t")
        own_server.resume()
        first.result(30)
    history.newest("t")


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_host_that_is_away_takes_no_other_with_it(
    valkey_server: ValkeyServer, own_server: ValkeyServer, how: str
) -> None:
    """Heads, presence and reads of the other host's tokens go on as ever."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url], TIMEOUT=1)
    there, away = (
        [name for name in map(str, range(40)) if history._host(name) is host]
        for host in history._hosts.all
    )
    listeners = {name: ["ada"] for name in (*there, *away)}
    history.announce("p", listeners, 60)
    entries = {name: add(history, name, token=name)[0] for name in listeners}
    getattr(own_server, how)()
    # More than there are threads: they wait for nothing but their own host.
    waiting = [asyncio.ensure_future(history.alocate(name, None)) for name in away * 2]
    await asyncio.sleep(0)
    began = time.monotonic()
    for _ in range(3):
        heads = await history.aheads(listeners)
        assert heads.keys() == set(there)
        assert history.heads(listeners) == heads
        position = await history.alocate(there[0], None)
        assert position.seq == entries[there[0]].seq
        assert history.announce("p", {there[0]: ["bob"]}, 60), "nothing to tell anew"
        assert history.present(there[0]) == ["bob"]
    assert time.monotonic() - began < 15
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, redis.RedisError) for result in results)
    history.prune()
    history.withdraw("p")
    assert history.present(there[1]) == []
    for call in (lambda: history.heads(away), lambda: history.present(away[0])):
        with pytest.raises(redis.RedisError):
            call()
    own_server.resume() if how == "pause" else own_server.start()
    for host in history._hosts.all:
        host._look_again_at = 0
    assert not history.announce("p", {}, 60), "the other host asks for everything"
    assert history.announce("p", listeners, 60)
    assert history.present(away[0]) == ["ada"]


async def test_an_error_that_is_none_of_the_servers_is_raised(
    valkey_server: ValkeyServer, own_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a host that is away."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url])
    heads = history._heads

    def fail(host: Host, names: Sequence[str]) -> Any:
        return 1 / 0 if host is history._hosts.all[0] else heads(host, names)

    monkeypatch.setattr(history, "_heads", fail)
    with pytest.raises(ZeroDivisionError):
        await history.aheads(map(str, range(40)))
    with pytest.raises(ZeroDivisionError):
        history.heads(map(str, range(40)))


def test_a_replica_becomes_the_primary(own_server: ValkeyServer) -> None:
    """A server that is read-only for a moment is tried again, else the error says why."""
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
    """Take the server's memory away; give it back at the end, or after some seconds."""
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
    """An append to a full server is tried again until the server has memory."""
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
    """Nothing of the append is stored, and the error says the way out."""
    history = of(own_server, TIMEOUT=0.5)
    add(history, "a")
    with full(own_server):
        began = time.monotonic()
        with pytest.raises(redis.ResponseError, match="maxmemory") as caught:
            add(history, "b", "c")
        assert time.monotonic() - began >= 0.5
        assert re.search(r"tried for \d\.\d s\. Give it more memory", caught.value.__notes__[0])
        assert everything(history) == ["a"]
    add(history, "d")
    assert everything(history) == ["a", "d"]


def test_the_error_of_an_old_server_without_memory_is_tried_again(history: RedisHistory) -> None:
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
    settings.EVENTSOURCE_HISTORY = {**AWAY, "OPTIONS": {"HOSTS": [own_server.url]}}
    publish("t", "ping", "before")
    with full(own_server, 0.3), transaction.atomic():
        publish("t", "ping", "committed")
    assert everything(cast("RedisHistory", get_history())) == ["before", "committed"]


def test_an_append_waits_for_a_server_that_cannot_write_to_disk() -> None:
    """A server that stopped accepting writes is tried again; the error says the way out."""
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
        assert re.search(r"tried for .* look at its log", caught.value.__notes__[0])
        timer = threading.Timer(0.3, server.run, ["CONFIG", "SET", "save", ""])
        timer.start()
        add(of(server), "c")
        timer.join()
        assert everything(history) == ["a", "c"]


def test_a_wrong_password_is_not_tried_again() -> None:
    """A mistake in the configuration shows at once."""
    with valkey("--requirepass", "right") as server:
        history = RedisHistory(HOSTS=[f"redis://:wrong@127.0.0.1:{server.port}"])
        began = time.monotonic()
        with pytest.raises(redis.AuthenticationError):
            history.heads(["t"])
        assert time.monotonic() - began < 5
        server.kill()


def test_errors_of_single_commands_are_raised(history: RedisHistory) -> None:
    """A key of somebody else's under our name is an error, not an empty answer."""
    (host,) = history._hosts.all
    host.client.set(*history._keys("t", "head"), "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE") as caught:
        history.heads(["t"])
    assert caught.value.__notes__ == [f"Redis server of the history: {host.name}."]


def test_forgotten_scripts(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """A server that forgot the scripts is given them again."""
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


def test_many_writers(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """Four processes give consecutive numbers, none twice, each in its own order."""
    writers = [start_python(WRITER, valkey_server.url, n) for n in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    entries = history.read("t", history.oldest("t"), max_events=5000, max_bytes=10**7).entries
    first = entries[0].seq
    assert [entry.seq for entry in entries] == list(range(first, first + 2000))
    for n in range(4):
        mine = [text for text in texts(entries) if text.startswith(f"{n} ")]
        assert mine == [f"{n} {m}" for m in range(500)]


# What the server lost


def test_restart_with_its_data(own_server: ValkeyServer) -> None:
    """Nobody is reset, and the numbers go on above all that may have been given out."""
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
    # This one may have been given out for an event that was lost.
    assert not history.read("t", old[1].seq + 1).complete
    assert history.locate("t", str(old[1].seq)).known
    own_server.restart()
    add(history, "e")
    assert texts(history.read("t", old[1].seq).entries) == ["c", "d", "e"]


def test_restart_without_its_data(own_server: ValkeyServer) -> None:
    """The epoch changes, and no number from before is continued."""
    history = of(own_server)
    floor = history.newest("t")[0]
    old = add(history, "a", "b")
    epoch = history.heads(["t"])["t"].epoch
    own_server.restart(data=False)
    lost = history.heads(["t"])["t"]
    assert (lost.life, lost.epoch == epoch) == (False, False)
    for _ in range(2):
        for after in (floor, old[0].seq, old[1].seq):
            assert not history.read("t", after).complete
        (new,) = add(history, "c")
        assert new.seq > old[1].seq
    assert history.heads(["t"])["t"].epoch == lost.epoch


def test_an_emptied_server(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """FLUSHALL changes the epoch, and who was at the head is told."""
    (old,) = add(history, "a")
    epoch = history.heads(["t"])["t"].epoch
    valkey_server.run("FLUSHALL")
    add(history, "b")
    assert not history.read("t", old.seq).complete
    assert history.heads(["t"])["t"].epoch != epoch


def test_restart_with_older_data(own_server: ValkeyServer) -> None:
    """Numbers of events that were lost are not given out again: who holds them is told."""
    history = of(own_server)
    kept = add(history, "a", "b")
    copy = own_server.directory.with_name(own_server.directory.name + "-copy")
    shutil.copytree(own_server.directory / "appendonlydir", copy)
    try:
        lost = add(history, "lost", "lost too")
        (gone,) = add(history, "lost life", token="u")
        own_server.kill()
        shutil.rmtree(own_server.directory / "appendonlydir")
        shutil.copytree(copy, own_server.directory / "appendonlydir")
        own_server.start()
    finally:
        shutil.rmtree(copy)
    heads = history.heads(["t", "u"])
    assert heads["t"].seq == kept[1].seq
    assert (heads["u"].life, heads["u"].seq < gone.seq) == (False, True)
    for _ in range(2):
        for entry in lost:
            assert not history.read("t", entry.seq).complete
        assert not history.read("u", gone.seq).complete
        assert history.read("t", kept[1].seq).complete
        add(history, "c", "d", "e")
        (new,) = add(history, "c", token="u")
        assert new.seq > gone.seq


def test_restart_with_a_clock_set_back(history: RedisHistory) -> None:
    """Numbers then go on far above the last one that survived."""
    (old,) = add(history, "a")
    (host,) = history._hosts.all
    (head,) = history._keys("t", "head")
    ahead = old.seq + 10**10
    host.client.hset(head, mapping={"last": ahead, "run": "another"})
    (new,) = add(history, "b")
    assert new.seq == ahead + 10**9


def test_failover_to_a_replica(own_server: ValkeyServer) -> None:
    """Another server that takes over without the last events does not give out their numbers."""
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
def test_evicted_keys(history: RedisHistory, lost: str) -> None:
    """Where the server evicted a part of a token, its listeners are told."""
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
    """A place from before a life is worthless when the server forgets that life."""
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
    assert not history.heads(["t"])["t"].life
    for after in (floor, renewed):
        assert not history.read("t", after).complete


def test_the_floor_when_the_clock_is_set_back(valkey_server: ValkeyServer) -> None:
    """It rises above all that was given out from it."""
    history = of(valkey_server, TOKEN_MAX_AGE=100_000)
    (host,) = history._hosts.all
    floor = history.newest("t")[0]
    ahead = floor + 80_000 * 10**6
    host.client.hset("eventsource:floor", mapping={"floor": ahead, "made": ahead})
    assert history.newest("t")[0] == ahead + 50_000 * 10**6
    assert history.newest("t")[0] == ahead + 50_000 * 10**6
    (entry,) = add(history, "a")
    assert entry.seq == ahead + 50_000 * 10**6 + 1


def test_a_life_that_began_with_an_older_floor(history: RedisHistory) -> None:
    """Who was given the newer floor is told, and can go on; there is no gap."""
    floor = history.newest("t")[0]
    (host,) = history._hosts.all
    host.client.hset("eventsource:floor", "floor", floor + 5)
    host.client.hset("eventsource:floor", "floor", floor)
    (entry,) = add(history, "a")
    assert not history.read("t", floor + 5).complete
    assert texts(history.read("t", floor).entries) == ["a"]
    assert entry.seq > floor + 5


# Bounds


def test_trimming_is_by_the_append(valkey_server: ValkeyServer) -> None:
    """No more than MAX_EVENTS and none older than MAX_AGE is left by an append."""
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
    assert host.client.hlen(*history._keys("t", "ids")) == 0


def test_all_keys_of_a_token_expire(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """Only the floor and the marker stay; a token's events go before its head."""
    history.append("t", [draft(own_id="u")])
    history.announce("p", {"t": ["x"]}, 10)
    with valkey_server.client() as client:
        expiries = {key: client.ttl(key) for key in client.scan_iter("*")}
    assert expiries.pop(b"eventsource:floor") == -1
    assert expiries.pop(b"eventsource:project") == -1
    assert len(expiries) == 5
    assert all(seconds > 0 for seconds in expiries.values())
    events, head = (key.encode() for key in history._keys("t", "events", "head"))
    assert expiries[events] < expiries[head]


def test_a_read_transfers_what_it_gives(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """Of many large events, only those within the bounds come over the wire."""
    history.append("t", [Draft(action="ping", data=b"x" * 100_000) for _ in range(50)])
    oldest = history.oldest("t")

    def sent() -> int:
        return int(valkey_server.client().info("stats")["total_net_output_bytes"])

    before = sent()
    slice_ = history.read("t", oldest, max_bytes=250_000)
    assert len(slice_.entries) == 2
    assert slice_.more
    assert sent() - before < 230_000


def test_round_trips(history: RedisHistory) -> None:
    """The heads of a thousand tokens are one round trip; a fresh place is one too."""
    (host,) = history._hosts.all
    add(history, "a")
    counted = Counting(host.client)
    host.client = counted
    for call, trips in (
        (lambda: history.heads([f"token {n}" for n in range(1000)]), 1),
        (lambda: history.locate("t", None), 1),
        (lambda: history.oldest("t"), 1),
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
        return self.client.eval(*args)  # once in the life of a server

    def pipeline(self, **kwargs: Any) -> Any:
        pipeline = self.client.pipeline(**kwargs)
        pipeline.command_stack  # noqa: B018 - fails should redis-py's pipeline change
        self.trips += 1
        return pipeline


def test_oldest(valkey_server: ValkeyServer) -> None:
    """It is a place from which everything that is kept can be read."""
    history = of(valkey_server, MAX_EVENTS=2, MAX_AGE=100)
    floor = history.newest("t")[0]
    assert history.oldest("t") == floor
    add(history, "a")
    assert history.oldest("t") == floor
    entries = add(history, "b", "c")
    assert history.oldest("t") == entries[0].seq - 1
    assert everything(history) == ["b", "c"]
    age(history, 101)
    assert history.oldest("t") == entries[1].seq


# Presence


def test_presence(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """All listeners of all processes are present until they or their process end."""
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


def test_an_expired_lease(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """What a process told before its lease expired does not count after it came back."""
    history.announce("p", {"t": ["ann"], "u": ["bob"]}, 100)
    age(history, 101)
    assert history.present("t") == []
    assert not history.announce("p", {"t": ["eve"]}, 100)
    assert history.present("t") == ["eve"]
    assert history.present("u") == []
    assert history.announce("p", {}, 100)


def test_a_process_that_does_not_know_its_lease(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """A lease that somebody else began under the same name counts for nothing."""
    of(valkey_server).announce("p", {"t": ["ann"]}, 100)
    assert not history.announce("p", {}, 100)
    assert history.present("t") == []


def test_what_was_written_meanwhile_stays(history: RedisHistory) -> None:
    """Of what looked stale, only what is still the same is removed."""
    history.announce("p", {"t": ["ann"], "u": ["bob"]}, 100)
    (host,) = history._hosts.all
    for token, value in (
        ("t", "another"),
        ("u", host.client.hget(_present_key(history, "u"), "p")),
    ):
        host.run(FORGET, [_present_key(history, token)], ["p", value])
    assert (history.present("t"), history.present("u")) == (["ann"], [])


def _present_key(history: RedisHistory, token: str) -> str:
    return history._keys(token, "present")[0]


def test_a_lease_is_renewed(history: RedisHistory) -> None:
    """The time begins anew with each call."""
    history.announce("p", {"t": ["ann"]}, 100)
    age(history, 60)
    assert history.announce("p", {}, 100)
    age(history, 60)
    assert history.present("t") == ["ann"]


def test_an_emptied_store_of_presence(history: RedisHistory, valkey_server: ValkeyServer) -> None:
    """A process is asked for everything when the server lost its data."""
    history.announce("p", {"t": ["ann"]}, 10)
    valkey_server.run("FLUSHALL")
    assert not history.announce("p", {}, 10)
    assert history.present("t") == []


def test_presence_after_a_restart(own_server: ValkeyServer) -> None:
    """A server that may have lost what it was told last asks for everything."""
    history = of(own_server)
    history.announce("p", {"t": ["ann"]}, 100)
    own_server.restart()
    assert not history.announce("p", {}, 100)
    assert history.present("t") == []


def test_everything_is_written_again_after_some_time(history: RedisHistory) -> None:
    """A process is asked for everything before the tokens expire; it counts meanwhile."""
    history.announce("p", {"t": ["ann"]}, 100)
    (host,) = history._hosts.all
    host.client.hincrby(history._lease_key("p"), "made", -43_200 * 10**6)
    assert not history.announce("p", {}, 100)
    assert history.present("t") == ["ann"]
    assert history.announce("p", {}, 100)


def test_an_announcement_that_failed(
    valkey_server: ValkeyServer, own_server: ValkeyServer
) -> None:
    """Where it failed on the way, the next call asks for everything."""
    history = RedisHistory(HOSTS=[valkey_server.url, own_server.url], TIMEOUT=1)
    history.announce("p", {"t": ["ann"]}, 10)
    own_server.pause()
    assert history.announce("p", {"t": ["bob"]}, 10), "the other host has all it needs"
    own_server.resume()
    for host in history._hosts.all:
        host._look_again_at = 0
    assert not history.announce("p", {"t": ["bob"]}, 10)
    assert history.announce("p", {}, 10)
    assert history.present("t") == ["bob"]


def test_prune_removes_what_dead_processes_left(
    history: RedisHistory, valkey_server: ValkeyServer
) -> None:
    """A process that lives tidies up its tokens after those that died."""
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


async def test_awaited_presence(history: RedisHistory) -> None:
    """The a-methods give what the plain ones give."""
    assert not await history.aannounce("p", {"t": ["ann"]}, 10)
    assert await history.apresent("t") == ["ann"]
    await history.awithdraw("p")
    assert await history.apresent("t") == []


# Threads and forks


async def test_a_paused_server_holds_up_nothing_else(own_server: ValkeyServer) -> None:
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
    assert not (await waiting)["t"].life


async def test_after_a_fork(history: RedisHistory) -> None:
    """A forked process has threads and connections of its own."""
    await history.aheads(["t"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            loop = asyncio.new_event_loop()
            asyncio.events._set_running_loop(None)
            loop.run_until_complete(history.call(add, history, "child"))
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        await asyncio.sleep(0.01)
    assert ended == (child, 0)
    await history.call(add, history, "parent")
    assert everything(history) == ["child", "parent"]


def test_hosts_are_told_apart_by_what_they_are(history: RedisHistory) -> None:
    """Aging, which other tests rely on, reaches every key with an expiry."""
    add(history, "a")
    (host,) = history._hosts.all
    assert isinstance(host, Host)
    age_server(host.client, 86_401)
    assert everything(history) == []
    assert history.heads(["t"])["t"].life


# What users see of it

AWAY = {
    "BACKEND": "django_eventsource.history.redis.RedisHistory",
    "OPTIONS": {"HOSTS": ["redis://127.0.0.1:1"], "TIMEOUT": 0.05},
}


@pytest.mark.parametrize(
    "arguments", [("send_event", "t", "ping", "x"), ("prune_events",)], ids=lambda a: a[0]
)
def test_commands_where_the_server_is_away(settings, arguments: tuple[str, ...]) -> None:
    """One line that says what failed and what to do, and no traceback."""
    settings.EVENTSOURCE_HISTORY = AWAY
    if arguments == ("prune_events",):
        get_history()._announced["p"] = {"t"}  # type: ignore[attr-defined]
    with pytest.raises(CommandError) as caught:
        call_command(*arguments)
    text = str(caught.value)
    assert text.startswith("The history's store failed: Error 111 connecting to 127.0.0.1:1.")
    assert "migrate" not in text
    assert "\n" not in text


@pytest.mark.django_db
async def test_a_post_where_the_server_is_away(settings) -> None:
    """503: the sender may try again."""
    settings.EVENTSOURCE_HISTORY = AWAY
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    response = await AsyncClient().post("/events/ping/t", "x", content_type="text/plain")
    assert response.status_code == 503
    assert b"may not have been published" in response.content


@pytest.fixture
def foreign(settings, valkey_server: ValkeyServer) -> None:
    """The prefix belongs to another project."""
    claim_as(settings, valkey_server, "other")
    settings.EVENTSOURCE_HISTORY = {**AWAY, "OPTIONS": {"HOSTS": [valkey_server.url]}}
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"


@pytest.mark.usefixtures("foreign")
def test_send_event_names_the_prefix_of_another_project() -> None:
    """One line with the way out, and no traceback."""
    with pytest.raises(CommandError, match=r"^The key 'eventsource:project' .* set PREFIX in"):
        call_command("send_event", "t", "ping", "x")
    get_history()._announced["p"] = {"t"}  # type: ignore[attr-defined]
    with pytest.raises(CommandError, match=r"^The key 'eventsource:project' .* set PREFIX in"):
        call_command("prune_events")


@pytest.mark.django_db
@pytest.mark.usefixtures("foreign")
async def test_a_listener_where_the_prefix_is_another_projects(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The listener is told to come back later, and the log names the way out."""
    response = await AsyncClient().get("/events/poll/t")
    assert response.status_code == 200
    assert b"\nretry: " in response.content
    assert "set PREFIX in" in caplog.text


@pytest.mark.usefixtures("foreign")
def test_system_checks_need_no_server_for_the_prefix() -> None:
    """The marker is not read by `manage.py check`."""
    assert [message.id for message in run_checks(tags=["eventsource"])] == []


@pytest.mark.parametrize("listeners", [1, 30])
async def test_round_trips_of_a_publish(
    settings, valkey_server: ValkeyServer, listeners: int
) -> None:
    """One script and one PUBLISH, however many listen."""
    settings.EVENTSOURCE_HISTORY = {**AWAY, "OPTIONS": {"HOSTS": [valkey_server.url]}}
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
            await asyncio.sleep(0.01)  # the next head check, with its own message, is far away
    streams = [EventStream("t", await get_history().alocate("t", None)) for _ in range(listeners)]
    await apublish("t", "ping", "0")
    for stream in streams:
        await until_it_has(stream, b"data: 0")
    before = calls(valkey_server)
    for n in range(1, 11):
        await apublish("t", "ping", str(n))
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


def calls(server: ValkeyServer) -> dict[str, int]:
    """How often each command was run."""
    stats = server.run("INFO", "commandstats")
    return {name.removeprefix("cmdstat_"): of["calls"] for name, of in stats.items()}
