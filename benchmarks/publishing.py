"""What publishing costs, against the least that the same store can do in the same process.

A database is compared with one insert of Django's ORM: of a small row, with two indexes, or of a
row like that of an event. Redis is compared with a script that adds one entry.

``python -m benchmarks.publishing NAME ROUNDS`` prints one JSON object. NAME is ``sqlite``,
``postgresql`` or ``redis``. The works alternate in rounds of a fraction of a second, so each
ratio compares figures of the same time.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any
from uuid import uuid4

from benchmarks.stores import store

NAMES = ("postgresql", "sqlite", "redis")
GOAL = 0.85
ATOMIC_GOALS = {"postgresql": 0.35, "sqlite": 0.70}
REDIS_GOAL = 0.50
WORKS = ("insert", "insert_like", "publish", "atomic", "atomic_publish")
COUNT = 100
"""The calls in each round."""
TOKENS = 10
VALUE = "x" * 64
ADD_ENTRY = "return redis.call('XADD', KEYS[1], '*', 'action', ARGV[1], 'data', ARGV[2])"

Works = dict[str, Callable[[int], object]]


def publish_alone(n: int) -> None:
    """Publish outside of a transaction."""
    from django_eventsource import publish

    publish(f"token {n % TOKENS}", "ping", VALUE)


def database_works() -> Works:
    """Return the works that are compared on a database, by name."""
    from django.contrib.auth.models import Group
    from django.db import transaction
    from django.utils import timezone

    from django_eventsource import publish
    from django_eventsource.models import StoredEvent, TokenHead

    publish("rows", "ping", VALUE)
    head = TokenHead.objects.get(token="rows")
    seqs = itertools.count(head.last + 1)

    def insert(n: int) -> None:
        Group.objects.create(name=uuid4().hex)

    def insert_like(n: int) -> None:
        StoredEvent.objects.create(
            head=head,
            seq=next(seqs),
            end_offset=0,
            action="ping",
            data=VALUE.encode(),
            kind="event",
            created=timezone.now(),
            ref=uuid4(),
        )

    def atomic(n: int) -> None:
        with transaction.atomic():
            insert(n)

    def atomic_and_publish(n: int) -> None:
        with transaction.atomic():
            insert(n)
            publish_alone(n)

    return {
        "insert": insert,
        "insert_like": insert_like,
        "publish": publish_alone,
        "atomic": atomic,
        "atomic_publish": atomic_and_publish,
    }


def redis_works() -> Works:
    """Return the works that are compared on Redis, by name."""
    from redis import Redis

    client = Redis.from_url(os.environ["BENCH_REDIS"])
    sha = client.script_load(ADD_ENTRY)

    def add_entry(n: int) -> None:
        client.evalsha(sha, 1, f"raw {n % TOKENS}", "ping", VALUE)

    return {"insert": add_entry, "publish": publish_alone}


def measure(found: Works, rounds: int) -> dict[str, Any]:
    """Return the rates, medians over the rounds, and the medians of the ratios of each round."""
    for work in found.values():
        _rate(work)  # opens the connection, and begins the tokens
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, work in found.items():
            rates[name].append(_rate(work))

    def ratio(name: str, base: str) -> float | None:
        if base not in rates:
            return None
        return median(a / b for a, b in zip(rates[name], rates[base], strict=True))

    return {
        "per_second": {name: round(median(some)) for name, some in rates.items()},
        "publish_ratio": ratio("publish", "insert"),
        "publish_ratio_like": ratio("publish", "insert_like"),
        "atomic_ratio": ratio("atomic_publish", "atomic"),
    }


def _rate(work: Callable[[int], object]) -> float:
    began = time.perf_counter()
    for n in range(COUNT):
        work(n)
    return COUNT / (time.perf_counter() - began)


def rows(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return the rows of the table of goals."""
    of_databases = [(name, found[name]) for name in ATOMIC_GOALS]
    return [
        *(
            (
                f"``publish()`` a second, against one insert of the ORM: {name}",
                result["publish_ratio"],
                f"at least {GOAL:.2f}",
            )
            for name, result in of_databases
        ),
        *(
            (
                f"``publish()`` a second, against one insert of a row like an event: {name}",
                result["publish_ratio_like"],
                "",
            )
            for name, result in of_databases
        ),
        *(
            (
                f"``atomic()`` with an insert and ``publish()``, against the insert alone: {name}",
                result["atomic_ratio"],
                f"at least {ATOMIC_GOALS[name]:.2f}",
            )
            for name, result in of_databases
        ),
        (
            "``publish()`` a second, against one raw script with XADD: redis",
            found["redis"]["publish_ratio"],
            f"at least {REDIS_GOAL:.2f}",
        ),
    ]


def main(name: str = "sqlite", rounds: str = "20") -> None:
    """Measure one store."""
    if name not in NAMES:
        sys.exit(f"{name!r}: one of {', '.join(NAMES)} is needed.")
    with store(name):
        works = redis_works() if name == "redis" else database_works()
        result = measure(works, int(rounds))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
