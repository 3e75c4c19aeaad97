"""Tests of the browser module and of its example, in Chromium.

The example runs with ``ManifestStaticFilesStorage`` and a strict Content-Security-Policy.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from playwright.sync_api import BrowserContext, Error, Page, Route, expect

import django_eventsource
from tests.support.browser import PATIENCE_MS
from tests.support.examples import Example, events, hide
from tests.support.proxies import NGINX
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.slow

SETTINGS = """
DEBUG = False
STATIC_ROOT = EXAMPLES / "static-root"
STATICFILES_DIRS = [EXAMPLES / "static"]
STORAGES = {
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"},
}
EVENTSOURCE_RETRY_MS = 100
EVENTSOURCE_PRESENCE_SECONDS = 0.5
"""
URLS = """
import re, time
from unittest.mock import patch
from django.conf import settings
from django.core.management import call_command
from django.views.static import serve
from browser_module.stories import Story
from django_eventsource.grants import make_grant
from django_eventsource.policies import AllowAny
from django_eventsource.views import EventSourceView


def expired(request):
    response = news(request)
    with patch("time.time", return_value=time.time() - 60):
        grant = make_grant("news", listen=True, seconds=1)
    response.content = re.sub(rb'grant=[\\w%:-]+', b"grant=" + grant.encode(), response.content)
    return response


def log_in_as(request, name):
    user, _ = get_user_model().objects.get_or_create(username=name)
    login(request, user, "django.contrib.auth.backends.ModelBackend")
    return redirect("news")


renewed = []
renew_grant = RenewGrantView.as_view(policy=Members)


async def renew(request, token):
    response = await renew_grant(request, token=token)
    if response.status_code == 200:
        renewed.append(token)
    return response


urlpatterns = [
    path("expired/", expired),
    path("login/<name>/", log_in_as),
    path("renew/<path:token>", renew, name="renew"),
    path("renewals/", lambda request: HttpResponse(str(len(renewed)))),
    path("open/<action>/<path:token>", EventSourceView.as_view(policy=AllowAny)),
    path(
        "stories/<action>/<path:token>",
        EventSourceView.as_view(policy=AllowAny, event_class=Story),
    ),
    *urlpatterns,
    path("static/<path:path>", serve, {"document_root": settings.STATIC_ROOT}),
]
# Other examples build scripts whose source maps are not there.
built = ["datastar.js", "*-app.js"]
call_command("collectstatic", interactive=False, verbosity=0, ignore_patterns=built)
"""
STORIES = """
from django_eventsource.events import StringEvent


class Story(StringEvent):
    @property
    def id(self):
        return self.value
"""
"""An Event class whose value is its id."""
WITHOUT_WORKERS = "delete window.SharedWorker;"
WITHOUT_TEXT_STREAMS = "delete window.TextDecoderStream;"
"""As Firefox before 105."""
UNNOTICED = """
addEventListener("freeze", (event) => window.unnoticed && event.stopImmediatePropagation(), true);
"""
"""Some browsers suspend a tab without an event."""
POLLING_MS = 50
"""Milliseconds between two checks of a page. By default they wait for a frame, and a hidden page
draws none."""

LEADS = """() => new Promise((resolve) => {
    const name = String(Math.random());
    navigator.locks.request(name, async () => {
        const { held } = await navigator.locks.query();
        const { clientId } = held.find((lock) => lock.name === name);
        const leads = (lock) => lock.name !== name && lock.clientId === clientId;
        resolve(held.some(leads));
    });
})"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    example = Example("browser_module", tmp_path_factory.mktemp("browser_module"))
    try:
        for name, lines in (("settings", SETTINGS), ("urls", URLS), ("stories", STORIES)):
            with (example.directory / f"browser_module/{name}.py").open("a") as file:
                file.write(lines)
        old, new = "import INSTALLED", "import EXAMPLES, INSTALLED"
        example.replace("browser_module/settings.py", old, new)
        example.start()
        yield example
    finally:
        example.close()


Opener = Callable[..., list[Page]]


@pytest.fixture
def open_tabs(browser: BrowserContext) -> Iterator[Opener]:
    """Return a function that opens tabs in which no script may fail, and that listen."""
    tabs: list[Page] = []
    errors: list[str] = []

    def open_tabs(
        count: int, url: str, script: str = "", context: BrowserContext = browser
    ) -> list[Page]:
        for _ in range(count):
            tab = context.new_page()
            tabs.append(tab)
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.add_init_script(script)
            tab.goto(url)
            expect(tab.locator("#state")).to_have_text("open")
        return tabs[-count:]

    yield open_tabs
    for tab in tabs:
        tab.close()
    assert errors == []


@contextmanager
def publishing(example: Example) -> Iterator[list[str]]:
    """Publish events during a block, and yield the list of their values."""
    values: list[str] = []
    done = Event()

    def publish() -> None:
        while not done.wait(0.02):
            values.append(f"value {len(values)}")
            example.publish("ping", values[-1])

    thread = Thread(target=publish)
    thread.start()
    try:
        yield values
    finally:
        done.set()
        thread.join()


