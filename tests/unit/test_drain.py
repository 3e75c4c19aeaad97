"""Draining: the processes of a host end their streams before their servers are stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from django_eventsource import _runtime
from django_eventsource.history import get_history
from django_eventsource.history.base import READ_EVENTS
from django_eventsource.management.commands import eventsource_drain as command
from django_eventsource.operations import drain as module
from django_eventsource.operations.close_requests import aclose_streams
from django_eventsource.operations.control import ControlEvent
from django_eventsource.operations.control_receiver import ControlReceiver
from django_eventsource.operations.details import request_details
from django_eventsource.operations.drain import DrainRequest, request_drain
from django_eventsource.operations.shutdown import Shutdown, shutdown
from django_eventsource.operations.supervisor import get_supervisor
from django_eventsource.protocol.field_rules import DRAIN_HOST
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.publishing import publish_event
from django_eventsource.signals import Reason
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import listen
from tests.support.commands import Run
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture(autouse=True)
def site(settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.02
    yield
    assert not list(registry.streams())


def make_request(**changes: Any) -> DrainRequest:
    return DrainRequest(**{"seconds": 0.1} | changes)


# Requests


def test_a_request_is_read_as_it_was_sent() -> None:
    request = make_request(pid=7)
    assert DrainRequest.read(json.dumps(request.value)) == request
    assert request.host == socket.gethostname()


@pytest.mark.parametrize(
    "changes",
    [{"seconds": "1"}, {"pid": "1"}, {"host": None}, {"requested_at": None}, {"more": 1}],
    ids=str,
)
def test_an_invalid_request_is_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A drain request must have"):
        DrainRequest.read(json.dumps(make_request().value | changes))


@pytest.mark.parametrize(
    ("changes", "is_for_this"),
    [
        ({}, True),
        ({"pid": os.getpid()}, True),
        ({"pid": os.getppid()}, True),
        ({"pid": 2**31}, False),
        ({"host": "another"}, False),
    ],
    ids=["host", "process", "parent", "other-process", "other-host"],
)
def test_a_request_is_for_the_processes_of_a_host_or_of_one_server(
    changes: dict[str, Any], is_for_this: bool
) -> None:
    assert make_request(**changes).is_for_this_process() is is_for_this


def test_a_process_that_was_started_after_the_request_does_not_drain() -> None:
    """A restart lets the host serve streams again. A forked process starts with the fork."""
    request = make_request(requested_at=time.time() - 1)
    assert not request.is_for_this_process()
    module._started_at -= 2
    assert request.is_for_this_process()
    _runtime.reset_all()
    assert not request.is_for_this_process()


# Streams


async def test_the_streams_of_a_process_end_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each sends a reconnection time. A new stream receives one, and nothing else."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Shutdown, "DRAIN_STEP_SECONDS", 0.03)
    ended: list[int] = []
    pause = asyncio.sleep

    async def count(seconds: float) -> None:
        if seconds == Shutdown.DRAIN_STEP_SECONDS:
            ended.append(sum(one.reason is Reason.SHUTDOWN for one in held))
        await pause(seconds)

    streams = [listen("t") for _ in range(10)]
    for stream in streams:
        await stream.__aenter__()
    held = list(registry.streams())
    monkeypatch.setattr(asyncio, "sleep", count)
    request_drain(0.3)
    await until(lambda: "It has ended 10 streams" in caplog.text)
    assert 0 < ended[0] <= 2
    assert ended == sorted(ended)
    await until(lambda: not any(stream.is_open for stream in streams))
    assert all(b"\nretry: " in stream.body for stream in streams)
    async with listen("t") as refused:
        await until(lambda: not refused.is_open)
        assert b"retry: " in refused.body
        assert b"id:" not in refused.body
    for stream in streams:
        await stream.__aexit__(None, None, None)


async def test_a_request_for_another_host_ends_no_stream() -> None:
    receiver = ControlReceiver(asyncio.get_running_loop(), print)
    async with listen("t") as stream:
        receiver.apply(DRAIN_HOST, json.dumps(make_request(host="another").value))
        assert not shutdown.draining
        receiver.apply(DRAIN_HOST, json.dumps(make_request().value))
        assert shutdown.draining
        await until(lambda: not stream.is_open)


async def test_an_invalid_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    receiver = ControlReceiver(asyncio.get_running_loop(), print)
    receiver.apply(DRAIN_HOST, "{}")
    assert "A drain request is not valid" in caplog.text
    assert not shutdown.draining


@pytest.mark.parametrize("seconds", [(3600, 0.01), (0.01, 3600)])
async def test_the_earliest_deadline_of_several_requests_counts(
    seconds: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each command returns after its own seconds. There is one drain."""
    caplog.set_level(logging.INFO)
    loop = asyncio.get_running_loop()
    streams = [listen("t") for _ in range(5)]
    for stream in streams:
        await stream.__aenter__()
    for one in seconds:
        shutdown.start_drain(loop, one)
    ended: list[bool] = []
    # Runs after the first step of the drain, which then waits.
    loop.call_soon(lambda: ended.extend(one.reason is not None for one in registry.streams()))
    await shutdown._drains[loop]
    assert ended == [True] * 5
    assert caplog.text.count("It has ended 5 streams") == 1
    for stream in streams:
        await stream.__aexit__(None, None, None)


