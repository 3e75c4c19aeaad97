"""Tests of the first tutorial, as printed: in an empty folder, and in a project with its own apps.

The package is installed into an environment of its own. Every command is typed as the page prints
it, and Chromium opens the page.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.support.examples import EXAMPLES, free_port, wait_for_port
from tests.support.pages import DOCS_PAGES, ROOT, Block, blocks, excerpt, sequence
from tests.support.proxies import NGINX

pytestmark = pytest.mark.slow

SECONDS = 300.0
"""How long one command may take: pip may have to fetch packages."""
TUTORIAL = "docs/tutorial/first-page.rst"
_, INSTALL, NEW_PROJECT, SERVE, SEND, _ = blocks(TUTORIAL, "sh")
EXISTING = "docs/howto/existing-project.rst"
WSGI, ASGI = blocks(EXISTING, "sh")[-1].splitlines()
(LOCATIONS,) = blocks(EXISTING, "nginx")
(SEVERAL_TOKENS,) = blocks("docs/howto/several-tokens.rst", "html+django")
TESTING = "docs/howto/test-your-project.rst"
OWN = ("mysite/", "news/")
"""The packages of the tutorial's project."""
HOWTOS = [
    page
    for page in DOCS_PAGES
    if page.startswith("docs/howto/")
    # The one is for another project, and the other needs a second database.
    and page not in {EXISTING, "docs/howto/databases.rst"}
    and any(block.file.startswith(OWN) for block in sequence(page) if block.language == "python")
]
PACKAGES = [
    *["celery[redis]", "channels_redis[cryptography]"],
    *["django-cors-headers", "django-ninja", "djangorestframework"],
]
"""What the how-to pages tell the reader to install."""

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
LIVE_URL = """
from news.views import live

urlpatterns += [path("live/", live)]
"""


class Project:
    """A project's folder beside the clone, and an environment for its commands."""

    def __init__(self, directory: Path, environment: Path) -> None:
        self.directory = directory
        self.env = {
            "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
            "HOME": str(directory.parent),
            "PYTHONUNBUFFERED": "1",
            **{key: value for key, value in os.environ.items() if key.startswith("PIP_")},
        }

    def type(self, lines: str) -> str:
        """Type lines into a shell, and return the output."""
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
        """Append text to a file, which is created if it is missing."""
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(f"{before}{text}\n")

    def replace(self, path: str, text: str) -> None:
        """Write a file."""
        (self.directory / path).write_text(text)

    def write(self, block: Block) -> None:
        """Write a block of a page to its file."""
        if block.whole:
            self.replace(block.file, block.text)
        else:
            self.append(block.file, block.text)

    def copy(self, directory: Path) -> Project:
        """Return a copy of the project."""
        shutil.copytree(self.directory, directory)
        project = copy(self)
        project.directory = directory
        return project

    def migrate(self) -> None:
        """Make the tables."""
        migrate, runserver = SERVE.splitlines()
        assert runserver == "python manage.py runserver"
        self.type(migrate)

    @contextmanager
    def serve(self, port: int, line: str = "python manage.py runserver 8000") -> Iterator[None]:
        """Run the command of a server, with another port than 8000."""
        log = self.directory / f"{line.split()[0]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                shlex.split(line.replace("8000", str(port))),
                cwd=self.directory,
                env=self.env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for_port(port, process, log)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment and a copy of this repository in one folder."""
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
    """Make a project in an empty folder, as the tutorial says."""
    project = make_project(environment, "new")
    project.type(NEW_PROJECT)
    for block in sequence(TUTORIAL):
        if block.file:
            project.write(block)
    project.migrate()
    return project


@pytest.fixture(scope="module")
def existing_project(environment: Path) -> Project:
    """Make a project that has its own apps, and daphne and channels for WebSockets.

    It has an ``asgi.py``, so the page's whole file is not for it.
    """
    project = make_project(environment, "existing")
    project.type(NEW_PROJECT + "\npython manage.py startapp shop")
    project.append("mysite/settings.py", OWN_SETTINGS)
    project.replace("mysite/asgi.py", OWN_ASGI)
    project.replace("mysite/urls.py", OWN_URLS)
    project.replace("news/views.py", OWN_VIEWS)
    for block in sequence(EXISTING):
        if block.file and not block.whole:
            project.write(block)
    for block in sequence(TUTORIAL):
        if block.file.startswith("news/"):
            project.write(block)
    project.append("mysite/urls.py", LIVE_URL)
    project.migrate()
    return project


@pytest.fixture(params=["new_project", "existing_project"])
def project(request: pytest.FixtureRequest) -> Project:
    """Run a test in both projects."""
    return request.getfixturevalue(request.param)


def publish(page: Page, text: str) -> None:
    """Publish with the form of the page."""
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Publish").click()


def test_both_windows_list_every_published_event(
    project: Project, browser: BrowserContext, page: Page
) -> None:
    """The publisher's own window keeps its list, and send_event reaches both."""
    port = free_port()
    with project.serve(port):
        other = browser.new_page()
        url = f"http://127.0.0.1:{port}/live/"
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
    new_project: Project, page: Page
) -> None:
    """The URL is not escaped for HTML in a script, so the grant in it is valid."""
    new_project.append("news/views.py", SEVERAL_VIEW)
    new_project.append("news/templates/news/several.html", SEVERAL_TOKENS)
    new_project.append("mysite/urls.py", SEVERAL_URL)
    port = free_port()
    with new_project.serve(port):
        with page.expect_response(lambda response: "/events/poll/" in response.url) as opened:
            page.goto(f"http://127.0.0.1:{port}/several/")
        assert opened.value.status == 200
        page.evaluate(COLLECT)
        new_project.type("""python manage.py send_event "weather & 'wind'" ping rain""")
        new_project.type("python manage.py send_event news ping Hello")
        page.wait_for_function("received.length == 2")
        assert sorted(page.evaluate("received")) == ["Hello", "rain"]


