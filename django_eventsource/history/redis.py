"""A history on Redis or Valkey Streams, for many machines.

Each append is one script, which runs as a whole: numbers are given and events are
written in the same order. All that belongs to a token expires by itself.

A token's keys:

- ``head``, a hash: ``last`` and ``closed`` (numbers), ``run`` (the server that gave them), and
  ``bytes`` (the sum over the values of the events that are kept);
- ``events``, a stream whose ids are the sequence numbers; ``redis_scripts`` says what the
  fields are. One is the place that an entry follows, where that is not the number before:
  it is in the first entry of a life (the floor) and in the first one after the server was
  started anew (the last number that survived);
- ``ids``, a hash: own id to number; ``present``, a hash: process to listeners.

A host's keys: ``project``, the fingerprint of the project that uses the prefix; ``floor``, a
hash with the floor, when it was made, and the epoch; and a lease of each process.

A life may begin with a floor that was renewed a moment before. A listener that was given
the newer one as its place is then told ``reset``: needless, but never a gap, since the
life's numbers are above both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from ..conf import number_error
from ..tokens import CONTROL_TOKEN, token_key
from ..troubles import Troubles
from .base import Draft, Entry, Found, Head, History, Slice, T
from .redis_entries import KINDS, follows, identities_of, milliseconds, unpack
from .redis_hosts import Host, Hosts
from .redis_scripts import APPEND, FIND, FLOOR, FORGET, LEASE, READ

troubles = Troubles(logging.getLogger("django_eventsource.history"))

DEFAULT_HOSTS = ("redis://127.0.0.1:6379",)
THREADS = 8
"""For the awaited calls of a process to one host."""
BATCH = 500
"""Tokens of which the listeners are written in one round trip."""
PRESENT_SECONDS = 86_400
"""How long the listeners of a token are kept. Leases are what counts."""
REWRITE_SECONDS = PRESENT_SECONDS / 2
"""After how long a process is asked to write all its listeners again."""
CLOCK_MARGIN = 1.0
"""Seconds that a server's clock may jump while an append is tried again."""


