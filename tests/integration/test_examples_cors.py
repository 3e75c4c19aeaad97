"""Tests of the page "Another origin" and of its example, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.support.examples import Example, events, npm_packages, run_example

__all__ = ["npm_packages"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("cors", tmp_path_factory) as example:
        yield example


def visit(page: Page, example: Example) -> None:
    """Open the page as another origin than that of its streams, and wait until it listens."""
    page.goto(example.url.replace("127.0.0.1", "localhost"))
    expect(page.locator("#state")).to_have_text("open")
    expect(page.locator("#fetch-state")).to_have_text("open")
    example.publish("retry", "50")


def test_both_clients_receive_events_of_the_other_origin(page: Page, example: Example):
    visit(page, example)
    page.get_by_label("Text").fill("tea")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["tea"])
    expect(page.locator("#fetch-news li")).to_have_text(["tea"])


def test_both_clients_miss_nothing_while_the_server_restarts(page: Page, example: Example):
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    expect(page.locator("#fetch-news li")).to_have_text(["before"])
    example.kill()
    example.publish("ping", "one", "two")
    example.start()
    example.publish("ping", "after")
    expected = ["before", "one", "two", "after"]
    expect(events(page)).to_have_text(expected)
    expect(page.locator("#fetch-news li")).to_have_text(expected)


def test_without_last_event_id_in_the_settings_the_browser_blocks_the_reconnection_of_fetch(
    page: Page, example: Example
):
    """EventSource reconnects, because it needs no preflight request."""
    example.kill()
    example.replace("cors/settings.py", ', "last-event-id"', "")
    # The browser has stored the result of the preflight request for the URL of the other tests.
    example.replace("cors/page.html", '"poll" "news" %}', '"poll" "news" %}?other')
    example.start()
    visit(page, example)
    example.publish("ping", "before")
    expect(page.locator("#fetch-news li")).to_have_text(["before"])
    example.kill()
    example.publish("ping", "meanwhile")
    with page.expect_console_message(
        lambda message: "last-event-id is not allowed" in message.text
    ):
        example.start()
    expect(events(page)).to_have_text(["before", "meanwhile"])
    expect(page.locator("#fetch-state")).to_have_text("reconnecting")
    example.replace("cors/settings.py", "[*default_headers", '[*default_headers, "last-event-id"')


def test_a_page_of_an_origin_that_is_not_allowed_receives_nothing(page: Page, example: Example):
    example.kill()
    example.replace("cors/settings.py", "http://localhost:", "http://other.example:")
    example.start()
    with page.expect_console_message(lambda message: "blocked by CORS policy" in message.text):
        page.goto(example.url.replace("127.0.0.1", "localhost"))
    expect(page.locator("#state")).to_have_text("connecting")