def expect_values(tabs: list[Page], values: list[str]) -> None:
    """Wait until each tab shows the last value, and compare all of them."""
    texts = "() => [...document.querySelectorAll('#news li')].map((item) => item.textContent)"
    for tab in tabs:
        shows_last = f"last => ({texts})().at(-1) === last"
        tab.wait_for_function(shows_last, arg=values[-1], polling=POLLING_MS)
        assert tab.evaluate(texts) == values


def expect_further_values(tabs: list[Page], values: list[str]) -> None:
    """Wait until each tab shows events that are published from now on."""
    count = len(values)
    for tab in tabs:
        expect(events(tab).nth(count + 5)).to_be_attached(timeout=PROCESS_PATIENCE_SECONDS * 1000)


def wait_for_streams(example: Example, count: int, token: str = "news") -> None:
    """Wait until the server has a number of open streams."""
    code = (
        f"from django_eventsource import listeners; assert listeners({token!r}).count == {count}"
    )
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while True:
        try:
            return example.run(code)
        except AssertionError:
            assert time.monotonic() < deadline, f"There are not {count} streams."


def leader_of(tabs: list[Page]) -> Page:
    """Wait until one of the tabs is the leader, and return it."""
    deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
    while True:
        for tab in tabs:
            if tab.evaluate(LEADS):
                return tab
        assert time.monotonic() < deadline, "No tab is the leader."


both_ways = pytest.mark.parametrize("script", ["", WITHOUT_WORKERS], ids=["worker", "locks"])


@both_ways
def test_ten_tabs_share_a_stream_and_receive_each_event_once(
    open_tabs: Opener, example: Example, tmp_path: Path, script: str
) -> None:
    """The tabs join while events arrive. Then nginx responds with 502 for six seconds.

    With HTTP/1.1 a browser opens at most six connections to a site.
    """
    example.drop_all()
    change = ("error_page 502 503 504 = @unavailable;", "")
    with NGINX.run(tmp_path, example.port, change) as (host, port):
        with publishing(example) as values:
            tabs = open_tabs(10, f"http://{host}:{port}/", script)
        example.publish("ping", "before")
        expect_values(tabs, [*values, "before"])
        wait_for_streams(example, 1)
        example.kill()
        for tab in tabs:
            expect(tab.locator("#state")).to_have_text("connecting")
        example.publish("ping", "one", "two")
        time.sleep(6)
        example.start()
        example.publish("ping", "after")
        expect_values(tabs, [*values, "before", "one", "two", "after"])
        src = tabs[0].locator("#eventsource").get_attribute("src") or ""
        for tab in tabs:
            tab.goto("about:blank")
        wait_for_streams(example, 0)
    assert re.fullmatch(r"/static/eventsource/eventsource\.[0-9a-f]{12}\.js", src)


def test_tabs_receive_each_event_once_when_the_leader_is_closed_or_frozen(
    plain_browser: BrowserContext, open_tabs: Opener, example: Example
) -> None:
    """A tab that is frozen without an event keeps its lock, and another tab steals it."""
    example.drop_all()
    tabs = open_tabs(4, example.url, WITHOUT_WORKERS + UNNOTICED, plain_browser)
    with publishing(example) as values:
        leader = leader_of(tabs)
        leader.close()
        tabs.remove(leader)
        for unnoticed in (False, True):
            leader = leader_of(tabs)
            others = [tab for tab in tabs if tab is not leader]
            others[0].bring_to_front()
            leader.wait_for_function("() => document.hidden", polling=POLLING_MS)
            leader.evaluate("unnoticed => { window.unnoticed = unnoticed; }", unnoticed)
            session = plain_browser.new_cdp_session(leader)
            session.send("Page.setWebLifecycleState", {"state": "frozen"})
            leader_of(others)
            expect_further_values(others, values)
            session.send("Page.setWebLifecycleState", {"state": "active"})
    example.publish("ping", "last")
    expect_values(tabs, [*values, "last"])
    wait_for_streams(example, 1)


def test_an_expired_grant_is_renewed_until_the_logout_and_after_the_next_login(
    browser: BrowserContext, open_tabs: Opener, example: Example
) -> None:
    example.drop_all()
    other = browser.new_page()
    other.goto(f"{example.url}login/")
    tabs = open_tabs(2, f"{example.url}expired/")
    example.publish("ping", "renewed")
    expect_values(tabs, ["renewed"])
    other.goto(f"{example.url}logout/")
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("refused: log in again")
    example.publish("ping", "missed")
    other.goto(f"{example.url}login/")
    expect_values(tabs, ["renewed", "missed"])
    other.close()


