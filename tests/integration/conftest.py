"""Fixtures for tests that need a browser or a Valkey server."""

from __future__ import annotations

import pytest

from tests.support.browser import browser, chromium, page, plain_browser, playwright
from tests.support.valkey import (
    ValkeyServer,
    close_shared_server,
    empty_shared_server,
    shared_server,
)

__all__ = ["browser", "chromium", "page", "plain_browser", "playwright"]


def pytest_unconfigure() -> None:
    """Stop the server that the tests share."""
    close_shared_server()


@pytest.fixture
def valkey_server() -> ValkeyServer:
    """Return the Valkey server that all tests share, without data."""
    return shared_server()


@pytest.fixture(autouse=True)
def empty_valkey() -> None:
    """Remove the data of the shared Valkey server before each test, if the server runs."""
    empty_shared_server()
