"""Tests of the page "Datastar" and of its example, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.support.examples import (
    POLL,
    Example,
    change_page,
    datastar_file,
    events,
    hide,
    refuse_streams,
    run_example,
)

__all__ = ["datastar_file"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(datastar_file: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("datastar", tmp_path_factory) as example:
        yield example


def visit(page: Page, example: Example) -> None:
    """Open the page on an empty history, and wait until it listens."""
    example.drop_all()
    with page.expect_response(POLL):
        page.goto(example.url)


def publish(example: Example, *texts: str) -> None:
    """Publish items as the view of the example does."""
    example.run(
        "from datastar.urls import *\n"
        "from datastar.urls import ServerSentEventGenerator as SSE\n"
        f"for text in {texts!r}:\n"
        "    item = f'<li>{text}</li>'\n"
        "    publish_datastar('news', SSE.patch_elements(item, '#news', ElementPatchMode.APPEND))"
    )


def test_the_page_shows_what_its_form_publishes(page: Page, example: Example):
    visit(page, example)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b>"])


def test_the_stream_begins_with_the_stored_items(page: Page, example: Example):
    visit(page, example)
    publish(example, "one", "two")
    expect(events(page)).to_have_text(["one", "two"])
    page.reload()
    expect(events(page)).to_have_text(["one", "two"])


def test_events_of_other_generators_of_datastar_py_are_published_as_they_are(
    page: Page, example: Example
):
    """The item of the list shows a signal."""
    visit(page, example)
    publish(example, '<span data-text="$tea"></span>')
    example.run("publish_datastar('news', SSE.patch_signals({'tea': 'hot'}))")
    expect(events(page)).to_have_text(["hot"])
    example.run("publish_datastar('news', SSE.execute_script('document.title = 1'))")
    expect(page).to_have_title("1")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_page_misses_nothing_while_the_server_restarts(page: Page, example: Example, how: str):
    visit(page, example)
    publish(example, "before")
    expect(events(page)).to_have_text(["before"])
    getattr(example, how)()
    publish(example, "one", "two")
    example.start()
    publish(example, "after")
    expect(events(page)).to_have_text(["before", "one", "two", "after"])


def test_without_retry_always_datastar_stops_when_the_server_ends_the_stream(
    page: Page, example: Example
):
    change_page(page, example, (", {retry: 'always'}", ""))
    page.add_init_script(
        "addEventListener('datastar-fetch', (event) => console.log(event.detail.type), true)"
    )
    visit(page, example)
    with page.expect_console_message(lambda message: message.text == "finished"):
        example.stop()
    example.start()


def test_a_stream_after_a_reset_begins_with_the_stored_items(page: Page, example: Example):
    visit(page, example)
    publish(example, "before")
    expect(events(page)).to_have_text(["before"])
    example.kill()
    publish(example, "dropped", "kept")
    example.drop_all_but(1)
    example.start()
    expect(events(page)).to_have_text(["kept"])


def test_datastar_stops_at_the_204_after_a_close(page: Page, example: Example):
    page.add_init_script(
        "addEventListener('datastar-fetch', (event) => console.log(event.detail.type), true)"
    )
    visit(page, example)
    with (
        page.expect_response(lambda response: response.status == 204),
        page.expect_console_message(lambda message: message.text == "finished"),
    ):
        example.publish("close")


def test_the_page_is_loaded_again_after_a_401(page: Page, example: Example):
    visit(page, example)
    example.kill()
    refuse_streams(page, example, times=1)
    with page.expect_event("load"):
        example.start()


def test_datastar_closes_the_stream_of_a_hidden_tab_and_continues_later(
    page: Page, example: Example
):
    visit(page, example)
    hide(page, True)
    publish(example, "meanwhile")
    with page.expect_response(POLL):
        hide(page, False)
    expect(events(page)).to_have_text(["meanwhile"])