@both_ways
def test_a_tab_receives_no_event_of_a_user_who_logs_in_later(
    browser: BrowserContext, open_tabs: Opener, example: Example, script: str
) -> None:
    """Neither the shared stream nor a new grant of the other user serves it."""
    example.drop_all()
    (alice,) = open_tabs(1, f"{example.url}login/alice/", script)
    example.publish("ping", "for alice")
    expect_values([alice], ["for alice"])
    other = browser.new_page()
    other.goto(f"{example.url}logout/")
    expect(alice.locator("#state")).to_have_text("refused: log in again")
    renewals = int(other.request.get(f"{example.url}renewals/").text())
    bobs = open_tabs(1, f"{example.url}login/bob/", script)
    # The page of the first user requests a new grant, and receives one for the other user.
    count = "async last => Number(await (await fetch('/renewals/')).text()) > last"
    bobs[0].wait_for_function(count, arg=renewals, polling=POLLING_MS)
    bobs += open_tabs(1, example.url, script)
    example.publish("ping", "for bob")
    expect_values(bobs, ["for alice", "for bob"])
    wait_for_streams(example, 1)
    expect(alice.locator("#state")).to_have_text("refused: log in again")
    expect_values([alice], ["for alice"])
    other.goto(f"{example.url}logout/")
    other.close()


CHECKS = """
window.setInterval = (check) => { window.check = check; };
window.received = 0;
const { set } = Object.getOwnPropertyDescriptor(MessagePort.prototype, "onmessage");
Object.defineProperty(MessagePort.prototype, "onmessage", { set(receive) {
    set.call(this, (message) => { received++; receive(message); });
} });
"""


def test_the_worker_answers_only_the_tab_that_asks(open_tabs: Opener, example: Example) -> None:
    example.drop_all()
    tabs = open_tabs(2, example.url, CHECKS)
    example.publish("ping", "one")
    expect_values(tabs, ["one"])
    before = [tab.evaluate("received") for tab in tabs]
    tabs[0].evaluate("check(); check()")
    tabs[0].wait_for_function("before => received > before", arg=before[0], polling=POLLING_MS)
    example.publish("ping", "two")
    expect_values(tabs, ["one", "two"])
    assert [tab.evaluate("received") for tab in tabs] == [before[0] + 2, before[1] + 1]


def test_tabs_share_a_stream_although_the_policy_of_the_page_forbids_workers(
    open_tabs: Opener, browser: BrowserContext, example: Example
) -> None:
    """After a reset each page is loaded again."""

    def forbid(route: Route) -> None:
        response = route.fetch()
        policy = response.headers["content-security-policy"]
        headers = {**response.headers, "content-security-policy": f"{policy}; worker-src 'none'"}
        route.fulfill(response=response, headers=headers)

    example.drop_all()
    browser.route(example.url, forbid)
    tabs = open_tabs(2, example.url)
    leader_of(tabs)
    example.publish("ping", "before")
    expect_values(tabs, ["before"])
    wait_for_streams(example, 1)
    example.kill()
    example.publish("ping", "dropped", "kept")
    example.drop_all_but(1)
    example.start()
    for tab in tabs:
        expect(events(tab)).to_have_text(["kept"])
    browser.unroute(example.url)


CONNECT = """async ({ url, ...options }) => {
    const { connect } = await import(document.querySelector("#eventsource").src);
    window.received = [];
    window.states = [];
    const onState = (state, status) => states.push([state, status]);
    const { dataset } = document.querySelector("#news");
    const stream = connect(url ?? dataset.url, { ...options, onState });
    for (const action of ["ping", "close"]) {
        stream.addEventListener(action, ({ type, data }) => received.push([type, data]));
    }
    window.stream = stream;
}"""


def wait_for_state(page: Page, state: str) -> None:
    """Wait until the stream of :data:`CONNECT` is in a state."""
    page.wait_for_function("state => stream.state === state", arg=state, polling=POLLING_MS)


def test_a_hidden_tab_pauses_and_a_close_stops_every_stream(
    open_tabs: Opener, example: Example
) -> None:
    example.drop_all()
    (tab,) = open_tabs(1, example.url)
    tab.evaluate(CONNECT, {"pauseHidden": True})
    wait_for_state(tab, "open")
    wait_for_streams(example, 2)
    hide(tab, True)
    wait_for_state(tab, "paused")
    wait_for_streams(example, 1)
    example.publish("ping", "missed")
    expect(events(tab)).to_have_text(["missed"])
    assert tab.evaluate("received") == []
    hide(tab, False)
    tab.wait_for_function("() => received.length === 1")
    example.publish("close", "bye")
    wait_for_state(tab, "closed")
    assert tab.evaluate("received") == [["ping", "missed"], ["close", "bye"]]
    assert tab.evaluate("states") == [
        *[["connecting", 0], ["open", 200], ["paused", 0]],
        *[["connecting", 0], ["open", 200], ["closed", 200]],
    ]
    expect(tab.locator("#state")).to_have_text("closed")
    wait_for_streams(example, 0)


def connect(tabs: list[Page], url: str) -> None:
    """Listen to another stream too, which the tabs share."""
    for tab in tabs:
        tab.evaluate(CONNECT, {"url": url, "share": "a reader"})
        wait_for_state(tab, "open")


def expect_received(tabs: list[Page], *items: tuple[str, str]) -> None:
    """Wait until each tab has received as many events, and compare them, in any order."""
    for tab in tabs:
        has_all = "count => received.length >= count"
        tab.wait_for_function(has_all, arg=len(items), polling=POLLING_MS)
        assert sorted(tab.evaluate("received")) == sorted(list(item) for item in items)


@both_ways
def test_tabs_of_a_quiet_token_whose_events_have_ids_share_a_stream(
    open_tabs: Opener, example: Example, script: str
) -> None:
    """The cursor of the first tab is an event's own id. That of a new stream is not."""
    url = f"/stories/poll/{script and 'tale'}story"
    token = url.rpartition("/")[2]
    story = f"from browser_module.stories import Story; publish({token!r}, 'ping', '{{}}', Story)"
    tabs = open_tabs(1, example.url, script)
    connect(tabs, url)
    example.run(story.format("first"))
    expect_received(tabs, ("ping", "first"))
    others = open_tabs(8, example.url, script)
    connect(others, url)
    for tab in [*tabs, *others]:
        tab.wait_for_function("() => stream.cursor.startsWith('~')", polling=POLLING_MS)
    wait_for_streams(example, 1, token)
    example.run(story.format("second"))
    expect_received(tabs, ("ping", "first"), ("ping", "second"))
    expect_received(others, ("ping", "second"))
    wait_for_streams(example, 1, token)


@both_ways
def test_tabs_share_a_stream_after_the_close_of_one_of_its_tokens(
    open_tabs: Opener, example: Example, script: str
) -> None:
    """Tabs that are opened later have opened the token again. They share another stream."""
    name = "sport" if script else "art"
    url = f"/open/poll/{name}?token={name}/live"
    publish = f"publish({name!r}, '{{}}', '{{}}'); publish('{name}/live', 'ping', '{{}}')"
    tabs = open_tabs(3, example.url, script)
    connect(tabs, url)
    wait_for_streams(example, 1, f"{name}/live")
    example.run(publish.format("close", "bye", "one"))
    expect_received(tabs, ("close", "bye"), ("ping", "one"))
    others = open_tabs(6, example.url, script)
    connect(others, url)
    wait_for_streams(example, 2, f"{name}/live")
    example.run(publish.format("ping", "two", "three"))
    expect_received(tabs, ("close", "bye"), ("ping", "one"), ("ping", "three"))
    expect_received(others, ("ping", "two"), ("ping", "three"))
    wait_for_streams(example, 2, f"{name}/live")
    example.run(f"publish({name!r}, 'close'); publish('{name}/live', 'close')")
    for tab in [*tabs, *others]:
        wait_for_state(tab, "closed")
    wait_for_streams(example, 0, f"{name}/live")


def test_a_browser_that_cannot_read_responses_as_text_uses_eventsource(
    open_tabs: Opener, example: Example
) -> None:
    """Each tab has a stream of its own, which is opened again after every end but a close.

    The stream of several tokens ends with the status 204.
    """
    example.drop_all()
    tabs = open_tabs(2, f"{example.url}expired/", WITHOUT_TEXT_STREAMS)
    wait_for_streams(example, 2)
    with publishing(example) as values:
        expect_further_values(tabs, values)
        example.kill()
        for tab in tabs:
            expect(tab.locator("#state")).to_have_text("connecting")
        example.start()
        expect_further_values(tabs, values)
    example.publish("ping", "last")
    expect_values(tabs, [*values, "last"])
    example.publish("close", "bye")
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("closed")
    wait_for_streams(example, 0)
    connect(tabs, "/open/poll/plain?token=plain/live")
    example.run("publish('plain', 'close'); publish('plain/live', 'close')")
    for tab in tabs:
        wait_for_state(tab, "closed")
        assert tab.evaluate("states").pop() == ["closed", 204]


# Without a server

