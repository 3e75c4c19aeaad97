"""Tests of the demo's start page and examples: their source, their layout, and what they show."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from django.test import Client
from django.urls import resolve, reverse
from playwright.sync_api import BrowserContext, Page, expect
from testproject.examples import DIRECTORY, EXAMPLES, Example
from testproject.examples.answer import TEXT
from testproject.hints import MACHINE_TOKEN

from tests.support.demosite import DemoSite
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

PATHS = ["/", *(f"/{example.name}/" for example in EXAMPLES)]
PATIENCE_MS = PROCESS_PATIENCE_SECONDS * 1000
LISTENS = re.compile("^Listening$")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoSite]:
    """Run a demo site for all tests of this module."""
    site = DemoSite(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.kill()
    assert site.errors == ""


@pytest.fixture
def other(browser: BrowserContext) -> Iterator[Page]:
    """Open a second tab."""
    page = browser.new_page()
    yield page
    page.close()


# The pages, without a server


@pytest.mark.django_db
@pytest.mark.usefixtures("memory_history")
class TestPages:
    """Tests of the views and the templates."""

    def test_the_start_page_links_to_every_example(self):
        page = Client().get("/").text
        links = re.findall(r'<h2><a href="([^"]+)">', page)
        assert links == [reverse(example.name) for example in EXAMPLES]
        for link, example in zip(links, EXAMPLES, strict=True):
            response = Client().get(link)
            assert response.status_code == 200
            assert f"<h1>{example.title}</h1>" in response.text

    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
    def test_a_page_shows_the_files_that_it_is_made_of(self, example: Example):
        response = Client().get(reverse(example.name))
        blocks = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", response.text, re.DOTALL)
        paths = [f"examples/{example.name}.py", f"templates/testproject/{example.name}.html"]
        paths += example.more_files
        assert [html.unescape(block) for block in blocks] == [
            (DIRECTORY / path).read_text() for path in paths
        ]
        assert not re.search("[<>]", "".join(blocks))
        view = resolve(reverse(example.name)).func
        assert view.__module__ == f"testproject.examples.{example.name}"
        assert response.templates[0].name == f"testproject/{example.name}.html"

    @pytest.mark.parametrize("example", EXAMPLES[1:], ids=lambda example: example.name)
    def test_a_script_has_at_most_30_lines(self, example: Example):
        """The live page has a file for its script. The orders need none, because htmx has it."""
        _, template = example.sources()[:2]
        scripts = re.findall(r"<script>\n(.*?)\n</script>", template.text, re.DOTALL)
        assert len(scripts) == (example.name != "orders")
        assert all(len(script.splitlines()) <= 30 for script in scripts)

    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
    def test_a_page_is_not_cached(self, example: Example):
        """It contains grants, which expire."""
        assert "no-store" in Client().get(reverse(example.name))["Cache-Control"]

    def test_a_client_with_a_session_can_open_every_page(self):
        """The chat room has given it the session."""
        client = Client()
        client.post("/room/", {"do": "enter", "name": "Ada"})
        assert [client.get(path).status_code for path in PATHS] == [200] * len(PATHS)

    def test_an_unknown_rewind_is_replaced_by_the_default(self):
        """The tag would raise an error."""
        assert "&rewind=5" in Client().get("/chat/", {"rewind": "x"}).text
        assert "&rewind=10m" in Client().get("/chat/", {"rewind": "10m"}).text

    def test_a_vote_for_an_unknown_choice_is_refused(self):
        assert Client().post("/fragments/", {"choice": "Oracle"}).status_code == 400

    def test_the_room_is_open_to_clients_with_a_name_and_to_them_only(self):
        """They may listen to no other token, and publish nothing over its URL."""
        client = Client()
        assert client.get("/room/poll/demo:room").status_code == 401
        client.post("/room/", {"do": "say", "text": "Hello"})
        client.post("/room/", {"do": "enter", "name": " "})
        assert client.get("/room/poll/demo:room").status_code == 401
        client.post("/room/", {"do": "enter", "name": "Ada"})
        assert client.get("/room/poll/demo:chat").status_code == 401
        assert client.post("/room/close/demo:room").status_code == 401
        accept = {"accept": "application/json"}
        assert client.get("/room/poll/demo:room", headers=accept).json()["events"] == []
        assert client.get("/room/people/").json() == {"people": []}
        client.post("/room/", {"do": "leave"})
        assert client.get("/room/poll/demo:room").status_code == 401

    def test_a_page_without_a_valid_run_shows_no_bar(self):
        assert "eventsource-progress" not in Client().get("/progress/", {"run": "x"}).text
        assert "<eventsource-progress" in Client().get("/progress/", {"run": "0" * 32}).text

    def test_an_order_that_does_not_exist_is_not_found(self):
        assert Client().post("/orders/", {"do": "delete", "order": "0"}).status_code == 404


# Layout


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_its_window_and_loads_nothing_from_elsewhere(
    page: Page, site: DemoSite, width: int
) -> None:
    """A long line of a source file scrolls inside of its box."""
    hosts = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.set_viewport_size({"width": width, "height": 800})
    for path in PATHS:
        page.goto(f"{site.url}{path[1:]}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(script) == 0, path
    assert hosts == {"127.0.0.1"}


def test_the_pages_are_dark_if_the_system_is(page: Page, site: DemoSite) -> None:
    page.goto(site.url)
    colors = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colors[scheme] = sum(map(int, re.findall(r"\d+", color)))
    assert colors["dark"] < 100
    assert colors["light"] > 650


def test_the_keyboard_opens_an_example_and_a_source_file(page: Page, site: DemoSite) -> None:
    page.goto(site.url)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Live ping")
    page.goto(f"{site.url}chat/")
    template = page.locator("summary", has_text="chat.html")
    template.press("Enter")
    expect(page.locator("code", has_text="new EventSource")).to_be_visible()


# The examples


def say(page: Page, *texts: str) -> None:
    """Send messages to the chat, and wait until the server has published each.

    Chromium clicks slowly in a tab that is not in front, because it draws such a tab rarely.
    """
    for text in texts:
        page.get_by_label("Message", exact=True).fill(text)
        with page.expect_response(lambda response: response.request.method == "POST"):
            page.get_by_label("Message", exact=True).press("Enter")


def test_the_chat_starts_with_the_messages_of_the_rewind(
    page: Page, other: Page, site: DemoSite
) -> None:
    """A message is shown as text."""
    page.goto(f"{site.url}chat/")
    page.get_by_label("Name").fill("<b>Ada</b>")
    say(page, *[f"message {n}" for n in range(1, 7)])
    texts = [f"<b>Ada</b> message {n}" for n in range(1, 7)]
    expect(page.locator("#messages li")).to_have_text(texts)
    other.goto(f"{site.url}chat/")
    expect(other.locator("#messages li")).to_have_text(texts[1:])
    other.get_by_role("link", name="all", exact=True).click()
    expect(other.locator("#messages li")).to_have_text(texts)
    expect(other.locator("[aria-current]")).to_have_text("all")
    with other.expect_response(lambda response: "/events/poll/" in response.url):
        other.get_by_role("link", name="none", exact=True).click()
    say(page, "new")
    expect(other.locator("#messages li")).to_have_text(["<b>Ada</b> new"])


def add_task(page: Page, text: str) -> None:
    """Add a task, and wait until the server has published it."""
    page.get_by_label("Task", exact=True).fill(text)
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.get_by_label("Task", exact=True).press("Enter")


def test_a_page_that_listens_late_receives_what_was_added_since_its_cursor(
    page: Page, other: Page, site: DemoSite
) -> None:
    page.goto(f"{site.url}cursor/")
    add_task(page, "in the page's own window")
    other.goto(f"{site.url}cursor/")
    expect(other.locator("#tasks li")).to_have_text(["in the page's own window"])
    add_task(other, "in another window")
    assert page.locator("#tasks li").count() == 0
    for window in (page, other):
        window.get_by_role("button", name="Listen").click()
        expect(window.get_by_role("button", name=LISTENS)).to_be_disabled()
    add_task(page, "live")
    tasks = ["in the page's own window", "in another window", "live"]
    expect(page.locator("#tasks li")).to_have_text(tasks)
    expect(other.locator("#tasks li")).to_have_text(tasks)


def test_a_task_that_the_page_contains_already_is_not_added_again(
    page: Page, site: DemoSite
) -> None:
    """A task can be committed after the cursor and before the data are read."""
    page.goto(f"{site.url}cursor/")
    add_task(page, "once")
    page.evaluate(
        """() => {
            const row = document.createElement("li");
            row.textContent = "once";
            document.querySelector("#tasks").append(row);
            window.row = row;
        }"""
    )
    newest = """
