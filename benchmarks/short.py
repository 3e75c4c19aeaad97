"""``python -m benchmarks.short``: figures that noise does not change. It fails on a regression.

Instructions are counted, not timed. Memory, threads, writes, statements and round trips are
numbers. The stores whose servers are not installed are left out. It takes less than a minute.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import django

from benchmarks import bare, contenders, counts, load, stores
from benchmarks.instructions import counted

LISTENERS = 50
EVENTS = 20
STREAMS = 400

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Sink:
    """Counts what is sent to all listeners, and waits for a number of writes.

    It is also the transport of all listeners.
    """

    def __init__(self) -> None:
        self.writes = 0
        self.bytes = 0

    async def send(self, message: dict[str, Any]) -> None:
        """Count one write."""
        self.writes += message["type"] == "http.response.body"
        self.bytes += len(message.get("body", b""))

    def write(self, data: bytes) -> None:
        """Count one write to the transport."""
        self.writes += 1
        self.bytes += len(data)

    def is_closing(self) -> bool:
        """Return that the connection is open."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return that the client has received everything."""
        return 0

    async def receive(self) -> dict[str, Any]:
        """Never report that the listener has disconnected."""
        await asyncio.Event().wait()
        return {}

    async def until(self, count: int) -> None:
        """Let the event loop run until there were so many writes."""
        async with asyncio.timeout(30):
            while self.writes < count:
                await asyncio.sleep(0)


class Cycle:
    """One request of a server with chunked bodies, whose transport is the sink."""

    response_complete = False

    def __init__(self, sink: Sink) -> None:
        self.transport = sink

    async def send(self, message: dict[str, Any]) -> None:
        """Write one chunk."""
        body = message["body"]
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


Cycle.send.__module__ = "uvicorn.protocols.http.h11_impl"


class Switches:
    """Counts how often an event loop switches to a task."""

    def __init__(self) -> None:
        self.count = 0
        self._loop: Any = asyncio.get_running_loop()
        self._call_soon = self._loop.call_soon

    def __enter__(self) -> Switches:
        self._loop.call_soon = self._count
        return self

    def __exit__(self, *exception: object) -> None:
        del self._loop.call_soon

    def _count(self, callback: Any, *args: Any, **options: Any) -> Any:
        self.count += isinstance(getattr(callback, "__self__", None), asyncio.Task)
        return self._call_soon(callback, *args, **options)


async def of_bare() -> float:
    """Count the instructions of a delivery by the bare application."""
    sink = Sink()
    tasks = [asyncio.ensure_future(bare.listen(sink.receive, sink.send)) for _ in range(LISTENERS)]
    await sink.until(LISTENERS)
    counts = []
    for n in range(EVENTS):
        with counted() as count:
            for queue in bare.listeners:
                queue.put_nowait(b"event: ping\ndata: %d\n\n" % n)
            await sink.until((n + 2) * LISTENERS)
        counts.append(count.instructions)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return median(counts) / LISTENERS


async def of_ours(*, to_transport: bool) -> dict[str, float]:
    """Count the instructions of a delivery by this app: single events, and a flood.

    :param to_transport: whether the server is one whose transport is written to.
    """
    from django_eventsource.asgi import Receiver, serve
    from django_eventsource.delivery.hub import get_hub
    from django_eventsource.delivery.layer import group_name
    from django_eventsource.history import Draft, get_history
    from django_eventsource.signals import Listener
    from django_eventsource.streaming.open_stream import OpenStream

    history, hub, sink = get_history(), get_hub(), Sink()
    position = await history.alocate("t", None)
    tasks = [
        asyncio.ensure_future(
            serve(
                OpenStream("t", position, listener=Listener(tokens=("t",))),
                Receiver(sink.receive),
                Cycle(sink).send if to_transport else sink.send,
            )
        )
        for _ in range(LISTENERS)
    ]
    await sink.until(LISTENERS)
    await asyncio.sleep(0.2)

    def publish(n: int) -> None:
        (entry,) = history.append("t", [Draft(action="ping", data=b"%d" % n)])
        hub._deliver(group_name("t"), entry.batch())

    counts = []
    for n in range(EVENTS):
        hub._feeds["t"]._coalescer._free_at = 0.0
        with counted() as count:
            publish(n)
            await sink.until((n + 2) * LISTENERS)
        counts.append(count.instructions)
    # Not the mean, because timers run in some of them, and in more of them on a busy machine.
    found = {"paced": median(counts) / LISTENERS}
    writes = sink.writes
    with Switches() as switches:
        for n in range(EVENTS):
            hub._feeds["t"]._coalescer._free_at = 0.0
            publish(n)
            await sink.until(writes + (n + 1) * LISTENERS)
    found["switches"] = switches.count / EVENTS / LISTENERS
    found["writes"] = (sink.writes - writes) / EVENTS / LISTENERS
    writes, before = sink.writes, sink.bytes
    hub._feeds["t"]._coalescer._free_at = 0.0
    with counted() as count:
        for n in range(EVENTS * 5):
            publish(n)
        while hub._feeds["t"]._coalescer._held or sink.writes == writes:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
    found["flood"] = count.instructions / (EVENTS * 5) / LISTENERS
    found["flood_writes"] = (sink.writes - writes) / LISTENERS
    assert sink.bytes > before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