PARTS = """
window.requests = [];
window.fetch = async (url, { signal }) => {
    const encoder = new TextEncoder();
    const request = { url: String(url), aborted: false, status: 200 };
    const body = new ReadableStream({ start: (controller) => {
        request.push = (text) => controller.enqueue(encoder.encode(text));
        request.pushByte = (byte) => controller.enqueue(new Uint8Array([byte]));
        request.end = () => controller.close();
        signal.addEventListener("abort", () => {
            request.aborted = true;
            controller.error(new DOMException("aborted", "AbortError"));
        });
    }, cancel: () => { request.aborted = true; } });
    requests.push(request);
    const answer = window.answers?.shift() ?? {};
    if (answer.failed) throw new TypeError("Failed to fetch");
    await answer.gate;
    const { status = 200, type = "text/event-stream", text, headers } = answer;
    return new Response(status === 204 ? null : text ?? body, {
        status, headers: { "Content-Type": type, ...headers }
    });
};
window.start = async (options, url = "/stream?grant=g&last_event_id=0") => {
    const { connect } = await import("/eventsource.js");
    window.received = [];
    window.states = [];
    window.stream = connect(url, {
        ...options, onState: (state, status) => states.push(`${state} ${status}`)
    });
    for (const action of ["ping", "message", "reset", "close"]) {
        stream.addEventListener(action, (event) => {
            received.push(`${event.type} ${event.data} ${event.lastEventId}`);
        });
    }
};
window.key = `eventsource same-origin ${location.origin}/stream [["g"],true]`;
window.lead = () => {
    const offer = { url: `${location.origin}/stream?grant=leader`, credentials: "same-origin" };
    const channel = new BroadcastChannel(key);
    channel.onmessage = ({ data }) => {
        if (data === "end") return;
        if (data.url) window.offered = data.url;
        else window.asked = (window.asked ?? 0) + 1;
        if (!window.mute) tell(window.last);
    };
    window.tell = (message) => {
        window.last = { term: 5, state: "open", status: 200, offer, ...message };
        if (message) channel.postMessage(last);
    };
    window.block = (before, after) => tell({
        cursor: after, block: { before, after, type: "ping", data: after }
    });
    return new Promise((held) => navigator.locks.request(key, () => {
        held();
        return new Promise(() => {});
    }).catch(() => {}));  // a tab steals the lock
};
// Wait until the stream has received all that a function has told.
window.heard = async (tellAll) => {
    const channel = new BroadcastChannel(key);  // younger than that of the stream
    const { promise, resolve } = Promise.withResolvers();
    channel.onmessage = ({ data }) => data === "end" && resolve();
    tellAll();
    new BroadcastChannel(key).postMessage("end");
    await promise;
    channel.close();
};
const { setTimeout } = window;
window.until = async (condition) => {
    const patience = AbortSignal.timeout(PATIENCE_MS);
    while (!condition()) {
        if (patience.aborted) throw new Error(`Not in time: ${condition}`);
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
};
""".replace("PATIENCE_MS", str(PATIENCE_MS))
MODULE = Path(django_eventsource.__file__).parent / "static" / "eventsource" / "eventsource.js"


@pytest.fixture
def parts(page: Page) -> Page:
    """Open a page with a server and a leader that the test controls."""
    page.route(
        "http://localhost/**",
        lambda route: (
            route.fulfill(path=MODULE, content_type="text/javascript")
            if route.request.url.endswith(".js")
            else route.fulfill(content_type="text/html", body="<!DOCTYPE html>")
        ),
    )
    page.goto("http://localhost/")
    page.evaluate(f"() => {{ {PARTS} }}")
    return page


def test_a_block_may_arrive_in_any_chunks(parts: Page) -> None:
    """An id without data moves the cursor. A block without its end is not an event."""
    received = parts.evaluate(
        r"""async () => {
            await start();
            await until(() => requests[0]);
            const text = "\ufeffid: 1\n\n: comment\nevent: ping\r\ndata: a\r\ndata:  \u2028é:\r\n"
                + "id: 2\r\n\r\ndata\rid: bad\0\r\rretry: 5\nretry: x\nother: x\n\nid:3\n\n"
                + "event: nothing\n\ndata: incomplete\nid: 4\n";
            const bytes = new TextEncoder().encode(text);
            for (const byte of bytes) requests[0].pushByte(byte);
            requests[0].end();
            await until(() => requests[1]);
            return [received, requests.map(({ url }) => new URL(url).search), stream.cursor];
        }"""
    )
    assert received == [
        ["ping a\n \u2028é: 2", "message  2"],
        ["?grant=g&last_event_id=0", "?grant=g&last_event_id=3"],
        "3",
    ]


def test_the_stream_is_opened_again_after_every_response_but_204(parts: Page) -> None:
    """Each wait is longer than the one before it, until an event arrives.

    There is no wait after a grant is renewed, unless the server refuses the new one.
    """
    found = parts.evaluate(
        r"""async () => {
            const waits = [];
            const { setTimeout } = window;
            window.setTimeout = (callback, ms) => setTimeout(callback, (waits.push(ms), 0));
            Math.random = () => 0;
            window.answers = [
                { failed: true }, { status: 502 }, { type: "text/html" }, { status: 401 },
                { type: "application/json", text: '{"grant": "new"}' }, { status: 403 },
                { failed: true }, { text: "retry: 40\nid: 1\ndata: x\n\n" }, { status: 204 },
            ];
            await start({ renew: "/renew" });
            await until(() => stream.state === "closed");
            const urls = requests.map(({ url }) => url.replace(location.origin, ""));
            return { urls, waits, states, received };
        }"""
    )
    first, renewed = "/stream?grant=g&last_event_id=0", "/stream?grant=new&last_event_id=0"
    assert found["urls"] == [
        *[first] * 4,
        *["/renew", renewed, "/renew", renewed, "/stream?grant=new&last_event_id=1"],
    ]
    assert found["waits"] == [1000, 2000, 4000, 8000, 40]
    assert found["states"] == [
        *["connecting 0", "connecting 502", "connecting 200", "connecting 401"],
        *["connecting 403", "open 200", "connecting 200", "closed 204"],
    ]
    assert found["received"] == ["message x 1"]


