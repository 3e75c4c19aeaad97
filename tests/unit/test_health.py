"""The views for the probes: ready and live."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import AsyncClient, Client

from django_eventsource.delivery import layer as layer_module
from django_eventsource.delivery.hub import get_hub
from django_eventsource.history import get_history
from django_eventsource.monitoring import history_check as module
from django_eventsource.monitoring.history_check import HistoryCheck
from django_eventsource.operations.control_receiver import ControlReceiver
from django_eventsource.operations.drain import request_drain
from django_eventsource.operations.shutdown import shutdown
from tests.support.layers import FaultySharedLayer, layer_of
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("memory_history")


class ScriptedHistory:
    """The history of a test, whose reads are counted, fail or hang."""

    def __init__(self) -> None:
        self.real = get_history()
        self.reads = 0
        self.error: Exception | None = None
        self.released = threading.Event()
        self.released.set()

    def newest(self, token: str) -> tuple[int, int | None]:
        self.reads += 1
        assert self.released.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        return self.real.newest(token)


@pytest.fixture(autouse=True)
def site(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.ROOT_URLCONF = "tests.support.monitored_urls"
    monkeypatch.setattr(HistoryCheck, "TIMEOUT_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedHistory]:
    history = ScriptedHistory()
    monkeypatch.setattr(module, "get_history", lambda: history)
    yield history
    history.released.set()
    for thread in threading.enumerate():
        if thread.name == "eventsource-health":
            thread.join(PATIENCE_SECONDS)


async def get(path: str = "/-/ready") -> tuple[int, Any]:
    response = await AsyncClient().get(path)
    assert response["Cache-Control"] == "private, no-store"
    return response.status_code, response.json()


READY = {"ready": True, "history": True, "layer": True, "draining": False}


async def test_a_process_is_ready_whose_history_can_be_read(history: ScriptedHistory) -> None:
    assert await get() == (200, READY)
    assert (await AsyncClient().head("/-/ready")).status_code == 200


@pytest.mark.parametrize("path", ["/-/ready", "/-/live", "/-/metrics"])
async def test_another_method_is_refused_with_405(settings, path: str) -> None:
    """The check against forged requests does not respond before."""
    settings.MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
    response = await AsyncClient(enforce_csrf_checks=True).post(path)
    assert (response.status_code, response["Allow"]) == (405, "GET, HEAD")


async def test_many_probes_read_the_history_once(
    history: ScriptedHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of them must not load the database."""
    monkeypatch.setattr(HistoryCheck, "CACHE_SECONDS", 3600.0)
    history.released.clear()
    probes = [asyncio.ensure_future(get()) for _ in range(50)]
    await until(lambda: history.reads)
    history.released.set()
    assert {status for status, _ in await asyncio.gather(*probes)} == {200}
    await get()
    assert history.reads == 1


async def test_the_history_is_read_again_after_a_second(
    history: ScriptedHistory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The response does not contain the error, which is logged."""
    monkeypatch.setattr(HistoryCheck, "CACHE_SECONDS", 0.0)
    history.error = ConnectionError("the password of the store")
    assert await get() == (503, READY | {"ready": False, "history": False})
    assert "The history cannot be read" in caplog.text
    history.error = None
    assert await get() == (200, READY)
    assert history.reads == 2


async def test_a_history_that_hangs_occupies_one_thread(
    history: ScriptedHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HistoryCheck, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(HistoryCheck, "TIMEOUT_SECONDS", 0.02)
    history.released.clear()
    for _ in range(3):
        status, found = await get()
        assert (status, found["history"]) == (503, False)
    assert history.reads == 1
    monkeypatch.setattr(HistoryCheck, "TIMEOUT_SECONDS", PATIENCE_SECONDS)
    history.released.set()
    assert await get() == (200, READY)


async def test_a_thread_that_cannot_be_started_is_tried_again(
    history: ScriptedHistory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process has reached its limit of threads for a moment."""
    monkeypatch.setattr(HistoryCheck, "CACHE_SECONDS", 0.0)
    check = HistoryCheck()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert await check.is_readable() is False
    assert "can't start new thread" in caplog.text
    assert await check.is_readable() is True


async def test_a_log_handler_that_raises_does_not_keep_the_result(
    history: ScriptedHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HistoryCheck, "CACHE_SECONDS", 0.0)
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    history.error = ConnectionError("down")
    with monkeypatch.context() as patch:
        patch.setattr(module.throttled, "error", None)  # calling it raises
        assert await module.history_check.is_readable() is False
    await until(lambda: raised)
    history.error = None
    assert await module.history_check.is_readable() is True


async def test_a_probe_that_is_cancelled_does_not_cancel_the_read_of_others(
    history: ScriptedHistory,
) -> None:
    history.released.clear()
    probes = [asyncio.ensure_future(module.history_check.is_readable()) for _ in range(2)]
    await until(lambda: history.reads)
    probes[0].cancel()
    history.released.set()
    assert await probes[1] is True


@pytest.mark.parametrize("state", ["begun", "draining"])
async def test_a_process_that_ends_its_streams_is_not_ready(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, state, True)
    assert await get() == (503, READY | {"ready": False, "draining": True})


@pytest.mark.parametrize("path", ["/-/ready", "/-/ready-without-layer"])
async def test_the_first_probe_of_a_process_finds_an_earlier_request_to_drain(path: str) -> None:
    """A worker that was idle has not received the request yet."""
    request_drain(0.1)
    assert await get(path) == (503, READY | {"ready": False, "draining": True})


async def test_a_probe_waits_for_earlier_requests_within_its_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The history is readable, but this read hangs."""

    async def hang(self: ControlReceiver, history: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ControlReceiver, "_find_drain_request", hang)
    monkeypatch.setattr(HistoryCheck, "TIMEOUT_SECONDS", 0.3)
    # The read of the history may be slower than this time-out on a loaded machine.
    monkeypatch.setattr(module.history_check, "is_readable", readable)
    assert await get() == (200, READY)


async def readable() -> bool:
    return True


async def test_a_process_is_not_ready_while_the_layer_does_not_deliver(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ready after the first message that the hub sends to itself."""
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}
    monkeypatch.setattr(FaultySharedLayer, "made", [])
    monkeypatch.setattr("django_eventsource.delivery.hub.LAYER_SECONDS", 0.3)
    assert layer_module.LAYER_SECONDS == 10
    layer = layer_of(get_hub())
    layer.silent = True
    assert await get() == (503, READY | {"ready": False, "layer": False})
    layer.silent = False

    async def is_ready(expected: bool) -> bool:
        return await get() == (
            (200, READY) if expected else (503, READY | {"ready": False, "layer": False})
        )

    await until(lambda: is_ready(True))
    layer.failing.add("group_send")
    await until(lambda: is_ready(False))
    assert await get("/-/ready-without-layer") == (200, READY)


def test_a_wsgi_server_is_ready_without_a_hub() -> None:
    """It opens no streams, so no channel layer delivers to it."""
    response = Client().get("/-/ready")
    assert (response.status_code, response.json()) == (200, READY)


async def test_a_process_is_live_whatever_its_history_does(history: ScriptedHistory) -> None:
    history.error = ConnectionError("down")
    assert await get("/-/live") == (200, {"live": True})
    assert history.reads == 0
