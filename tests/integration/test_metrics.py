"""The metrics: in one process, in several, and as Prometheus stores them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import prometheus_client.values
import psutil
import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.test import Client
from prometheus_client.parser import text_string_to_metric_families

from django_eventsource import _runtime, _statistics, apublish
from django_eventsource.delivery.counters import counters
from django_eventsource.monitoring import metrics as module
from django_eventsource.monitoring.metrics import files, install, render
from django_eventsource.protocol.batches import Batch
from django_eventsource.signals import Reason
from django_eventsource.testing import listen
from tests.support.listeners import Connection
from tests.support.processes import Server, serve
from tests.support.proxies import free_port, wait_for_port
from tests.support.waiting import PATIENCE_SECONDS, PROCESS_PATIENCE_SECONDS, until

SECRET = "a-secret-of-the-tests"
MONITORED: dict[str, Any] = {
    "ROOT_URLCONF": "tests.support.monitored_urls",
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
    "EVENTSOURCE_METRICS_TOKEN": SECRET,
}
Values = dict[str, float]


@pytest.fixture(autouse=True)
def site(settings) -> None:
    for name, value in MONITORED.items():
        setattr(settings, name, value)


def parsed(page: str) -> Values:
    """Return the values of a page by their names, with the labels as text."""
    found = {}
    for family in text_string_to_metric_families(page):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def values() -> Values:
    """Return the metrics of this process, as the view does."""
    return parsed(render()[0].decode())


# One process


async def test_the_metrics_of_a_process_are_its_statistics(memory_history: Any) -> None:
    """Every reason has a value from the start, so that a rate can be computed."""
    before = values()
    assert {f"eventsource_streams_closed_total{{reason={reason}}}" for reason in Reason} <= {
        *before
    }
    assert before["eventsource_resets_total{reason=expired}"] == 0
    async with listen("a-token-of-the-tests") as stream:
        await apublish("a-token-of-the-tests", "ping", "x")
        await stream.next("ping")
        await until(lambda: values()["eventsource_delivery_seconds_count"] == 1)
        found = values()
    assert found["eventsource_streams_open"] == 1
    assert found["eventsource_streams_opened_total"] == 1
    assert found["eventsource_delivered_events_total"] == 1
    assert found["eventsource_published_events_total"] == 1
    assert found["eventsource_delivery_seconds_bucket{le=+Inf}"] == 1
    assert found["eventsource_publish_seconds_sum"] > 0
    assert "a-token" not in render()[0].decode()


def test_the_metrics_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImproperlyConfigured, match='with the extra "prometheus"'):
        render()
    monkeypatch.setenv(module.DIRECTORY, "anywhere")
    install()
    assert _statistics.observers == []


# The view


def test_the_metrics_are_closed_without_a_token(settings, client: Client) -> None:
    settings.EVENTSOURCE_METRICS_TOKEN = None
    response = client.get("/-/metrics", headers={"Authorization": "Bearer None"})
    assert response.status_code == 403
    assert b"EVENTSOURCE_METRICS_TOKEN is not set" in response.content


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", f"Basic {SECRET}", SECRET])
def test_the_metrics_need_the_token_of_the_settings(client: Client, sent: str) -> None:
    response = client.get("/-/metrics", headers={"Authorization": sent})
    assert response.status_code == 401
    assert response["WWW-Authenticate"].startswith("Bearer ")
    assert b"eventsource_" not in response.content


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", "text/plain"), ("application/openmetrics-text", "application/openmetrics-text")],
)
def test_the_metrics_have_the_format_that_is_requested(
    client: Client, accept: str, content_type: str
) -> None:
    headers = {"Authorization": f"bearer  {SECRET}", "Accept": accept}
    response = client.get("/-/metrics", headers=headers)
    assert response.status_code == 200
    assert response["Content-Type"].startswith(content_type)
    assert response["Cache-Control"] == "private, no-store"
    assert b"eventsource_streams_open 0.0\n" in response.content


# Several processes


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enable the multi-process mode in this process."""
    monkeypatch.setenv(module.DIRECTORY, str(tmp_path))
    value_class = prometheus_client.values.MultiProcessValue()
    monkeypatch.setattr(prometheus_client.values, "ValueClass", value_class)
    yield tmp_path
    files.reset()
    value_class.close_all_files()


