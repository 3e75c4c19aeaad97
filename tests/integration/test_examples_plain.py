"""Tests of the page "Plain EventSource" and of its example, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.support.examples import POLL, Example, events, polls, refuse_streams, run_example

TABS = 6
"""The most HTTP/1.1 connections of a browser to one site."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("plain", tmp_path_factory) as example:
        yield example


def visit(page: Page, example: Example) -> None:
    """Open the page on an empty history, and let the browser reconnect after 50 ms."""
    example.drop_all()
    page.goto(example.url)
    expect(page.locator("#state")).to_have_text("open")
    example.publish("retry", "50")


def test_the_page_shows_what_its_form_publishes(page: Page, example: Example):
    visit(page, example)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b>"])


def test_the_page_misses_nothing_while_the_server_restarts(page: Page, example: Example):
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    example.kill()
    expect(page.locator("#state")).to_have_text("reconnecting")
    example.publish("ping", "one", "two")
    example.start()
    expect(page.locator("#state")).to_have_text("open")
    example.publish("ping", "after")
    expect(events(page)).to_have_text(["before", "one", "two", "after"])


def test_the_page_misses_nothing_when_the_server_ends_its_stream(page: Page, example: Example):
    """The server asks the browser to wait before it reconnects."""
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    example.stop()
    expect(page.locator("#state")).to_have_text("reconnecting")
    example.publish("ping", "meanwhile")
    example.start()
    expect(events(page)).to_have_text(["before", "meanwhile"])


def test_a_reset_loads_the_page_again(page: Page, example: Example):
    """The page then shows what the history still has."""
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    example.kill()
    example.publish("ping", "dropped", "kept")
    example.drop_all_but(1)
    with page.expect_event("load"):
        example.start()
    expect(events(page)).to_have_text(["kept"])


def test_a_close_stops_the_browser(page: Page, example: Example):
    requests = polls(page)
    visit(page, example)
    example.publish("ping", "last")
    example.publish("close")
    expect(page.locator("#state")).to_have_text("closed")
    expect(events(page)).to_have_text(["last"])
    assert page.evaluate("() => source.readyState === EventSource.CLOSED")
    assert len(requests) == 1


def test_without_a_handler_for_close_the_browser_stops_at_the_204(page: Page, example: Example):
    """The `close` is durable, so the response to the reconnection is 204."""
    page.add_init_script("EventSource.prototype.close = () => {}")
    visit(page, example)
    with page.expect_response(lambda response: response.status == 204):
        example.publish("close")
    expect(page.locator("#state")).to_have_text("refused: reload the page")


def test_a_grant_that_has_expired_stops_the_browser(page: Page, example: Example):
    refuse_streams(page, example)
    with page.expect_response(POLL) as response:
        page.goto(example.url)
    assert response.value.status == 401
    expect(page.locator("#state")).to_have_text("refused: reload the page")


def test_a_handler_for_message_receives_the_action_message_only(page: Page, example: Example):
    visit(page, example)
    page.evaluate("() => { source.onmessage = (event) => { state.textContent = event.data; }; }")
    example.publish("ping", "named")
    expect(events(page)).to_have_text(["named"])
    expect(page.locator("#state")).to_have_text("open")
    example.run(
        "from django_eventsource.events import StringIdEvent\n"
        "class AnyEvent(StringIdEvent): ACTIONS = ['*']\n"
        "publish('news', 'message', 'unnamed', AnyEvent)"
    )
    expect(page.locator("#state")).to_have_text("unnamed")


def test_the_seventh_tab_loads_when_another_one_is_closed(
    browser: BrowserContext, example: Example
):
    """All tabs of a browser share six HTTP/1.1 connections to a site."""
    example.drop_all()
    tabs = [browser.new_page() for _ in range(TABS + 1)]
    try:
        for tab in tabs[:-1]:
            tab.goto(example.url)
            expect(tab.locator("#state")).to_have_text("open")
        with pytest.raises(PlaywrightTimeout):
            tabs[-1].goto(example.url, timeout=1000)
        tabs[0].close()
        expect(tabs[-1].locator("#state")).to_have_text("open")
    finally:
        for tab in tabs:
            tab.close()


def test_the_page_fits_a_phone_in_light_and_dark(page: Page, example: Example):
    page.set_viewport_size({"width": 360, "height": 640})
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        visit(page, example)
        example.publish("ping", "w" * 500)
        expect(events(page)).to_have_count(1)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        backgrounds.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
