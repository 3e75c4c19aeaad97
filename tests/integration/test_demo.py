"""Tests of the demo: its live page, the machine's figures, its command, and the Makefile."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from django.db import OperationalError
from django.test import Client

from django_eventsource import publish
from django_eventsource.grants import read_grant
from django_eventsource.history import History
from django_eventsource.protocol.cursors import parse_cursors
from django_eventsource.protocol.frames import Decoder
from testproject import hints, machine
from tests.support.cursors import cursor_texts
from tests.support.demosite import MANAGE, ROOT, DemoSite
from tests.support.waiting import PROCESS_PATIENCE_SECONDS


@pytest.fixture
def site(tmp_path) -> Iterator[DemoSite]:
    """Run the demo site."""
    site = DemoSite(tmp_path)
    site.start()
    yield site
    site.kill()


# The live page


def attribute(page: str, tag_id: str, name: str) -> str:
    """Return an attribute of the element with an id."""
    found = re.search(rf'id="{tag_id}"[^>]*\sdata-{name}="([^"]*)"', page)
    assert found, page
    return found[1]


def grant_in(url: str) -> object:
    """Return the grant in a URL."""
    return read_grant(parse_qs(urlsplit(url).query)["grant"][0])


@pytest.mark.usefixtures("memory_history")
class TestPage:
    """Tests of the view, without a server."""

    def test_the_page_shows_the_token_of_the_readme(self):
        """It is not cached."""
        response = Client().get("/live/")
        assert response.status_code == 200
        assert 'value="42:42:42:42:42:42"' in response.text
        assert "no-store" in response["Cache-Control"]

    def test_the_grants_of_the_page_allow_only_what_it_does(self):
        page = Client().get("/live/", {"token": "a b/c"}).text
        grant = grant_in(attribute(page, "log", "url"))
        assert (grant.tokens, grant.listen, grant.send) == (("a b/c",), True, False)
        grant = grant_in(attribute(page, "machine", "url"))
        assert (grant.tokens, grant.listen, grant.send) == ((hints.MACHINE_TOKEN,), True, False)
        options = re.findall(r'<option data-url="([^"]*)">(\w+)', page)
        assert [action for _, action in options] == ["ping", "retry", "close"]
        for url, action in options:
            assert url.startswith(f"/events/{action}/a%20b/c?")
            grant = grant_in(url)
            assert (grant.tokens, grant.listen, grant.send) == (("a b/c",), False, True)

    def test_the_box_starts_after_the_newest_event(self):
        publish("t", "ping", "before")
        event = publish("t", "ping", "shown by nobody")
        page = Client().get("/live/", {"token": "t"}).text
        assert cursor_texts(attribute(page, "log", "cursor"), ["t"]) == {"t": event.id}

    def test_the_page_can_listen_to_a_closed_token(self, memory_history: History):
        publish("t", "close")
        page = Client().get("/live/", {"token": "t"}).text
        cursor = parse_cursors(attribute(page, "log", "cursor"), ["t"])["t"]
        position = memory_history.locate("t", cursor)
        assert position.known
        assert not position.closed

    def test_a_token_is_escaped(self):
        page = Client().get("/live/", {"token": '"><script>alert(1)</script>'}).text
        assert "<script>alert" not in page
        assert "&quot;&gt;&lt;script&gt;" in page

    @pytest.mark.parametrize(
        ("token", "words"),
        [("x" * 256, "256 characters long"), ("a\0b", "contains NUL")],
    )
    def test_an_invalid_token_shows_an_error_without_a_box(self, token: str, words: str):
        response = Client().get("/live/", {"token": token})
        assert response.status_code == 400
        assert words in response.text
        assert 'id="machine"' in response.text
        assert 'id="log"' not in response.text

    def test_the_page_accepts_get_and_head_only(self):
        assert Client().head("/live/").status_code == 200
        assert Client().post("/live/").status_code == 405


# What to type


def test_the_commands_of_the_page_are_those_of_the_readme(monkeypatch):
    """The demo runs as in the README."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv" / "bin" / "python"))
    assert hints.commands("42:42:42:42:42:42") == [
        ".venv/bin/python testproject/manage.py listen_events 42:42:42:42:42:42 -r 5000",
        '.venv/bin/python testproject/manage.py send_event 42:42:42:42:42:42 ping "42"',
        ".venv/bin/python testproject/manage.py send_event 42:42:42:42:42:42 close",
    ]


