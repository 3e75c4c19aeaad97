"""A history on Redis or Valkey Streams, for many machines.

Each append is one script. A server runs a script as a whole, so events are written in the order
of their sequence numbers. All keys of a token expire.

The keys of a token:

- ``head``, a hash: ``last``, ``closed``, ``closed_before`` and ``whole`` (the sequence numbers of
  the newest event, of the last two closes and of the last event of the kind ``WHOLE``), ``run``
  (the run id of the server that assigned them), ``bytes`` (the sum over the values of the events
  that are kept), and ``oldest`` (the time of the oldest of these, in microseconds);
- ``events``, a stream whose ids are the sequence numbers. :mod:`.scripts` describes the fields.
  One of them is the position that an entry follows. It is set only where that is not the
  sequence number before: in the first entry of an epoch (the floor), and in the first entry
  after the server was restarted (the last sequence number that the server still had);
- ``ids``, a hash from own id to sequence number;
- ``keys``, a hash from the key of an event to its sequence number. The key is a digest of what the
  publisher passed. An event of the outbox without a key has its reference as its key;
- ``present``, a hash from process to listeners.

The keys of a server: ``project``, the fingerprint of the project that uses the prefix;
``floor``, a hash with the floor, the time when it was made, and the generation of the store;
``changes``, a stream with the tokens of the last appends, which a cluster does not have; and the
lease of each process.

An append may begin an epoch with a floor that another process has renewed since. A listener at
the newer floor then receives a ``reset`` that it does not need. It misses no event, because the
sequence numbers of the epoch are above both floors.
"""

import asyncio
import json
import logging
import secrets
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, Error, connections

from ..._logging import ThrottledLogger
from ...conf import check_flag, check_positive
from ...protocol.tokens import token_key
from ..base import READ_BYTES, READ_EVENTS, History, T, check_using
from ..outbox import Outbox, draft_of, settle_batches
from ..records import Draft, Entry, Found, Head, RowEntries, Slice
from ..transaction_retries import in_transaction
from .codec import (
    KINDS,
    bounds_argument,
    entry_of,
    event_arguments,
    milliseconds,
    times_of,
    unpack,
)
from .scripts import APPEND, FIND, FLOOR, LEASE, NOW, READ, REMOVE, REWIND, STORED
from .servers import Host, Hosts

throttled = ThrottledLogger(logging.getLogger("django_eventsource.history"))

__all__ = ["RedisHistory"]

THREADS = 8
"""The number of threads for the awaited calls of a process to one server."""
BATCH = 500
"""The number of tokens whose listeners are written or read in one round trip."""
PRESENT_SECONDS = 86_400
"""Seconds after which the listeners of a token expire. They count only with a valid lease."""
REWRITE_SECONDS = PRESENT_SECONDS / 2
"""Seconds after which a process must announce all its listeners again."""
CLOCK_MARGIN = 1.0
"""Seconds by which a server's clock may jump between two attempts of an append."""
MOVE_SECONDS = 0.1
"""Seconds for which a failing append of pending events is repeated, while their rows are locked.

The next history check tries again."""
HEAD_CHECK_PATIENCE = 0.5
"""Seconds for which a head check repeats a transaction that settles pending events."""
CHANGES = 500
"""The number of appends since the last history check after which it checks all tokens."""


class RowsTaken(Exception):
    """Another settler has stored some of the pending events that this one has read."""