def count_events(number: int) -> None:
    counters.count_batch(Batch([b"x"], published=0.0), number)


def test_the_files_have_the_same_values_as_the_collector(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        count_events(number)
        counters.latency.observe(0.002)  # in another bucket
        copied = values()
        assert copied["eventsource_delivered_events_total"] == (1, 3)[number - 1]
    monkeypatch.delenv(module.DIRECTORY)
    assert values() == copied


def test_a_process_continues_the_file_of_an_earlier_one_with_its_id(directory: Path) -> None:
    """A counter must not decrease. A fork begins at zero, too."""
    count_events(5)
    files.write()
    _runtime.reset_all()
    count_events(1)
    assert values()["eventsource_delivered_events_total"] == 6


def test_the_gauges_of_a_process_that_was_killed_are_dropped(directory: Path) -> None:
    """Its counters are kept."""
    code = "import os; print(os.getpid())"
    pid = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    count_events(1)
    files.write()
    for name in ("gauge_livesum", "counter"):
        shutil.copy(directory / f"{name}_{os.getpid()}.db", directory / f"{name}_{int(pid)}.db")
    assert values()["eventsource_delivered_events_total"] == 2
    assert not (directory / f"gauge_livesum_{int(pid)}.db").exists()
    assert (directory / f"gauge_livesum_{os.getpid()}.db").exists()


class ManualTimer:
    """Stands for ``threading.Timer``, whose time a test must not wait for."""

    made: list[ManualTimer] = []
    error: Exception | None = None

    def __init__(self, seconds: float, call: Any) -> None:
        self.call = call
        ManualTimer.made.append(self)

    def start(self) -> None:
        if ManualTimer.error is not None:
            raise ManualTimer.error


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[ManualTimer]:
    monkeypatch.setattr(ManualTimer, "made", [])
    monkeypatch.setattr(ManualTimer, "error", None)
    monkeypatch.setattr(threading, "Timer", ManualTimer)
    return ManualTimer.made


def test_one_timer_copies_all_changes_of_a_second(
    directory: Path, monkeypatch: pytest.MonkeyPatch, timers: list[ManualTimer]
) -> None:
    monkeypatch.setattr(_statistics, "observers", [])
    install()
    count_events(1)
    count_events(1)
    (timer,) = timers
    assert not list(directory.iterdir())
    timer.call()
    assert list(directory.iterdir())
    count_events(1)
    assert len(timers) == 2


def test_an_event_loop_does_not_wait_while_the_files_are_written(
    directory: Path, timers: list[ManualTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be slow."""
    writes, released = threading.Event(), threading.Event()

    def write_slowly(found: Any) -> Iterator[Any]:
        writes.set()
        assert released.wait(PROCESS_PATIENCE_SECONDS)
        yield from ()

    monkeypatch.setattr(module, "metrics_of", write_slowly)
    writer = threading.Thread(target=files.write)
    caller = threading.Thread(target=files.schedule)
    writer.start()
    assert writes.wait(PROCESS_PATIENCE_SECONDS)
    caller.start()
    caller.join(PATIENCE_SECONDS)
    number = len(timers)
    released.set()
    writer.join()
    caller.join()
    assert number == 1


def test_files_that_cannot_be_written_are_logged(
    directory: Path, timers: list[ManualTimer], caplog: pytest.LogCaptureFixture
) -> None:
    directory.rmdir()
    files.schedule()
    timers[0].call()
    assert "The metrics cannot be written" in caplog.text
    directory.mkdir()


def test_the_end_of_a_process_copies_the_last_counts(
    directory: Path, timers: list[ManualTimer]
) -> None:
    """Its streams are not open any more. A process that has counted nothing leaves no file."""
    files.end()
    assert not list(directory.iterdir())
    ManualTimer.error = RuntimeError("can't start new thread")
    count_events(1)
    files.schedule()
    files.write()
    counters.count_overflow()
    files.end()
    found = values()
    assert found["eventsource_overflows_total"] == 1


# Servers


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[int]:
    """Run a Prometheus that scrapes targets, and yield its port."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("`prometheus` is not on the PATH.")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {
                "job_name": "mysite",
                "metrics_path": "/-/metrics",
                "authorization": {"credentials": SECRET},
                "static_configs": [{"targets": targets}],
            }
        ],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    log_path = folder / "prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *[program, f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"],
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_port(port, process, log_path)
        yield port
    finally:
        process.kill()
        process.wait(PROCESS_PATIENCE_SECONDS)


