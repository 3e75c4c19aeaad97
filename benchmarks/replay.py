"""Replay of many events through a stream, against fetching the same rows with the bare driver.

``python -m benchmarks.replay NAME ROUNDS`` prints one JSON object. NAME is ``sqlite``,
``postgresql`` or ``redis``. The replay and the driver alternate, so each ratio compares figures of
the same time. All of it runs on one processor, because a replay reads in another thread than the
driver, and the processors of a shared machine differ in speed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.stores import replay, store

NAMES = ("postgresql", "sqlite", "redis")
EVENTS = 10_000
TOKEN = "replayed"
GOAL = 0.6


def use_one_processor() -> None:
    """Use one processor for all threads, and for the processes that are started later."""
    if hasattr(os, "sched_setaffinity"):  # on Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def fetch_rows() -> Callable[[], Sequence[object]]:
    """Return a function that fetches the rows of a token with the driver of the database."""
    from django.db import connection

    from django_eventsource.models import StoredEvent, TokenHead

    head = TokenHead.objects.get(token=TOKEN).pk
    events = StoredEvent.objects.filter(head=head).order_by("seq")
    query = events.values_list("seq", "action", "data", "event_id", "kind").query
    sql, params = query.sql_with_params()
    if connection.vendor == "sqlite":
        sql = sql.replace("%s", "?")
    connection.ensure_connection()
    driver = type(connection.connection)
    if connection.vendor == "sqlite":
        bare = driver(connection.settings_dict["NAME"])
    else:
        bare = driver.connect(connection.connection.info.dsn)

    def fetch() -> Sequence[object]:
        cursor = bare.cursor()
        cursor.execute(sql, params)
        rows: list[object] = cursor.fetchall()
        return rows

    return fetch


def fetch_entries() -> Callable[[], Sequence[object]]:
    """Return a function that fetches the entries of a token with the client of Redis."""
    from redis import Redis

    from django_eventsource.history import get_history

    (key,) = get_history()._keys(TOKEN, "events")  # type: ignore[attr-defined]
    client = Redis.from_url(os.environ["BENCH_REDIS"])

    def fetch() -> Sequence[object]:
        entries: list[object] = client.xrange(key)  # type: ignore[assignment]
        return entries

    return fetch


async def measure(rounds: int, fetch: Callable[[], Sequence[object]]) -> dict[str, float]:
    """Return the events a second of both, and the median of the ratios of each round."""
    rates: list[tuple[float, float]] = []
    for n in range(rounds + 1):
        replayed = await replay(TOKEN, EVENTS)
        began = time.perf_counter()
        rows = fetch()
        fetched = len(rows) / (time.perf_counter() - began)
        if len(rows) < EVENTS:
            raise RuntimeError(f"{len(rows)} rows were fetched.")
        if n:  # not the first round, which opens connections
            rates.append((replayed, fetched))
    return {
        "replayed_per_second": median(a for a, _ in rates),
        "fetched_per_second": median(b for _, b in rates),
        "ratio": median(a / b for a, b in rates),
    }


def rows(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return the rows of the table of goals."""
    return [
        (
            f"replay of {EVENTS:,} events, against fetching them with the driver: {name}",
            result["ratio"],
            f"at least {GOAL:.2f}",
        )
        for name, result in found.items()
    ]


def main(name: str = "sqlite", rounds: str = "10") -> None:
    """Measure one history."""
    if name not in NAMES:
        sys.exit(f"{name!r}: one of {', '.join(NAMES)} is needed.")
    use_one_processor()
    with store(name):
        from django_eventsource import publish_many

        publish_many([(TOKEN, "ping", "x" * 64)] * EVENTS)
        fetch = fetch_entries() if name == "redis" else fetch_rows()
        result = asyncio.run(measure(int(rounds), fetch))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
