"""Tests of the page "React" and of its example, in Chromium."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.support.examples import (
    Example,
    events,
    npm_packages,
    polls,
    refuse_streams,
    run_example,
)
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

__all__ = ["npm_packages"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    change = ("react/page.jsx", "createRoot(root)", "(window.tree = createRoot(root))")
    with run_example("react", tmp_path_factory, change) as example:
        subprocess.run(
            ["npm", "run", "build", "--silent"],
            cwd=example.directory,
            check=True,
            capture_output=True,
            timeout=PROCESS_PATIENCE_SECONDS,
        )
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


def test_events_arrive_once_on_one_stream_although_the_component_renders_again(
    page: Page, example: Example
):
    """StrictMode closes its first EventSource before the request is sent."""
    requests = polls(page)
    visit(page, example)
    example.publish("ping", "one", "two")
    expect(events(page)).to_have_text(["one", "two"])
    example.publish("ping", "three")
    expect(events(page)).to_have_text(["one", "two", "three"])
    assert len(requests) == 1


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


def test_a_reset_calls_its_handler(page: Page, example: Example):
    visit(page, example)
    example.publish("ping", "before")
    expect(events(page)).to_have_text(["before"])
    example.kill()
    example.publish("ping", "dropped", "kept")
    example.drop_all_but(1)
    with page.expect_event("load"):
        example.start()
    expect(events(page)).to_have_text(["kept"])


def test_a_close_ends_the_stream(page: Page, example: Example):
    requests = polls(page)
    visit(page, example)
    example.publish("ping", "last")
    example.publish("close")
    expect(page.locator("#state")).to_have_text("closed")
    expect(events(page)).to_have_text(["last"])
    assert len(requests) == 1


def test_an_expired_grant_is_reported(page: Page, example: Example):
    refuse_streams(page, example)
    page.goto(example.url)
    expect(page.locator("#state")).to_have_text("refused")


def test_the_stream_ends_with_its_component(page: Page, example: Example):
    page.add_init_script(
        "const close = EventSource.prototype.close;"
        "window.closes = 0;"
        "EventSource.prototype.close = function () { window.closes += 1; close.call(this); };"
    )
    visit(page, example)
    closed = page.evaluate("() => window.closes")
    page.evaluate("() => window.tree.unmount()")
    assert page.evaluate("() => window.closes") == closed + 1
