"""Release of the thread and the connections of a request."""

from __future__ import annotations

import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import connection

from django_eventsource.streaming import thread_release
from django_eventsource.streaming.thread_release import release_request_thread
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("memory_history")


async def test_the_thread_of_the_request_ends() -> None:
    async with ThreadSensitiveContext():
        await sync_to_async(lambda: None)()
        context = SyncToAsync.thread_sensitive_context.get()
        executor = SyncToAsync.context_to_thread_executor[context]
        (thread,) = executor._threads
        await release_request_thread()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
        assert await sync_to_async(lambda: 5)() == 5


@pytest.mark.django_db(transaction=True)
async def test_the_database_connections_of_the_request_are_closed() -> None:
    async with ThreadSensitiveContext():
        closed = []

        def use() -> None:
            connection.ensure_connection()
            real = connection.connection
            closed.append(lambda: real)

        await sync_to_async(use)()
        raw = closed[0]()
        await release_request_thread()
        with pytest.raises(Exception, match="closed"):
            raw.execute("SELECT 1")


@pytest.mark.django_db
def test_a_connection_in_a_transaction_is_kept() -> None:
    """A test case's transaction outlives a stream."""
    connection.ensure_connection()
    thread_release._close_connections()
    assert connection.connection is not None


async def test_nothing_is_released_without_a_request_or_with_another_asgiref(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await release_request_thread()
    async with ThreadSensitiveContext():
        with monkeypatch.context() as patch:
            patch.delattr(SyncToAsync, "context_to_thread_executor")
            await release_request_thread()


async def test_a_context_without_a_thread_has_none_to_abandon() -> None:
    async with ThreadSensitiveContext():
        thread_release.abandon_thread()
        assert await sync_to_async(lambda: 5)() == 5
