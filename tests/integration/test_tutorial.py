"""Tests of the tutorial, as printed, with a fresh home directory.

Every command is typed as the pages print it, every file is written as they print it, and Chromium
opens the result. Only the port of the server differs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.support.pages import ROOT, Block, literals, read_page, sequence

pytestmark = pytest.mark.slow

SECONDS = 300.0
"""How long one command may take: pip may have to fetch packages."""
FIRST_PAGE = "docs/tutorial/first-page.rst"
NOTIFICATIONS = "docs/tutorial/notifications.rst"


class Folder:
    """The reader's folder: at first that of the clone of this repository, then the project's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "server.log"
        self.activation = ""
        """The command that each new terminal needs."""
        self.server: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (directory / "home").mkdir()
        self.env = {
            # The directory of this interpreter's `python3`.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(directory / "home"),
            **{key: value for key, value in os.environ.items() if key.startswith("PIP_")},
        }

    def type(self, line: str) -> None:
        """Type a line into a terminal. A server continues to run."""
        if line.startswith("cd "):
            self.directory /= line.removeprefix("cd ")
            return
        if line.startswith(". "):
            self.activation = line
        if "runserver" in line:
            self.serve(line)
            return
        done = subprocess.run(
            ["sh", "-e"],
            input=f"{self.activation}\n{line}\n",
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    def serve(self, line: str) -> None:
        """Start the server, and wait until it listens."""
        assert self.server is None, f"{line}: the port is in use."
        with self.log.open("ab") as output:
            self.server = subprocess.Popen(
                ["sh", "-c", f"{self.activation}\nexec {line} {self.port}"],
                cwd=self.directory,
                env=self.env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.server.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def press_ctrl_c(self) -> None:
        """Stop the server: Ctrl-C sends SIGINT to all processes of a terminal."""
        assert self.server is not None
        os.killpg(self.server.pid, signal.SIGINT)
        self.server.wait(SECONDS)
        self.server = None

    def write(self, block: Block) -> None:
        """Write a block to the end of its file, which is created if it does not exist."""
        file = self.directory / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w" if block.whole else "a") as output:
            output.write(f"\n\n{block.text}\n" if output.tell() else f"{block.text}\n")

    def url(self, path: str) -> str:
        """Return a URL of the server."""
        return f"http://127.0.0.1:{self.port}/{path}"


class Lesson:
    """A page of the tutorial, which is followed block by block."""

    def __init__(self, folder: Folder, page: str) -> None:
        self.folder = folder
        self.blocks = sequence(page)

    def follow_to(self, word: str) -> None:
        """Follow the page to the end of the next block of commands that contains a word."""
        while True:
            assert self.blocks, f"There is no further block with {word!r}."
            block = self.blocks.pop(0)
            if block.file:
                self.folder.write(block)
                continue
            assert block.language == "sh", f"No sentence names the file of:\n{block.text}"
            for line in block.text.splitlines():
                self.folder.type(line)
            if word in block.text:
                return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """Copy this repository into an empty folder."""
    directory = tmp_path_factory.mktemp("tutorial")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, directory / "django-eventsource", ignore=ignored)
    folder = Folder(directory)
    yield folder
    if folder.server is not None:
        folder.press_ctrl_c()


@pytest.fixture
def private(browser: BrowserContext) -> Iterator[Page]:
    """Open a private window."""
    assert browser.browser is not None
    context = browser.browser.new_context()
    yield context.new_page()
    context.close()


def open_listening(page: Page, url: str) -> None:
    """Open a page, and wait until it listens."""
    with page.expect_response(lambda response: "/events/poll/" in response.url) as opened:
        page.goto(url)
    assert opened.value.status == 200


def items(page: Page) -> Locator:
    """Return a locator of the list of a page."""
    return page.locator("li")


def test_the_first_lesson_ends_with_a_page_that_shows_every_event(
    folder: Folder, browser: BrowserContext, page: Page
) -> None:
    """Also those of another process, and those that were published without a server.

    A new page has an empty list, or the stored events if the page's rewind is added.
    """
    lesson = Lesson(folder, FIRST_PAGE)
    lesson.follow_to("runserver")
    other = browser.new_page()
    for window in (page, other):
        open_listening(window, folder.url("live/"))
    page.get_by_label("Text").fill("One")
    page.get_by_role("button", name="Publish").click()
    for window in (page, other):
        expect(items(window)).to_have_text(["One"])
    lesson.follow_to("send_event")
    for window in (page, other):
        expect(items(window)).to_have_text(["One", "Hello"])
    folder.press_ctrl_c()
    lesson.follow_to("runserver")
    for window in (page, other):
        expect(items(window)).to_have_text(["One", "Hello", "Published while the server was down"])
    assert lesson.blocks == []
    other.close()
    open_listening(page, folder.url("live/"))
    expect(items(page)).to_have_count(0)
    (tag,) = [text for text in literals(read_page(FIRST_PAGE)[0]) if "rewind=" in text]
    live = folder.directory / "news/templates/news/live.html"
    live.write_text(live.read_text().replace("{% eventsource_url token %}", tag))
    deadline = time.monotonic() + SECONDS
    while "rewind=50" not in page.evaluate("source.url"):  # runserver finds the change.
        assert time.monotonic() < deadline
        open_listening(page, folder.url("live/"))
    expect(items(page)).to_have_text(["One", "Hello", "Published while the server was down"])
    folder.press_ctrl_c()


def log_in(page: Page, folder: Folder, name: str, password: str) -> None:
    """Log in, and wait until the page of the notifications listens."""
    page.goto(folder.url("notifications/"))
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password").fill(password)
    with page.expect_response(lambda response: "/events/poll/" in response.url):
        page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading")).to_have_text(f"Notifications of {name}")


def notify(page: Page, to: str, text: str, result: str) -> None:
    """Send a notification with the form of the page."""
    page.get_by_label("To", exact=True).fill(to)
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Notify").click()
    expect(page.locator("output")).to_have_text(result)


def test_the_second_lesson_ends_with_notifications_of_committed_transactions(
    folder: Folder, page: Page, private: Page
) -> None:
    """Each user sees their own only."""
    lesson = Lesson(folder, NOTIFICATIONS)
    lesson.follow_to("runserver")
    assert lesson.blocks == []
    log_in(page, folder, "ada", "tutorial-1")
    log_in(private, folder, "grace", "tutorial-2")
    notify(page, "grace", "For Grace", "Sent.")
    expect(items(private)).to_have_text(["For Grace"])
    notify(page, "grace nobody", "Rolled back", "A user does not exist. Nothing was sent.")
    notify(page, "ada grace", "For both", "Sent.")
    for _ in ("as the events arrived", "as the rows are stored"):
        expect(items(private)).to_have_text(["For Grace", "For both"])
        expect(items(page)).to_have_text(["For both"])
        for window in (page, private):
            open_listening(window, folder.url("notifications/"))
    url = private.evaluate("source.url")
    private.get_by_role("button", name="Log out").click()
    expect(private.get_by_role("button", name="Log in")).to_be_visible()
    status = "async url => (await fetch(url)).status"
    assert private.evaluate(status, url) == 401
    assert page.evaluate(status, page.evaluate("source.url")) == 200
