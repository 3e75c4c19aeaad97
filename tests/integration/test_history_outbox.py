"""The outbox: what transactions wrote, before it has its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections, transaction

from django_eventsource.history import Draft, Kind, outbox
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.outbox import Outbox, columns_of, draft_of
from django_eventsource.models import PendingEvent
from tests.histories import ALIASES, DATABASES, draft, texts

real_commits = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(params=DATABASES)
def history(request: pytest.FixtureRequest) -> Iterator[DatabaseHistory]:
    yield DatabaseHistory(USING=request.param)
    connections[request.param].close()


@pytest.fixture
def settled(history: DatabaseHistory) -> list[int]:
    """How many events are settled in each batch."""
    batches: list[int] = []
    append = history._append

    def count(token: str, drafts: Any, **extra: Any) -> Any:
        batches.append(len(drafts))
        return append(token, drafts, **extra)

    history._append = count  # type: ignore[method-assign]
    return batches


@real_commits
def test_what_is_written_is_found(history: DatabaseHistory) -> None:
    """In its order, and of this token only; what is removed is not there any more."""
    box = Outbox(history.using)
    assert (box.tokens(), box.oldest("t")) == ([], ([], False))
    drafts = [Draft(action="ping", data=b"\0\xff", event_id="own"), draft("b", kind=Kind.FINISH)]
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
def test_more_pending_events_than_a_batch(
    history: DatabaseHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long outbox is settled whole, in order, batch by batch."""
    monkeypatch.setattr(outbox, "BATCH", 3)
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft(str(n)) for n in range(8)])
    entries = settle()
    assert texts(entries) == [str(n) for n in range(8)]
    assert [entry.seq - entries[0].seq for entry in entries] == list(range(8))


@real_commits
def test_more_pending_bytes_than_a_statement_may_have(
    history: DatabaseHistory, settled: list[int]
) -> None:
    """Large events are settled a few at a time: MySQL refuses what is over 16 MiB together."""
    values = [f"{n:03}" + "x" * 60_000 for n in range(400)]
    with transaction.atomic(using=history.using):
        for value in values[:-1]:
            history.stage("t", [draft(value)])
        settle = history.stage("t", [draft(values[-1])])
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
def test_pending_events_are_settled_by_their_size(
    history: DatabaseHistory,
    settled: list[int],
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    batches: list[int],
) -> None:
    """Each batch is as large as it may be, and a single event may be larger."""
    monkeypatch.setattr(outbox, "BATCH_BYTES", 50)
    with transaction.atomic(using=history.using):
        settle = history.stage("t", [draft("x" * size) for size in sizes])
    assert [len(entry.draft.data) for entry in settle() if entry is not None] == sizes
    assert settled == batches
