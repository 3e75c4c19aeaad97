"""Tests of the memory history beyond the contract."""

from __future__ import annotations

import threading
from typing import Any

from django_eventsource.history import History, Slice
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.protocol.cursors import parse_cursor
from tests.support.events import add, texts


def test_ids_of_an_earlier_process_are_unknown() -> None:
    before = MemoryHistory()
    floor = before.newest("t")[0]
    (entry,) = add(before, "a")
    after = MemoryHistory()
    add(after, "b")
    for cursor in (floor, entry.seq):
        assert not after.locate("t", parse_cursor(str(cursor))).known


def test_an_append_trims_events_beyond_max_events() -> None:
    history = MemoryHistory(MAX_EVENTS=3)
    entries = add(history, *"abcdef")
    assert texts(history.read("t", entries[2].seq).entries) == ["d", "e", "f"]
    assert not history.read("t", entries[1].seq).complete


def test_twenty_threads_get_consecutive_numbers() -> None:
    history = MemoryHistory()
    entries = []

    def publish() -> None:
        for _ in range(50):
            entries.extend(add(history, "x"))

    threads = [threading.Thread(target=publish) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = sorted(entry.seq for entry in entries)
    assert numbers == list(range(numbers[0], numbers[0] + 1000))


class BlockingHistory(MemoryHistory):
    """A backend of a third party that blocks and does not declare anything."""

    call = History.call

    def read(self, *args: Any, **kwargs: Any) -> Slice:
        self.thread = threading.get_ident()
        return super().read(*args, **kwargs)


async def test_a_blocking_history_runs_outside_of_the_event_loop() -> None:
    history = BlockingHistory()
    (entry,) = add(history, "a")
    assert (await history.aread("t", entry.seq - 1)).entries == (entry,)
    assert history.thread != threading.get_ident()
