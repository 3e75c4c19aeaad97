"""The projects of docs/examples, each run in a copy, as their users run them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, Request, Route

from tests.support.waiting import PROCESS_PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"

IGNORE = shutil.ignore_patterns("node_modules", "*.sqlite3*", "*-app.js")

WORKER = """
import json, sys, traceback
import django
django.setup()
from django.core.management import call_command
from django_eventsource import publish
from django_eventsource.history.database import DatabaseHistory
call_command("migrate", verbosity=0)
print(json.dumps(None), flush=True)
for line in sys.stdin:
    try:
        exec(json.loads(line))
        error = None
    except Exception:
        error = traceback.format_exc()
    print(json.dumps(error), flush=True)
"""
"""Creates the tables, and then runs the code that it receives, one JSON string on each line."""


class Example:
    """A copy of one example: its server, which can be started again, and a second process."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory / "examples"
        shutil.copytree(EXAMPLES, self.directory, ignore=IGNORE)
        (self.directory / "node_modules").symlink_to(EXAMPLES / "node_modules")
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": f"{name}.settings",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=self.directory,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read_result()

    @property
    def url(self) -> str:
        """The URL of the example's page."""
        return f"http://127.0.0.1:{self.port}/"

    def replace(self, file: str, old: str, new: str) -> None:
        """Change the text of a file."""
        path = self.directory / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        path = self.directory / "server.log"
        with path.open("ab") as log:
            self.server = subprocess.Popen(
                [
                    *[sys.executable, "-W", "ignore", "manage.py", "runserver", "--noreload"],
                    f"127.0.0.1:{self.port}",
                ],
                cwd=self.directory,
                env=self.env,
                stdout=log,
                stderr=log,
            )
        wait_for_port(self.port, self.server, path)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server: with SIGTERM as a restart does, with SIGKILL as a crash does."""
        assert self.server is not None
        self.server.send_signal(how)
        self.server.wait(PROCESS_PATIENCE_SECONDS)

    def kill(self) -> None:
        """End the server as a crash does."""
        self.stop(signal.SIGKILL)

    def run(self, code: str) -> None:
        """Run code in the second process, with the settings of the example."""
        assert self.worker.stdin is not None
        self.worker.stdin.write(json.dumps(code) + "\n")
        self.worker.stdin.flush()
        self._read_result()

    def publish_item(self, action: str, *texts: str) -> None:
        """Render and publish an item for each text in the second process."""
        template = f"{self.name}/item.html"
        self.run(
            "from django_eventsource import publish_template\n"
            f"for text in {texts!r}: "
            f"publish_template('news', {action!r}, {template!r}, {{'text': text}})"
        )

    def publish(self, action: str, *values: str) -> None:
        """Publish events of the default class in the second process."""
        self.run(f"for value in {values or ('',)!r}: publish('news', {action!r}, value)")

    def drop_all_but(self, events: int) -> None:
        """Remove the oldest events from the history, as it does when it is full."""
        self.run(f"DatabaseHistory(MAX_EVENTS={events}).prune()")

    def drop_all(self) -> None:
        """Remove all events from the history, as it does when they are old."""
        self.run("DatabaseHistory(MAX_AGE=1e-6).prune()")

    def close(self) -> None:
        """End both processes."""
        if self.server is not None and self.server.poll() is None:
            self.kill()
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.close()
        self.worker.wait(PROCESS_PATIENCE_SECONDS)
        self.worker.stdout.close()

    def _read_result(self) -> None:
        assert self.worker.stdout is not None
        line = self.worker.stdout.readline()
        assert line, "The second process has ended."
        error = json.loads(line)
        assert error is None, error


@contextlib.contextmanager
def run_example(
    name: str, factory: pytest.TempPathFactory, *changes: tuple[str, str, str]
) -> Iterator[Example]:
    """Run an example during a block.

    :param changes: a file, a text of it, and the text that replaces it.
    """
    example = Example(name, factory.mktemp(name))
    try:
        for file, old, new in changes:
            example.replace(file, old, new)
        example.start()
        yield example
    finally:
        example.close()


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process, which writes a log, accepts connections."""
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), PROCESS_PATIENCE_SECONDS).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)


# Their pages

POLL = re.compile("/events/poll/")
"""Matches the URL of a stream."""


def events(page: Page) -> Locator:
    """Return a locator of the events that the page shows."""
    return page.locator("#news li")


def polls(page: Page) -> list[Request]:
    """Return a list that collects the page's requests for streams."""
    requests: list[Request] = []
    page.on("request", lambda one: requests.append(one) if POLL.search(one.url) else None)
    return requests


def hide(page: Page, hidden: bool) -> None:
    """Let a page be hidden, or visible again, as if its user changed to another tab."""
    page.evaluate(
        """hidden => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def change_page(page: Page, example: Example, *changes: tuple[str, str]) -> None:
    """Replace texts of the example's page on its way to the browser."""

    def change(route: Route) -> None:
        response = route.fetch()
        text = response.text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        route.fulfill(response=response, body=text)

    page.route(example.url, change)


def refuse_streams(page: Page, example: Example, times: int | None = None) -> None:
    """Let the server receive no grant, so that it refuses the streams of a page."""
    url = f"{example.url}events/poll/news"
    page.route(POLL, lambda route: route.continue_(url=url, headers={}), times=times)


# What the examples load from elsewhere


@pytest.fixture(scope="session")
def npm_packages() -> None:
    """Install the packages of docs/examples/package.json, once for all processes of pytest-xdist.

    A machine without npm skips the tests, except in CI.
    """
    if shutil.which("npm") is None:
        missing("npm")
    pins = (EXAMPLES / "package.json").read_text()
    stamp = EXAMPLES / "node_modules" / ".installed"
    with locked():
        if stamp.is_file() and stamp.read_text() == pins:
            return
        done = subprocess.run(
            [
                *["npm", "install", "--ignore-scripts", "--no-package-lock", "--no-audit"],
                *["--no-fund", "--loglevel=error"],
            ],
            cwd=EXAMPLES,
            capture_output=True,
            text=True,
            timeout=PROCESS_PATIENCE_SECONDS,
        )
        if done.returncode:
            missing(f"`npm install` in docs/examples ({done.stderr.strip()[:200]})")
        stamp.write_text(pins)


DATASTAR_WHEEL = "starhtml==0.7.0"
"""A wheel that contains Datastar 1.0.1, which is not on npm. Its changes to Datastar concern the
shadow DOM and clicks, and no requests."""


@pytest.fixture(scope="session")
def datastar_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Put Datastar's file where its example expects it."""
    target = EXAMPLES / "static" / "datastar.js"
    with locked():
        if target.is_file():
            return
        directory = tmp_path_factory.mktemp("wheel")
        done = subprocess.run(
            [
                *[sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"],
                *["--only-binary=:all:", "--python-version=3.13", "--dest", str(directory)],
                DATASTAR_WHEEL,
            ],
            capture_output=True,
            text=True,
            timeout=PROCESS_PATIENCE_SECONDS,
        )
        if done.returncode:
            missing(f"`pip download {DATASTAR_WHEEL}` ({done.stderr.strip()[:200]})")
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            target.write_bytes(files.read("starhtml/static/js/datastar-core.js"))


def missing(what: str) -> None:
    """Skip a test that needs a program or a file; in CI, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"CI needs {what}, which is not available.")
    pytest.skip(f"{what} is not available.")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Wait until no other process of the tests installs something."""
    with (EXAMPLES / "package.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