def test_the_system_check_finds_no_error_and_no_warning(project: Project) -> None:
    """The project has followed the tutorial."""
    assert "no issues" in project.type("python manage.py check --fail-level WARNING")


def test_the_projects_own_page_and_websocket_still_work(
    existing_project: Project, page: Page
) -> None:
    """The steps do not replace anything of an existing project."""
    port = free_port()
    with existing_project.serve(port):
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.locator("body")).to_have_text("the project's own page")
        echo = page.evaluate(
            """port => new Promise((resolve, reject) => {
                const socket = new WebSocket(`ws://127.0.0.1:${port}/echo/`);
                socket.onopen = () => socket.send("echo");
                socket.onmessage = (event) => resolve(event.data);
                socket.onerror = reject;
            })""",
            port,
        )
        assert echo == "echo"


def test_the_examples_of_tests_pass_in_the_new_project(new_project: Project) -> None:
    """The examples of the page on testing run as printed, with Django's runner and pytest."""
    for block in sequence(TESTING):
        new_project.write(block)
    new_project.type("python -m pip install --quiet pytest-django")
    assert "Ran 8 tests" in new_project.type("python -W error manage.py test 2>&1")
    run = "python -m pytest -W error --ds=mysite.settings news/tests.py test_news.py"
    assert "11 passed" in new_project.type(run)


def test_a_site_on_wsgi_has_the_streams_of_an_asgi_server_behind_the_same_proxy(
    existing_project: Project, page: Page, tmp_path: Path
) -> None:
    """The page and the form are served by gunicorn, and the stream by daphne."""
    existing_project.type("python -m pip install gunicorn")
    example = (EXAMPLES / "nginx" / NGINX.file).read_text()
    wsgi, asgi = free_port(), free_port()
    changes = [
        (excerpt(example, {"start-at": "location /", "end-before": "# End of"}), LOCATIONS),
        ("127.0.0.1:8001", f"127.0.0.1:{asgi}"),
    ]
    with (
        NGINX.run(tmp_path, wsgi, *changes) as (host, port),
        existing_project.serve(wsgi, WSGI),
        existing_project.serve(asgi, ASGI.replace("8001", "8000")),
    ):
        with page.expect_response(lambda response: "/events/poll/" in response.url):
            page.goto(f"http://{host}:{port}/live/")
        publish(page, "one")
        expect(page.locator("li")).to_have_text(["one"])


@pytest.fixture(scope="module")
def extended_project(new_project: Project) -> Project:
    """Install the packages of the how-to pages."""
    new_project.type(f"python -m pip install {shlex.join(PACKAGES)}")
    return new_project


CHECK = (
    'from django.core.management import call_command; call_command("check", fail_level="WARNING")'
)


@pytest.mark.parametrize("page", HOWTOS)
def test_the_files_of_a_how_to_page_fit_into_the_project_of_the_tutorial(
    page: str, extended_project: Project, tmp_path: Path
) -> None:
    """Every module can be imported, and the system check finds no error and no warning."""
    project = extended_project.copy(tmp_path / "project")
    modules = []
    for block in sequence(page):
        if block.file.startswith(OWN):
            project.write(block)
            # Not every Django has django.tasks.
            if block.language == "python" and "django.tasks" not in block.text:
                modules.append(block.file.removesuffix(".py").replace("/", "."))
    project.type(f"python manage.py shell -c 'import {', '.join(modules)}; {CHECK}'")
