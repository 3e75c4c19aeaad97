"""Progress: on all histories, in task queues, and in Chromium."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from playwright.sync_api import Locator, Page, Route, expect

from django_eventsource import atrack, track
from django_eventsource.history import get_history
from tests.support.demosite import DemoSite
from tests.support.histories import ALIASES, MARIADB, before_oldest
from tests.support.pages import blocks
from tests.support.valkey import shared_server
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

PAGE = "docs/howto/progress.rst"
RUN = "0" * 32
TOKEN = f"demo:progress:{RUN}"
POLL = re.compile("/events/poll/")


def history_setting(name: str) -> dict[str, Any]:
    """Return ``EVENTSOURCE_HISTORY`` for a history."""
    match name:
        case "memory":
            path, options = "memory.MemoryHistory", {}
        case "redis":
            path, options = "redis.RedisHistory", {"HOSTS": [shared_server().url]}
        case _:
            path, options = "database.DatabaseHistory", {"USING": name}
    return {"BACKEND": f"django_eventsource.history.{path}", "OPTIONS": options}


def stored(token: str) -> list[tuple[str, int, int | None]]:
    """Return the action, the done and the total of each event of a token."""
    history = get_history()
    found = []
    for entry in history.read(token, before_oldest(history, token)).entries:
        value = json.loads(entry.draft.data)
        found.append((entry.draft.action, value["done"], value["total"]))
    return found


# Histories


@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("name", ["memory", "default", "postgres", MARIADB, "redis"])
def test_every_history_has_the_begin_and_the_end(settings: Any, name: str) -> None:
    """Of loops in synchronous and in asynchronous code."""
    settings.EVENTSOURCE_HISTORY = history_setting(name)

    async def loop() -> None:
        async for _ in atrack(range(3), "async", interval_seconds=3600):
            pass

    for row in track(range(3), "sync", interval_seconds=3600):
        if row == 2:
            break
    async_to_sync(loop)()
    assert stored("sync") == [("progress", 0, 3), ("failed", 2, 3)]
    assert stored("async") == [("progress", 0, 3), ("done", 3, 3)]


# The page of the documentation


def block(number: int, name: str = "progress") -> dict[str, Any]:
    """Execute a Python block of the page and return its names."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(blocks(PAGE, "python")[number], name, "exec", dont_inherit=True), names)
    return names


@pytest.mark.django_db(transaction=True)
def test_the_loop_of_the_page_publishes_its_progress() -> None:
    block(0)["import_users"](["ada", "grace"], "import:1")
    assert stored("import:1") == [("progress", 0, 2), ("done", 2, 2)]
    assert User.objects.count() == 2


@pytest.mark.usefixtures("memory_history")
def test_the_celery_task_of_the_page_publishes_its_progress() -> None:
    result = block(1)["count_letters"].apply(args=[["tea", "cake"], "count:1"], throw=True)
    assert result.get() == 7
    assert stored("count:1") == [("progress", 0, 2), ("done", 2, 2)]


TASK = """
from django.tasks import task
from django_eventsource import track


@task
def count_letters(words, token):
    return sum(len(word) for word in track(words, token))
"""


@pytest.mark.skipif(django.VERSION < (6,), reason="django.tasks is new in Django 6.0")
@pytest.mark.usefixtures("memory_history")
def test_a_task_of_django_publishes_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("progress_tasks")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(TASK, vars(module))
    result = module.count_letters.enqueue(["tea", "cake"], "count:3")
    assert result.return_value == 7
    assert stored("count:3") == [("progress", 0, 2), ("done", 2, 2)]


@pytest.mark.usefixtures("memory_history")
async def test_the_asynchronous_loop_of_the_page_publishes_its_progress() -> None:
    assert await block(2)["count_letters"](["tea", "cake"], "count:2") == 7
    assert stored("count:2") == [("progress", 0, 2), ("done", 2, 2)]


