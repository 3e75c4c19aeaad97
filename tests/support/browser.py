"""Fixtures for Chromium, and tabs in which no script may fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright

from tests.support.waiting import PROCESS_PATIENCE_SECONDS

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 20_000
"""Milliseconds after which a wait fails; much longer than any takes."""


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of Chromium. A machine without it skips these tests, except in CI."""
    path = shutil.which("chromium")
    if path is None and os.environ.get("CI"):
        pytest.fail("CI needs Debian's chromium, and `chromium` is not on the PATH.")
    if path is None:
        pytest.skip("`chromium` is not on the PATH.")
    return path


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Run Playwright, of which a thread can run one at a time."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(
    chromium: str, playwright: Playwright, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrowserContext]:
    """Run Chromium with a profile of its own."""
    context = playwright.chromium.launch_persistent_context(
        tmp_path_factory.mktemp("profile"), executable_path=chromium, args=ARGS
    )
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def plain_browser(
    chromium: str, playwright: Playwright, tmp_path: Path
) -> Iterator[BrowserContext]:
    """Run Chromium so that only the tab in front is visible. It can freeze the others.

    Playwright's defaults keep all tabs visible.
    """
    profile = tmp_path / "profile"
    options = ["--headless", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [chromium, *ARGS, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = _debugging_port(profile / "DevToolsActivePort", process)
        _wait_for_tab(port)
        browser = playwright.chromium.connect_over_cdp(
            f"http://127.0.0.1:{port}", no_defaults=True
        )
        context = browser.contexts[0]
        context.set_default_timeout(PATIENCE_MS)
        yield context
        browser.new_browser_cdp_session().send("Browser.close")
        process.wait(PROCESS_PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()


def _debugging_port(file: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until Chromium has written its port to a file, and return the port."""
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while not (file.is_file() and file.read_text().count("\n")):
        assert process.poll() is None, "Chromium has ended."
        assert time.monotonic() < deadline, "Chromium has not opened its port."
        time.sleep(0.02)
    return file.read_text().split()[0]


def _wait_for_tab(port: str) -> None:
    """Wait for the first tab. Playwright waits without end for one that appears as it connects."""
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while True:
        with urlopen(f"http://127.0.0.1:{port}/json/list") as response:
            if any(target["type"] == "page" for target in json.load(response)):
                return
        assert time.monotonic() < deadline, "Chromium has not opened a tab."
        time.sleep(0.02)


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """Open a tab in which no script may fail."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []
