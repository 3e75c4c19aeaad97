"""Tests of the parts of the benchmarks: counters, the attack, the contenders and the report."""

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

from benchmarks import __main__ as pages
from benchmarks import calibration, contenders, counts, measure, report, stores
from benchmarks.attack import attacking
from benchmarks.instructions import counted


def work(times: int) -> None:
    for _ in range(times):
        step()


def step() -> int:
    return sum([1, 2, 3])


def test_the_same_work_has_the_same_number_of_instructions() -> None:
    """Twice the work is twice the number, except for the frame of the call."""
    counts = []
    for times in (10, 10, 20, 40):
        with counted() as count:
            work(times)
        counts.append(count.instructions)
    assert counts[0] == counts[1] > 50
    assert counts[3] - counts[2] == 2 * (counts[2] - counts[1])


async def test_instructions_of_resumed_coroutines_are_counted() -> None:
    """Streams wait for events in suspended coroutines."""
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


def test_the_report_replaces_only_the_text_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text around the marks stays, however often the report is written."""
    page = tmp_path / "page.rst"
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    for text in ("first", "second"):
        report.write(text)
    assert page.read_text() == (f"before\n\n{report.BEGIN}\n\nsecond\n\n{report.END}\n\nafter\n")


def test_the_page_names_the_measurements_during_which_the_machine_was_busy() -> None:
    """The fastest loop of the run is the base, before or after a measurement."""
    found = {"paced": (1.0, 1.1), "flood": (1.0, 1.5), "opening": (1.25, 1.25)}
    text = calibration.warning(found)
    assert "busy" in text
    assert text.endswith("*flood* (50% slower), *opening* (25% slower).")
    assert calibration.warning({"paced": (1.0, 1.1)}) == ""
    assert calibration.warning({}) == ""


def test_the_calibration_measures_the_loop_before_and_after_a_block() -> None:
    found: dict[str, tuple[float, float]] = {}
    with calibration.calibrated(found, "one"):
        assert not found
    before, after = found["one"]
    assert before > 0
    assert after > 0


@pytest.mark.parametrize("name", counts.NAMES)
def test_the_requests_of_each_store_are_counted(name: str) -> None:
    """None exceeds its bound."""
    if name not in counts.installed():
        pytest.skip(f"{counts.NEEDS[name]} is not installed.")
    rows = counts.rows({name: stores.in_process("counts", name)})
    assert len(rows) == len(counts.MOST[name])
    assert all(0 < count <= most for _, count, most in rows)


def test_docutils_parses_the_tables_of_the_report() -> None:
    """A missing figure is shown as ``n/a``."""
    text = report.table(
        ("a", "b"), [("x", report.number(1234.56)), ("y", report.number(None))], "50 50"
    )
    cells = [cell.astext() for cell in publish_doctree(text).findall() if cell.tagname == "entry"]
    assert cells == ["a", "b", "x", "1,234.6", "y", "n/a"]


def test_the_page_compares_each_figure_of_a_store_with_its_goal() -> None:
    databases = {"publish_ratio": 0.9, "publish_ratio_like": 1.1, "atomic_ratio": 0.5}
    found = {
        "publish": {
            "postgresql": databases,
            "sqlite": databases,
            "redis": {"publish_ratio": 0.4},
        },
        "post": {"sqlite": [{"publish": 11, "base": 10}], "memory": [{"publish": 6, "base": 5}]},
        "wake-up": {"sqlite": {"on": {"p50": 1, "p99": 2}, "off": {"p50": 100, "p99": 40}}},
        "replay": {"sqlite": {"ratio": 0.3}},
        "count": {"sqlite": {"publish": 4}, "redis": {"burst": 1}},
    }
    document = publish_doctree(pages.store_goals(found))
    cells = [cell.astext() for cell in document.findall() if cell.tagname == "entry"]
    assert cells[3::3][-2:] == [counts.WHAT["publish"]["sqlite"], counts.WHAT["burst"]["redis"]]
    assert cells[4::3] == [
        *("0.90", "0.90", "1.10", "1.10", "0.50", "0.50", "0.40"),
        *("1.10", "1.20", "0.01", "0.05", "0.30", "4", "1"),
    ]
    goals = cells[5::3]
    assert goals[0] == "at least 0.85"
    assert goals[-3:] == ["at least 0.60", "at most 4", "at most 1"]


def test_a_contender_that_is_not_installed_names_what_is_missing() -> None:
    """It raises nothing."""
    assert contenders.BARE.missing == ""
    assert replace(contenders.BARE, needs=("no_such_package",)).missing == (
        "no_such_package is not installed"
    )


def test_a_ratio_compares_figures_of_the_same_round() -> None:
    """A machine that is slow for a while is slow for both contenders."""
    ours = [{"x": {"y": value}} for value in (2, 30, 4)]
    theirs = [{"x": {"y": value}} for value in (1, 10, 4)]
    results = {contenders.HANDED_OVER.name: ours, contenders.BARE.name: theirs}
    assert measure.ratio(results, contenders.HANDED_OVER, contenders.BARE, "x", "y") == 2
    assert measure.ratio(results, contenders.HANDED_OVER, contenders.NCHAN, "x", "y") is None
    assert measure.median(ours, "x", "y") == 4


def test_the_median_uses_the_rounds_that_have_a_figure() -> None:
    """Without any figure the median is None."""
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
    """Each connection sends requests until the block ends."""
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


def test_an_attack_opens_a_closed_connection_again() -> None:
    """A closed connection does not count as a response."""
    server = socket.create_server(("127.0.0.1", 0))
    with attacking(server.getsockname()[1], "/", 1) as answers:
        for _ in range(3):
            server.accept()[0].close()
        server.close()
    assert not answers


@pytest.mark.slow
def test_a_contender_leaves_no_process_behind() -> None:
    """It runs on a port of its own."""
    with contenders.run(contenders.BARE) as running:
        assert running.port
        assert Path(f"/proc/{running.pids[0]}").exists()
    assert not Path(f"/proc/{running.pids[0]}").exists()
