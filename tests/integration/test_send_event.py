"""``manage.py send_event`` over HTTP, and its process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from django.urls import include, path

from django_eventsource.grants import read_grant
from django_eventsource.management.commands import send_event
from tests.conftest import MEMORY
from tests.support.commands import Run, Terminal
from tests.support.scripted import Connection, Server, Step, respond

urlpatterns = [path("ev/", include("django_eventsource.urls"))]

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **options: Any) -> Run:
    return Run("send_event", *arguments, **options)


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``ev/``."""
    settings.ROOT_URLCONF = __name__


# Over HTTP


def accept(event_id: str | None) -> Step:
    """Return a step that responds with the id of an event."""
    return respond(200, json.dumps({"id": event_id}).encode())


def test_with_a_server_the_event_is_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has a grant to send, and this process publishes nothing."""
    monkeypatch.setattr(send_event, "publish_in_batches", None)
    with Server(accept("7")) as server:
        result = run("4/2", "ping", "é", "-P", str(server.port))
    request = server.requests[0]
    assert result.out == "7\n"
    assert (request.method, request.path, request.body) == ("POST", "/ev/ping/4%2F2", "é".encode())
    assert request.headers["content-type"] == b"text/plain; charset=utf-8"
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert (grant.tokens, grant.listen, grant.actions) == (("4/2",), False, ("ping",))


def test_over_http_the_history_may_be_in_memory(settings: Any) -> None:
    """The server has the history."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    with Server(accept("7")) as server:
        assert run("42", "ping", "-P", str(server.port)).out == "7\n"


def test_the_id_of_a_server_is_escaped_on_a_terminal() -> None:
    """A script receives the id unchanged."""
    hostile = "7\x1b]0;x\x07\x9b\u202e"
    out = Terminal()
    with Server(accept(hostile), accept(hostile)) as server:
        run("42", "ping", "-P", str(server.port), stdout=out)
        assert run("42", "ping", "-P", str(server.port)).out == f"{hostile}\n"
    assert out.getvalue() == "7\\u001b]0;x\\u0007\\u009b\\u202e\n"


def test_an_id_that_the_output_cannot_encode_is_escaped() -> None:
    """It is not a failure, because the event was published."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Server(accept("é"), accept("\ud800")) as server:
        for _ in range(2):
            assert run("42", "ping", "-P", str(server.port), stdout=out).error is None
    out.seek(0)
    assert out.read() == "\\xe9\n\\ud800\n"


def test_with_a_server_the_options_are_sent(settings: Any) -> None:
    """A live-only class may be used, and its content type is sent."""
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.JSONEvent"
    with Server(accept(None)) as server:
        result = run(
            *("42", "ping", "1", "--url", f"{server.origin}/x"),
            *("-u", "u", "-p", "p", "--header", "X-A: 1", "--insecure"),
        )
    request = server.requests[0]
    assert (result.error, result.out) == (None, "")
    assert request.path == "/x/ping/42"
    assert request.headers["content-type"] == b"application/json"
    assert request.headers["authorization"].startswith(b"Basic ")
    assert request.headers["x-a"] == b"1"


def test_lines_are_posted_over_one_connection() -> None:
    """The error of a status has the number of its line."""

    def step(connection: Connection) -> None:
        accept("1")(connection)
        request = connection.read_request()
        assert request is not None
        assert request.body == b"b"
        respond(400, b"Too large.", Content_Type="text/plain")(connection)

    with Server(step) as server:
        result = run("42", "ping", "a\nb\nc", "--lines", "-P", str(server.port))
    assert result.out == "1\n"
    assert str(result.error) == (
        f"Line 2: {server.url}ev/ping/42 responded with 400 Bad Request: Too large. "
        "Before it, 1 event published."
    )


def test_a_key_is_sent_with_the_sender_of_the_options() -> None:
    """A user, or the grant of a header, is the same in each attempt."""
    senders = [("-u", "u", "-p", "p"), ("--header", "authorization: Bearer x")]
    with Server(accept("7"), accept("7")) as server:
        for options in senders:
            result = run("42", "ping", "x", "--key", "order 5", "-P", str(server.port), *options)
            assert (result.error, result.out) == (None, "7\n")
    for request in server.requests:
        assert request.headers["idempotency-key"] == b"order 5"


def test_a_key_without_a_lasting_sender_is_not_sent() -> None:
    """The grants of two runs differ, so the second run would publish the event again."""
    with Server() as server:
        result = run("42", "ping", "x", "--key", "k", "-P", str(server.port))
        assert "--key over HTTP needs the same sender in each attempt" in str(result.error)
        assert "-u/--user" in str(result.error)
        assert "create_grant" in str(result.error)
        refused = run("42", "ping", "--key", "", "-P", str(server.port), "-u", "u", "-p", "p")
        assert str(refused.error).startswith("The key is empty")
    assert server.requests == []


def test_a_refused_connection_is_one_line() -> None:
    with Server() as server:
        pass
    result = run("42", "ping", "-P", str(server.port))
    assert str(result.error) == f"Cannot send to {server.url}ev/ping/42: connection refused."


def test_a_token_that_is_not_valid_is_not_sent() -> None:
    assert "token" in str(run("", "ping", "-P", "1").error)
    assert "token" in str(run("", "ping", "-P", "1", "-u", "u", "-p", "p").error)


# The process


def test_ctrl_c_exits_with_1() -> None:
    """The error is one line without a traceback."""
    arrived = threading.Event()

    def step(connection: Connection) -> None:
        accept("7")(connection)
        arrived.set()
        connection.wait_for_close()

    environment = os.environ | {
        "DJANGO_SETTINGS_MODULE": "testproject.test_settings",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'testproject'}",
    }
    with Server(step) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "django", "send_event", "42", "ping", "--lines"),
                *("-x", "events", "-P", str(server.port)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("a\n")
        process.stdin.flush()
        assert process.stdout.readline() == "7\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == "CommandError: Interrupted: 1 event published.\n"
    assert arrived.is_set()
