"""The demo site: its page, the machine's figures, its command, and the Makefile."""

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

import httpx
import pytest
from django.db import OperationalError
from django.test import Client

from django_eventsource import publish
from django_eventsource.frames import Decoder
from django_eventsource.grants import read_grant
from django_eventsource.history import History, get_history
from testproject import hints, machine, views
from tests.demosite import DEADLINE, MANAGE, ROOT, DemoSite


@pytest.fixture
def site(tmp_path) -> Iterator[DemoSite]:
    """Run the demo site."""
    site = DemoSite(tmp_path)
    site.start()
    yield site
    site.kill()


# The page


def attribute(page: str, tag_id: str, name: str) -> str:
    """Give an attribute of the element with an id."""
    found = re.search(rf'id="{tag_id}"[^>]*\sdata-{name}="([^"]*)"', page)
    assert found, page
    return found[1]


def grant_in(url: str) -> object:
    """Give the grant that a URL carries."""
    return read_grant(parse_qs(urlsplit(url).query)["grant"][0])


@pytest.mark.usefixtures("memory_history")
class TestPage:
    """The view, without a server."""

    def test_default_token(self):
        """The page shows the token of the README, and is kept by no cache."""
        response = Client().get("/")
        assert response.status_code == 200
        assert 'value="42:42:42:42:42:42"' in response.text
        assert "no-store" in response["Cache-Control"]

    def test_grants(self):
        """The page's URLs grant what it does with them, and no more."""
        page = Client().get("/", {"token": "a b/c"}).text
        grant = grant_in(attribute(page, "log", "url"))
        assert (grant.tokens, grant.listen, grant.send) == (("a b/c",), True, False)
        grant = grant_in(attribute(page, "machine", "url"))
        assert (grant.tokens, grant.listen, grant.send) == ((machine.TOKEN,), True, False)
        options = re.findall(r'<option data-url="([^"]*)">(\w+)', page)
        assert [action for _, action in options] == ["ping", "retry", "close"]
        for url, action in options:
            assert url.startswith(f"/events/{action}/a%20b/c?")
            grant = grant_in(url)
            assert (grant.tokens, grant.listen, grant.send) == (("a b/c",), False, True)

    def test_cursor(self):
        """The box goes on from the newest event of when the page was made."""
        publish("t", "ping", "before")
        event = publish("t", "ping", "shown by nobody")
        page = Client().get("/", {"token": "t"}).text
        assert attribute(page, "log", "cursor") == event.id

    def test_cursor_after_close(self, memory_history: History):
        """A token that was closed is opened anew by the page."""
        publish("t", "close")
        page = Client().get("/", {"token": "t"}).text
        position = memory_history.locate("t", attribute(page, "log", "cursor"))
        assert position.known
        assert not position.closed

    def test_escapes(self):
        """A token cannot bring markup into the page."""
        page = Client().get("/", {"token": '"><script>alert(1)</script>'}).text
        assert "<script>alert" not in page
        assert "&quot;&gt;&lt;script&gt;" in page

    @pytest.mark.parametrize(
        ("token", "words"),
        [("x" * 256, "256 characters long"), ("a\0b", "holds NUL")],
    )
    def test_bad_token(self, token: str, words: str):
        """A token that is none is answered in words, and without a box."""
        response = Client().get("/", {"token": token})
        assert response.status_code == 400
        assert words in response.text
        assert 'id="machine"' in response.text
        assert 'id="log"' not in response.text

    def test_needs_nothing_from_elsewhere(self):
        """The page loads nothing from another host."""
        static = ROOT / "testproject" / "testproject" / "static" / "testproject"
        texts = [Client().get("/").text]
        texts += [path.read_text() for path in static.iterdir() if path.suffix != ".svg"]
        assert not re.search(r"https?://", "".join(texts))

    def test_head(self):
        """The page answers GET and HEAD only."""
        assert Client().head("/").status_code == 200
        assert Client().post("/").status_code == 405


@pytest.mark.parametrize(
    ("published", "kept", "expected"),
    [(0, 9, 0), (2, 9, 2), (3, 9, 3), (8, 9, 3), (8, 3, 3), (8, 2, 2)],
)
def test_recent(settings, published: int, kept: int, expected: int):
    """The chart's listener gets the newest few events, and never a `reset`."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.memory.MemoryHistory",
        "OPTIONS": {"MAX_EVENTS": kept},
    }
    history = get_history()
    for number in range(published):
        publish("t", "ping", str(number))
    history.prune()
    position = history.locate("t", str(views.recent("t", 3)))
    assert position.known
    assert len(history.read("t", position.seq).entries) == expected


# What to type


def test_commands(monkeypatch):
    """The commands are those of the README when the demo runs as in the README."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv" / "bin" / "python"))
    assert hints.commands("42:42:42:42:42:42") == [
        ".venv/bin/python testproject/manage.py listen_events 42:42:42:42:42:42 -r 5000",
        '.venv/bin/python testproject/manage.py send_event 42:42:42:42:42:42 ping "42"',
        ".venv/bin/python testproject/manage.py send_event 42:42:42:42:42:42 close",
    ]


