"""Tests of the demo's live page in Chromium, on a demo site in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Request, Route, expect

from django_eventsource.protocol.frames import CONTENT_TYPE, encode_retry
from tests.support.browser import PATIENCE_MS
from tests.support.demosite import DemoSite

TOKEN = "42:42:42:42:42:42"
OPEN = re.compile("^open$")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoSite]:
    """Run a demo site for the tests that do not stop it."""
    site = DemoSite(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.kill()


@pytest.fixture
def mortal_site(tmp_path) -> Iterator[DemoSite]:
    """Run a demo site for a test that kills it."""
    site = DemoSite(tmp_path)
    site.start()
    yield site
    site.kill()


def visit(page: Page, url: str) -> None:
    """Open the page and wait until it listens."""
    page.goto(url)
    expect(page.locator("#state")).to_have_text(OPEN)


def send(page: Page, action: str, value: str = "") -> None:
    """Send an event with the form."""
    page.get_by_label("Action").select_option(action)
    page.get_by_label("Value").fill(value)
    page.get_by_role("button", name="Send").click()


def events(page: Page) -> Locator:
    """Return a locator of the values of the events in the box."""
    return page.locator("#log li .data")


def reconnect_at_once(page: Page, site: DemoSite) -> None:
    """Let the browser reconnect after 50 ms in place of some seconds."""
    site.publish(TOKEN, "retry", "50")
    site.publish(TOKEN, "ping", "begin")
    expect(events(page)).to_have_text(["begin"])


def polls(page: Page, token: str) -> list[str]:
    """Return a list that collects the URLs of the requests for a token's streams."""
    urls: list[str] = []

    def note(request: Request) -> None:
        if f"/events/poll/{token}" in request.url:
            urls.append(request.url)

    page.on("request", note)
    return urls


def points(page: Page) -> int:
    """Return the number of points that the chart has received, also those that it has dropped."""
    return int(page.locator("#machine svg").get_attribute("data-received") or 0)


def wait_for_points(page: Page, count: int, timeout: float = PATIENCE_MS) -> None:
    """Wait until the chart has received a number of points."""
    script = "count => document.querySelector('#machine svg').dataset.received >= count"
    page.wait_for_function(script, arg=count, timeout=timeout)


# Sending and receiving


def test_an_event_of_the_form_appears_with_its_id(page: Page, site: DemoSite):
    """The page shows the value as it was typed."""
    visit(page, site.live_url)
    send(page, "ping", "42")
    expect(events(page)).to_have_text(["42"])
    expect(page.locator("#log li .action")).to_have_text(["ping"])
    event_id = page.locator("#log li .id").inner_text()
    assert event_id.isdigit()
    expect(page.locator("#result")).to_have_text(f"Sent ping with id {event_id}.")
    value = "two\nlines, <b onclick='x'>markup</b> and é☃"
    send(page, "ping", value)
    expect(events(page)).to_have_count(2)
    assert events(page).nth(1).text_content() == value
    send(page, "ping", "")
    expect(events(page)).to_have_text(["42", value, ""])


def test_ctrl_enter_in_the_value_sends_the_event(page: Page, site: DemoSite):
    visit(page, site.live_url)
    page.get_by_label("Value").press("Control+Enter")
    expect(events(page)).to_have_text(["42"])


def test_events_of_another_process_appear_in_order(page: Page, site: DemoSite):
    visit(page, site.live_url)
    values = [str(number) for number in range(100)]
    site.publish(TOKEN, "ping", *values)
    expect(events(page)).to_have_text(values)


def test_the_page_listens_only_to_the_chosen_token(page: Page, site: DemoSite):
    visit(page, site.live_url)
    page.get_by_label("Token", exact=True).fill('a/b?c=1&d "é"')
    page.get_by_role("button", name="Listen").click()
    expect(page.get_by_label("Token", exact=True)).to_have_value('a/b?c=1&d "é"')
    expect(page.locator("#state")).to_have_text(OPEN)
    site.publish(TOKEN, "ping", "for another token")
    send(page, "ping", "here")
    expect(events(page)).to_have_text(["here"])


def test_an_event_between_the_page_and_its_stream_is_shown(page: Page, site: DemoSite):
    """It is sent after the page was rendered, and before the page listens."""
    page.route(
        "**/live.js",
        lambda route: (site.publish(TOKEN, "ping", "between"), route.continue_()),
    )
    visit(page, site.live_url)
    expect(events(page)).to_have_text(["between"])


# The chart