import django
django.setup()
from testproject.models import Task
print(Task.objects.latest("pk").pk)
"""
    page.evaluate("id => { row.id = `task-${id}`; }", site.run(newest).strip())
    page.get_by_role("button", name="Listen").click()
    add_task(page, "last")
    expect(page.locator("#tasks li").last).to_have_text("last")
    expect(page.locator("#tasks li", has_text="once")).to_have_count(1)


def test_a_rolled_back_transaction_shows_no_event(page: Page, site: DemoSite) -> None:
    with page.expect_response(lambda response: "/events/poll/" in response.url):
        page.goto(f"{site.url}transactions/")
    before = int(page.locator("#rows").inner_text())
    for amount, end in (("1", "commit"), ("2", "roll back"), ("3", "commit")):
        page.get_by_label("Amount").fill(amount)
        with page.expect_response(lambda response: response.request.method == "POST"):
            page.get_by_role("button", name=end).click()
    expect(page.locator("#server li")).to_have_text(
        [
            "Stored 1, published it, committed.",
            "Stored 2, published it, rolled back.",
            "Stored 3, published it, committed.",
        ]
    )
    expect(page.locator("#events li")).to_have_text(
        [re.compile(r"^Payment \d+: 1$"), re.compile(r"^Payment \d+: 3$")]
    )
    expect(page.locator("#rows")).to_have_text(str(before + 2))


def test_the_presence_counts_the_streams_of_all_windows(
    page: Page, other: Page, site: DemoSite
) -> None:
    page.goto(f"{site.url}presence/")
    other.goto(f"{site.url}presence/")
    page.get_by_role("button", name="Open a stream").click()
    expect(other.locator("#count")).to_have_text("3")
    page.close()
    other.get_by_role("button", name="Close a stream").click()
    expect(other.locator("#own")).to_have_text("0")
    expect(other.locator("#count")).to_have_text("0")


def test_a_stream_that_the_server_ended_reconnects_and_one_that_was_closed_does_not(
    page: Page, site: DemoSite
) -> None:
    """A new stream opens the token again."""
    page.goto(f"{site.url}close/")
    state, rows = page.locator("#state"), page.locator("#events li")
    expect(state).to_have_text("open")
    expect(page.get_by_role("button", name="Reopen")).to_be_disabled()
    page.get_by_role("button", name="End the streams").click()
    expect(state).to_have_text("reconnecting")
    page.get_by_role("button", name="Publish").click()
    expect(rows).to_have_text([re.compile("^ping: Published at ")])
    expect(state).to_have_text("open")
    page.get_by_role("button", name="Close the token").click()
    expect(rows.last).to_have_text("close: Closed")
    expect(state).to_have_text("closed")
    page.get_by_role("button", name="Reopen").click()
    expect(state).to_have_text("open")
    page.get_by_role("button", name="Publish").click()
    expect(rows.last).to_have_text(re.compile("^ping: Published at "))
    expect(rows).to_have_count(3)


def test_the_history_is_read_page_by_page(page: Page, site: DemoSite) -> None:
    site.publish(MACHINE_TOKEN, "ping", *map(str, range(6)))
    page.goto(f"{site.url}history/")
    shown = page.locator("#page")

    def read() -> list[str]:
        return [event["id"] for event in json.loads(shown.inner_text())["events"]]

    expect(shown).to_contain_text('"events"')
    first = read()
    page.get_by_role("button", name="Next page").click()
    expect(shown).not_to_contain_text(first[0])
    second = read()
    assert [int(event_id) for event_id in first + second] == [int(first[0]) + n for n in range(6)]
    page.get_by_role("button", name="First page").click()
    expect(shown).to_contain_text(first[0])
    assert read() == first


def test_a_vote_replaces_its_bar_in_every_window(page: Page, other: Page, site: DemoSite) -> None:
    """The focus stays on the button."""
    for window in (page, other):
        window.goto(f"{site.url}fragments/")
    button = page.get_by_role("button", name="MariaDB")
    button.press("Enter")
    for window in (page, other):
        expect(window.locator("#bar-MariaDB b")).to_have_text("1")
    expect(button).to_be_focused()
    button.press("Enter")
    expect(other.locator("#bar-MariaDB b")).to_have_text("2")
    expect(other.locator("#bar-SQLite b")).to_have_text("0")
    width = "name => document.querySelector(`#bar-${name} span`).offsetWidth"
    assert other.evaluate(width, "MariaDB") > other.evaluate(width, "SQLite") == 0
    other.reload()
    expect(other.locator("#bar-MariaDB b")).to_have_text("2")


def finished(page: Page, state: str) -> None:
    """Wait until the bar has a state."""
    expect(page.locator("eventsource-progress")).to_have_attribute("state", state)


def test_a_run_shows_its_progress_and_its_end_in_every_window(
    page: Page, other: Page, site: DemoSite
) -> None:
    """Also in a window that is opened after the end."""
    page.goto(f"{site.url}progress/")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/?run=*")
    expect(page.locator("#text")).to_contain_text("rows, ")
    other.goto(page.url)
    for window in (page, other):
        finished(window, "done")
        expect(window.locator("#text")).to_have_text("Processed 300 rows.")
        expect(window.locator("[data-share]")).to_have_text("100%")
        assert window.evaluate("document.querySelector('progress').position") == 1
    page.reload()
    expect(page.locator("#text")).to_have_text("Processed 300 rows.")


def test_a_run_that_fails_shows_where_it_stopped(page: Page, site: DemoSite) -> None:
    page.goto(f"{site.url}progress/")
    page.get_by_role("button", name="Start, and fail").click()
    finished(page, "failed")
    expect(page.locator("#text")).to_have_text("Stopped after 150 of 300 rows.")
    expect(page.get_by_text("Failed", exact=True)).to_be_visible()


def order_item(page: Page, item: str) -> None:
    """Add an order, and wait until the server has stored it."""
    page.get_by_label("Item").fill(item)
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.get_by_label("Item").press("Enter")
    expect(page.get_by_label("Item")).to_have_value("")


def test_two_lists_follow_the_changes_of_a_model_in_every_window(
    page: Page, other: Page, site: DemoSite
) -> None:
    """An item is shown as text. A reload shows the same."""
    for window in (page, other):
        window.goto(f"{site.url}orders/")
    order_item(page, "<b>Tea</b>")
    order_item(page, "Cake")

    def shows(kitchen: list[str], counter: list[str]) -> None:
        for window in (page, other):
            for label, items in (("Kitchen", kitchen), ("Counter", counter)):
                rows = window.get_by_label(label, exact=True).locator("li > span")
                expect(rows).to_have_text(items)

    shows(["1 <b>Tea</b>", "1 Cake"], [])
    more = page.get_by_role("button", name="One more Cake")
    more.press("Enter")
    shows(["1 <b>Tea</b>", "2 Cake"], [])
    expect(more).to_be_focused()
    other.get_by_role("button", name="Ready").last.press("Enter")
    shows(["1 <b>Tea</b>"], ["2 Cake"])
    page.get_by_role("button", name="Back").press("Enter")
    shows(["1 <b>Tea</b>", "2 Cake"], [])
    other.get_by_role("button", name="Delete <b>Tea</b>").press("Enter")
    shows(["2 Cake"], [])
    other.reload()
    shows(["2 Cake"], [])


def test_an_order_that_code_of_another_process_changes_is_shown(
    page: Page, site: DemoSite
) -> None:
    """An event that arrives twice changes nothing."""
    page.goto(f"{site.url}orders/")
    change = """