def of_many() -> dict[str, float]:
    """Count the instructions of publish(), and of an event of publish_many() and of a replay."""
    from django_eventsource import publish, publish_many
    from django_eventsource.history import get_history

    items = [("many", "ping", "x" * 64)] * 1000
    publish_many(items)
    with counted() as count:
        publish_many(items)
    found = {"publish_many": count.instructions / len(items)}
    publish("one", "ping", "x" * 64)
    with counted() as count:
        publish("one", "ping", "x" * 64)
    found["publish"] = count.instructions
    history = get_history()
    with counted() as count:
        slice_ = history.read("many", history.newest("many")[0] - len(items))
        data = [batch.data for batch in slice_.batches]
    assert len(data) == 1
    found["replay"] = count.instructions / len(slice_.entries)
    return found


def of_servers() -> dict[str, float]:
    """Open streams on real servers: memory, threads and descriptors."""
    found = {}
    for name, contender in (("bare", contenders.BARE), ("ours", contenders.HANDED_OVER)):
        with contenders.run(contender) as running:
            common: dict[str, Any] = {
                "port": running.port,
                "listen": contender.listen,
                "pid": running.pids,
            }
            load.run(**common, listeners=STREAMS, idle=0.2)
            # Memory of the warm-up is used again. Four times the streams show the memory of one.
            result = load.run(**common, listeners=STREAMS * 4, idle=0.5)
        found[f"{name}_kib"] = result["rss_per_stream_kib"]
        found[f"{name}_threads"] = result["threads_after"]
        found[f"{name}_fds"] = result["fds"] / (STREAMS * 4)
    return found


def main() -> None:
    """Measure, compare, and print what exceeds its bound."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    os.environ["BENCH_MIDDLEWARE"] = "none"
    django.setup()
    least = asyncio.run(of_bare())
    ours = asyncio.run(of_ours(to_transport=True))
    send = asyncio.run(of_ours(to_transport=False))
    eager = sys.version_info >= (3, 12)
    many = of_many()
    servers = of_servers()
    requests = {name: stores.in_process("counts", name) for name in counts.installed()}
    rows = [
        ("instructions per delivery, against bare ASGI", ours["paced"] / least, 0.8),
        ("the same with send only", send["paced"] / least, 1.1 if eager else 1.5),
        ("task switches per delivery", ours["switches"], 0),
        ("the same with send only", send["switches"], 0.1 if eager else 1.1),
        ("writes per delivery", ours["writes"], 1),
        ("the same with send only", send["writes"], 1),
        ("instructions per delivery in a flood, against bare ASGI", ours["flood"] / least, 0.4),
        ("writes per listener of a flood of 100 events", ours["flood_writes"], 10),
        ("instructions of publish() into memory", many["publish"], 1700),
        ("instructions per event of publish_many()", many["publish_many"], 1200),
        ("instructions per event that is replayed", many["replay"], 300),
        (
            "memory per idle stream, against bare ASGI",
            servers["ours_kib"] / servers["bare_kib"],
            1.15,
        ),
        ("threads of a server with 1,600 streams", servers["ours_threads"], 4),
        ("open files per stream", servers["ours_fds"], 1.05),
        *counts.rows(requests),
    ]
    failed = False
    for what, value, most in rows:
        worse = value > most
        failed = failed or worse
        print(f"{'FAIL' if worse else ' ok '}  {what}: {value:.2f} (at most {most})")
    print(f"      (bare ASGI: {least:.0f} instructions; ours: {ours['paced']:.0f})")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
