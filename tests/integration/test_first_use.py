"""README's first use, as printed: in an empty folder, and in a project that has its own apps.

The package is installed into an environment of its own, every command is typed as the README
prints it, and the page is used in Chromium.
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
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.pages import ROOT, blocks, section

pytestmark = pytest.mark.slow

SECONDS = 300.0
"""How long one command may take: pip may have to fetch packages."""
INSTALL, NEW_PROJECT, SERVE, SEND = blocks("sh", section("First use in an existing project"))
SETTINGS, ASGI, VIEWS, URLS = blocks("python", section("First use in an existing project"))
(PAGE,) = blocks("html+django", section("First use in an existing project"))
(SEVERAL_TOKENS,) = blocks("html+django", section("Several tokens on one stream"))
TESTS = blocks("python", section("Testing your project"))

OWN_SETTINGS = """
INSTALLED_APPS = ["daphne", "channels", *INSTALLED_APPS, "shop", "news"]
"""
OWN_ASGI = """
import os

from channels.generic.websocket import WebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")


class Echo(WebsocketConsumer):
    def receive(self, text_data=None, bytes_data=None):
        self.send(text_data)


application = ProtocolTypeRouter(
    {
        "http": get_asgi_application(),
        "websocket": URLRouter([path("echo/", Echo.as_asgi())]),
    }
)
"""
OWN_VIEWS = """
from django.http import HttpResponse


def views(request):
    return HttpResponse("the project's own page")
"""
OWN_URLS = """
from django.contrib import admin
from django.urls import path

from news import views
from shop import models