import django
django.setup()
from django_eventsource import publish
from django_eventsource.model_changes import ChangeEvent
from testproject.examples.orders import TOKENS, as_html
from testproject.models import Order
order = Order.objects.create(item="Soup")
order.ready = True
order.save()
for change in ("created", "updated"):
    publish(TOKENS[True], "message", as_html(order, change), ChangeEvent)
Order.objects.create(item="Bread", ready=True)
"""
    site.run(change)
    counter = page.get_by_label("Counter", exact=True)
    expect(counter.locator("li", has_text="Bread")).to_have_count(1)
    expect(counter.locator("li", has_text="Soup")).to_have_count(1)
    expect(page.get_by_label("Kitchen", exact=True)).not_to_contain_text("Soup")


def test_the_room_shows_its_messages_and_the_people_in_it(page: Page, site: DemoSite) -> None:
    """A name is shown as text. A person whose stream has ended is not in the room."""
    page.goto(f"{site.url}room/")
    page.get_by_label("Name").fill("<b>Ada</b>")
    page.get_by_label("Name").press("Enter")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator("#messages li")).to_have_text(["<b>Ada</b> Hello"])
    with httpx2.Client(base_url=site.url, timeout=PROCESS_PATIENCE_SECONDS) as grace:
        grace.get("/room/")
        data = {"do": "enter", "name": "Grace", "csrfmiddlewaretoken": grace.cookies["csrftoken"]}
        assert grace.post("/room/", data=data).status_code == 302
        with grace.stream("GET", "/room/poll/demo:room?rewind=20") as response:
            lines = response.iter_lines()
            assert any("Hello" in line for line in lines)
            expect(page.locator("#people")).to_have_text("<b>Ada</b>, Grace")
        expect(page.locator("#people")).to_have_text("<b>Ada</b>")
    page.reload()
    expect(page.locator("#messages li")).to_have_text(["<b>Ada</b> Hello"])
    page.get_by_role("button", name="Leave").click()
    expect(page.get_by_label("Name")).to_be_visible()


def ask(page: Page, question: str) -> None:
    """Ask for an answer, and wait until the page shows its beginning."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).to_contain_text(f"You asked: {question}")


