"""Tests of the page "AI SDK" and of its example, with the library itself, in Chromium."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Route, expect

from tests.support.examples import Example, npm_packages, run_example
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

__all__ = ["npm_packages"]

pytestmark = pytest.mark.slow

PATIENCE_MS = PROCESS_PATIENCE_SECONDS * 1000


@pytest.fixture(scope="module")
def example(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("ai_sdk", tmp_path_factory) as example:
        subprocess.run(
            ["npm", "run", "build-ai-sdk", "--silent"],
            cwd=example.directory,
            check=True,
            capture_output=True,
            timeout=PROCESS_PATIENCE_SECONDS,
        )
        yield example


def whole(question: str) -> str:
    return f"You asked: {question}\nThis is the answer, word by word. "


def ask(page: Page, example: Example, question: str) -> None:
    """Open the page without an answer, ask, and wait for the beginning of the answer."""
    page.goto(example.url)
    page.evaluate("sessionStorage.clear()")
    page.reload()
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("p.user")).to_have_text(question)
    expect(page.locator("p.assistant")).to_contain_text("You asked")


def expect_whole(page: Page, question: str) -> None:
    """Wait for the end, and compare the text, in which no part is missing or repeated."""
    expect(page.locator("#state")).to_have_text("ready", timeout=PATIENCE_MS)
    (text,) = page.locator("p.assistant").all_text_contents()
    assert text == whole(question)


@pytest.mark.parametrize("width", [1280, 390])
def test_an_answer_is_shown_while_it_is_made(page: Page, example: Example, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, example, "why?")
    expect(page.locator("#state")).to_have_text("streaming")
    expect_whole(page, "why?")
    script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(script) == 0


def test_a_reload_in_the_middle_and_after_the_end_shows_the_whole(
    page: Page, example: Example
) -> None:
    ask(page, example, "how?")
    page.reload()
    expect(page.locator("#state")).to_have_text("streaming")
    expect_whole(page, "how?")
    page.reload()
    expect(page.locator("p.assistant")).to_have_count(1)
    expect_whole(page, "how?")


def test_the_stop_of_the_library_stops_the_production(page: Page, example: Example) -> None:
    """A page that is loaded again receives the end, too."""
    ask(page, example, "when?")
    with page.expect_response(lambda response: "/answers/stop/" in response.url) as stopped:
        page.get_by_role("button", name="Stop").click()
    assert stopped.value.status == 200
    expect(page.locator("#state")).to_have_text("ready")
    page.reload()
    expect(page.locator("p.assistant")).to_contain_text("You asked: when?")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("p.assistant")).not_to_contain_text("by word.")


def test_a_stop_during_the_request_for_an_answer_stops_its_production(
    page: Page, example: Example
) -> None:
    held: list[Route] = []
    page.route("**/ask/", lambda route: held.append(route))
    page.goto(example.url)
    page.get_by_label("Question").fill("where?")
    with page.expect_request("**/ask/"):
        page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Stop").click()
    with page.expect_response(lambda response: "/answers/stop/" in response.url) as stopped:
        held[0].continue_()
    assert stopped.value.status == 200
    expect(page.locator("#state")).to_have_text("ready")


def test_an_answer_whose_server_is_killed_is_reported(page: Page, example: Example) -> None:
    ask(page, example, "who?")
    example.kill()
    example.start()
    state = page.locator("#state")
    expect(state).to_have_text("The answer was interrupted.", timeout=PATIENCE_MS)
    expect(page.locator("p.assistant")).to_contain_text("You asked: who?")
    ask(page, example, "again?")
    expect_whole(page, "again?")