urlpatterns = [path("admin/", admin.site.urls), path("", views.views)]
"""


class Project:
    """A project's folder beside the clone, and an environment to run its commands in."""

    def __init__(self, directory: Path, environment: Path) -> None:
        self.directory = directory
        self.env = {
            "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
            "HOME": str(directory.parent),
            "PYTHONUNBUFFERED": "1",
            **{key: value for key, value in os.environ.items() if key.startswith("PIP_")},
        }

    def type(self, lines: str) -> str:
        """Type lines into a shell, and return what they print."""
        done = subprocess.run(
            ["sh", "-e"],
            input=lines,
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def append(self, path: str, text: str) -> None:
        """Put text at the end of a file, which is made if it is not there."""
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(f"{before}{text}\n")

    def replace(self, path: str, text: str) -> None:
        """Write a file."""
        (self.directory / path).write_text(text)

    def follow_the_readme(self) -> None:
        """Do steps 2 to 5, up to the server."""
        self.append("mysite/settings.py", SETTINGS)
        self.append("mysite/asgi.py", ASGI)
        self.append("news/views.py", VIEWS)
        self.append("news/templates/news/live.html", PAGE)
        self.append("mysite/urls.py", URLS)
        migrate, runserver = SERVE.splitlines()
        assert runserver == "python manage.py runserver"
        self.type(migrate)

    @contextmanager
    def serve(self, port: int) -> Iterator[None]:
        """Run ``manage.py runserver``, with its reloader, on a port that is free here."""
        log = self.directory / "runserver.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["python", "manage.py", "runserver", str(port)],
                cwd=self.directory,
                env=self.env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + SECONDS
            while f"127.0.0.1:{port}" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment and a copy of this repository, in one folder."""
    directory = tmp_path_factory.mktemp("first-use")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, directory / "django-eventsource", ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True, timeout=SECONDS)
    return directory / "venv"


def make_project(environment: Path, name: str) -> Project:
    """Make an empty folder beside the copy, and install the package from it."""
    directory = environment.parent / name
    directory.mkdir()
    project = Project(directory, environment)
    project.type(INSTALL)
    return project


@pytest.fixture(scope="module")
def new_project(environment: Path) -> Project:
    """Make a project in an empty folder, as the README says."""
    project = make_project(environment, "new")
    project.type(NEW_PROJECT)
    project.follow_the_readme()
    return project


@pytest.fixture(scope="module")
def existing_project(environment: Path) -> Project:
    """Make a project that has its own apps, and daphne and channels for WebSockets."""
    project = make_project(environment, "existing")
    project.type(NEW_PROJECT + "\npython manage.py startapp shop")
    project.append("mysite/settings.py", OWN_SETTINGS)
    project.replace("mysite/asgi.py", OWN_ASGI)
    project.replace("mysite/urls.py", OWN_URLS)
    project.replace("news/views.py", OWN_VIEWS)
    project.follow_the_readme()
    return project


@pytest.fixture
def free_port() -> int:
    """Find a port on which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(params=["new_project", "existing_project"])
def project(request: pytest.FixtureRequest) -> Project:
    """Run a test in both projects."""
    return request.getfixturevalue(request.param)


def publish(page: Page, text: str) -> None:
    """Publish with the page's form."""
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Publish").click()


def test_both_windows_list_all_that_is_published(
    project: Project, browser: BrowserContext, page: Page, free_port: int
) -> None:
    """The publisher's own window keeps its list, and send_event reaches both."""
    with project.serve(free_port):
        other = browser.new_page()
        url = f"http://127.0.0.1:{free_port}/live/"
        for window in (page, other):
            with window.expect_response(lambda response: "/events/poll/" in response.url):
                window.goto(url)
        publish(page, "one")
        expect(other.locator("li")).to_have_text(["one"])
        publish(page, "two & <b>three</b>")
        project.type(SEND)
        for window in (page, other):
            expect(window.locator("li")).to_have_text(["one", "two & <b>three</b>", "Hello"])
        other.close()


SEVERAL_VIEW = """
def several(request):
    return render(request, "news/several.html", {"tokens": ["news", "weather & 'wind'"]})
"""
SEVERAL_URL = """
from news.views import several

urlpatterns += [path("several/", several)]
"""
COLLECT = """() => {
    window.received = [];
    source.addEventListener("ping", (event) => received.push(event.data));
}"""


def test_a_script_that_listens_to_several_tokens_receives_the_events_of_each(
    new_project: Project, page: Page, free_port: int
) -> None:
    """The grant in the URL reaches the server: nothing in the URL is escaped for HTML."""
    new_project.append("news/views.py", SEVERAL_VIEW)
    new_project.append("news/templates/news/several.html", SEVERAL_TOKENS)
    new_project.append("mysite/urls.py", SEVERAL_URL)
    with new_project.serve(free_port):
        with page.expect_response(lambda response: "/events/poll/" in response.url) as opened:
            page.goto(f"http://127.0.0.1:{free_port}/several/")
        assert opened.value.status == 200
        page.evaluate(COLLECT)
        new_project.type("""python manage.py send_event "weather & 'wind'" ping rain""")
        new_project.type("python manage.py send_event news ping Hello")
        page.wait_for_function("received.length == 2")
        assert sorted(page.evaluate("received")) == ["Hello", "rain"]


def test_the_system_check_finds_nothing_to_improve(project: Project) -> None:
    """Neither an error nor a warning is left after the five steps."""
    assert "no issues" in project.type("python manage.py check --fail-level WARNING")


def test_the_projects_own_page_and_websocket_still_work(
    existing_project: Project, page: Page, free_port: int
) -> None:
    """The steps add to an existing project and take nothing away."""
    with existing_project.serve(free_port):
        page.goto(f"http://127.0.0.1:{free_port}/")
        expect(page.locator("body")).to_have_text("the project's own page")
        echo = page.evaluate(
            """port => new Promise((resolve, reject) => {
                const socket = new WebSocket(`ws://127.0.0.1:${port}/echo/`);
                socket.onopen = () => socket.send("echo");
                socket.onmessage = (event) => resolve(event.data);
                socket.onerror = reject;
            })""",
            free_port,
        )
        assert echo == "echo"


def test_the_examples_of_tests_pass_in_the_new_project(new_project: Project) -> None:
    """The examples of the section on testing run as printed."""
    new_project.append("news/tests.py", "\n\n".join(TESTS))
    assert "Ran 2 tests" in new_project.type("python manage.py test 2>&1")
