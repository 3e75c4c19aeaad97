"""The benchmarks' own parts: what counts, and what writes the page."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from docutils.core import publish_doctree

from benchmarks import contenders, measure, report
from benchmarks.attack import attacking
from benchmarks.instructions import counted


def work(times: int) -> None:
    for _ in range(times):
        step()


def step() -> int:
    return sum([1, 2, 3])


def test_instructions_are_counted_exactly() -> None:
    """The same work is the same number; twice as much is twice as much, but for its frame."""
    counts = []
    for times in (10, 10, 20, 40):
        with counted() as count:
            work(times)
        counts.append(count.instructions)
    assert counts[0] == counts[1] > 50
    assert counts[3] - counts[2] == 2 * (counts[2] - counts[1])


async def test_instructions_of_tasks_that_were_there_before() -> None:
    """What is resumed is counted: that is how streams wait for events."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    done = asyncio.Event()

    async def wait() -> None:
        work(await queue.get())
        done.set()

    counts = []
    for times in (10, 100):
        done.clear()
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        with counted() as count:
            queue.put_nowait(times)
            await done.wait()
        await task
        counts.append(count.instructions)
    with counted() as count:
        work(10)
    ten = count.instructions
    with counted() as count:
        work(100)
    assert counts[1] - counts[0] == pytest.approx(count.instructions - ten, rel=0.05)


def test_figures_are_put_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands around them stays, however often they are written."""
    page = tmp_path / "page.rst"
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    for text in ("first", "second"):
        report.write(text)
    assert page.read_text() == (f"before\n\n{report.BEGIN}\n\nsecond\n\n{report.END}\n\nafter\n")


def test_a_table_is_a_table() -> None:
    """docutils reads it as one; a figure that there is not says so."""
    text = report.table(
        ("a", "b"), [("x", report.number(1234.56)), ("y", report.number(None))], "50 50"
    )
    cells = [cell.astext() for cell in publish_doctree(text).findall() if cell.tagname == "entry"]
    assert cells == ["a", "b", "x", "1,234.6", "y", "n/a"]


def test_who_cannot_be_measured_says_why() -> None:
    """What is missing is named, and nothing is raised."""
    assert contenders.BARE.missing == ""
    assert replace(contenders.BARE, needs="no_such_package").missing == (
        "no_such_package is not installed"
    )


def test_ratios_are_of_one_round_each() -> None:
    """A machine that is slow for a while is slow for both."""
    ours = [{"x": {"y": value}} for value in (2, 30, 4)]
    theirs = [{"x": {"y": value}} for value in (1, 10, 4)]
    results = {contenders.HANDED_OVER.name: ours, contenders.BARE.name: theirs}
    assert measure.ratio(results, contenders.HANDED_OVER, contenders.BARE, "x", "y") == 2
    assert measure.ratio(results, contenders.HANDED_OVER, contenders.NCHAN, "x", "y") is None
    assert measure.median(ours, "x", "y") == 4


def test_figures_that_a_machine_does_not_give() -> None:
    """Those of the rounds that have them count; without any there is no figure."""
    one = [{"instructions_per_delivery": value} for value in (10, None, 30)]
    none = [{"instructions_per_delivery": None}] * 3
    name = measure.INSTRUCTIONS
    assert measure.median(one, name) == 20
    assert measure.median(none, name) is None
    assert measure.between(one, one, name) == 1
    assert measure.between(one, none, name) is None
    both = {contenders.BARE.name: one, contenders.HANDED_OVER.name: none}
    assert measure.ratio(both, contenders.HANDED_OVER, contenders.BARE, name) is None


class Closed(BaseHTTPRequestHandler):
    """A server that refuses every login."""

    protocol_version = "HTTP/1.1"
    logins: list[tuple[int, str]] = []

    def do_GET(self) -> None:
        scheme, _, text = self.headers["Authorization"].partition(" ")
        assert scheme == "Basic"
        self.logins.append((self.client_address[1], base64.b64decode(text).decode()))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_an_attack_logs_in_with_invented_users_over_its_connections() -> None:
    """Each connection goes on until the block ends, and then all have ended."""
    before = threading.active_count()
    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with attacking(server.server_address[1], "/", 3) as answers:
            deadline = time.monotonic() + 30
            while answers[401] < 30 and time.monotonic() < deadline:
                time.sleep(0.01)
        server.shutdown()
        thread.join()
    assert set(answers) == {401}
    assert answers[401] == len(Closed.logins) >= 30
    assert len({port for port, _ in Closed.logins}) == 3
    assert len({name for _, name in Closed.logins}) == len(Closed.logins)
    assert threading.active_count() == before


def test_an_attack_survives_a_server_that_hangs_up() -> None:
    """A connection that was cut is opened again, and is no answer."""
    server = socket.create_server(("127.0.0.1", 0))
    with attacking(server.getsockname()[1], "/", 1) as answers:
        for _ in range(3):
            server.accept()[0].close()
        server.close()
    assert not answers


@pytest.mark.slow
def test_a_contender_runs_and_ends() -> None:
    """On a port of its own, and no process is left."""
    with contenders.run(contenders.BARE) as running:
        assert running.port
        assert Path(f"/proc/{running.pids[0]}").exists()
    assert not Path(f"/proc/{running.pids[0]}").exists()
