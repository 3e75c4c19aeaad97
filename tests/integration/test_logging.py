"""Tests of the detection of missing tables, with each database."""

from __future__ import annotations

import pytest
from django.db import DatabaseError, connections, transaction

from django_eventsource._logging import is_unmigrated
from tests.support.histories import ALIASES


@pytest.mark.parametrize("using", ALIASES)
@pytest.mark.parametrize(
    ("sql", "missing"),
    [
        ("SELECT x FROM nowhere", True),
        ("INSERT INTO nowhere VALUES (1)", True),
        ("SELECT missing_column FROM django_eventsource_tokenhead", True),
        ("SELECT 1 FROM django_eventsource_tokenhead WHERE", False),
        ("INSERT INTO django_eventsource_tokenhead (token) VALUES (NULL)", False),
    ],
)
@pytest.mark.django_db(databases=ALIASES)
def test_a_missing_table_is_detected_by_the_error_of_each_database(
    using: str, sql: str, missing: bool
) -> None:
    """Other errors are not taken for a missing table or column."""
    with (
        pytest.raises(DatabaseError) as caught,
        transaction.atomic(using),
        connections[using].cursor() as cursor,
    ):
        cursor.execute(sql)
    assert is_unmigrated(caught.value) == missing
