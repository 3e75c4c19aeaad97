"""Tests of the pages "htmx 4" and "htmx 2" and of their examples, in Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Route, expect

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
def htmx4(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("htmx", tmp_path_factory) as example:
        yield example


@pytest.fixture(scope="module")
def htmx2(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("htmx2", tmp_path_factory) as example:
        yield example


def visit(page: Page, example: Example) -> None:
    """Open the page on an empty history, and wait until it listens."""
    example.drop_all()
    with page.expect_response(POLL):
        page.goto(example.url)


# htmx 4

AFTER_REQUEST = """
addEventListener("htmx:finally:request", ({ detail }) => console.log(detail.ctx.response.status));
"""


def test_htmx_4_swaps_the_items_that_the_form_publishes(page: Page, htmx4: Example):
    visit(page, htmx4)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b>"])


def test_htmx_4_dispatches_a_named_event_and_swaps_nothing(page: Page, htmx4: Example):
    visit(page, htmx4)
    page.evaluate(
        "() => addEventListener('ping', (event) => { document.title = event.detail.data; })"
    )
    htmx4.publish("ping", "named")
    expect(page).to_have_title("named")
    expect(events(page)).to_have_count(0)


def test_htmx_4_misses_nothing_while_the_server_restarts(page: Page, htmx4: Example):
    visit(page, htmx4)
    htmx4.publish_item("message", "before")
    expect(events(page)).to_have_text(["before"])
    htmx4.stop()
    htmx4.publish_item("message", "one", "two")
    htmx4.start()
    htmx4.publish_item("message", "after")
    expect(events(page)).to_have_text(["before", "one", "two", "after"])


def test_htmx_4_misses_nothing_before_its_first_event(page: Page, htmx4: Example):
    """It keeps the id that the stream begins with."""
    visit(page, htmx4)
    page.wait_for_function("() => document.querySelector('#news')._htmx.sse.lastEventId")
    htmx4.kill()
    htmx4.publish_item("message", "first")
    with page.expect_request(lambda request: "last-event-id" in request.headers):
        htmx4.start()
    expect(events(page)).to_have_text(["first"])


def test_htmx_4_loads_the_page_again_after_a_reset(page: Page, htmx4: Example):
    visit(page, htmx4)
    htmx4.kill()
    htmx4.publish_item("message", "dropped", "kept")
    htmx4.drop_all_but(1)
    with page.expect_event("load"):
        htmx4.start()
    expect(events(page)).to_have_text(["kept"])


def test_htmx_4_closes_the_stream_of_a_hidden_tab_and_continues_later(page: Page, htmx4: Example):
    visit(page, htmx4)
    hide(page, True)
    htmx4.publish_item("message", "meanwhile")
    with page.expect_response(POLL):
        hide(page, False)
    expect(events(page)).to_have_text(["meanwhile"])


def test_htmx_4_stops_at_its_closing_event(page: Page, htmx4: Example):
    visit(page, htmx4)
    requests = polls(page)
    with page.expect_console_message(lambda message: message.text == "message"):
        page.evaluate(
            "() => document.addEventListener('htmx:sse:close', "
            "(event) => console.log(event.detail.reason))"
        )
        htmx4.publish("close")
    assert requests == []


def test_htmx_4_without_a_closing_event_retries_the_204_again_and_again(
    page: Page, htmx4: Example
):
    change_page(page, htmx4, (' hx-sse:close="close"', ""))
    visit(page, htmx4)
    with page.expect_response(lambda response: response.status == 204):
        htmx4.publish("close")
    with page.expect_response(lambda response: response.status == 204):
        pass


def test_htmx_4_swaps_no_text_of_a_401(page: Page, htmx4: Example):
    refuse_streams(page, htmx4)
    page.add_init_script(AFTER_REQUEST)
    with page.expect_console_message(lambda message: message.text == "401"):
        visit(page, htmx4)
    assert page.locator("#news").inner_html() == ""


def test_htmx_4_without_hx_status_swaps_the_text_of_a_401(page: Page, htmx4: Example):
    change_page(page, htmx4, (' hx-status:4xx="swap:none"', ""))
    refuse_streams(page, htmx4)
    visit(page, htmx4)
    expect(page.locator("#news")).to_have_text(re.compile("grant"))


def test_htmx_4_loads_the_page_again_after_a_401(page: Page, htmx4: Example):
    visit(page, htmx4)
    htmx4.kill()
    refuse_streams(page, htmx4)
    with page.expect_event("load"):
        htmx4.start()


# htmx 2


def test_htmx_2_swaps_the_items_that_the_form_publishes(page: Page, htmx2: Example):
    visit(page, htmx2)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b>"])


def test_htmx_2_misses_nothing_while_the_server_restarts(page: Page, htmx2: Example):
    visit(page, htmx2)
    htmx2.publish("retry", "50")
    htmx2.publish_item("ping", "before")
    expect(events(page)).to_have_text(["before"])
    htmx2.kill()
    htmx2.publish_item("ping", "one", "two")
    htmx2.start()
    htmx2.publish_item("ping", "after")
    expect(events(page)).to_have_text(["before", "one", "two", "after"])


def answer_502_once(page: Page) -> None:
    """Respond to the next request for a stream as a proxy does while the server is down."""
    page.route(POLL, lambda route: route.fulfill(status=502, body="Bad gateway"), times=1)


def test_htmx_2_misses_nothing_after_a_502(page: Page, htmx2: Example):
    visit(page, htmx2)
    htmx2.publish("retry", "50")
    htmx2.publish_item("ping", "before")
    expect(events(page)).to_have_text(["before"])
    answer_502_once(page)
    with page.expect_response(lambda response: response.status == 502):
        htmx2.kill()
    htmx2.publish_item("ping", "one", "two")
    htmx2.start()
    expect(events(page)).to_have_text(["before", "one", "two"])


def test_htmx_2_stops_at_its_closing_event(page: Page, htmx2: Example):
    visit(page, htmx2)
    requests = polls(page)
    with page.expect_console_message(lambda message: message.text == "message"):
        page.evaluate(
            "() => document.addEventListener('htmx:sseClose', "
            "(event) => console.log(event.detail.type))"
        )
        htmx2.publish("close")
    assert requests == []


def test_htmx_2_loads_the_page_again_after_a_reset(page: Page, htmx2: Example):
    visit(page, htmx2)
    htmx2.publish("retry", "50")
    htmx2.publish_item("ping", "before")
    expect(events(page)).to_have_text(["before"])
    htmx2.kill()
    htmx2.publish_item("ping", "dropped", "kept")
    htmx2.drop_all_but(1)
    with page.expect_event("load"):
        htmx2.start()
    expect(events(page)).to_have_text(["kept"])


def test_htmx_2_repeats_a_request_that_is_refused(page: Page, htmx2: Example):
    refuse_streams(page, htmx2)
    visit(page, htmx2)
    with page.expect_response(lambda response: response.status == 401):
        pass


# A list that follows a model


@pytest.fixture(scope="module")
def orders(npm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("orders", tmp_path_factory) as example:
        yield example


def change(example: Example, code: str) -> None:
    """Change the orders in the second process."""
    example.run(f"from orders.models import Order\n{code}")


def visit_orders(page: Page, example: Example) -> None:
    """Open the page without orders, and wait until it listens."""
    change(example, "Order.objects.all().delete()")
    with page.expect_response(POLL):
        page.goto(example.url)


def test_a_list_follows_what_is_created_updated_and_deleted(page: Page, orders: Example):
    visit_orders(page, orders)
    page.get_by_label("Text").fill("<b>tea</b>")
    page.get_by_role("button", name="Publish").click()
    expect(events(page)).to_have_text(["<b>tea</b> Done"])
    change(orders, "Order.objects.create(text='cake')")
    expect(events(page)).to_have_text(["<b>tea</b> Done", "cake Done"])
    change(orders, "order = Order.objects.last(); order.text = 'pie'; order.save()")
    expect(events(page)).to_have_text(["<b>tea</b> Done", "pie Done"])
    page.get_by_role("button", name="Done").first.click()
    expect(events(page)).to_have_text(["pie Done"])
    change(orders, "Order.objects.get(done=False).delete()")
    expect(events(page)).to_have_count(0)


def test_a_list_shows_what_changed_before_its_stream_was_open_or_while_the_server_was_down(
    page: Page, orders: Example
):
    change(orders, "Order.objects.all().delete(); Order.objects.create(text='first')")

    def add(route: Route) -> None:
        change(orders, "Order.objects.create(text='second')")
        route.continue_()

    page.route(POLL, add, times=1)
    page.goto(orders.url)
    expect(events(page)).to_have_text(["first Done", "second Done"])
    orders.stop()
    change(orders, "Order.objects.create(text='third')")
    orders.start()
    expect(events(page)).to_have_text(["first Done", "second Done", "third Done"])
