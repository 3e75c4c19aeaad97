"""Fixtures for pytest. They need pytest-django.

Enable them in the ``conftest.py`` of a project::

    pytest_plugins = ["django_eventsource.testing.fixtures"]
"""

from __future__ import annotations

from typing import Any

import pytest

from .. import _runtime
from ..history import History, get_history

__all__ = ["eventsource_reset", "memory_history"]


@pytest.fixture(autouse=True)
def eventsource_reset() -> None:
    """Reset the process-wide state of the package before each test."""
    _runtime.reset_all()


@pytest.fixture
def memory_history(settings: Any) -> History:
    """Use a new memory history in the test, which then needs no database for its events."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
    }
    return get_history()