def test_a_refused_stream_waits_for_the_time_of_retry_after(parts: Page) -> None:
    """It waits at least for the time of the back-off, and at most for an hour."""
    waits = parts.evaluate(
        r"""async () => {
            const waits = [];
            const { setTimeout } = window;
            window.setTimeout = (callback, ms) => setTimeout(callback, (waits.push(ms), 0));
            Math.random = () => 0;
            const times = ["60", "1", "99999999", "soon", "0"];
            window.answers = times.map((time, index) => (
                { status: index ? 503 : 429, headers: { "Retry-After": time } }
            ));
            await start();
            await until(() => stream.state === "open");
            return waits;
        }"""
    )
    assert waits == [60000, 2000, 3600000, 8000, 16000]


def test_a_stream_of_several_tokens_ends_when_all_of_them_are_closed(parts: Page) -> None:
    """After the close of one token the stream continues. A reconnection time may be short."""
    found = parts.evaluate(
        r"""async () => {
            window.answers = [{}, { status: 204 }];
            await start({}, "/stream?token=b&last_event_id=0");
            await until(() => requests[0]);
            requests[0].push("retry: 0\n\nevent: close\ndata: a\nid: 1\n\ndata: b\nid: 2\n\n");
            requests[0].end();
            await until(() => stream.state === "closed");
            return [received, requests.map(({ url }) => new URL(url).search)];
        }"""
    )
    assert found == [
        ["close a 1", "message b 2"],
        ["?token=b&last_event_id=0", "?token=b&last_event_id=2"],
    ]


def test_a_stream_that_was_open_for_long_ends_the_back_off(parts: Page) -> None:
    """The server ends the stream of a quiet token when it is old."""
    waits = parts.evaluate(
        r"""async () => {
            const waits = [];
            const { setTimeout } = window;
            window.setTimeout = (callback, ms) => setTimeout(callback, (waits.push(ms), 0));
            Math.random = () => 0;
            window.answers = [{ status: 502 }, { status: 502 }];
            await start();
            await until(() => requests[2] && stream.state === "open");
            const now = Date.now() + 11000;
            Date.now = () => now;
            requests[2].end();
            await until(() => requests[3] && stream.state === "open");
            requests[3].end();
            await until(() => requests[4]);
            return waits;
        }"""
    )
    assert waits == [1000, 2000, 1000, 2000]


def test_an_error_in_a_handler_does_not_end_the_stream(parts: Page) -> None:
    """A handler that closes the stream receives no further event of the same chunk."""
    received = parts.evaluate(
        r"""async () => {
            window.errors = [];
            window.onerror = (message) => { errors.push(message); return true; };
            await start({ onState: null });
            stream.addEventListener("ping", ({ data }) => {
                if (data === "two") stream.close();
                throw new Error(data);
            });
            await until(() => requests[0]);
            requests[0].push("data: x\n\nevent: ping\ndata: one\n\n");
            requests[0].push("event: ping\ndata: two\n\nevent: ping\ndata: three\n\n");
            await until(() => requests[0].aborted);
            return [received, errors, stream.state];
        }"""
    )
    assert received == [
        ["message x 0", "ping one 0", "ping two 0"],
        ["Uncaught Error: one", "Uncaught Error: two"],
        "closed",
    ]


@pytest.mark.parametrize("url", [None, ""])
def test_a_stream_without_a_url_is_an_error(parts: Page, url: str | None) -> None:
    with pytest.raises(Error, match="connect\\(\\) needs the URL of a stream, not"):
        parts.evaluate("url => start({}, url ?? null)", url)


def test_a_leader_that_is_refused_uses_the_grant_of_another_tab(parts: Page) -> None:
    """If that one is refused too, it uses its own one again."""
    found = parts.evaluate(
        r"""async () => {
            delete window.SharedWorker;
            window.answers = [{ status: 401 }, { status: 401 }];
            await start({ share: true });
            const channel = new BroadcastChannel(key);
            const messages = [];
            channel.onmessage = ({ data }) => messages.push(data);
            await until(() => states.includes("connecting 401"));
            const url = `${location.origin}/stream?grant=other`;
            channel.postMessage({ url, credentials: "same-origin" });
            await until(() => stream.state === "open");
            requests[2].push("data: x\nid: 1\n\n");
            await until(() => messages.at(-1)?.block);
            return [requests.map(({ url }) => new URL(url).search), messages.at(-1)];
        }"""
    )
    assert found[0] == [f"?grant={grant}&last_event_id=0" for grant in ("g", "other", "g")]
    assert found[1]["block"] == {"before": "0", "after": "1", "type": "message", "data": "x"}