class RedisHistory(History):
    """Durable events in Redis or Valkey (5.0 or newer).

    :param HOSTS: the servers: URLs, (host, port) tuples, and dictionaries with "address" or with
        keyword arguments of redis.Redis. Each token is stored on one of them.
    :param PREFIX: the text with which all keys begin.
    :param TIMEOUT: seconds after which a failing call is not repeated any more.
    :param OUTBOX: whether the events of a transaction are stored with it in the database, and
        moved to the server after the commit.
    :param USING: the alias of the database whose transactions count.
    :param options: the options of :class:`~django_eventsource.history.History`.
    :raises ImproperlyConfigured: if an option is not acceptable or redis-py is not installed.
    """

    shared = True

    def __init__(
        self,
        *,
        HOSTS: Any = ("redis://127.0.0.1:6379",),  # noqa: N803
        PREFIX: str = "eventsource",  # noqa: N803
        TIMEOUT: float = 10,  # noqa: N803
        OUTBOX: bool = False,  # noqa: N803
        USING: str = DEFAULT_DB_ALIAS,  # noqa: N803
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(PREFIX, str) or not PREFIX or set(PREFIX) & set("{}"):
            raise ImproperlyConfigured(
                "EVENTSOURCE_HISTORY PREFIX must be non-empty text without { and }, "
                f"not {PREFIX!r}."
            )
        check_positive("EVENTSOURCE_HISTORY TIMEOUT", TIMEOUT)
        check_flag("EVENTSOURCE_HISTORY OUTBOX", OUTBOX)
        self.using = check_using(USING)
        self.has_outbox = OUTBOX
        self._outbox = Outbox(USING) if OUTBOX else None
        if self._outbox is not None:
            self._outbox.batch_bytes = min(self._outbox.batch_bytes, self.max_bytes)
        # The tokens of which this process could not settle events, with the last failure of each.
        self._unsettled: dict[str, object] = {}
        self._unsettled_lock = threading.Lock()
        self.prefix = PREFIX
        self._changes_key = f"{PREFIX}:changes"
        self._hosts = Hosts(HOSTS, TIMEOUT, PREFIX)
        self.storage_errors = (Error, self._hosts.error)
        # The key None is for calls that are not bound to one server.
        self._executors = {
            host: ThreadPoolExecutor(THREADS, thread_name_prefix="eventsource-redis")
            for host in (None, *self._hosts.all)
        }
        self._leases: dict[str, dict[Host, bytes]] = {}
        self._announced: dict[str, set[str]] = {}

    @property
    def hosts(self) -> Sequence[Host]:
        """The servers of the history."""
        return self._hosts.all

    # Appending

    def append(self, token: str, drafts: Sequence[Draft]) -> list[Entry]:
        if not drafts:
            return []
        if token in self._unsettled:
            # Events that this process could not settle before must not be overtaken.
            self._settle(token)
        host = self._host(token)
        ref = secrets.token_hex(16)

        def attempt(began: float | None) -> list[Entry]:
            since = 0 if began is None else self._time_of_server(host, token, began)
            return self._append(host, token, drafts, [draft.key for draft in drafts], ref, since)

        # A logout publishes an internal event, and must not wait for the whole time-out.
        return host.retry(attempt, patient=not drafts[0].internal)

    def _time_of_server(self, host: Host, token: str, began: float) -> int:
        """Return the server's clock, in microseconds, at a time of this process or earlier.

        A time of the server, and not the age of the attempt: a paused server runs an attempt long
        after it was sent.

        :param began: the time, as :func:`time.monotonic` gives it.
        """
        now = int(host.run_once(NOW, self._keys(token, "head"), []))
        # The response may be late, so the age is measured after it.
        age = time.monotonic() - began + CLOCK_MARGIN
        return now - int(age * 1_000_000)

    def _append(
        self,
        host: Host,
        token: str,
        drafts: Sequence[Draft],
        keys: Sequence[str | None],
        ref: str,
        since: int = 0,
    ) -> list[Entry]:
        """Run the APPEND script.

        :param keys: the key of each event, or ``None`` for each.
        :param since: a time of the server's clock, in microseconds, before the first attempt, or
            0 in the first attempt.
        """
        names = self._keys(token, "head", "events", "ids", f"ref:{ref}", "keys")
        bounds = bounds_argument(self.max_events, self.max_bytes, self.max_age, self.token_max_age)
        events: list[Any] = []
        for draft, key in zip(drafts, keys, strict=True):
            events += *event_arguments(draft), key or ""

        def run(floor: int) -> Any:
            args = [ref, token, f"{bounds} {floor} {since}", *events]
            return host.run_with_log(APPEND, names, self._changes_key, args)

        found = run(0)
        if found is None:
            floor, _ = host.run_once(*self._floor_script())
            found = run(int(floor))
        if keys[0] is None:
            first = int(found)
            return [Entry(seq=first + n, draft=draft) for n, draft in enumerate(drafts)]
        lines = found.decode().split("\n")
        return [entry_of(draft, line) for draft, line in zip(drafts, lines, strict=True)]

    # The outbox

    def stage(self, token: str, drafts: Sequence[Draft]) -> Callable[[], Sequence[Entry | None]]:
        if self._outbox is None:
            return super().stage(token, drafts)
        refs = self._outbox.add(token, drafts)
        return partial(self._settle_and_find, token, drafts, refs)

    def _settle_and_find(
        self, token: str, drafts: Sequence[Draft], refs: Sequence[uuid.UUID]
    ) -> list[Entry | None]:
        """Settle staged events and return their entries, also if another process settled them."""
        try:
            settled = self._settle(token, refs)
        except self.storage_errors as error:
            with self._unsettled_lock:
                self._unsettled[token] = object()
            error.add_note(
                f"The events of {token!r} stay in the outbox. The next history check tries again."
            )
            raise
        pairs = list(zip(drafts, refs, strict=True))
        missing = [(draft, ref) for draft, ref in pairs if ref not in settled]
        if missing:
            args = [arg for draft, ref in missing for arg in _key_and_ref(draft, ref)]
            found = self._host(token).run(STORED, self._keys(token, "events", "keys"), args)
            for (draft, ref), line in zip(missing, found.decode().split("\n"), strict=True):
                if line:
                    settled[ref] = entry_of(draft, line)
        return [settled.get(ref) for ref in refs]

    def _settle_pending(self) -> None:
        """Settle what committed transactions left in the outbox. Failures are logged."""
        if self._outbox is None:
            return
        errors: tuple[type[Exception], ...] = (*self.storage_errors, ValueError)
        failed: set[Host] = set()
        failures = dict(self._unsettled)
        try:
            tokens = self._outbox.tokens()
        except Error as error:
            throttled.error("Reading the outbox of the Redis history failed.", error=error)
            return
        if not tokens:
            self._forget(failures)
        for token in tokens:
            host = self._host(token)
            if host in failed:
                continue
            try:
                self._settle(token, patience=HEAD_CHECK_PATIENCE)
            except errors as error:
                throttled.error(
                    "Assigning sequence numbers to pending events of %r failed; retrying.",
                    token,
                    error=error,
                )
                if host.is_transient(error):
                    failed.add(host)

    def _forget(self, failures: Mapping[str, object]) -> None:
        """Forget failures after which all events were settled, but no newer failures."""
        with self._unsettled_lock:
            for token, failure in failures.items():
                if self._unsettled.get(token) is failure:
                    del self._unsettled[token]

    def _settle_pending_and_close(self) -> None:
        """Settle in a thread in which no request ends, so that Django closes no connection."""
        try:
            self._settle_pending()
        finally:
            connections[self.using].close_if_unusable_or_obsolete()

    async def _asettle_pending(self) -> None:
        if self._outbox is not None:
            await sync_to_async(self._settle_pending_and_close)()

    def _settle(
        self, token: str, refs: Sequence[uuid.UUID] = (), *, patience: float | None = None
    ) -> dict[uuid.UUID, Entry]:
        """Settle the pending events of a token, the oldest first.

        :param refs: the references of the events after which to return, unless this process could
            not settle earlier ones; empty to settle all.
        :param patience: as in :func:`in_transaction`.
        :returns: the entries of the events that this call settled, by reference.
        """
        assert self._outbox is not None
        host = self._host(token)
        if host.is_unreachable:
            # A silent server is detected here, before rows are locked, which on SQLite would stop
            # every writer of the database.
            host.run(*self._floor_script())
        batch = partial(self._settle_batch, self._outbox, host, token, patience)
        failure = self._unsettled.get(token)
        if failure is None:
            return settle_batches(batch, refs)
        settled = settle_batches(batch)
        self._forget({token: failure})
        return settled

    def _settle_batch(
        self, outbox: Outbox, host: Host, token: str, patience: float | None
    ) -> tuple[dict[uuid.UUID, Entry], bool]:
        """Settle the oldest pending events; return them, and whether there may be more.

        The transaction deletes the rows before it appends their events, so that other settlers
        wait for it. If it is rolled back after the append, the next settler appends the same
        events again, and the script finds them by their keys.
        """
        rows, more = outbox.oldest(token)
        if not rows:
            return {}, more
        batch = rows[:1]
        if not rows[0].idempotency_key:
            # An append may not trim its own events, because they would not be found again. So its
            # bytes are bounded too.
            batch = list(takewhile(lambda row: not row.idempotency_key, rows[: self.max_events]))
        drafts = [draft_of(row) for row in batch]
        pairs = [_key_and_ref(draft, row.ref) for draft, row in zip(drafts, batch, strict=True)]
        keys, ref = [key for key, _ in pairs], pairs[0][1]

        def move() -> list[Entry]:
            if outbox.remove([row.pk for row in batch]) < len(batch):
                raise RowsTaken
            return host.retry(
                lambda _: self._append(host, token, drafts, keys, ref), seconds=MOVE_SECONDS
            )

        try:
            entries = in_transaction(self.using, move, patience=patience)
        except RowsTaken:
            return {}, True
        settled = {row.ref: entry for row, entry in zip(batch, entries, strict=True)}
        return settled, more or len(batch) < len(rows)

    # Reading

    def read(
        self,
        token: str,
        after: int,
        *,
        max_events: int = READ_EVENTS,
        max_bytes: int = READ_BYTES,
        times: bool = False,
    ) -> Slice:
        host = self._host(token)
        keys = self._keys(token, "head", "events")
        found = host.run(READ, keys, [after + 1, max_events, max_bytes])
        if found is None:
            (floor, _), _ = self._with_floor(host, [])
            return Slice(complete=after == floor, last=floor)
        last = int(found[0])
        closed = found[1] is not None and int(found[1]) == last
        lengths = found[3].split()
        rows = unpack(lengths, found[4])
        if not rows:
            return Slice(complete=after == last, last=last, closed=closed)
        first = rows[0][0]
        # The first event of an epoch or of a server's run contains the position it follows.
        complete = after in (first - 1, int(found[2] or first - 1))
        entries = RowEntries(rows, times_of(lengths) if times else None)
        return Slice(entries=entries, complete=complete, last=last, closed=closed)

    def heads(self, tokens: Iterable[str]) -> dict[str, Head]:
        self._settle_pending()
        results = self._each(self._by_host(tokens), self._heads)
        return {token: head for heads in results for token, head in heads.items()}

    async def aheads(self, tokens: Iterable[str]) -> dict[str, Head]:
        """Await :meth:`heads`, with all servers in parallel."""
        await self._asettle_pending()
        results = await self._aeach(self._by_host(tokens), self._heads)
        return {token: head for heads in results for token, head in heads.items()}

    def _heads(self, host: Host, names: Sequence[str]) -> dict[str, Head]:
        commands = [("HMGET", *self._keys(token, "head"), "last") for token in names]
        (floor, generation), rows = self._with_floor(host, commands)
        heads = {}
        for token, (last,) in zip(names, rows, strict=True):
            seq = floor if last is None else int(last)
            heads[token] = Head(seq=seq, has_epoch=last is not None, generation=generation)
        return heads

    def changes(self, since: Any) -> tuple[Any, dict[str, Head] | None]:
        self._settle_pending()
        work = partial(self._changes, since or {})
        return self._merge(self._each(self._by_all_hosts(()), work))

    async def achanges(self, since: Any) -> tuple[Any, dict[str, Head] | None]:
        """Await :meth:`changes`, with all servers in parallel."""
        await self._asettle_pending()
        work = partial(self._changes, since or {})
        return self._merge(await self._aeach(self._by_all_hosts(()), work))

    def _changes(
        self, since: Mapping[Host, bytes], host: Host, names: Sequence[str]
    ) -> tuple[Host, bytes | None, dict[str, Head] | None]:
        """Return the id of the newest entry in the log of a server, and the changed heads.

        If the entry that was the newest one is still there, so are all later ones.
        """
        if host.is_cluster:
            return host, None, None
        commands: list[Sequence[Any]] = [("XREVRANGE", self._changes_key, "+", "-", "COUNT", 1)]
        known = since.get(host)
        if known is not None:
            commands.append(("XRANGE", self._changes_key, known, "+", "COUNT", CHANGES + 2))
        (_, generation), (newest, *found) = self._with_floor(host, commands)
        last = newest[0][0] if newest else None
        entries = found[0] if found else []
        if not entries or entries[0][0] != known or len(entries) > CHANGES + 1:
            return host, last, None
        heads = {
            token.decode(): Head(seq=int(seq), has_epoch=True, generation=generation)
            for _, fields in entries[1:]
            for token, seq in fields.items()
        }
        return host, last, heads

    def _merge(
        self, results: Sequence[tuple[Host, bytes | None, dict[str, Head] | None]]
    ) -> tuple[dict[Host, bytes], dict[str, Head] | None]:
        """Return what :meth:`changes` returns, from what each server returned that responds."""
        since = {host: last for host, last, _ in results if last is not None}
        heads: dict[str, Head] = {}
        for _, _, changed in results:
            if changed is None:
                return since, None
            heads |= changed
        return since, heads if len(results) == len(self._hosts.all) else None

    def find(self, token: str, cursor: str, seq: int | None) -> Found:
        keys = self._keys(token, "head", "events", "ids")
        found = self._host(token).run(FIND, keys, [cursor, "" if seq is None else seq])
        if found is None:
            last, closed = self.newest(token)
            return Found(last=last, closed=closed, seq=seq, complete=seq == last)
        last, closed, position, kind, complete = found
        return Found(
            last=int(last),
            closed=None if closed is None else int(closed),
            seq=None if position is None else int(position),
            kind=None if kind is None else KINDS[kind],
            complete=bool(complete),
        )

    def rewind(self, token: str, max_events: int, max_seconds: float | None) -> int | None:
        max_age = "" if max_seconds is None else milliseconds(max_seconds) * 1000
        keys = self._keys(token, "head", "events")
        before = self._host(token).run(REWIND, keys, [max_events, max_age])
        return None if before is None else int(before)

    def newest(self, token: str) -> tuple[int, int | None]:
        command = ("HMGET", *self._keys(token, "head"), "last", "closed")
        (floor, _), ((last, closed),) = self._with_floor(self._host(token), [command])
        if last is None:
            return floor, None
        return int(last), None if closed is None else int(closed)

    def _floor_script(self) -> tuple[Any, list[str], list[Any]]:
        half = milliseconds(self.token_max_age) * 500
        return FLOOR, [f"{self.prefix}:floor"], [uuid.uuid4().hex, half]

    def _with_floor(
        self, host: Host, commands: Sequence[Sequence[Any]]
    ) -> tuple[tuple[int, str], list[Any]]:
        """Return the floor and the store's generation, and the results of commands.

        One round trip reads them. The floor is read first, because a floor that is newer than the
        results could be above the first events of an epoch.
        """
        (floor, generation), *rows = host.pipe(commands, self._floor_script())
        return (int(floor), generation.decode()), rows

    # Presence

    def announce(self, process: str, changes: Mapping[str, Sequence[str]], seconds: float) -> bool:
        # If this call fails half way, the next one announces all listeners again.
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

        kept = self._each(self._by_all_hosts(changes), announce)
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
        # _listeners() relies on the 32 characters of a lease's generation.
        value = generation + json.dumps(list(identities)).encode()
        return [
            ("HSET", key, process, value),
            ("PEXPIRE", key, PRESENT_SECONDS * 1000),
        ]

    def present(self, token: str, *, exclude_process: str | None = None) -> list[str]:
        (found,) = self._listeners(self._host(token), [token])
        excluded = (exclude_process or "").encode()
        return [name for process, names in found.items() if process != excluded for name in names]

    def withdraw(self, process: str) -> None:
        self._leases.pop(process, None)
        tokens = self._announced.pop(process, ())

        def withdraw(host: Host, names: Sequence[str]) -> None:
            keys = [key for token in names for key in self._keys(token, "present")]
            ends = [("HDEL", key, process) for key in keys]
            host.pipe([("DEL", self._lease_key(process)), *ends])

        self._each(self._by_all_hosts(tokens), withdraw)

    def _listeners(self, host: Host, tokens: Sequence[str]) -> list[dict[bytes, list[str]]]:
        """Return each token's listeners by process, and remove those without a valid lease."""
        keys = [self._keys(token, "present")[0] for token in tokens]
        rows = host.pipe([("HGETALL", key) for key in keys])
        processes = sorted({process for row in rows for process in row})
        leases = [("HGET", self._lease_key(name.decode()), "generation") for name in processes]
        valid = dict(zip(processes, host.pipe(leases) if leases else [], strict=True))
        found = []
        for key, row in zip(keys, rows, strict=True):
            fresh = {name: value for name, value in row.items() if value[:32] == valid[name]}
            # A process that has written since has another value, which is not removed.
            stale = [part for item in row.items() if item[0] not in fresh for part in item]
            if stale:
                host.run(REMOVE, [key], stale)
            found.append({name: json.loads(value[32:]) for name, value in fresh.items()})
        return found

    # Trimming

    def prune(self) -> int:
        """Remove the listeners of expired leases.

        Appends trim the events, and the server removes those that expire.

        :returns: 0.
        :raises storage_errors: if the store fails.
        """
        tokens = {token for names in list(self._announced.values()) for token in list(names)}

        def prune(host: Host, names: Sequence[str]) -> None:
            for start in range(0, len(names), BATCH):
                self._listeners(host, names[start : start + BATCH])

        self._each(self._by_host(tokens), prune)
        return 0

    # Keys

    def _keys(self, token: str, *names: str) -> list[bytes]:
        """Return keys of a token. A cluster chooses the node by the part in braces."""
        key = token_key(token)
        # As bytes, because redis-py takes longer to encode a text.
        return [f"{self.prefix}:{{{key}}}:{name}".encode() for name in names]

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
        """Return the tokens by server, with every server."""
        by_host = self._by_host(tokens)
        return {host: by_host.get(host, []) for host in self._hosts.all}

    # Running

    def _each(
        self, by_host: Mapping[Host, list[str]], work: Callable[[Host, list[str]], T]
    ) -> list[T]:
        """Call a function for several servers; skip those that fail, unless all of them do."""
        results: list[T | BaseException] = []
        for host, names in by_host.items():
            try:
                results.append(work(host, names))
            except self._hosts.error as error:
                results.append(error)
        return self._without_failures(by_host, results)

    async def _aeach(
        self, by_host: Mapping[Host, list[str]], work: Callable[[Host, list[str]], T]
    ) -> list[T]:
        """Await :meth:`_each`, with all servers in parallel."""
        calls = [self._run(host, work, host, names) for host, names in by_host.items()]
        return self._without_failures(
            by_host, await asyncio.gather(*calls, return_exceptions=True)
        )

    def _without_failures(
        self, hosts: Iterable[Host], results: Sequence[T | BaseException]
    ) -> list[T]:
        """Return the results of the servers that did not fail.

        :raises redis.exceptions.RedisError: if all of them failed.
        """
        failures = [
            (host, result)
            for host, result in zip(hosts, results, strict=True)
            if isinstance(result, BaseException)
        ]
        for host, error in failures:
            if len(failures) == len(results) or not isinstance(error, self._hosts.error):
                raise error
            throttled.error(
                "Redis server %r of the history failed. Other servers are not affected.",
                host.name,
                error=error,
            )
        return [result for result in results if not isinstance(result, BaseException)]

    async def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in a thread of the history.

        A server that does not respond delays neither the event loop nor Django's own threads.

        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return await self._run(None, func, *args, **kwargs)

    async def call_for(self, token: str, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in a thread for the server that stores a token.

        A server that does not respond delays no call to other servers.

        :param token: the token.
        :param func: the function to call with ``args`` and ``kwargs``.
        :returns: what the function returns.
        """
        return await self._run(self._host(token), func, *args, **kwargs)

    async def _run(
        self, host: Host | None, func: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        work = partial(func, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executors[host], work)


def _key_and_ref(draft: Draft, ref: uuid.UUID) -> tuple[str, str]:
    """Return the key with which a pending event is appended once, and the append's reference."""
    return (draft.key, ref.hex) if draft.key else (ref.hex, "")
