"""The capture of published events, in each kind of test class of Django."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction
from django.db.transaction import TransactionManagementError
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings

from django_eventsource import apublish, publish, publish_many
from django_eventsource.events import JSONEvent, StringEvent
from django_eventsource.operations.close_requests import close_streams
from django_eventsource.testing import capture_events

MEMORY = override_settings(
    EVENTSOURCE_HISTORY={"BACKEND": "django_eventsource.history.memory.MemoryHistory"}
)


class InTestCase(TestCase):
    """The transaction of the test does not commit."""

    def test_what_is_published_inside_is_captured_after_the_block(self):
        publish("t", "ping", "before")
        with capture_events() as events:
            publish("t", "ping", "a")
            publish("t", "ping", "b", StringEvent)
            publish_many([("t", "ping", "c\r\nd"), ("u", "ping", "e")])
            assert events == []
        publish("t", "ping", "after")
        self.assertEqual(
            events,
            [
                ("t", "ping", "a"),
                ("t", "ping", "b"),
                ("t", "ping", "c\nd"),
                ("u", "ping", "e"),
            ],
        )
        assert int(events[0].event.id or 0) + 1 == int(events[2].event.id or 0)

    def test_a_hook_that_publishes_is_run(self):
        with capture_events() as events:
            transaction.on_commit(lambda: publish("t", "ping", "a"))
        assert events == [("t", "ping", "a")]

    def test_what_is_rolled_back_is_not_captured(self):
        with capture_events() as events, transaction.atomic():
            publish("t", "ping", "a")
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                publish("t", "ping", "b")
                raise ZeroDivisionError
            with transaction.atomic():
                publish("t", "ping", "c")
        assert events == [("t", "ping", "a"), ("t", "ping", "c")]

    def test_a_capture_inside_of_another_one_publishes_once(self):
        with self.captureOnCommitCallbacks(execute=True), capture_events() as outer:
            publish("t", "ping", "a")
            with capture_events(token="u") as inner:
                publish("u", "ping", "b")
        assert inner == [("u", "ping", "b")]
        assert outer == [("u", "ping", "b"), ("t", "ping", "a")]

    def test_hooks_run_if_the_block_raises(self):
        """A transaction inside of it may have committed."""
        with pytest.raises(ZeroDivisionError), capture_events() as events:
            publish("t", "ping", "a")
            raise ZeroDivisionError
        assert events == [("t", "ping", "a")]

    def test_a_hook_that_raises_ends_the_capture(self):
        def fail() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), capture_events() as events:
            transaction.on_commit(fail)
        with capture_events():
            publish("t", "ping", "a")
        assert events == []

    def test_a_block_inside_of_a_transaction_is_refused(self):
        with (
            transaction.atomic(),
            pytest.raises(TransactionManagementError, match="around transaction"),
            capture_events(),
        ):
            pass

    def test_another_database_can_be_named(self):
        with capture_events(using="default") as events:
            publish("t", "ping", "a")
        assert events == [("t", "ping", "a")]

    async def test_asynchronous_code_is_captured_with_async_with(self):
        async with capture_events() as events:
            await apublish("t", "ping", "a")
        assert events == [("t", "ping", "a")]

    async def test_asynchronous_code_must_not_use_with(self):
        with pytest.raises(SynchronousOnlyOperation, match="async with"), capture_events():
            pass


class InTransactionTestCase(TransactionTestCase):
    """Transactions commit."""

    def test_an_event_is_captured_at_its_commit(self):
        with capture_events() as events:
            with transaction.atomic():
                publish("t", "ping", "a")
                assert events == []
            assert events == [("t", "ping", "a")]
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                publish("t", "ping", "b")
                raise ZeroDivisionError
        assert events == [("t", "ping", "a")]

    def test_a_block_inside_of_a_transaction_is_refused(self):
        with transaction.atomic(), pytest.raises(TransactionManagementError), capture_events():
            pass

    async def test_asynchronous_code_is_captured(self):
        async with capture_events() as events:
            await apublish("t", "ping", "a")
            assert events == [("t", "ping", "a")]


@MEMORY
class InSimpleTestCase(SimpleTestCase):
    """There is no database."""

    def test_an_event_of_another_thread_is_captured(self):
        with capture_events() as events:
            thread = threading.Thread(target=publish, args=("t", "ping", "a"))
            thread.start()
            thread.join()
        assert events == [("t", "ping", "a")]

    def test_events_are_selected_by_token_and_action(self):
        published = [("t", "ping", "a"), ("u", "ping", "b"), ("t", "close", "")]
        for options, expected in (
            ({"token": "t"}, published[::2]),
            ({"action": "ping"}, published[:2]),
            ({"token": "t", "action": "ping"}, published[:1]),
        ):
            with capture_events(**options) as events:
                publish_many(published)
            assert events == expected

    def test_the_value_of_a_json_class_is_what_its_text_means(self):
        with capture_events() as events:
            publish("t", "ping", {"a": [1, None]}, JSONEvent)
        assert events == [("t", "ping", {"a": [1, None]})]

    def test_an_event_of_the_package_itself_is_not_captured(self):
        with capture_events() as events:
            close_streams(token="t")
        assert events == []

    def test_an_event_with_a_key_is_captured_once(self):
        with capture_events() as events:
            for _ in range(2):
                publish("t", "ping", "a", key="k")
        assert events == [("t", "ping", "a")]

    def test_the_difference_contains_tokens_actions_and_values(self):
        with capture_events() as events:
            publish_many([("t", "ping", "a"), ("t", "ping", "b")])
        with pytest.raises(AssertionError) as caught:
            self.assertEqual(events, [("t", "ping", "a"), ("t", "ping", "c")])
        assert "- [('t', 'ping', 'a'), ('t', 'ping', 'b')]" in str(caught.value)


@pytest.mark.django_db
def test_the_fixture_of_pytest_django_is_like_a_test_case():
    with capture_events() as events:
        publish("t", "ping", "a")
    assert events == [("t", "ping", "a")]


@pytest.mark.usefixtures("memory_history")
async def test_asynchronous_tests_of_pytest_are_captured():
    async with capture_events() as events:
        await asyncio.gather(*(apublish("t", "ping", str(n)) for n in range(3)))
    assert sorted(events) == [("t", "ping", str(n)) for n in range(3)]


def test_an_event_without_a_transaction_is_captured_at_once(memory_history: Any):
    with capture_events() as events:
        publish("t", "ping", "a")
        assert events == [("t", "ping", "a")]