@pytest.mark.django_db(transaction=True)
def test_the_loop_with_transactions_of_the_page_publishes_its_progress() -> None:
    user = User.objects.create_user("ada", is_active=False)
    block(3)["activate"](User.objects.order_by("pk"), "activate:1")
    assert stored("activate:1") == [("progress", 0, 1), ("done", 1, 1)]
    user.refresh_from_db()
    assert user.is_active


@pytest.mark.usefixtures("memory_history")
def test_the_value_of_the_page_has_the_members_of_an_event() -> None:
    list(track([1], "t"))
    history = get_history()
    entry = history.read("t", before_oldest(history)).entries[0]
    (example,) = blocks(PAGE, "json")
    assert list(json.loads(entry.draft.data)) == list(json.loads(example))


# In the browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoSite]:
    """Run a demo site for all tests of this module."""
    site = DemoSite(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.kill()
    assert site.errors == ""


@pytest.fixture
def bar(page: Page) -> Locator:
    """Return the element of the page."""
    return page.locator("eventsource-progress")


PUBLISH = """
import json, sys, django
django.setup()
from django_eventsource import publish
from django_eventsource.progress import ProgressEvent
for action, done, total in json.loads(sys.argv[2]):
    value = {"done": done, "total": total, "rate": 1, "remaining_seconds": None}
    publish(sys.argv[1], action, value, ProgressEvent)
"""


def events(site: DemoSite, *events: tuple[str, int, int | None]) -> None:
    """Publish events of the run of the page: the action, the done and the total of each."""
    site.run(PUBLISH, TOKEN, json.dumps(events))


def shows(bar: Locator, state: str, text: str, position: float) -> None:
    """Wait until the bar shows a state. The position -1 is that of a bar without a value."""
    expect(bar).to_have_attribute("state", state)
    expect(bar.locator("[data-share]")).to_have_text(text)
    assert bar.locator("progress").evaluate("bar => bar.position") == position
    failed = bar.locator("[data-state=failed]")
    assert failed.is_visible() == (state == "failed")


@pytest.mark.parametrize(
    ("action", "done", "total", "text", "position"),
    [
        ("progress", 0, 4, "0%", 0),
        ("progress", 1, 4, "25%", 0.25),
        ("progress", 7, None, "", -1),
        ("failed", 1, 4, "25%", 0.25),
        ("failed", 7, None, "", 0),
        ("done", 4, 4, "100%", 1),
        ("done", 0, 0, "100%", 1),
    ],
)
def test_a_page_starts_with_the_newest_event(
    page: Page,
    site: DemoSite,
    bar: Locator,
    action: str,
    done: int,
    total: int | None,
    text: str,
    position: float,
) -> None:
    events(site, ("progress", 0, total), (action, done, total))
    page.goto(f"{site.url}progress/?run={RUN}")
    shows(bar, action, text, position)
    if action == "progress":
        events(site, ("progress", 2, 4))
        expect(bar.locator("[data-share]")).to_have_text("50%")
        assert bar.locator("progress").evaluate("bar => bar.position") == 0.5


def count_polls(page: Page, *first: tuple[int, str]) -> list[str]:
    """Return the list of the requests for streams. The first ones have other responses."""
    polls: list[str] = []

    def handle(route: Route) -> None:
        polls.append(route.request.url)
        if len(polls) <= len(first):
            status, body = first[len(polls) - 1]
            route.fulfill(status=status, content_type="text/event-stream", body=body)
        else:
            route.continue_()

    page.route(POLL, handle)
    return polls


@pytest.mark.parametrize(
    "first",
    [
        [(502, "Bad Gateway"), (401, "Expired")],  # a browser gives up
        [(200, "retry: 600000\nevent: reset\ndata: {}\n\n")],
    ],
    ids=["refused", "reset"],
)
def test_a_stream_that_does_not_continue_is_opened_again(
    page: Page, site: DemoSite, bar: Locator, first: list[tuple[int, str]]
) -> None:
    events(site, ("progress", 1, 2))
    polls = count_polls(page, *first)
    page.goto(f"{site.url}progress/?run={RUN}")
    shows(bar, "progress", "50%", 0.5)
    assert len(polls) == len(first) + 1


@pytest.mark.parametrize("action", ["close", "done", "failed"])
def test_no_stream_is_opened_after_the_last_event(
    page: Page, site: DemoSite, bar: Locator, action: str
) -> None:
    """An element that is inserted again opens a stream again."""
    events(site, ("progress", 1, 2))
    body = "".join(
        f'event: {one}\ndata: {{"done": 1, "total": 4}}\n\n' for one in ("progress", action)
    )
    polls = count_polls(page, (200, f"retry: 1\n{body}"))
    page.goto(f"{site.url}progress/?run={RUN}")
    expect(bar).to_have_attribute("state", "progress" if action == "close" else action)
    bar.evaluate("bar => bar.replaceWith(bar.cloneNode(true))")
    shows(bar, "progress", "50%", 0.5)
    assert len(polls) == 2


def test_an_element_that_is_removed_closes_its_stream(
    page: Page, site: DemoSite, bar: Locator
) -> None:
    events(site, ("progress", 1, 2))
    page.goto(f"{site.url}progress/?run={RUN}")
    shows(bar, "progress", "50%", 0.5)
    with page.expect_event("requestfailed", lambda request: bool(POLL.search(request.url))):
        bar.evaluate("bar => bar.remove()")


def test_the_template_works_under_a_strict_policy(
    page: Page, site: DemoSite, bar: Locator
) -> None:
    """Only scripts and connections of the site are allowed."""

    def handle(route: Route) -> None:
        found = re.search(
            "<script type=.*</eventsource-progress>", route.fetch().text(), re.DOTALL
        )
        assert found
        policy = "default-src 'none'; script-src 'self'; connect-src 'self'"
        headers = {"Content-Security-Policy": policy, "Content-Type": "text/html"}
        route.fulfill(headers=headers, body=f"<!DOCTYPE html>{found[0]}")

    events(site, ("progress", 1, 2))
    page.route(re.compile(r"/progress/\?run="), handle)
    violations: list[str] = []
    page.on("console", lambda message: violations.append(message.text))
    page.goto(f"{site.url}progress/?run={RUN}")
    shows(bar, "progress", "50%", 0.5)
    assert violations == []


STORED = """
import json, sys, django
django.setup()
from django_eventsource import read_history
events = read_history(sys.argv[1], limit=500).events
print(json.dumps([[event.action, json.loads(event.value)["done"]] for event in events]))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_page_misses_no_event_of_a_run_during_which_the_server_restarts(
    page: Page, tmp_path: Any, bar: Locator, how: signal.Signals
) -> None:
    """The run continues without the server. A page that is opened later shows the end too."""
    site = DemoSite(tmp_path)
    site.start()
    try:
        page.goto(f"{site.url}progress/")
        page.get_by_role("button", name="Start", exact=True).click()
        expect(bar).to_have_attribute("state", "progress")
        page.evaluate(
            """() => {
                window.received = [];
                for (const action of ["progress", "done", "failed"])
                    addEventListener(action, ({ detail }) => received.push([action, detail.done]));
            }"""
        )
        token = "demo:progress:" + page.url.partition("?run=")[2]
        page.wait_for_function("received.length > 0")
        site.stop(how)
        while_down = site.run(STORED, token)
        for _ in range(1000):
            if site.run(STORED, token) != while_down:
                break
        site.start()
        expect(bar).to_have_attribute("state", "done", timeout=PROCESS_PATIENCE_SECONDS * 1000)
        received = page.evaluate("received")
        published = json.loads(site.run(STORED, token))
        assert received == published[-len(received) :]
        assert [action for action, _ in published].count("done") == 1
        assert received[0][1] < json.loads(while_down)[-1][1] < received[-1][1] == 300
        page.reload()
        shows(bar, "done", "100%", 1)
        assert site.errors == ""
    finally:
        site.kill()
