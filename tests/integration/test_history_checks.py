"""The history checks of a hub: of the tokens that have changed, and of all tokens."""

from __future__ import annotations

import datetime

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_eventsource.delivery.hub import Hub, get_hub
from django_eventsource.delivery.subscription import Subscriber
from django_eventsource.history import get_history
from django_eventsource.history.database.backend import BATCH, DatabaseHistory
from django_eventsource.models import StoredEvent
from tests.support.events import add, draft
from tests.support.histories import ALIASES, DATABASES, NAMES, make, to_outbox
from tests.support.waiting import until

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)

LONG_AGO = datetime.timedelta(hours=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_of_changes_requires_a_look_at_all_tokens(name: str) -> None:
    history = make(name)
    add(history, "a")
    assert history.changes(None)[1] is None


@pytest.mark.parametrize("name", DATABASES)
def test_changes_returns_the_heads_that_have_changed_in_one_statement(name: str) -> None:
    history = make("sqlite" if name == "default" else name)
    assert isinstance(history, DatabaseHistory)
    add(history, "a", token="old")
    history._events.update(created=timezone.now() - LONG_AGO)
    (entry,) = add(history, "b", token="new")
    since, _ = history.changes(None)
    with CaptureQueriesContext(connections[history.using]) as queries:
        since, heads = history.changes(since)
    assert len(queries) == 1
    assert heads is not None
    assert {token: head.seq for token, head in heads.items()} == {"new": entry.seq}
    assert all(head.has_epoch for head in heads.values())
    assert since is not None
    assert history.changes(since + LONG_AGO)[1] == {}


def test_changes_of_many_tokens_require_a_look_at_all() -> None:
    history = make("sqlite")
    since, _ = history.changes(None)
    for n in range(BATCH + 1):
        add(history, "a", "b", token=str(n))
    assert history.changes(since)[1] is None
    StoredEvent.objects.filter(head__token="0").delete()
    assert len(history.changes(since)[1] or ()) == BATCH


def test_changes_reads_no_event_but_the_index_of_their_times() -> None:
    """The index contains the heads of the events. SQLite stands for the other databases."""
    history = make("sqlite")
    since, _ = history.changes(None)
    with CaptureQueriesContext(connections["default"]) as queries:
        history.changes(since)
    with connections["default"].cursor() as cursor:
        cursor.execute(f"EXPLAIN QUERY PLAN {queries[0]['sql']}")
        plan = "\n".join(row[-1] for row in cursor.fetchall())
    assert "USING COVERING INDEX eventsource_created (created>?)" in plan


@pytest.mark.parametrize("name", DATABASES)
def test_pending_events_require_a_look_at_all_tokens(name: str) -> None:
    """Only heads() moves them to the history."""
    history = make("sqlite" if name == "default" else name)
    assert isinstance(history, DatabaseHistory)
    since, _ = history.changes(None)
    assert history.changes(since)[1] is not None
    to_outbox(history, draft("a"))
    assert history.changes(since)[1] is None
    history.heads([])
    assert list(history.changes(since)[1] or ()) == ["t"]


# In a hub


@pytest.fixture
def checks(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the history only when a test says so."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"WAKE_UP": False}}
    settings.EVENTSOURCE_POLL_SECONDS = 600
    monkeypatch.setattr(Hub, "full_check_seconds", 600)
    monkeypatch.setattr(Hub, "full_check_every", 600)


async def listen(tokens: int = 1) -> Subscriber:
    """Return a subscriber of many tokens that are live."""
    hub = get_hub()
    subscriber = Subscriber(buffer_bytes=2**20, keepalive_seconds=None, joined=tokens > 1)
    await until(lambda: hub._wake._waiters)  # the first check is over
    for n in range(tokens):
        subscriber.add(f"t{n}", (await hub.history.alocate(f"t{n}", None)).seq)
    await hub.subscribe(subscriber)
    for one in subscriber.subscriptions:
        hub.catch_up(one, await hub.read(one.token, one.seq))
        assert one.live
    return subscriber


def test_a_check_without_changes_is_one_statement_whatever_the_number_of_tokens(
    checks: None,
) -> None:
    async def main() -> int:
        await listen(600)
        hub = get_hub()
        await hub._check_history()
        # Django's thread for synchronous work makes the statements, on its own connection.
        queries = await sync_to_async(capture)()
        await hub._check_history()
        return len(queries)

    def capture() -> CaptureQueriesContext:
        return CaptureQueriesContext(connections["default"]).__enter__()

    assert async_to_sync(main)() == 1


def test_a_check_passes_on_the_event_of_another_process(checks: None) -> None:
    async def main() -> bytes:
        subscriber = await listen()
        hub = get_hub()
        await hub._check_history()
        await hub.history.call(add, hub.history, "a", token="t0")
        await hub._check_history()
        await until(lambda: subscriber.has_frames)
        return subscriber.take()

    assert b"data: a\n" in async_to_sync(main)()


def test_a_check_of_all_tokens_finds_an_event_that_became_visible_late(
    checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is older than the earlier checks."""

    async def main() -> tuple[bool, bytes]:
        subscriber = await listen()
        hub = get_hub()
        await hub._check_history()
        await hub.history.call(publish_late)
        await hub._check_history()
        hub.flush(subscriber)
        found = subscriber.has_frames
        monkeypatch.setattr(Hub, "full_check_seconds", 0)
        await hub._check_history()
        await until(lambda: subscriber.has_frames)
        return found, subscriber.take()

    def publish_late() -> None:
        add(get_history(), "late", token="t0")
        StoredEvent.objects.filter(head__token="t0").update(created=timezone.now() - LONG_AGO)

    found, data = async_to_sync(main)()
    assert not found
    assert b"data: late\n" in data
