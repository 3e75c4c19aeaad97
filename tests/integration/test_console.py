"""The console: on all histories, over two processes, and in Chromium."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db.backends.utils import CursorWrapper
from django.test import AsyncClient
from django.urls import reverse
from playwright.sync_api import Page, Route, expect

from django_eventsource import history
from django_eventsource.console import find_events, newest_page
from django_eventsource.history import History
from django_eventsource.operations.details import (
    DETAILS_PREFIX,
    DetailsWriter,
    read_details,
    request_details,
)
from django_eventsource.protocol.tokens import DETAILS_TOKEN, token_key
from django_eventsource.streaming.stream import retry_body
from tests.support.demosite import DemoSite
from tests.support.events import add
from tests.support.histories import ALIASES, NAMES, age, make
from tests.support.listeners import Connection
from tests.support.processes import Server, serve
from tests.support.valkey import shared_server
from tests.support.waiting import PROCESS_PATIENCE_SECONDS, until

OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}


# Histories


@pytest.fixture(params=NAMES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> History:
    """Use each of the histories for the process."""
    found = make(request.param)
    monkeypatch.setattr(history, "_current", found)
    return found


@pytest.mark.django_db(databases=ALIASES)
def test_every_history_stores_the_details_and_finds_events(store: History) -> None:
    details = {"host": "h", "pid": "1", "process": "p", "text": "ünï😀'\"\u2028" * 5000}
    for seconds in (30, 60):
        store.announce(f"{DETAILS_PREFIX}p", {DETAILS_TOKEN: [json.dumps(details)]}, seconds)
    assert read_details() == [details]
    age(store, 61)
    assert read_details() == []
    add(store, *(f"value {n}" for n in range(120)))
    newest = find_events("t", after=newest_page("t"))
    assert [one.value for one in newest.events] == [f"value {n}" for n in range(70, 120)]
    assert (newest.more, newest.missing) == (False, None)
    found = find_events("t", text="VALUE 11")
    assert [one.value for one in found.events] == [f"value {n}" for n in (11, *range(110, 120))]
    assert not find_events("t", action="other").events


# Statements


@pytest.mark.django_db(transaction=True)
async def test_a_process_runs_no_statement_for_a_console_that_is_not_open(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_POLICY = OPEN["EVENTSOURCE_POLICY"]
    settings.EVENTSOURCE_PRESENCE_SECONDS = settings.EVENTSOURCE_POLL_SECONDS = 0.05
    monkeypatch.setattr(DetailsWriter, "WRITE_SECONDS", 0.05)
    execute = CursorWrapper.execute
    statements: list[str] = []

    def record(self: Any, sql: Any, params: Any = None) -> Any:
        statements.append(f"{sql} {params}")
        return execute(self, sql, params)

    def count(text: str) -> int:
        return sum(text in one for one in list(statements))

    stream = (await AsyncClient().get("/events/poll/t"))._stream  # type: ignore[attr-defined]
    await anext(stream)
    monkeypatch.setattr(CursorWrapper, "execute", record)
    renewal = 'UPDATE "django_eventsource_processlease"'
    await until(lambda: count(renewal) >= 5)
    assert count(token_key(DETAILS_TOKEN)) == 0

    async def is_written() -> bool:
        # A request that comes before the process has read the control token is not received.
        await sync_to_async(request_details)()
        return count(token_key(DETAILS_TOKEN)) > 0

    await until(is_written, interval_seconds=0.1)
    await stream.aclose()


# Two processes


HISTORIES: dict[str, Any] = {
    "database": lambda: {"EVENTSOURCE_POLL_SECONDS": 0.1},
    "redis": lambda: {
        "EVENTSOURCE_POLL_SECONDS": 0.1,
        "EVENTSOURCE_HISTORY": {
            "BACKEND": "django_eventsource.history.redis.RedisHistory",
            "OPTIONS": {"HOSTS": [shared_server().url]},
        },
    },
}


async def get_json(server: Server, url: str, client: AsyncClient) -> Any:
    """Return the JSON of a page of the admin."""
    cookie = f"sessionid={client.cookies['sessionid'].value}"
    connection = await Connection.open(server.address, url, Cookie=cookie)
    assert connection.status == 200, connection.head
    body = b""
    while chunk := await connection.read():
        body += chunk
    connection.close()
    return json.loads(body)


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", list(HISTORIES))
async def test_each_process_shows_the_listeners_of_all_processes(name: str) -> None:
    """A process that was killed disappears."""
    client = AsyncClient()
    await client.aforce_login(await User.objects.acreate_superuser("admin"))
    changes = OPEN | HISTORIES[name]()
    url = reverse("admin:django_eventsource_console_details", query={"token": "t", "request": ""})
    with serve("daphne", **changes) as one, serve("uvicorn", **changes) as two:
        streams = []
        for server in (one, two):
            streams.append(await Connection.open(server.address, "/events/poll/t"))
            await streams[-1].read()

        async def pids(server: Server) -> list[str]:
            answer = await get_json(server, url, client)
            assert all(
                found["tokens"]["t"]["streams"] == len(found["tokens"]["t"]["listeners"]) == 1
                for found in answer["processes"]
                if "t" in found["tokens"]  # not in what was written before the request
            )
            return sorted(found["pid"] for found in answer["processes"] if found["tokens"])

        expected = sorted(str(server.process.pid) for server in (one, two) if server.process)
        for server in (one, two):

            async def shows_both(server: Server = server) -> bool:
                return await pids(server) == expected

            await until(shows_both, seconds=PROCESS_PATIENCE_SECONDS, interval_seconds=0.2)

        async def shows_one() -> bool:
            return await pids(one) == [str(one.process and one.process.pid)]

        if name == "database":  # one wait for the end of a lease is enough
            two.stop()
            await until(shows_one, seconds=PROCESS_PATIENCE_SECONDS, interval_seconds=0.2)
        for stream in streams:
            stream.close()


# In the browser


SUPERUSER = """
import django
django.setup()
from django.contrib.auth.models import User
from django_eventsource import publish
User.objects.create_superuser("admin", "", "admin")
publish("a/b <script>alert(1)</script>", "ping", "first <img src=x onerror=alert(1)>")
"""
TOKEN = "a/b <script>alert(1)</script>"
LOG = """
import django
django.setup()
from django.contrib.admin.models import LogEntry
print([one.change_message for one in LogEntry.objects.order_by("pk")])
"""
CLOSE = """
import sys, django
django.setup()
from django_eventsource import close_streams
close_streams(token=sys.argv[1])
"""
CONSOLE = "admin/django_eventsource/console/"
STRICT = "default-src 'self'; img-src 'self' data:"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoSite]:
    """Run a demo site with a superuser and an event."""
    site = DemoSite(tmp_path_factory.mktemp("site"))
    site.start()
    site.run(SUPERUSER)
    yield site
    site.kill()


@pytest.fixture
def console(page: Page, site: DemoSite) -> Page:
    """Return a page that is logged in, on the overview, under a strict CSP."""

    def add_policy(route: Route) -> None:
        if route.request.resource_type != "document":
            return route.continue_()
        response = route.fetch(max_redirects=0)
        headers = {**response.headers, "content-security-policy": STRICT}
        return route.fulfill(response=response, headers=headers)

    page.route("**/admin/**", add_policy)
    page.goto(f"{site.url}{CONSOLE}")
    if page.locator("#id_username").is_visible():
        page.fill("#id_username", "admin")
        page.fill("#id_password", "admin")
        page.keyboard.press("Enter")
    expect(page.locator("#console")).to_be_visible()
    return page


def tab_to(page: Page, selector: str) -> None:
    """Press the tab key until an element has the focus."""
    for _n in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"The tab key does not reach {selector}.")


def utc_now() -> str:
    """Return the time in UTC as the pages show it."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}"


