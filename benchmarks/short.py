"""``python -m benchmarks.short``: what noise cannot flip; it fails on a regression.

Instructions are counted, not timed; memory, threads, writes, reads and round trips are
numbers. It takes less than a minute.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import django

from benchmarks import bare, contenders, load
from benchmarks.instructions import counted

LISTENERS = 50
EVENTS = 20
STREAMS = 400

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Sink:
    """Takes what is sent to all listeners, and waits for so many writes."""

    def __init__(self) -> None:
        self.writes = 0
        self.bytes = 0

    async def send(self, message: dict[str, Any]) -> None:
        """Take one write."""
        self.writes += message["type"] == "http.response.body"
        self.bytes += len(message.get("body", b""))

    async def receive(self) -> dict[str, Any]:
        """Never say that the listener has gone."""
        await asyncio.Event().wait()
        return {}

    async def until(self, count: int) -> None:
        """Let the loop run until there were so many writes."""
        async with asyncio.timeout(30):
            while self.writes < count:
                await asyncio.sleep(0)


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


async def of_ours() -> dict[str, float]:
    """Count those of ours: events one by one, and in a flood."""
    from django_eventsource.asgi import Receiver, serve
    from django_eventsource.history import Draft, get_history
    from django_eventsource.hub import get_hub
    from django_eventsource.streams import EventStream
    from django_eventsource.tokens import group_name

    history, hub, sink = get_history(), get_hub(), Sink()
    position = await history.alocate("t", None)
    tasks = [
        asyncio.ensure_future(serve(EventStream("t", position), Receiver(sink.receive), sink.send))
        for _ in range(LISTENERS)
    ]
    await sink.until(LISTENERS)
    await asyncio.sleep(0.2)

    def publish(n: int) -> None:
        (entry,) = history.append("t", [Draft(action="ping", data=b"%d" % n)])
        message = {"group": group_name("t"), "seq": entry.seq, "finish": False}
        hub._take(message | {"type": "eventsource.frame", "frames": [entry.frame()]})

    counts = []
    for n in range(EVENTS):
        hub._feeds["t"].free_at = 0.0
        with counted() as count:
            publish(n)
            await sink.until((n + 2) * LISTENERS)
        counts.append(count.instructions)
    # Not the mean: timers go off in some of them, in more on a machine that is busy.
    found = {"paced": median(counts) / LISTENERS}
    writes, before = sink.writes, sink.bytes
    hub._feeds["t"].free_at = 0.0
    with counted() as count:
        for n in range(EVENTS * 5):
            publish(n)
        while hub._feeds["t"]._held or sink.writes == writes:
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
    """Count those of an event that is published with many, and of one that is replayed."""
    from django_eventsource import publish_many
    from django_eventsource.history import get_history

    items = [("many", "ping", "x" * 64)] * 1000
    publish_many(items)
    with counted() as count:
        publish_many(items)
    found = {"publish_many": count.instructions / len(items)}
    history = get_history()
    with counted() as count:
        slice_ = history.read("many", history.oldest("many"))
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
            # What warming up left is used again: more streams than that show what one takes.
            result = load.run(**common, listeners=STREAMS * 4, idle=0.5)
        found[f"{name}_kib"] = result["rss_per_stream_kib"]
        found[f"{name}_threads"] = result["threads_after"]
        found[f"{name}_fds"] = result["fds"] / (STREAMS * 4)
    return found


def main() -> None:
    """Measure, compare, and say what is too much."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    os.environ["BENCH_MIDDLEWARE"] = "none"
    django.setup()
    least = asyncio.run(of_bare())
    ours = asyncio.run(of_ours())
    many = of_many()
    servers = of_servers()
    rows = [
        ("instructions per delivery, against bare ASGI", ours["paced"] / least, 1.4),
        ("instructions per delivery in a flood, against bare ASGI", ours["flood"] / least, 0.4),
        ("writes per listener of a flood of 100 events", ours["flood_writes"], 10),
        ("instructions per event of publish_many()", many["publish_many"], 1200),
        ("instructions per event that is replayed", many["replay"], 300),
        (
            "memory per idle stream, against bare ASGI",
            servers["ours_kib"] / servers["bare_kib"],
            1.25,
        ),
        ("threads of a server with 1,600 streams", servers["ours_threads"], 4),
        ("open files per stream", servers["ours_fds"], 1.05),
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
