"""The memory history, beyond the contract."""

from __future__ import annotations

import threading

from django_eventsource.history.memory import MemoryHistory
from tests.histories import add, texts


def test_an_earlier_process_ids_are_unknown() -> None:
    """What was read before a restart is answered with reset after it."""
    before = MemoryHistory()
    floor = before.newest("t")[0]
    (entry,) = add(before, "a")
    after = MemoryHistory()
    add(after, "b")
    for cursor in (floor, entry.seq):
        assert not after.locate("t", str(cursor)).known


def test_events_are_bounded_as_they_come() -> None:
    """The ring never holds more than MAX_EVENTS."""
    history = MemoryHistory(MAX_EVENTS=3)
    entries = add(history, *"abcdef")
    assert texts(history.read("t", entries[2].seq).entries) == ["d", "e", "f"]
    assert not history.read("t", entries[1].seq).complete


def test_threads_get_consecutive_numbers() -> None:
    """Twenty threads at once get each number once."""
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
