"""Tests of publishers at the same time, on a history without SQL for its database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connections

from django_eventsource.history.database.backend import DatabaseHistory
from tests.integration.test_history_database import (
    test_a_publisher_finds_its_event_that_a_head_check_settled,
    test_a_rolled_back_event_is_never_published,
    test_an_open_transaction_does_not_block_other_publishers,
    test_committed_events_of_all_kinds_of_publishers_keep_their_order,
    test_staged_and_direct_events_share_consecutive_numbers,
    test_staged_events_are_visible_after_the_commit,
    test_the_size_in_the_head_is_the_sum_over_its_events,
)
from tests.support.histories import DATABASES, with_orm

__all__ = [
    "test_a_publisher_finds_its_event_that_a_head_check_settled",
    "test_a_rolled_back_event_is_never_published",
    "test_an_open_transaction_does_not_block_other_publishers",
    "test_committed_events_of_all_kinds_of_publishers_keep_their_order",
    "test_staged_and_direct_events_share_consecutive_numbers",
    "test_staged_events_are_visible_after_the_commit",
    "test_the_size_in_the_head_is_the_sum_over_its_events",
]


@pytest.fixture(params=DATABASES)
def using(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def history(using: str) -> Iterator[DatabaseHistory]:
    yield with_orm(using)
    connections[using].close()
