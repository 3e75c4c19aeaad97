"""Tests of the page "fetch-event-source" and of its example, in Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.support.examples import (
    POLL,
    Example,
    change_page,
    events,
    hide,
    npm_packages,
    polls,
    refuse_streams,
    run_example,
)

__all__ = ["npm_packages"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("fetch_event_source", tmp_path_factory) as example:
        yield example


def visit(page: Page, example: Example) -> None:
    """Open the page on an empty history, and wait until it listens."""
    example.drop_all()
    page.goto(example.url)
    expect(page.locator("#state")).to_have_text("open")


def test_the_page_shows_what_its_form_publishes(page: Page, example: Example):
    """The grant is in a header, and not in the URL."""
    requests = polls(page)
    visit(page, example)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b>"])
    assert requests[0].headers["authorization"].startswith("Bearer ")
    assert "grant" not in requests[0].url


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_page_misses_nothing_while_the_server_restarts(page: Page, example: Example, how: str):
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    getattr(example, how)()
    expect(page.locator("#state")).to_have_text("reconnecting")
    example.publish("ping", "one", "two")
    example.start()
    expect(page.locator("#state")).to_have_text("open")
    example.publish("ping", "after")
    expect(events(page)).to_have_text(["before", "one", "two", "after"])


def test_without_onclose_the_page_stops_when_the_server_ends_the_stream(
    page: Page, example: Example
):
    change_page(
        page,
        example,
        ('throw new Error("The server has ended the stream.");', ""),
        ("}).catch(", '}).then(() => { state.textContent = "stopped"; }).catch('),
    )
    visit(page, example)
    example.stop()
    expect(page.locator("#state")).to_have_text("stopped")
    example.start()


def test_the_page_reconnects_after_a_502(page: Page, example: Example):
    visit(page, example)
    page.route(POLL, lambda route: route.fulfill(status=502, body="Bad gateway"), times=1)
    with page.expect_response(lambda response: response.status == 502):
        example.kill()
    example.publish("ping", "meanwhile")
    example.start()
    expect(events(page)).to_have_text(["meanwhile"])


def test_a_reset_loads_the_page_again(page: Page, example: Example):
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    example.kill()
    example.publish("ping", "dropped", "kept")
    example.drop_all_but(1)
    with page.expect_event("load"):
        example.start()
    expect(events(page)).to_have_text(["kept"])


def test_the_page_stops_at_the_204_after_a_close(page: Page, example: Example):
    visit(page, example)
    with page.expect_response(lambda response: response.status == 204):
        example.publish("close")
    expect(page.locator("#state")).to_have_text("closed")


def test_without_onopen_the_page_repeats_the_request_after_a_204(page: Page, example: Example):
    change_page(page, example, ("response.status === 204", "false"))
    visit(page, example)
    with page.expect_response(lambda response: response.status == 204):
        example.publish("close")
    with page.expect_response(lambda response: response.status == 204):
        pass


def test_the_page_reports_an_expired_grant_and_stops(page: Page, example: Example):
    refuse_streams(page, example)
    page.goto(example.url)
    expect(page.locator("#state")).to_have_text("refused: reload the page")


def test_the_stream_begins_with_a_message_without_an_event(page: Page, example: Example):
    """The page must ignore it."""
    change_page(
        page,
        example,
        ("return; // An id without an event.", "state.textContent = `id ${message.id}`; return;"),
    )
    example.drop_all()
    page.goto(example.url)
    expect(page.locator("#state")).to_have_text(re.compile(r"^id \S+$"))


def test_the_page_closes_the_stream_of_a_hidden_tab_and_continues_later(
    page: Page, example: Example
):
    visit(page, example)
    hide(page, True)
    example.publish("ping", "meanwhile")
    with page.expect_response(POLL):
        hide(page, False)
    expect(events(page)).to_have_text(["meanwhile"])