def test_commands_elsewhere(monkeypatch, tmp_path):
    """Another place, port, host or odd token is put so that a shell takes it as it is."""
    monkeypatch.chdir(tmp_path)
    listen, send, _ = hints.commands("it's; rm", "192.0.2.1", 8001)
    assert listen.startswith(f"{sys.executable} {MANAGE} listen_events ")
    assert listen.endswith(""" 'it'"'"'s; rm' -H 192.0.2.1 -P 8001 -r 5000""")
    assert " -H " not in send


# The machine's figures


def test_sample():
    """A sample holds real figures in their ranges, as JSON."""
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
def test_no_drift(now: float, due: float):
    """What was late stays on the beat; beats that were slept through are left out."""
    assert machine.next_due(10.0, now, 1.0) == due


def test_publisher(monkeypatch):
    """The publisher publishes samples to the chart's token until it is stopped."""
    published: queue.Queue[tuple] = queue.Queue()
    monkeypatch.setattr(machine, "publish", lambda *args: published.put(args))
    publisher = machine.Publisher(interval_seconds=0.01)
    publisher.start()
    for _ in range(3):
        token, action, value, event_class = published.get(timeout=DEADLINE)
        event = event_class(token, action, value)
        assert (event.token, event.action) == ("demo:machine", "sample")
        assert action in event_class.ACTIONS
        assert json.loads(event.value[0])["total"] > 0
    publisher.stop(DEADLINE)
    assert not publisher.is_alive()


def test_publisher_survives(monkeypatch, caplog):
    """A database that fails ends nothing: it is said once, and so is its return."""
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
            done.get(timeout=DEADLINE)
        publisher.stop(DEADLINE)
    assert [record.getMessage() for record in caplog.records] == [
        "The machine's figures cannot be published; going on trying.",
        "The machine's figures are published again.",
    ]


def test_publisher_prunes(monkeypatch):
    """The publisher keeps its history in its bounds, where no stream does."""
    pruned: queue.Queue[None] = queue.Queue()

    class Fake:
        def prune(self) -> None:
            pruned.put(None)

    monkeypatch.setattr(machine, "publish", lambda *args: None)
    monkeypatch.setattr(machine, "get_history", Fake)
    publisher = machine.Publisher(interval_seconds=0.01)
    publisher.start()
    pruned.get(timeout=DEADLINE)
    publisher.stop(DEADLINE)


# The command


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ends(site: DemoSite, how: signal.Signals):
    """Ctrl-C and SIGTERM end the demo quietly, without waiting for its open stream."""
    page = httpx.get(site.url).text
    stream = site.url.rstrip("/") + attribute(page, "machine", "url")
    with httpx.stream("GET", stream, params=None, timeout=DEADLINE) as response:
        chunks = response.iter_bytes()
        next(chunks)
        begin = time.monotonic()
        status = site.stop(how)
        seconds = time.monotonic() - begin
    assert status == 0
    # Normally a fraction of a second; a stream stays open for up to an hour.
    assert seconds < DEADLINE / 4
    assert site.errors == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(site.process.pid, 0)
    # And it can start again at once, where it was.
    port = site.port
    site.start()
    assert site.port == port
    assert site.stop(how) == 0


def test_stream_of_figures(site: DemoSite):
    """The chart's stream brings a sample per second, each with the next id."""
    page = httpx.get(site.url).text
    url = site.url.rstrip("/") + attribute(page, "machine", "url")
    url += "&last_event_id=" + attribute(page, "machine", "cursor")
    decoder, events = Decoder(), []
    end = time.monotonic() + DEADLINE
    with httpx.stream("GET", url, timeout=DEADLINE) as response:
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
        timeout=DEADLINE,
        check=False,
    )


def test_port_in_use(tmp_path):
    """A port that is taken is one clear line and status 1."""
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
        (["--host", "host.invalid"], "'host.invalid' is no host to listen on: "),
    ],
)
def test_nowhere(tmp_path, args: list[str], words: str):
    """A host or port that is none is one clear line and status 1."""
    result = run_demo(tmp_path, *args)
    assert result.returncode == 1
    assert result.stderr.startswith(f"CommandError: {words}")
    assert result.stderr.count("\n") == 1


# The Makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    """Both commands' beginnings; their ends are this test run and the tests above."""

    def make(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run make in the project."""
        return subprocess.run(
            ["make", "--no-print-directory", *args],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def test_help(self):
        """By itself make says what it can do."""
        result = self.make()
        assert result.returncode == 0
        assert re.findall(r"^make ([\w-]+)", result.stdout, re.MULTILINE) == [
            "demo",
            "demo-cluster",
            "test",
            "test-faults",
            "bench",
            "bench-short",
            "lint",
            "types",
            "clean",
        ]

    def test_no_python(self, tmp_path):
        """Without a fitting Python there is a clear message, and nothing is made."""
        old = tmp_path / "python2"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        venv = tmp_path / "venv"
        result = self.make("demo", f"PYTHON={old}", f"VENV={venv}")
        assert result.returncode != 0
        assert f"Python 3.11 or newer is needed, and none of these is one: {old}." in result.stderr
        assert "make PYTHON=" in result.stderr
        assert not venv.exists()