def test_the_commands_are_quoted_for_a_shell(monkeypatch, tmp_path):
    """Directory, port, host and token differ from the defaults."""
    monkeypatch.chdir(tmp_path)
    listen, send, _ = hints.commands("it's; rm", "192.0.2.1", 8001)
    assert listen.startswith(f"{sys.executable} {MANAGE} listen_events ")
    assert listen.endswith(""" 'it'"'"'s; rm' -H 192.0.2.1 -P 8001 -r 5000""")
    assert " -H " not in send


# The machine's figures


def test_a_sample_contains_figures_in_their_ranges():
    """It can be encoded as JSON."""
    sample = machine.sample()
    assert abs(sample["time"] / 1000 - time.time()) < 10
    assert 0 <= sample["cpu"] <= 100
    assert 0 < sample["memory"] <= 100
    assert 0 < sample["used"] <= sample["total"]
    assert sample["load"] >= 0
    assert sample["cores"] >= 1
    assert json.loads(json.dumps(sample)) == sample


@pytest.mark.parametrize(
    ("now", "due"),
    [(10.0, 11.0), (10.3, 11.0), (10.99, 11.0), (11.0, 11.0), (11.2, 12.0), (75.5, 76.0)],
)
def test_a_late_sample_does_not_delay_the_next_ones(now: float, due: float):
    """Samples that are overdue are left out."""
    assert machine.next_due(10.0, now, 1.0) == due


def test_the_publisher_publishes_samples_until_it_is_stopped(monkeypatch):
    published: queue.Queue[tuple] = queue.Queue()
    monkeypatch.setattr(machine, "publish", lambda *args: published.put(args))
    publisher = machine.Publisher(interval_seconds=0.01)
    publisher.start()
    for _ in range(3):
        token, action, value, event_class = published.get(timeout=PROCESS_PATIENCE_SECONDS)
        event = event_class(token, action, value)
        assert (event.token, event.action) == ("demo:machine", "sample")
        assert action in event_class.ACTIONS
        assert json.loads(event.value[0])["total"] > 0
    publisher.stop(PROCESS_PATIENCE_SECONDS)
    assert not publisher.is_alive()


def test_the_publisher_logs_a_failing_database_once_and_continues(monkeypatch, caplog):
    """Its recovery is logged once too."""
    results = iter(
        [None, OperationalError("database is locked"), OperationalError("again"), None, None]
    )
    done: queue.Queue[None] = queue.Queue()

    def fail_or_not(*args: object) -> None:
        result = next(results, None)
        done.put(None)
        if result is not None:
            raise result

    monkeypatch.setattr(machine, "publish", fail_or_not)
    publisher = machine.Publisher(interval_seconds=0.01)
    with caplog.at_level(logging.WARNING, "testproject.machine"):
        publisher.start()
        for _ in range(6):
            done.get(timeout=PROCESS_PATIENCE_SECONDS)
        publisher.stop(PROCESS_PATIENCE_SECONDS)
    assert [record.getMessage() for record in caplog.records] == [
        "Publishing this machine's figures failed; retrying.",
        "Publishing this machine's figures works again.",
    ]


def test_the_publisher_prunes_the_history(monkeypatch):
    pruned: queue.Queue[None] = queue.Queue()

    class Fake:
        def prune(self) -> None:
            pruned.put(None)

    monkeypatch.setattr(machine, "publish", lambda *args: None)
    monkeypatch.setattr(machine, "get_history", Fake)
    publisher = machine.Publisher(interval_seconds=0.01)
    publisher.start()
    pruned.get(timeout=PROCESS_PATIENCE_SECONDS)
    publisher.stop(PROCESS_PATIENCE_SECONDS)


# The command


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_while_a_stream_is_open(site: DemoSite, how: signal.Signals):
    """Ctrl-C and SIGTERM cause no error message."""
    page = httpx2.get(site.live_url).text
    stream = site.url.rstrip("/") + attribute(page, "machine", "url")
    with httpx2.stream("GET", stream, params=None, timeout=PROCESS_PATIENCE_SECONDS) as response:
        chunks = response.iter_bytes()
        next(chunks)
        begin = time.monotonic()
        status = site.stop(how)
        seconds = time.monotonic() - begin
    assert status == 0
    # Normally a fraction of a second; a stream stays open for up to an hour.
    assert seconds < PROCESS_PATIENCE_SECONDS / 4
    assert site.errors == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(site.process.pid, 0)
    # And it can start again at once, where it was.
    port = site.port
    site.start()
    assert site.port == port
    assert site.stop(how) == 0


