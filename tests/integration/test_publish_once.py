"""Publishing with one key from many threads and processes: one event is stored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from django_eventsource.history import get_history
from django_eventsource.models import PendingEvent
from tests.support.events import texts
from tests.support.histories import ALIASES, MARIADB, before_oldest
from tests.support.processes import PROCESS_PATIENCE_SECONDS, start_python
from tests.support.valkey import shared_server

KEYS = "abcdefgh"
PUBLISHER = """
import json, sys, threading
from contextlib import nullcontext
from django.db import connections, transaction
from django_eventsource import publish
from django_eventsource.history import get_history

name, keys, atomic = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
using = get_history().using
ids = []
barrier = threading.Barrier(5)

def work(thread):
    try:
        for key in keys:
            barrier.wait(60)
            with transaction.atomic(using=using) if atomic else nullcontext():
                event = publish("t", "ping", f"{key} {name} {thread}", key=key)
            ids.append((key, event.id))
    finally:
        connections.close_all()

threads = [threading.Thread(target=work, args=[n]) for n in range(5)]
print("ready", flush=True)
sys.stdin.readline()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(ids))
"""


def setting(name: str) -> dict[str, Any]:
    """Return ``EVENTSOURCE_HISTORY`` for a history that processes share."""
    if name == "redis":
        path, options = "redis.RedisHistory", {"HOSTS": [shared_server().url]}
    else:
        path, options = "database.DatabaseHistory", {"USING": name}
    return {"BACKEND": f"django_eventsource.history.{path}", "OPTIONS": options}


@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("atomic", [False, True], ids=["autocommit", "atomic"])
@pytest.mark.parametrize("name", ["default", "postgres", MARIADB, "redis"])
def test_four_processes_of_five_threads_store_each_key_once(
    settings: Any, name: str, atomic: bool
) -> None:
    """All of the calls return the id of the event that is stored."""
    settings.EVENTSOURCE_HISTORY = setting(name)
    processes = [
        start_python(PUBLISHER, n, KEYS, atomic, EVENTSOURCE_HISTORY=setting(name))
        for n in range(4)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    ids: dict[str, list[str]] = {key: [] for key in KEYS}
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
        assert (process.returncode, err) == (0, "")
        for key, event_id in json.loads(out):
            ids[key].append(event_id)
    history = get_history()
    entries = history.read("t", before_oldest(history)).entries
    stored = {text[0]: entry.id for text, entry in zip(texts(entries), entries, strict=True)}
    assert len(entries) == len(stored) == len(KEYS)
    assert ids == {key: [stored[key]] * 20 for key in KEYS}
    for alias in ALIASES:
        assert not PendingEvent.objects.using(alias).exists()