async def test_an_event_loop_without_a_stream_learns_of_the_request_at_its_first_one() -> None:
    """A worker of a server may have had no listener before. Open consoles request details."""
    await aclose_streams(token="t")
    publish_event(ControlEvent(CONTROL_TOKEN, DRAIN_HOST, make_request(host="another").value))
    request_drain(0.1)
    for _ in range(READ_EVENTS + 1):
        request_details()
    get_supervisor()
    await until(lambda: shutdown.draining)


# The command


class SharedHistory:
    """A history that looks as if processes shared it."""

    def __getattr__(self, name: str) -> Any:
        return True if name == "shared" else getattr(get_history(), name)


def test_the_command_sends_the_request_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(command, "get_history", SharedHistory)
    monkeypatch.setattr(command.time, "sleep", waits.append)
    run = Run("eventsource_drain", "--seconds", "2.5", "--pid", str(os.getpid()))
    assert run.error is None
    assert run.out == f"Draining {socket.gethostname()} for 2.5 s.\n"
    assert waits == [3.5]
    (entry,) = get_history().read(CONTROL_TOKEN, 0).entries
    request = DrainRequest.read(entry.draft.data.decode())
    assert (request.seconds, request.pid) == (2.5, os.getpid())
    assert Run("eventsource_drain", verbosity=0).out == ""


def test_the_command_needs_a_history_that_processes_share() -> None:
    run = Run("eventsource_drain")
    assert "the history belongs to one process" in str(run.error)


@pytest.mark.parametrize("seconds", ["0", "soon"])
def test_the_command_needs_a_positive_number_of_seconds(seconds: str) -> None:
    run = Run("eventsource_drain", "--seconds", seconds)
    assert "--seconds must be a positive number" in str(run.error)


@pytest.mark.parametrize(
    ("pid", "error"),
    [
        (0, "--pid must be the id of a process, not 0."),
        (-7, "--pid must be the id of a process, not -7."),
        (2**31 - 1, "has the id 2147483647. Pass the id of the server's main process"),
        (2**80, f"has the id {2**80}. Pass the id of the server's main process"),
    ],
)
def test_the_command_needs_the_id_of_a_process_that_runs(pid: int, error: str) -> None:
    """Otherwise no process would drain, and the command would succeed."""
    run = Run("eventsource_drain", "--pid", str(pid))
    assert error in str(run.error)


def test_the_process_may_belong_to_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        assert (pid, number) == (1, 0)
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    command.check_pid(1)


def test_ctrl_c_ends_the_command_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "get_history", SharedHistory)
    monkeypatch.setattr(command.time, "sleep", interrupt)
    run = Run("eventsource_drain")
    assert str(run.error) == "Interrupted: a drain that has begun continues."


def test_the_command_reports_a_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "get_history", SharedHistory)

    def fail(*arguments: Any) -> None:
        raise ValueError("the store failed")

    monkeypatch.setattr(command, "request_drain", fail)
    assert "the store failed" in str(Run("eventsource_drain").error)