def test_the_chart_draws_one_point_a_second_and_keeps_them_over_a_reload(
    page: Page, site: DemoSite
):
    visit(page, site.live_url)
    wait_for_points(page, 8)
    for name in ("cpu", "load", "memory"):
        path = page.locator(f'[data-line="{name}"]').get_attribute("d")
        assert path.startswith("M")
        assert path.count("L") >= 5
    figure = page.locator('[data-figure="memory"]')
    expect(figure).to_have_text(re.compile(r"^\d+ %[\d.]+/[\d.]+ GiB$"))
    page.reload()
    # Before so many seconds could have passed.
    wait_for_points(page, 8, timeout=5000)


def test_a_hidden_chart_closes_its_stream_and_resumes_later(page: Page, site: DemoSite):
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    visit(page, site.live_url)
    wait_for_points(page, 1)
    page.evaluate(hide, True)
    expect(page.locator("#machine .state")).to_have_text("paused")
    seen = points(page)
    page.evaluate(hide, False)
    expect(page.locator("#machine .state")).to_have_text(OPEN)
    wait_for_points(page, seen + 1)


# Reconnecting


def test_a_retry_block_sets_the_reconnection_time_and_dispatches_nothing(
    page: Page, site: DemoSite
):
    """With the browser's default of some seconds, so many requests would take much longer."""
    page.route(
        "**/short-stream",
        lambda route: route.fulfill(content_type=CONTENT_TYPE, body=encode_retry(20)),
    )
    page.goto(site.live_url)
    page.evaluate(
        """() => {
            window.opened = window.dispatched = 0;
            const source = new EventSource("/short-stream");
            source.addEventListener("open", () => { window.opened += 1; });
            for (const type of ["retry", "message"]) {
                source.addEventListener(type, () => { window.dispatched += 1; });
            }
        }"""
    )
    page.wait_for_function("() => window.opened >= 20")
    assert page.evaluate("() => window.dispatched") == 0


# Losing nothing


def test_a_stream_survives_two_crashes_of_the_server(page: Page, mortal_site: DemoSite):
    """The page shows each event once and in order."""
    visit(page, mortal_site.live_url)
    reconnect_at_once(page, mortal_site)
    values = ["begin"]
    for restart in ("first", "second"):
        mortal_site.publish(
            TOKEN, "ping", *(before := [f"before {restart} {n}" for n in range(5)])
        )
        mortal_site.kill()
        mortal_site.publish(TOKEN, "ping", *(down := [f"down {restart} {n}" for n in range(20)]))
        expect(page.locator("#state")).to_have_text("reconnecting")
        mortal_site.start()
        values += before + down
        expect(events(page)).to_have_text(values)
        expect(page.locator("#state")).to_have_text(OPEN)
    send(page, "ping", "after")
    expect(events(page)).to_have_text([*values, "after"])
    ids = [int(text) for text in page.locator("#log li .id").all_inner_texts()]
    assert ids == [ids[0] + n for n in range(len(ids))]
    seen = points(page)
    wait_for_points(page, seen + 1)


def test_the_page_shows_a_reset(page: Page, site: DemoSite):

    def expire_cursors(route: Route) -> None:
        response = route.fetch()
        body = re.sub(r'data-cursor="[^"]*"', 'data-cursor="1"', response.text())
        route.fulfill(response=response, body=body)

    site.publish(TOKEN, "ping", "missed")
    page.route(site.live_url, expire_cursors)
    visit(page, site.live_url)
    expect(events(page)).to_have_text(["Some events are missing here (expired)."])
    send(page, "ping", "live")
    expect(events(page)).to_have_count(2)
    wait_for_points(page, 1)


# Closing


def test_a_close_stops_the_reconnections_of_the_browser(page: Page, site: DemoSite):
    urls = polls(page, TOKEN)
    visit(page, site.live_url)
    reconnect_at_once(page, site)
    send(page, "close", "bye")
    expect(events(page)).to_have_text(["begin", "bye"])
    expect(page.locator("#state")).to_have_text("closed")
    expect(page.locator("#notice")).to_contain_text("The token was closed.")
    # The chart's seconds are the clock: 20 reconnection times and more.
    wait_for_points(page, points(page) + 2)
    assert len(urls) == 1
    expect(page.locator("#state")).to_have_text("closed")


def test_a_page_that_missed_the_close_receives_what_it_missed_and_stops(
    page: Page, mortal_site: DemoSite
):
    visit(page, mortal_site.live_url)
    reconnect_at_once(page, mortal_site)
    mortal_site.kill()
    mortal_site.publish(TOKEN, "ping", "missed")
    mortal_site.publish(TOKEN, "close", "bye")
    mortal_site.start()
    expect(events(page)).to_have_text(["begin", "missed", "bye"])
    expect(page.locator("#state")).to_have_text("closed")


def test_the_page_can_listen_again_after_a_close(page: Page, site: DemoSite):
    visit(page, site.live_url)
    send(page, "close")
    page.get_by_role("button", name="Listen again").click()
    expect(page.locator("#state")).to_have_text(OPEN)
    expect(page.locator("#notice")).to_be_hidden()
    send(page, "ping", "again")
    expect(events(page)).to_have_text(["", "again"])