def test_the_chart_receives_a_sample_every_second(site: DemoSite):
    """Each sample has the next id."""
    page = httpx2.get(site.live_url).text
    url = site.url.rstrip("/") + attribute(page, "machine", "url")
    decoder, events = Decoder(), []
    end = time.monotonic() + PROCESS_PATIENCE_SECONDS
    with httpx2.stream("GET", url, timeout=PROCESS_PATIENCE_SECONDS) as response:
        for chunk in response.iter_bytes():
            assert time.monotonic() < end
            events += decoder.feed(chunk)
            if len(events) >= 3:
                break
    assert {event.event for event in events} == {"sample"}
    first = int(events[0].id)
    assert [int(event.id) for event in events] == [first + n for n in range(len(events))]
    times = [json.loads(event.data)["time"] for event in events]
    assert times == sorted(set(times))
    assert site.stop() == 0


def run_demo(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a demo that cannot start."""
    return subprocess.run(
        [sys.executable, str(MANAGE), "demo", *args],
        env=DemoSite(tmp_path).env,
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_SECONDS,
        check=False,
    )


def test_a_port_in_use_is_reported_in_one_line(tmp_path):
    """The exit status is 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_demo(tmp_path, "--port", str(port))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"CommandError: Cannot listen on 127.0.0.1:{port}: Address already in use. "
        "Choose another port with --port (or `make demo PORT=...`).\n"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "65536"], "The port must be 0 to 65535, not 65536."),
        (["--host", "host.invalid"], "'host.invalid' is not a host to listen on: "),
    ],
)
def test_an_invalid_host_or_port_is_reported_in_one_line(tmp_path, args: list[str], words: str):
    """The exit status is 1."""
    result = run_demo(tmp_path, *args)
    assert result.returncode == 1
    assert result.stderr.startswith(f"CommandError: {words}")
    assert result.stderr.count("\n") == 1


# The Makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    """Tests of the Makefile, except for what a test run and the tests above run."""

    def make(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run make in the project."""
        return subprocess.run(
            ["make", "--no-print-directory", *args],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=PROCESS_PATIENCE_SECONDS,
            check=False,
        )

    def test_make_without_a_target_prints_its_help(self):
        result = self.make()
        assert result.returncode == 0
        assert re.findall(r"^make ([\w-]+)", result.stdout, re.MULTILINE) == [
            "demo",
            "demo-cluster",
            "test-unit",
            "test",
            "test-faults",
            "bench",
            "bench-short",
            "docs",
            "pictures",
            "lint",
            "types",
            "clean",
        ]

    def test_make_without_a_suitable_python_names_the_way_out(self, tmp_path):
        """It creates no environment."""
        old = tmp_path / "python2"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        venv = tmp_path / "venv"
        result = self.make("demo", f"PYTHON={old}", f"VENV={venv}")
        assert result.returncode != 0
        assert f"Python 3.11 or newer is needed, and none of these is one: {old}." in result.stderr
        assert "make PYTHON=" in result.stderr
        assert not venv.exists()

    def test_make_clean_removes_what_the_examples_made_and_no_source(self, tmp_path):
        shutil.copy(ROOT / "Makefile", tmp_path)
        kept = ["Makefile", "docs/examples/package.json", "docs/examples/static/publish.js"]
        for name in [
            *kept,
            *[
                f"docs/examples/static/{name}.js"
                for name in ("datastar", "react-app", "ai-sdk-app")
            ],
            *["docs/examples/plain.sqlite3", "docs/examples/plain.sqlite3-wal"],
            *["docs/examples/node_modules/x/x.js", "docs/examples/plain/__pycache__/urls.pyc"],
        ]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        # Without these, `make test VENV=...` would pass its VENV on, which must not be removed.
        result = self.make("-C", str(tmp_path), "clean", "VENV=.venv", MAKEFLAGS="")
        assert result.returncode == 0, result.stderr
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert sorted(str(path.relative_to(tmp_path)) for path in left) == kept
        assert not (tmp_path / "docs/examples/node_modules").exists()