def ask(port: int, query: str) -> float | None:
    """Return the value of a query; ``None`` without one, and while the program starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=PROCESS_PATIENCE_SECONDS) as response:
            found = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 503:
                raise
        return None
    return float(found[0]["value"][1]) if found else None


async def until_is(port: int, query: str, value: float) -> None:
    found: list[float | None] = []

    async def is_equal() -> bool:
        found.append(await sync_to_async(ask)(port, query))
        return found[-1] == value

    try:
        await until(is_equal, seconds=PROCESS_PATIENCE_SECONDS, interval_seconds=0.1)
    except TimeoutError:
        pytest.fail(f"{query} is {found[-1]}, not {value}")


async def open_streams(server: Server, number: int) -> list[Connection]:
    """Open streams, and wait until each is live."""
    streams = [await Connection.open(server.address, "/events/poll/t") for _ in range(number)]
    for stream in streams:
        assert stream.status == 200
        await stream.read()
    return streams


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
async def test_prometheus_scrapes_three_servers_and_the_workers_of_a_fourth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers behind one port are one target, whichever of them responds."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serve(kind, **MONITORED))
            for kind in ("uvicorn", "daphne", "hypercorn")
        ]
        shared = tmp_path / "shared"
        shared.mkdir()
        monkeypatch.setenv(module.DIRECTORY, str(shared))
        workers = stack.enter_context(serve("gunicorn", "-w", "3", **MONITORED))
        monkeypatch.delenv(module.DIRECTORY)
        targets = [f"127.0.0.1:{server.port}" for server in (*servers, workers)]
        # Before the streams, which would stay open if the test is skipped here.
        port = stack.enter_context(prometheus(tmp_path, targets))
        streams = [await open_streams(server, 2) for server in servers]
        # Enough that each worker has one with near certainty. The sum does not depend on it.
        many = await open_streams(workers, 9)
        await until_is(port, "sum(eventsource_streams_open)", 15)
        await until_is(port, f'eventsource_streams_open{{instance="{targets[3]}"}}', 9)
        await apublish("t", "ping", "x")
        for connection in [*many, *[one for pair in streams for one in pair]]:
            await connection.read_until(b"data: x")
        await until_is(port, "sum(eventsource_delivered_events_total)", 15)
        delivered = "sum(eventsource_delivery_seconds_count) >= bool 4"
        await until_is(port, delivered, 1)
        for connection in many:
            connection.close()
        await until_is(port, "sum(eventsource_streams_open)", 6)
        closed = 'sum(eventsource_streams_closed_total{reason="client_disconnected"})'
        await until_is(port, closed, 9)
        for pair in streams:
            for connection in pair:
                connection.close()


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
async def test_a_worker_that_is_killed_leaves_no_open_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.DIRECTORY, str(tmp_path))

    def scraped() -> float:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/-/metrics",
            headers={"Authorization": f"Bearer {SECRET}"},
        )
        with urllib.request.urlopen(request, timeout=PROCESS_PATIENCE_SECONDS) as response:
            return parsed(response.read().decode())["eventsource_streams_open"]

    async def is_open(number: int) -> bool:
        return await sync_to_async(scraped)() == number

    with serve("gunicorn", "-w", "1", **MONITORED) as server:
        (stream,) = await open_streams(server, 1)
        await until(lambda: is_open(1), seconds=PROCESS_PATIENCE_SECONDS)
        assert server.process is not None
        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()
        await stream.rest()
        await until(lambda: is_open(0), seconds=PROCESS_PATIENCE_SECONDS)
        stream.close()