WHOLE = TEXT.format(question="why?") + " "


@pytest.mark.parametrize("width", [1280, 390])
def test_an_answer_is_whole_in_every_window_and_after_a_reload(
    page: Page, other: Page, site: DemoSite, width: int
) -> None:
    for window in (page, other):
        window.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{site.url}answer/")
    ask(page, "why?")
    expect(page.locator("#state")).to_have_text("writing")
    other.goto(f"{site.url}answer/")
    expect(other.locator("#answer")).to_contain_text("You asked: why?")
    page.reload()
    expect(page.locator("#answer")).to_contain_text("You asked: why?")
    for window in (page, other):
        expect(window.locator("#state")).to_have_text("done", timeout=PATIENCE_MS)
        assert window.locator("#answer").text_content() == WHOLE
    page.reload()
    expect(page.locator("#state")).to_have_text("done")
    assert page.locator("#answer").text_content() == WHOLE


def test_an_answer_is_stopped_from_another_window(page: Page, other: Page, site: DemoSite) -> None:
    """The next answer replaces what was there. A second one at the same time does not begin."""
    for window in (page, other):
        window.goto(f"{site.url}answer/")
    ask(page, "how?")
    expect(other.locator("#state")).to_have_text("writing")
    status = page.evaluate(
        """() => {
            const body = new FormData(document.querySelector("form"));
            body.set("do", "ask");
            body.set("question", "second?");
            return fetch("", { method: "POST", body }).then((response) => response.status);
        }"""
    )
    assert status == 204
    other.get_by_role("button", name="Stop").click()
    for window in (page, other):
        expect(window.locator("#state")).to_have_text("stopped")
        expect(window.locator("#answer")).to_contain_text("You asked: how?")
        expect(window.locator("#answer")).not_to_contain_text("second?")
    ask(other, "when?")
    expect(page.locator("#answer")).to_contain_text("You asked: when?")
    expect(page.locator("#answer")).not_to_contain_text("how?")
    page.get_by_role("button", name="Stop").click()
    expect(other.locator("#state")).to_have_text("stopped")


def test_an_answer_whose_server_is_killed_is_interrupted(
    page: Page, other: Page, tmp_path: Path
) -> None:
    """The pages keep its text. The next server publishes the end."""
    site = DemoSite(tmp_path)
    site.start()
    try:
        for window in (page, other):
            window.goto(f"{site.url}answer/")
        ask(page, "who?")
        expect(other.locator("#answer")).to_contain_text("No language")
        site.kill()
        before = other.locator("#answer").text_content()
        site.start()
        for window in (page, other):
            expect(window.locator("#state")).to_have_text("interrupted", timeout=PATIENCE_MS)
            expect(window.locator("#answer")).to_contain_text(before or "-")
        other.reload()
        expect(other.locator("#state")).to_have_text("interrupted")
        assert other.locator("#answer").text_content() == page.locator("#answer").text_content()
        ask(other, "again?")
        expect(page.locator("#state")).to_have_text("writing")
    finally:
        site.kill()
