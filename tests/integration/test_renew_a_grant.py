"""Tests of the script that renews a grant, as the page prints it, in Chromium."""

from __future__ import annotations

import pytest
from django.template import engines
from playwright.sync_api import Page

from tests.support.pages import block_of

PAGE = "docs/howto/renew-a-grant.rst"
ANSWER = '{"url": "/stream?grant=g"}'
FIRST = "/stream?grant=g&last_event_id=5-a"
LATER = "/stream?grant=g&last_event_id=7"

RUN = """async ([script, answers]) => {
    const seen = [], waiting = [];
    let stream;
    class Stream {
        static CLOSED = 2;
        constructor(url) {
            this.receivers = {};
            stream = this;
            seen.push(url);
        }
        addEventListener(name, receiver) { this.receivers[name] = receiver; }
    }
    const fetch = async () => {
        const answer = answers.shift();
        if (answer === "failed") throw new TypeError("Failed to fetch");
        return { redirected: answer === "redirected", json: async () => JSON.parse(answer) };
    };
    const location = { reload: () => seen.push("reload") };
    const delay = (callback, ms) => { seen.push(ms); waiting.push(callback); };
    const settle = () => new Promise((resolve) => setTimeout(resolve));
    new Function("fetch", "EventSource", "location", "setTimeout", script)(
        fetch, Stream, location, delay);
    await settle();
    while (answers.length) {
        if (!waiting.length) {
            stream.receivers.ping({ lastEventId: "7", data: "Hello" });
            stream.onerror();  // The browser reconnects.
            stream.readyState = Stream.CLOSED;
            stream.onerror();
        }
        waiting.shift()();
        await settle();
    }
    return seen;
}"""
"""Run the script with the answers to its requests. Each stream sends one event and is refused."""


@pytest.mark.parametrize(
    ("answers", "seen"),
    [
        ([ANSWER, ANSWER], [FIRST, 5000, LATER]),
        (["redirected"], ["reload"]),
        ([ANSWER, "redirected"], [FIRST, 5000, "reload"]),
        (["failed", ANSWER], [5000, FIRST]),
        (["<h1>Server Error (500)</h1>", ANSWER], [5000, FIRST]),
    ],
    ids=["expired", "logged-out", "expired-and-logged-out", "no-network", "server-error"],
)
def test_the_page_opens_a_new_stream_until_the_user_is_logged_out(
    page: Page, answers: list[str], seen: list[object]
) -> None:
    """It continues after the last event, or at first after the cursor of the page."""
    template = engines["django"].from_string(block_of(PAGE, "news/templates/news/news.html"))
    before, script = template.render({"cursor": "5-a"}).split("<script>")
    page.set_content(before)
    assert page.evaluate(RUN, [script.removesuffix("</script>"), answers]) == seen
