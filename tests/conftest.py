"""Fixtures for all tests.

The tests in ``tests/unit`` need Django and pytest only. ``tests/integration/conftest.py`` contains
what starts servers. Nothing of it is imported when only unit tests run.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from django.conf import settings
from django.db import connections

pytest_plugins = ["django_eventsource.testing.fixtures", "tests.support.skip_summary"]

UNIT = Path(__file__).parent / "unit"

# A loaded machine is slow. No test fails because of the time that an example takes, or its choice.
# The examples are the same in each run. The profile `explore` chooses other ones.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("eventsource", derandomize=True, **patient)
hypothesis.settings.register_profile("explore", print_blob=True, **patient)
hypothesis.settings.load_profile("eventsource")


def pytest_configure() -> None:
    """Let SIGINT reach the servers that tests start, where a shell with ``&`` has ignored it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Use SQLite alone if only unit tests run, so that no server is started for them."""
    if all(UNIT in item.path.parents for item in items):
        for alias in set(connections) - {"default"}:
            del connections.settings[alias]


def pytest_collection_finish() -> None:
    """Exclude what is imported by now from garbage collection: tests collect many times."""
    use_hypothesis()
    gc.collect()
    gc.freeze()


@hypothesis.given(hypothesis.strategies.none())
def use_hypothesis(value: None) -> None:
    """Let Hypothesis create its random generator, which it does not find in a frozen object.

    On Python 3.14, the object is frozen that will refer to the generator.
    """


@pytest.fixture(scope="session")
def database_servers() -> Iterator[Any]:
    """Run the database servers of the settings."""
    with ExitStack() as stack:
        if "postgres" in connections.settings:
            # Imported here because a machine that runs the unit tests does not need it.
            servers = importlib.import_module("tests.support.database_servers")
            yield stack.enter_context(servers.run(settings.TEST_DIR))
        else:
            yield None


@pytest.fixture(scope="session")
def django_db_modify_db_settings(database_servers: Any) -> None:
    """Start the database servers before pytest-django makes the databases."""


def pytest_unconfigure() -> None:
    """Remove the files that the tests wrote."""
    shutil.rmtree(settings.TEST_DIR, ignore_errors=True)


MEMORY = {"BACKEND": "django_eventsource.history.memory.MemoryHistory"}


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> Iterator[None]:
    """Report what a module leaves open as its own failure, not as one of a later module."""
    yield
    gc.collect()