def test_a_tab_whose_grant_is_refused_reports_it_and_uses_that_of_the_leader(parts: Page) -> None:
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            window.answers = [{ status: 403 }];
            tell({ cursor: "4" });
            await start({ share: true });
            await until(() => requests[1]);
            requests[1].push("event: ping\ndata: 4\nid: 4\n\n");
            await until(() => requests[1].aborted && stream.state === "open");
            return [received, requests.map(({ url }) => new URL(url).search), states];
        }"""
    )
    assert found == [
        ["ping 4 4"],
        ["?grant=g&last_event_id=0", "?grant=leader&last_event_id=0"],
        ["connecting 0", "connecting 403", "open 200"],
    ]


@pytest.mark.parametrize(
    ("query", "share", "shares"),
    [
        ("", True, False),
        ("", "alice", True),
        ("?grant=g", True, True),
        ("?grant=g", False, False),
    ],
)
def test_tabs_share_a_stream_only_if_the_page_names_its_user(
    parts: Page, query: str, share: bool | str, shares: bool
) -> None:
    """A grant, or a text of the option, does so."""
    name = parts.evaluate(
        r"""async ([query, share]) => {
            window.SharedWorker = class {
                port = { postMessage: () => {}, close: () => {} };
                constructor(url, { name }) { window.name = name; }
            };
            await start({ share }, `/stream${query}`);
            return window.name;
        }""",
        [query, share],
    )
    owner = {"": None, "?grant=g": ["g"]}[query]
    key = f"eventsource same-origin http://localhost/stream {json.dumps([owner, share])}"
    assert name == (key.replace(", ", ",") if shares else "")


def test_a_tab_asks_a_silent_leader_before_it_takes_over(parts: Page) -> None:
    """It asks only if it has received nothing since its last check."""
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            window.setInterval = (check) => { window.check = check; };
            tell({ cursor: "0" });
            await start({ share: true });
            await until(() => stream.state === "open");
            check();
            tell({ cursor: "0", status: 299 });
            await until(() => stream.status === 299);
            check();
            const before = window.asked ?? 0;
            window.last.status = 298;
            check();
            await until(() => stream.status === 298);
            const answered = asked;
            window.mute = true;
            for (let number = 0; number < 3; number++) check();
            await until(() => requests[0]);
            return [before, answered, requests.length];
        }"""
    )
    assert found == [0, 1, 1]


def test_a_tab_that_is_behind_the_leader_reads_its_own_stream_until_they_meet(
    parts: Page,
) -> None:
    """It uses the blocks of the leader that arrived before."""
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            tell({ cursor: "4" });
            await start({ share: true });
            await until(() => requests[0]);
            await heard(() => { block("4", "5"); block("5", "6"); });
            requests[0].push("id: 1\n\nevent: ping\ndata: 2\nid: 2\n\n");
            requests[0].push("event: ping\ndata: 4\nid: 4\n\n");
            await until(() => requests[0].aborted);
            block("6", "7");
            await until(() => stream.cursor === "7");
            return [received, requests.length, offered.replace(location.origin, "")];
        }"""
    )
    values = ["2", "4", "5", "6", "7"]
    assert found == [[f"ping {n} {n}" for n in values], 1, "/stream?grant=g"]


def test_a_tab_that_is_ahead_of_the_leader_waits_for_it(parts: Page) -> None:
    """It ignores the blocks that it has passed, and those of an earlier leader."""
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            tell({ cursor: "9" });
            await start({ share: true });
            await until(() => requests[0]);
            requests[0].push("event: ping\ndata: 1\nid: 1\n\nevent: ping\ndata: 2\nid: 2\n\n");
            await until(() => stream.cursor === "2");
            block("0", "1");
            await until(() => requests[0].aborted);
            const old = { before: "2", after: "x", type: "ping", data: "" };
            tell({ cursor: "x", term: 4, block: old });
            block("1", "2");
            block("2", "3");
            await until(() => stream.cursor === "3");
            return [received, requests.length];
        }"""
    )
    assert found == [["ping 1 1", "ping 2 2", "ping 3 3"], 1]


