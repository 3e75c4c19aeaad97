"""Tests of the configurations of nginx and Caddy that the pages show, with Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import trustme
from playwright.sync_api import BrowserContext, Page, expect

from tests.support.examples import POLL, Example, events, run_example
from tests.support.proxies import NGINX, Proxy, every_proxy

STREAM = {"Accept": "text/event-stream"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with run_example("plain", tmp_path_factory) as example:
        yield example


@contextmanager
def run_proxy(
    proxy: Proxy, example: Example, directory: Path, *changes: tuple[str, str]
) -> Iterator[str]:
    """Run a proxy in front of the example, and yield its URL. Clients reconnect fast."""
    faster = ("retry: 3000", "retry: 50")
    with proxy.run(directory, example.port, *changes, faster) as (host, port):
        yield f"http://{host}:{port}/"


def visit(page: Page, url: str, example: Example) -> None:
    """Open the page on an empty history, and wait until it listens."""
    example.drop_all()
    page.goto(url)
    expect(page.locator("#state")).to_have_text("open")
    example.publish("retry", "50")


@every_proxy
def test_the_page_continues_after_the_server_was_down_and_misses_nothing(
    page: Page, example: Example, tmp_path: Path, proxy: Proxy
):
    with run_proxy(proxy, example, tmp_path) as url:
        visit(page, url, example)
        page.get_by_label("Text").fill("before")
        page.get_by_role("button", name="Publish").click()
        expect(events(page)).to_have_text(["before"])
        with page.expect_response(POLL) as response:
            example.kill()
        assert response.value.status == 200
        example.publish("ping", "one", "two")
        example.start()
        example.publish("ping", "after")
        expect(events(page)).to_have_text(["before", "one", "two", "after"])


@every_proxy
def test_only_the_get_of_a_stream_is_answered_while_the_server_is_down(
    example: Example, tmp_path: Path, proxy: Proxy
):
    """A client that posts an event, or reads the history as JSON, receives an error."""
    with run_proxy(proxy, example, tmp_path) as url:
        example.kill()
        stream = httpx2.get(f"{url}events/poll/news", headers=STREAM)
        statuses = [
            httpx2.post(f"{url}events/ping/news", content="42", headers=STREAM).status_code,
            httpx2.get(f"{url}events/poll/news").status_code,
            httpx2.get(f"{url}events/poll/news", headers={"Accept": "*/*"}).status_code,
            httpx2.get(url).status_code,
        ]
        example.start()
    assert stream.status_code == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-store"
    assert stream.text == "retry: 50\n\n"
    assert set(statuses) <= {502, 503}


def test_a_502_stops_the_browser_for_good(page: Page, example: Example, tmp_path: Path):
    """This is what the page prevents."""
    change = ("error_page 502 503 504 = @unavailable;", "")
    with run_proxy(NGINX, example, tmp_path, change) as url:
        visit(page, url, example)
        example.publish("ping", "before")
        expect(events(page)).to_have_text(["before"])
        example.kill()
        expect(page.locator("#state")).to_have_text("refused: reload the page")
        example.start()


def test_with_http_2_more_than_six_tabs_listen(
    browser: BrowserContext, example: Example, tmp_path: Path
):
    """They share one connection. Browsers use HTTP/2 with TLS only."""
    certificate = trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    certificate.write_to_path(tmp_path / "server.pem")
    change = (
        "listen 127.0.0.1:8080;",
        "listen 127.0.0.1:8080 ssl http2; ssl_certificate server.pem; "
        "ssl_certificate_key server.pem;",
    )
    example.drop_all()
    tabs = [browser.new_page() for _ in range(8)]
    with run_proxy(NGINX, example, tmp_path, change) as url:
        for tab in tabs:
            browser.new_cdp_session(tab).send(
                "Security.setIgnoreCertificateErrors", {"ignore": True}
            )
            tab.goto(url.replace("http:", "https:"))
            expect(tab.locator("#state")).to_have_text("open")
        example.publish("ping", "all")
        for tab in tabs:
            expect(events(tab)).to_have_text(["all"])
            tab.close()