class RedisHistory(History):
    """Durable events in Redis or Valkey (5.0 or newer).

    :param HOSTS: the servers: URLs, (host, port) tuples, dictionaries with "address" or
        with keyword arguments of redis.Redis. A token is on one of them.
    :param PREFIX: what all keys begin with.
    :param TIMEOUT: seconds for which a call is tried again before it raises.
    """

    shared = True

    def __init__(
        self,
        *,
        HOSTS: Any = DEFAULT_HOSTS,  # noqa: N803
        PREFIX: str = "eventsource",  # noqa: N803
        TIMEOUT: float = 10,  # noqa: N803
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(PREFIX, str) or not PREFIX or set(PREFIX) & set("{}"):
            raise ImproperlyConfigured(
                "EVENTSOURCE_HISTORY PREFIX must be non-empty text without { and }, "
                f"not {PREFIX!r}."
            )
        number = isinstance(TIMEOUT, int | float) and not isinstance(TIMEOUT, bool)
        if not number or not 0 < TIMEOUT < float("inf"):
            raise number_error("EVENTSOURCE_HISTORY TIMEOUT", TIMEOUT, "a positive number")
        self.prefix = PREFIX
        self._hosts = Hosts(HOSTS, TIMEOUT, PREFIX)
        self.failures = (*self.failures, self._hosts.error)
        self._executors: dict[tuple[int, Host | None], ThreadPoolExecutor] = {}
        self._leases: dict[str, dict[Host, bytes]] = {}
        self._announced: dict[str, set[str]] = {}

    # Appending

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        if not drafts:
            return []
        host = self._host(token)
        ref = uuid.uuid4().hex
        keys = self._keys(token, "head", "events", "ids", f"ref:{ref}")
        max_age = milliseconds(self.max_age)
        bounds = [self.max_events, self.max_bytes, max_age * 1000]
        bounds += [max_age, milliseconds(self.token_max_age)]
        events = [
            field
            for draft in drafts
            for field in (draft.action, draft.data, draft.kind.value, draft.event_id or "")
        ]

        def attempt(elapsed: float | None) -> int:
            since = "" if elapsed is None else int((elapsed + CLOCK_MARGIN) * 1_000_000)
            first = host.run_once(APPEND, keys, ["", since, ref, *bounds, *events])
            if first is None:
                floor, _ = host.run_once(*self._floor_script())
                first = host.run_once(APPEND, keys, [floor, since, ref, *bounds, *events])
            return int(first)

        # Who logs out must get out: a word to end streams is not worth the whole time.
        first = host.again(attempt, patient=token != CONTROL_TOKEN)
        return [Entry(seq=first + n, draft=draft) for n, draft in enumerate(drafts)]

    # Reading

    def read(
        self, token: str, after: int, *, max_events: int = 500, max_bytes: int = 262_144
    ) -> Slice:
        host = self._host(token)
        keys = self._keys(token, "head", "events")
        found = host.run(READ, keys, [after + 1, max_events, max_bytes])
        if found is None:
            (floor, _), _ = self._with_floor(host, [])
            return Slice(complete=after == floor, last=floor)
        last = int(found[0])
        closed = found[1] is not None and int(found[1]) == last
        entries = tuple(unpack(found[3].split(), found[4]))
        if not entries:
            return Slice(complete=after == last, last=last, closed=closed)
        first = entries[0].seq
        # What a new run of numbers follows is said by its first event.
        complete = after in (first - 1, int(found[2] or first - 1))
        return Slice(
            entries=entries if complete else (), complete=complete, last=last, closed=closed
        )

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        heads: dict[str, Head] = {}
        for found in self._each(self._by_host(tokens), self._heads):
            heads.update(found)
        return heads

    async def aheads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Await :meth:`heads`, of all hosts at once: none waits for one that hangs."""
        by_host = self._by_host(tokens)
        calls = [self._run(host, self._heads, host, names) for host, names in by_host.items()]
        results = await asyncio.gather(*calls, return_exceptions=True)
        heads: dict[str, Head] = {}
        for found in self._without_failures(by_host, results):
            heads.update(found)
        return heads

    def _heads(self, host: Host, names: Sequence[str]) -> dict[str, Head]:
        commands = [("HMGET", *self._keys(token, "head"), "last") for token in names]
        (floor, epoch), rows = self._with_floor(host, commands)
        heads = {}
        for token, (last,) in zip(names, rows, strict=True):
            seq = floor if last is None else int(last)
            heads[token] = Head(seq=seq, life=last is not None, epoch=epoch)
        return heads

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        keys = self._keys(token, "head", "events", "ids")
        found = self._host(token).run(FIND, keys, [cursor, "" if seq is None else seq])
        if found is None:
            last, closed = self.newest(token)
            return Found(last=last, closed=closed, seq=seq, complete=seq == last)
        last, closed, place, kind, complete = found
        return Found(
            last=int(last),
            closed=None if closed is None else int(closed),
            seq=None if place is None else int(place),
            kind=None if kind is None else KINDS[kind],
            complete=bool(complete),
        )

    def newest(self, token: str) -> tuple[int, int | None]:
        command = ("HMGET", *self._keys(token, "head"), "last", "closed")
        (floor, _), ((last, closed),) = self._with_floor(self._host(token), [command])
        if last is None:
            return floor, None
        return int(last), None if closed is None else int(closed)

    def oldest(self, token: str) -> int:
        head, events = self._keys(token, "head", "events")
        commands = [("HGET", head, "last"), ("XRANGE", events, "-", "+", "COUNT", "1")]
        (floor, _), (last, rows) = self._with_floor(self._host(token), commands)
        if last is None:
            return floor
        return follows(*rows[0]) if rows else int(last)

    def _floor_script(self) -> tuple[Any, list[str], list[Any]]:
        half = milliseconds(self.token_max_age) * 500
        return FLOOR, [f"{self.prefix}:floor"], [uuid.uuid4().hex, half]

    def _with_floor(
        self, host: Host, commands: Sequence[Sequence[str]]
    ) -> tuple[tuple[int, str], list[Any]]:
        """Give the floor and the epoch, then what commands give, in one round trip.

        In this order: a floor that is newer than the rest could be above the first
        events of a life.
        """
        script, (key,), args = self._floor_script()
        (floor, epoch), *rows = host.pipe(commands, (script, key, args))
        return (int(floor), epoch.decode()), rows

    # Presence

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        # What fails on the way leaves no generation to rely on: the next call starts anew.
        known = self._leases.pop(process, {})
        leases: dict[Host, bytes] = {}

        def announce(host: Host, names: Sequence[str]) -> bool:
            args = [
                known.get(host, ""),
                uuid.uuid4().hex,
                milliseconds(seconds),
                int(REWRITE_SECONDS * 1_000_000),
            ]
            generation, kept = host.run(LEASE, [self._lease_key(process)], args)
            for start in range(0, len(names), BATCH):
                commands: list[Sequence[Any]] = []
                for token in names[start : start + BATCH]:
                    commands += self._write(process, generation, token, changes[token])
                host.pipe(commands)
            leases[host] = generation
            return bool(kept)

        kept = list(self._each(self._by_all_hosts(changes), announce))
        announced = self._announced.setdefault(process, set())
        announced.update(token for token, names in changes.items() if names)
        announced.difference_update(token for token, names in changes.items() if not names)
        self._leases[process] = leases
        return all(kept)

    def _write(
        self, process: str, generation: bytes, token: str, identities: Sequence[str]
    ) -> list[Sequence[Any]]:
        (key,) = self._keys(token, "present")
        if not identities:
            return [("HDEL", key, process)]
        # The generation has a fixed length: see _listeners.
        value = generation + json.dumps(list(identities)).encode()
        return [
            ("HSET", key, process, value),
            ("PEXPIRE", key, PRESENT_SECONDS * 1000),
        ]

    def present(self, token: str, *, elsewhere: str | None = None) -> list[str]:
        (found,) = self._listeners(self._host(token), [token])
        here = (elsewhere or "").encode()
        return [one for process, names in found.items() if process != here for one in names]

    def withdraw(self, process: str) -> None:
        self._leases.pop(process, None)
        tokens = self._announced.pop(process, ())

        def withdraw(host: Host, names: Sequence[str]) -> None:
            keys = [key for token in names for key in self._keys(token, "present")]
            ends = [("HDEL", key, process) for key in keys]
            host.pipe([("DEL", self._lease_key(process)), *ends])

        list(self._each(self._by_all_hosts(tokens), withdraw))

    def _listeners(self, host: Host, tokens: Sequence[str]) -> list[dict[bytes, list[str]]]:
        """Give each token's listeners by process, and remove what dead processes left."""
        keys = [self._keys(token, "present")[0] for token in tokens]
        rows = host.pipe([("HGETALL", key) for key in keys])
        processes = sorted({process for row in rows for process in row})
        leases = [("HGET", self._lease_key(name.decode()), "generation") for name in processes]
        valid = dict(zip(processes, host.pipe(leases) if leases else [], strict=True))
        found = []
        for key, row in zip(keys, rows, strict=True):
            fresh = {name: value for name, value in row.items() if value[:32] == valid[name]}
            # One that wrote anew meanwhile has another value, and stays.
            stale = [part for item in row.items() if item[0] not in fresh for part in item]
            if stale:
                host.run(FORGET, [key], stale)
            found.append({name: identities_of(value) for name, value in fresh.items()})
        return found

    # Trimming

    def prune(self) -> int:
        """Remove what dead processes left. Events go with appends, or expire: gives 0."""
        tokens = {token for names in list(self._announced.values()) for token in list(names)}

        def prune(host: Host, names: Sequence[str]) -> None:
            for start in range(0, len(names), BATCH):
                self._listeners(host, names[start : start + BATCH])

        list(self._each(self._by_host(tokens), prune))
        return 0

    # Keys

    def _keys(self, token: str, *names: str) -> list[str]:
        """Give keys of a token. The part in braces decides where a cluster keeps them."""
        key = token_key(token)
        return [f"{self.prefix}:{{{key}}}:{name}" for name in names]

    def _lease_key(self, process: str) -> str:
        return f"{self.prefix}:lease:{token_key(process)}"

    def _host(self, token: str) -> Host:
        return self._hosts.of(token_key(token))

    def _by_host(self, tokens: Iterable[str]) -> dict[Host, list[str]]:
        by_host: dict[Host, list[str]] = defaultdict(list)
        for token in dict.fromkeys(tokens):
            by_host[self._host(token)].append(token)
        return by_host

    def _by_all_hosts(self, tokens: Iterable[str]) -> dict[Host, list[str]]:
        """Give the tokens of each host, also of those that have none of these."""
        by_host = self._by_host(tokens)
        return {host: by_host.get(host, []) for host in self._hosts.all}

    # Running

    def _each(
        self, by_host: Mapping[Host, list[str]], work: Callable[[Host, list[str]], T]
    ) -> Iterator[T]:
        """Do the same on several hosts, whichever of them are away."""
        results: list[T | BaseException] = []
        for host, names in by_host.items():
            try:
                results.append(work(host, names))
            except self._hosts.error as error:
                results.append(error)
        return self._without_failures(by_host, results)

    def _without_failures(
        self, hosts: Iterable[Host], results: Sequence[T | BaseException]
    ) -> Iterator[T]:
        """Give what came of the hosts that could be reached.

        :raises redis.exceptions.RedisError: when none could.
        """
        failures = [
            (host, result)
            for host, result in zip(hosts, results, strict=True)
            if isinstance(result, BaseException)
        ]
        for host, error in failures:
            if len(failures) == len(results) or not isinstance(error, self._hosts.error):
                raise error
            troubles.tell(
                "The host %r of the history is away; the others go on.", host.name, error
            )
        return (result for result in results if not isinstance(result, BaseException))

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run in threads of the history's own: a server that hangs holds up nothing else."""
        return await self._run(None, func, *args, **kwargs)

    async def call_for(self, token: str, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run in threads of the token's host: no other's that hangs holds it up."""
        return await self._run(self._host(token), func, *args, **kwargs)

    async def _run(
        self, host: Host | None, func: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        # The threads of a process do not live on in its fork.
        key = os.getpid(), host
        executor = self._executors.get(key)
        if executor is None:
            made = ThreadPoolExecutor(THREADS, thread_name_prefix="eventsource-redis")
            executor = self._executors.setdefault(key, made)
        work = partial(func, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(executor, work)