def test_a_tab_leaves_the_connections_to_a_leader_that_has_no_stream(parts: Page) -> None:
    """Later it continues after its own cursor. After a close it reads what it missed."""
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            tell({ cursor: "9" });
            await start({ share: true });
            await until(() => requests[0]);
            requests[0].push("event: ping\ndata: 1\nid: 1\n\n");
            await until(() => stream.cursor === "1");
            tell({ cursor: "9", state: "connecting", status: 502 });
            await until(() => requests[0].aborted);
            tell({ cursor: "10", state: "closed" });
            await until(() => requests[1]);
            requests[1].push("event: close\ndata: bye\nid: 10\n\n");
            await until(() => stream.state === "closed");
            return [received, requests.map(({ url }) => new URL(url).search), states];
        }"""
    )
    assert found == [
        ["ping 1 1", "close bye 10"],
        ["?grant=g&last_event_id=0", "?grant=g&last_event_id=1"],
        ["connecting 0", "open 200", "connecting 502", "connecting 0", "open 200", "closed 200"],
    ]


APART = r"""async (meets) => {
    await lead();
    delete window.SharedWorker;
    window.setInterval = (check) => { window.check = check; };
    const apart = [];
    const channel = new BroadcastChannel(key);
    channel.onmessage = ({ data }) => data.apart !== undefined && apart.push(data.apart);
    const leader = { cursor: "an id" };
    tell(leader);
    await start({ share: true });
    await until(() => stream.state === "open" && requests[0]);
    for (const number of [1, 2]) {
        requests[0].push(`id: ${number}\n\n`);
        await until(() => stream.cursor === String(number));
        await heard(() => tell(leader));
        check();
    }
    await heard(() => tell(leader));
    const early = apart.includes(true);
    check();
    await until(() => apart.includes(true));
    const block = { before: "an id", after: "2", type: "", data: "" };
    await heard(() => tell(meets ? { cursor: "2", block } : leader));
    const { aborted } = requests[0];
    check();
    if (!meets) await until(() => requests[1]);
    const { held } = await navigator.locks.query();
    const names = held.map(({ name }) => name.replace(key, "key")).sort();
    const urls = requests.map(({ url }) => new URL(url).search);
    const { length } = apart.filter(Boolean);
    return [early, length, aborted, requests[0].aborted, urls, names];
}"""


def test_a_tab_whose_own_stream_does_not_meet_the_leader_asks_for_a_new_one(parts: Page) -> None:
    """It does so if neither cursor has changed between two checks."""
    assert parts.evaluate(APART, True) == [
        *[False, 1, True, True],
        ["?grant=g&last_event_id=0"],
        ["key"],
    ]


def test_a_tab_whose_own_stream_never_meets_the_leader_joins_others(parts: Page) -> None:
    """Here it is the first one, so it leads them."""
    assert parts.evaluate(APART, False) == [
        *[False, 1, False, True],
        ["?grant=g&last_event_id=0", "?grant=g&last_event_id=2"],
        ["key", "key apart"],
    ]


def test_a_tab_joins_others_although_its_cursor_and_that_of_the_leader_change(parts: Page) -> None:
    """It asks the leader after more than ten checks."""
    found = parts.evaluate(
        r"""async () => {
            await lead();
            delete window.SharedWorker;
            window.setInterval = (check) => { window.check = check; };
            const apart = [];
            const channel = new BroadcastChannel(key);
            channel.onmessage = ({ data }) => data.apart && apart.push(stream.cursor);
            tell({ cursor: "an id" });
            await start({ share: true });
            await until(() => stream.state === "open" && requests[0]);
            for (let number = 1; number <= 12; number++) {
                requests[0].push(`id: ${number}\n\n`);
                await until(() => stream.cursor === String(number));
                await heard(() => tell({ cursor: `an id ${number}` }));
                check();
                await heard(() => tell({ cursor: `an id ${number}` }));
            }
            await until(() => requests[1]);
            return [apart, requests.map(({ url }) => new URL(url).search)];
        }"""
    )
    assert found == [["11"], ["?grant=g&last_event_id=0", "?grant=g&last_event_id=12"]]


def test_a_leader_that_is_refused_uses_the_grant_that_it_received_meanwhile(parts: Page) -> None:
    found = parts.evaluate(
        r"""async () => {
            delete window.SharedWorker;
            let refuse;
            const gate = new Promise((resolve) => { refuse = resolve; });
            window.answers = [{ status: 401, gate }];
            await start({ share: true });
            await until(() => requests[0]);
            const url = `${location.origin}/stream?grant=other`;
            await heard(() => {
                const channel = new BroadcastChannel(key);
                channel.postMessage({ url, credentials: "same-origin" });
            });
            await new Promise((resolve) => setTimeout(resolve));
            refuse();
            await until(() => stream.state === "open");
            return requests.map(({ url }) => new URL(url).search);
        }"""
    )
    assert found == [f"?grant={grant}&last_event_id=0" for grant in ("g", "other")]


def test_a_leader_opens_its_stream_again_for_a_new_cursor_only_after_an_event(
    parts: Page,
) -> None:
    """It does not wait. The cursor of a stream without an event is that of a new one."""
    found = parts.evaluate(
        r"""async () => {
            delete window.SharedWorker;
            const waits = [];
            const { setTimeout } = window;
            await start({ share: true });
            const channel = new BroadcastChannel(key);
            const messages = [];
            channel.onmessage = ({ data }) => data.term && messages.push(data);
            const ask = async () => {
                const { length } = messages;
                channel.postMessage({ apart: true });
                await until(() => messages.length > length);
            };
            await until(() => stream.state === "open");
            requests[0].push("id: 1\n\n");
            await until(() => stream.cursor === "1");
            await ask();
            const early = requests.length;
            requests[0].push("event: ping\ndata: x\nid: an id\n\n");
            await until(() => received.length);
            window.setTimeout = (callback, ms) => setTimeout(callback, (waits.push(ms), 0));
            await ask();
            await until(() => requests[1]);
            requests[1].push("id: 2\n\n");
            await until(() => messages.at(-1).block?.after === "2");
            const { before, after } = messages.at(-1).block;
            return [early, requests[0].aborted, waits.filter(Boolean), before, after];
        }"""
    )
    assert found == [1, True, [], "an id", "2"]