# Errors


def test_a_refused_value_shows_the_message_of_the_server(page: Page, site: DemoSite):
    visit(page, site.live_url)
    send(page, "retry", "soon")
    expect(page.locator("#result")).to_contain_text(
        "Not sent. The value of a retry event must be ASCII digits"
    )
    send(page, "retry", "1000")
    expect(page.locator("#result")).to_contain_text("and show no event.")


def test_sending_without_a_server_shows_an_error(page: Page, mortal_site: DemoSite):
    visit(page, mortal_site.live_url)
    mortal_site.kill()
    send(page, "ping", "42")
    expect(page.locator("#result")).to_have_text("Not sent: the server cannot be reached.")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, "The grant has expired.", "The grant has expired. Reload the page"),
        (403, "", "The server responded 403"),
    ],
)
def test_an_expired_grant_shows_the_reason_and_the_way_out(
    page: Page, site: DemoSite, status: int, body: str, words: str
):
    refuse(page, status, body)
    page.goto(site.live_url)
    expect(page.locator("#state")).to_have_text("closed: failed")
    expect(page.locator("#notice")).to_contain_text(words)
    page.unroute_all()
    page.get_by_role("button", name="Reload").click()
    expect(page.locator("#state")).to_have_text(OPEN)


def test_the_page_reconnects_after_a_502(page: Page, site: DemoSite):
    """EventSource itself gives up after such a response."""
    refuse(page, 502, "Bad gateway")
    page.goto(site.live_url)
    expect(page.locator("#state")).to_have_text("reconnecting")
    page.unroute_all()
    expect(page.locator("#state")).to_have_text(OPEN)


def test_an_invalid_token_shows_an_error_and_the_chart_still_works(page: Page, site: DemoSite):
    page.goto(f"{site.live_url}?token={'x' * 256}")
    expect(page.get_by_role("alert")).to_contain_text("256 characters long")
    wait_for_points(page, 1)


def refuse(page: Page, status: int, body: str) -> None:
    """Respond to requests for the token's stream with a status."""
    content_type = "text/plain; charset=utf-8"
    page.route(
        f"**/events/poll/{TOKEN}*",
        lambda route: route.fulfill(status=status, content_type=content_type, body=body),
    )


# The admin

ROWS = """
import django
django.setup()
from datetime import timedelta
from uuid import uuid4
from django.contrib.auth.models import User
from django.utils import timezone
from django_eventsource import publish
from django_eventsource.models import *
User.objects.create_superuser("admin", "", "admin")
now = timezone.now()
for token in ("42:42:42:42:42:42", "t" * 255, "a room with a name of many words"):
    publish(token, "ping", "W" * 500)
head = TokenHead.objects.get(token="t" * 255)
fields = {"action": "A" * 255, "data": b"W" * 500, "event_id": "I" * 255, "kind": "event"}
StoredEvent.objects.create(head=head, seq=head.last + 1, end_offset=0, created=now, **fields)
PendingEvent.objects.create(key="k", token="t" * 255, created=now, ref=uuid4(), **fields)
for host, seconds in (("web-1.example.com", 9000), ("h" * 200, 9000), ("web-2", -9000)):
    lease = ProcessLease.objects.create(
        key=host[:32], process=f"{host}:1234:{uuid4().hex}", until=now + timedelta(seconds=seconds)
    )
    TokenPresence.objects.create(
        lease=lease, key="k", token="t" * 255, listeners=3, identities="{}"
    )
"""
WIDTHS = """() => {
    const page = document.documentElement, box = document.querySelector("#changelist-form");
    const table = document.querySelector("#result_list");
    return {page: page.scrollWidth - page.clientWidth, table: table.offsetWidth - box.offsetWidth};
}"""


@pytest.mark.parametrize("width", [1200, 390])
def test_no_list_of_the_admin_is_wider_than_the_page(
    browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory, width: int
) -> None:
    """On a phone the table scrolls inside of the page, as the tables of Django do."""
    site = DemoSite(tmp_path_factory.mktemp("admin"))
    site.start()
    try:
        site.run(ROWS)
        page = browser.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(f"{site.url}admin/login/?next=/admin/")
        page.fill("#id_username", "admin")
        page.fill("#id_password", "admin")
        page.click("[type=submit]")
        for model in ("tokenhead", "storedevent", "pendingevent", "processlease", "tokenpresence"):
            page.goto(f"{site.url}admin/django_eventsource/{model}/")
            over = page.evaluate(WIDTHS)
            assert over["page"] == 0, model
            assert over["table"] <= 0 or width < 1024, (model, over)
        page.close()
    finally:
        site.kill()
