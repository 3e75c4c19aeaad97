"""A page that gets a cursor, reads its data, and then opens a stream after the cursor."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group
from django.db import connections, transaction

from django_eventsource import aget_cursor, apublish, publish
from django_eventsource.history import get_history
from django_eventsource.testing import listen
from tests.support import mariadb
from tests.support.histories import ALIASES
from tests.support.valkey import shared_server
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

PUBLISHERS = 2
PAGES = 20
"""The number of pages that are opened while the publishers make changes."""

LAST = "last"
"""The data of the last event."""

HISTORIES = {
    "memory": {"BACKEND": "django_eventsource.history.memory.MemoryHistory"},
    "sqlite": {},
    "postgres": {"OPTIONS": {"USING": "postgres"}},
    "mariadb": {"OPTIONS": {"USING": "mariadb"}},
    "redis": {"BACKEND": "django_eventsource.history.redis.RedisHistory"},
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(bool(mariadb.MISSING), reason=mariadb.MISSING))
        if name == "mariadb"
        else name
        for name in HISTORIES
    ]
)
def history(request: pytest.FixtureRequest, settings: Any) -> None:
    history = dict(HISTORIES[request.param])
    if request.param == "redis":
        history["OPTIONS"] = {"HOSTS": [shared_server().url]}
    settings.EVENTSOURCE_HISTORY = history
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.05


def make_changes(publisher: int, end: threading.Event) -> None:
    """Change the data and publish each change, as fast as possible, until the end."""
    using = get_history().using
    connection = connections[using]
    try:
        if connection.vendor == "sqlite":
            # SQLite's lock is not fair: a publisher that waits for it looks every 100 ms, and the
            # other one holds it nearly all the time. Django's default of 5 s may not be enough.
            with connection.cursor() as cursor:
                cursor.execute(f"PRAGMA busy_timeout = {PROCESS_PATIENCE_SECONDS * 1000:.0f}")
        for n in itertools.count():
            if end.is_set():
                break
            with transaction.atomic(using):
                group = Group.objects.using(using).create(name=f"{publisher}-{n}")
                publish("t", "ping", group.name)
    finally:
        connections.close_all()


def read_data() -> set[str]:
    return set(Group.objects.using(get_history().using).values_list("name", flat=True))


async def received_after(cursor: str) -> list[str]:
    """Return the data of the events after a cursor, up to the last one that is published."""
    options = {"last_event_id": cursor, "timeout_seconds": PROCESS_PATIENCE_SECONDS}
    async with listen("t", **options) as stream:
        while (await stream.next()).data != LAST:
            pass
        return [event.data for event in stream.events]


async def open_pages() -> list[tuple[set[str], list[str]]]:
    """Open pages while publishers run; return the data and the received events of each."""
    end = threading.Event()
    publishers = [
        asyncio.ensure_future(asyncio.to_thread(make_changes, n, end)) for n in range(PUBLISHERS)
    ]
    pages: list[tuple[set[str], asyncio.Task[list[str]]]] = []
    try:
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            while len(pages) < PAGES:
                cursor = await aget_cursor("t")
                data = await sync_to_async(read_data)()
                if len(data) > len(pages):  # another change at least for each page
                    pages.append((data, asyncio.create_task(received_after(cursor))))
    finally:
        end.set()
        await asyncio.gather(*publishers)
    async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
        await apublish("t", "ping", LAST)
        return [(data, await page) for data, page in pages]


@pytest.mark.django_db(transaction=True, databases=ALIASES)
def test_a_page_misses_no_change_and_receives_no_event_twice(history: None) -> None:
    pages = async_to_sync(open_pages)()
    every = read_data()
    assert len(pages[0][0]) < len(pages[-1][0]) <= len(every), "the publishers made no changes"
    for data, received in pages:
        assert len(received) == len(set(received)), "an event was received twice"
        assert data | set(received) == every | {LAST}, "a change was missed"
