"""Tests of the outbox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections, transaction

from django_eventsource.history import Draft, Kind
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.outbox import Outbox, columns_of, draft_of
from django_eventsource.models import PendingEvent
from tests.support.events import draft, texts
from tests.support.histories import ALIASES, DATABASES, to_outbox

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(params=DATABASES)
def history(request: pytest.FixtureRequest) -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING=request.param)
    connections[request.param].close()


@pytest.fixture
def settled(history: DatabaseHistory) -> list[int]:
    """Return the number of events settled in each batch."""
    batches: list[int] = []
    settle = history._writer._settle_batch

    def count(token: str, patience: float | None) -> Any:
        batch, more = settle(token, patience)
        batches.append(len(batch))
        return batch, more

    history._writer._settle_batch = count  # type: ignore[method-assign]
    return batches


@real_commits
def test_the_outbox_returns_events_of_a_token_in_order(history: DatabaseHistory) -> None:
    """Removed events are not returned any more."""
    box = Outbox(history.using)
    assert (box.tokens(), box.oldest("t")) == ([], ([], False))
    drafts = [Draft(action="ping", data=b"\0\xff", event_id="own"), draft("b", kind=Kind.CLOSE)]
    refs = box.add("t", drafts)
    box.add("u", [draft("c")])
    assert sorted(box.tokens()) == ["t", "u"]
    rows, more = box.oldest("t")
    assert not more
    assert [row.ref for row in rows] == refs
    assert [draft_of(row) for row in rows] == drafts
    assert columns_of(drafts[0])["event_id"] == "own"
    assert box.remove([row.pk for row in rows]) == 2
    assert box.remove([row.pk for row in rows]) == 0
    assert box.tokens() == ["u"]


@real_commits
def test_a_long_outbox_is_settled_in_batches(history: DatabaseHistory, settled: list[int]) -> None:
    """All events are settled, in order."""
    with transaction.atomic(using=history.using):
        settle = to_outbox(history, *(draft(str(n)) for n in range(1_100)))
    entries = settle()
    assert texts(entries) == [str(n) for n in range(1_100)]
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(1_100))
    assert settled == [500, 500, 100]


@real_commits
def test_large_pending_events_are_settled_in_several_statements(
    history: DatabaseHistory, settled: list[int]
) -> None:
    """MySQL refuses a statement of more than 16 MiB."""
    values = [f"{n:03}" + "x" * 60_000 for n in range(400)]
    with transaction.atomic(using=history.using):
        for value in values[:-1]:
            to_outbox(history, draft(value))
        settle = to_outbox(history, draft(values[-1]))
    (last,) = settle()
    assert last is not None
    assert last.draft.data == values[-1].encode()
    assert settled == [4] * 100
    assert not PendingEvent.objects.using(history.using).exists()


@real_commits
@pytest.mark.parametrize(
    ("sizes", "batches"),
    [([5], [1]), ([5, 5], [2]), ([5, 5, 5], [3]), ([90, 5], [1, 1]), ([5, 90, 5, 1], [1, 1, 2])],
)
def test_a_batch_is_bounded_by_bytes_but_contains_one_event(
    history: DatabaseHistory,
    settled: list[int],
    sizes: list[int],
    batches: list[int],
) -> None:
    """A single event may be larger than the bound."""
    history._outbox.batch_bytes = 50
    with transaction.atomic(using=history.using):
        settle = to_outbox(history, *(draft("x" * size) for size in sizes))
    assert [len(entry.draft.data) for entry in settle() if entry is not None] == sizes
    assert settled == batches