def fits(page: Page) -> bool:
    """Return whether the page is not wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.slow
def test_an_operator_watches_publishes_and_closes_with_the_keyboard(
    console: Page, site: DemoSite
) -> None:
    """Values are shown as text, and nothing breaks a strict content security policy."""
    problems: list[str] = []
    console.on("console", lambda message: problems.append(message.text))
    console.on("dialog", lambda dialog: problems.append(dialog.message))

    tab_to(console, "input[name=token]")
    console.keyboard.type(TOKEN)
    console.keyboard.press("Enter")
    stored, tail = console.locator("#history td.value"), console.locator("#tail td.value")
    expect(stored).to_have_text(["first <img src=x onerror=alert(1)>"])
    expect(console.locator("#token-streams")).to_have_text("0")

    tab_to(console, "#tail button")
    console.keyboard.press("Space")
    status = console.locator("#tail [role=status]")
    expect(status).to_have_text("listening")
    expect(console.locator("#listeners tr")).to_have_count(1)
    expect(console.locator("#listeners td")).to_contain_text(["1", "127.0.0.1", "s", "live"])

    tab_to(console, "#publish_value")
    console.keyboard.type("<b>second</b>")
    console.keyboard.press("Enter")
    console.keyboard.type("line")
    console.keyboard.press("Tab")
    console.keyboard.press("Enter")
    expect(console.locator(".messagelist")).to_contain_text(f"Published ping to token '{TOKEN}'.")
    expect(stored).to_have_text(["first <img src=x onerror=alert(1)>", "<b>second</b>\nline"])
    expect(status).to_have_text("listening")
    site.publish(TOKEN, "ping", "<i>third</i>")
    expect(tail).to_have_text(["<i>third</i>"])

    tab_to(console, "#close_user")
    console.keyboard.press("Enter")
    expect(console.locator(".messagelist")).to_contain_text("Requested to close the")
    assert site.run(LOG).strip() == str(
        [
            f"Published ping to token '{TOKEN}'.",
            f"Requested to close the streams of token '{TOKEN}'.",
        ]
    )
    assert problems == []


@pytest.mark.slow
def test_the_tail_continues_after_its_stream_was_closed(console: Page, site: DemoSite) -> None:
    """An event that is published meanwhile is not lost. A closed token ends the tail."""
    console.goto(f"{site.url}{CONSOLE}token/?token=cut")
    console.get_by_role("button", name="Listen").click()
    status = console.locator("#tail [role=status]")
    expect(status).to_have_text("listening")
    began = utc_now()
    with console.expect_request("**/console/tail/**"):
        site.run(CLOSE, "cut")
        site.publish("cut", "ping", "meanwhile")
    expect(console.locator("#tail td.value")).to_have_text(["meanwhile"])
    received = console.locator('#tail td[data-label="Received (UTC)"]').inner_text()
    assert began <= received <= utc_now()
    site.publish("cut", "close", "end")
    expect(console.locator("#tail td.value")).to_have_text(["meanwhile", "end"])
    expect(status).to_have_text("the token is closed")
    expect(console.get_by_role("button", name="Listen")).to_be_visible()


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
LINES = "long\nlines\r\nof a\rtoken" + "x" * 200


@pytest.mark.slow
def test_the_tail_of_a_long_token_pauses_while_its_page_is_hidden(
    console: Page, site: DemoSite
) -> None:
    """It states why the server accepts no stream. Each form keeps the line ends of the token."""
    console.set_viewport_size({"width": 390, "height": 844})
    console.goto(f"{site.url}{CONSOLE}token/?{urlencode({'token': LINES})}")
    assert fits(console)
    console.route(
        "**/console/tail/**",
        lambda route: route.fulfill(body=retry_body(), content_type="text/event-stream"),
    )
    console.get_by_role("button", name="Listen").click()
    status = console.locator("#tail [role=status]")
    expect(status).to_contain_text("a limit of streams is reached")
    console.unroute("**/console/tail/**")
    expect(status).to_have_text("listening")
    with console.expect_event("requestfailed"):
        console.evaluate(HIDE, True)
    expect(status).to_have_text("paused while the page is hidden")
    site.publish(LINES, "ping", "while hidden")
    console.evaluate(HIDE, False)
    values = console.locator("#tail td.value")
    expect(values).to_have_text(["while hidden"])
    site.publish(LINES, "ping", "while visible")
    expect(values).to_have_text(["while hidden", "while visible"])

    console.fill("#id_text", "while")
    console.get_by_role("button", name="Search").click()
    expect(console.locator("#history td.value")).to_have_text(["while hidden", "while visible"])
    expect(status).to_have_text("listening")
    console.get_by_role("button", name="Close the streams of this token").click()
    expect(console.locator(".messagelist")).to_contain_text("Requested to close the streams")
    assert fits(console)
    assert site.run(LOG).strip().endswith(f"token {LINES!r}.".replace("\\", "\\\\") + '"]')


@pytest.mark.slow
def test_the_overview_shows_processes_in_each_window_and_theme(
    console: Page, site: DemoSite
) -> None:
    live = open_live_page(console, site)
    process = console.locator("#processes tr")
    expect(process.locator("td").nth(1)).to_have_text(str(site.process and site.process.pid))
    expect(process.locator("td").nth(2)).to_have_text("alive")
    expect(console.locator("#busiest")).to_contain_text("orders")
    # The demo publishes the figures of the machine, which the live page shows.
    delivered = console.locator("[data-chart=delivered]")
    expect(delivered.locator("output")).not_to_have_text("0")
    assert delivered.locator("polyline").get_attribute("points")
    expect(console.locator("#history-state")).to_contain_text("read in")

    background = "getComputedStyle(document.querySelector('#console figure')).backgroundColor"
    colors = set()
    for scheme in ("light", "dark"):
        console.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colors.add(console.evaluate(background))
    assert len(colors) == 2
    assert fits(console)
    console.set_viewport_size({"width": 390, "height": 844})
    assert fits(console)
    link = console.locator("#busiest a", has_text="orders")
    link.focus()
    answer = console.request.get(f"{site.url}{CONSOLE}details/").json()
    console.route("**/console/details/**", lambda route: route.fulfill(json=answer))
    for count in (7, 8):  # the rows change, and their order, while a link has the focus
        answer["processes"][0]["busiest"] = [["other", 7.5], ["orders", count]]
        expect(console.locator("#busiest tr", has_text="orders")).to_contain_text(str(count))
        expect(link).to_be_focused()
    console.unroute("**/console/details/**")
    console.keyboard.press("Enter")
    expect(console.locator("#token-streams")).to_have_text("1")
    assert fits(console)
    live.close()


def open_live_page(console: Page, site: DemoSite) -> Page:
    """Open a page with a stream, and return to the console."""
    live = console.context.new_page()
    live.goto(f"{site.live_url}?token=orders")
    expect(live.locator("#state")).to_have_text("open")
    # Tabs in the background request nothing.
    console.bring_to_front()
    return live


@pytest.mark.slow
def test_the_overview_reports_what_does_not_respond(console: Page, site: DemoSite) -> None:
    open_live_page(console, site).close()
    state = console.locator("#processes td").nth(2)
    expect(state).to_have_text("alive")
    problem = console.locator("#problem")
    answers: list[Any] = [
        {"processes": [], "time": time.time(), "history": {"seconds": 0}},
        {"error": "The history's store failed."},
    ]
    console.route("**/console/details/**", lambda route: route.fulfill(json=answers[0]))
    expect(state).to_have_text("not alive")
    answers.pop(0)
    expect(problem).to_have_text("The history's store failed.")
    expect(console.locator("#history-state")).to_have_text("not readable")
    console.unroute("**/console/details/**")
    expect(problem).to_be_hidden()
    console.route("**/console/details/**", lambda route: route.abort())
    expect(problem).to_contain_text("The server does not respond")
    console.unroute("**/console/details/**")
    expect(problem).to_be_hidden()
    # As if all connections of the browser were in use.
    console.evaluate("""() => {
        const timeout = AbortSignal.timeout.bind(AbortSignal);
        AbortSignal.timeout = (ms) => timeout(ms / 100);
    }""")
    console.route("**/console/details/**", lambda route: None)
    expect(problem).to_contain_text("timed out")
    console.unroute("**/console/details/**")
    console.reload()
    expect(console.locator("#history-state")).to_contain_text("read in")
    console.context.clear_cookies()
    expect(problem).to_contain_text("You are logged out")
