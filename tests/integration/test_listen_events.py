"""``manage.py listen_events``, against a server that runs scripts."""

from __future__ import annotations

import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme
from django.urls import include, path

from django_eventsource.client.client import EventSourceClient
from django_eventsource.events import StringIdEvent
from django_eventsource.grants import read_grant
from tests.support.commands import Run, Terminal
from tests.support.scripted import (
    Connection,
    Server,
    basic_auth,
    cut,
    keep_open,
    redirect,
    respond,
    stream,
)

urlpatterns = [path("ev/", include("django_eventsource.urls"))]

ROOT = Path(__file__).resolve().parents[2]


class OtherNames(StringIdEvent):
    """A class with other action names."""

    LISTEN = "listen"
    FINISH = "bye"
    ACTIONS = ["bye"]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``ev/``."""
    settings.ROOT_URLCONF = __name__


def run(server: Server, *arguments: str, **options: Any) -> Run:
    return Run("listen_events", "42", "-P", str(server.port), *arguments, **options)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make the client record its waits in seconds, and not wait."""
    noted: list[float] = []

    def wait(self: EventSourceClient, seconds: float) -> None:
        noted.append(seconds)
        assert len(noted) < 100, "it reconnects for ever"

    monkeypatch.setattr(EventSourceClient, "wait", wait)
    return noted


# Output


def test_events_are_printed_until_close() -> None:
    """Further lines of a value are indented, and close is printed."""
    with Server(
        keep_open(
            b"event: ping\ndata: a\ndata: b\n\ndata:\n\n", b"event: close\ndata: x\n\ndata: y\n\n"
        )
    ) as server:
        result = run(server)
    assert result.error is None
    assert result.out == "ping: a\n  b\nmessage: \nclose: x\n"
    assert result.err == ""


def test_each_event_is_flushed() -> None:
    """An event does not wait in a buffer for the next one."""
    flushed = threading.Event()

    class Output(io.StringIO):
        def flush(self) -> None:
            if self.getvalue():
                flushed.set()

    def step(connection: Connection) -> None:
        connection.open_stream()
        connection.chunk(b"data: a\n\n")
        assert flushed.wait(10)
        connection.end()

    with Server(step) as server:
        assert run(server, "--count", "1", stdout=Output()).error is None


def test_json_prints_one_object_for_each_event() -> None:
    """The characters of the value are not escaped."""
    with Server(
        keep_open('id: 7\nevent: ping\ndata: "é\ndata: ✓\n\ndata:\n\n'.encode())
    ) as server:
        result = run(server, "--json", "--count", "2")
    first, second = result.out.splitlines()
    assert json.loads(first) == {"id": "7", "event": "ping", "data": '"é\n✓'}
    assert list(json.loads(first)) == ["id", "event", "data"]
    assert "é" in first
    assert json.loads(second) == {"id": "7", "event": "message", "data": ""}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "message: \\xe9\n"),
        (("--json",), '{"id": "", "event": "message", "data": "\\u00e9"}\n'),
    ],
)
def test_characters_outside_the_encoding_are_escaped(
    arguments: tuple[str, ...], expected: str
) -> None:
    """With --json the line is still JSON."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Server(keep_open("data: é\n\n".encode())) as server:
        run(server, "--count", "1", *arguments, stdout=out)
    out.seek(0)
    assert out.read() == expected


def test_count_ends_the_command() -> None:
    """The command prints no event above the count, even if it has arrived."""
    with Server(keep_open(b"data: 1\n\ndata: 2\n\ndata: 3\n\n")) as server:
        assert run(server, "--count", "2").out == "message: 1\nmessage: 2\n"


def test_the_event_class_names_the_action_that_ends_the_command(settings: Any) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.OtherNames"
    with Server(keep_open(b"event: close\ndata\n\nevent: bye\ndata\n\n")) as server:
        assert run(server).out == "close: \nbye: \n"
    assert server.requests[0].path == "/ev/listen/42"


# Requests


def test_rewind_starts_with_stored_events() -> None:
    with Server(respond(204)) as server:
        assert run(server, "--rewind", "30s").error is None
    assert server.requests[0].path == "/ev/poll/42?rewind=30s"


def test_the_request_has_a_grant_to_listen_to_the_token() -> None:
    with Server(respond(204)) as server:
        assert run(server, "--last-event-id", "é").error is None
    request = server.requests[0]
    assert request.path == "/ev/poll/42"
    assert request.headers["last-event-id"] == "é".encode()
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert (grant.tokens, grant.listen, grant.send) == (("42",), True, False)


def test_several_tokens_share_a_stream_and_a_grant() -> None:
    """The command ends when each token is closed."""
    closes = (
        b"event: close\ndata: a\n\nevent: ping\ndata: x\n\n" + b"event: close\ndata: b\n\n" * 2
    )
    with Server(stream(closes)) as server:
        result = Run("listen_events", "42", "a b", "43", "-P", str(server.port))
    assert result.error is None
    assert result.out == "close: a\nping: x\nclose: b\nclose: b\n"
    request = server.requests[0]
    assert request.path == "/ev/poll/42?token=a+b&token=43"
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert grant.tokens == ("42", "a b", "43")


def test_options_are_sent() -> None:
    """The request has the action, the prefix, the user and the headers."""
    with Server(respond(204)) as server:
        run(
            server,
            "-H",
            "localhost",
            "-x",
            "a/b",
            "-a",
            "l",
            "-u",
            "u",
            "-p",
            "p",
            "--header",
            "X-A: é",
        )
    request = server.requests[0]
    assert request.path == "/a/b/l/42"
    assert request.headers["host"] == f"localhost:{server.port}".encode()
    assert request.headers["authorization"] == basic_auth("u", "p")
    assert request.headers["x-a"] == "é".encode()


def test_an_authorization_header_replaces_the_grant() -> None:
    with Server(respond(204)) as server:
        run(server, "--header", "Authorization: Bearer mine")
    assert server.requests[0].headers["authorization"] == b"Bearer mine"


def test_url_replaces_host_and_port() -> None:
    """The URL may have a path."""
    with Server(respond(204), respond(204)) as server:
        Run("listen_events", "4 2", "--url", server.origin)
        Run("listen_events", "4 2", "--url", f"{server.origin}/there/")
    assert [request.path for request in server.requests] == ["/ev/poll/4%202", "/there/poll/4%202"]


def test_a_whole_url_is_requested_without_a_grant() -> None:
    with Server(keep_open(b"data: a\n\n")) as server:
        result = Run("listen_events", f"{server.url}any/stream?of=this", "--count", "1")
    assert result.out == "message: a\n"
    assert server.requests[0].path == "/any/stream?of=this"
    assert "authorization" not in server.requests[0].headers


def test_a_whole_url_receives_user_and_headers() -> None:
    with Server(respond(204)) as server:
        Run("listen_events", server.url, "-u", "u", "-p", "p", "--header", "X-A: 1")
    assert server.requests[0].headers["authorization"].startswith(b"Basic ")
    assert server.requests[0].headers["x-a"] == b"1"


def test_the_grant_is_not_sent_to_another_origin() -> None:
    with Server(respond(204)) as other, Server(redirect(other.url)) as server:
        assert run(server).error is None
    assert "authorization" not in other.requests[0].headers


# Ends and failures


def test_the_command_reconnects_until_the_token_is_closed(waits: list[float]) -> None:
    """It reconnects after the end of a stream and after a network failure."""
    with Server(
        stream(b"id: 1\ndata: a\n\n"),
        stream(b"retry: 200\ndata: b\n\n"),
        cut(b"data: c\n\n"),
        keep_open(b"event: close\ndata\n\n"),
    ) as server:
        result = run(server)
    assert result.error is None
    assert result.out == "message: a\nmessage: b\nmessage: c\nclose: \n"
    assert waits == [3, 0.2, 0.2]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert result.err == (
        f"Lost the connection to {server.url}ev/poll/42: the connection was closed before "
        "the response was complete. Reconnecting.\n"
    )


def test_another_status_ends_the_command(waits: list[float]) -> None:
    """It exits with status 1, also after a stream."""
    with Server(stream(b"data: a\n\n"), respond(503)) as server:
        result = run(server)
    assert str(result.error) == f"{server.url}ev/poll/42 responded with 503 Service Unavailable."
    assert result.out == "message: a\n"
    assert waits == [3]


HOSTILE = "event: close\ndata: \x1b[31mred\x07\x9b\u202e\u2066\u061c\x7f\u2028\tend\n\n".encode()


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (
            Terminal,
            "close: \\u001b[31mred\\u0007\\u009b\\u202e\\u2066\\u061c\\u007f\\u2028\tend\n",
        ),
        (io.StringIO, "close: \x1b[31mred\x07\x9b\u202e\u2066\u061c\x7f\u2028\tend\n"),
    ],
)
def test_control_characters_are_escaped_on_a_terminal(
    output: type[io.StringIO], shown: str
) -> None:
    """A script receives them unchanged."""
    out = output()
    with Server(keep_open(HOSTILE)) as server:
        assert run(server, stdout=out).error is None
    assert out.getvalue() == shown


def test_json_is_escaped_on_a_terminal() -> None:
    """The line has no control and no bidirectional character, and is JSON."""
    out = Terminal()
    with Server(keep_open(HOSTILE)) as server:
        assert run(server, "--json", stdout=out).error is None
    text = out.getvalue().removesuffix("\n")
    assert text.isprintable()
    data = "\x1b[31mred\x07\x9b\u202e\u2066\u061c\x7f\u2028\tend"
    assert json.loads(text) == {"id": "", "event": "close", "data": data}


def test_json_is_not_escaped_in_a_pipe() -> None:
    """Only the escapes that JSON requires remain."""
    with Server(keep_open("event: close\ndata: \x9b\u202eé\n\n".encode())) as server:
        result = run(server, "--json")
    assert result.out == '{"id": "", "event": "close", "data": "\x9b\u202eé"}\n'


def test_retry_is_the_wait_until_the_server_sets_another(waits: list[float]) -> None:
    with Server(
        stream(b"data: a\n\n"), stream(b"retry: 200\ndata: b\n\n"), respond(204)
    ) as server:
        result = run(server, "-r", "5000")
    assert result.error is None
    assert waits == [5, 0.2]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_keep_reconnecting_reconnects_after_transient_statuses(
    waits: list[float], status: int
) -> None:
    """The wait is that of Retry-After."""
    with Server(respond(status, Retry_After="70"), respond(204)) as server:
        result = run(server, "-k")
    assert result.error is None
    assert waits == [70]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_keep_reconnecting_does_not_repeat_other_statuses(waits: list[float], status: int) -> None:
    with Server(respond(status)) as server:
        result = run(server, "-k")
    assert f"responded with {status}" in str(result.error)
    assert waits == []


def test_a_repeated_failure_is_printed_once(waits: list[float]) -> None:
    """It is printed again after an event."""
    steps = [respond(503), respond(503), respond(502), respond(503), stream(b"data: a\n\n")]
    with Server(*steps, respond(503), respond(204)) as server:
        result = run(server, "-k")
    assert result.error is None
    assert result.out == "message: a\n"
    assert [line.split(" responded with ")[1] for line in result.err.splitlines()] == [
        "503 Service Unavailable. Reconnecting.",
        "502 Bad Gateway. Reconnecting.",
        # An event came in between: this is a new failure.
        "503 Service Unavailable. Reconnecting.",
    ]
    assert waits[0] == 3
    assert len(waits) == 6


def test_failures_are_not_printed_with_verbosity_0(waits: list[float]) -> None:
    with Server(respond(503), respond(204)) as server:
        assert run(server, "-k", "-r", "1000", "-v", "0").err == ""
    assert waits == [1]


def test_each_step_is_printed_with_verbosity_2(waits: list[float]) -> None:
    with Server(stream(b"data: a\n\n"), respond(204)) as server:
        result = run(server, "-r", "1500", "-v", "2")
    url = f"{server.url}ev/poll/42"
    assert result.err.splitlines() == [
        f"Connecting to {url}",
        f"Connected to {url}",
        "The server ended the stream",
        "Reconnecting in 1.5 s",
        f"Connecting to {url}",
        f"{url} responded with 204 No Content: there are no more events",
    ]
    assert result.out == "message: a\n"


def test_the_error_contains_the_text_of_the_server() -> None:
    with Server(respond(403, b"Not you.", Content_Type="text/plain")) as server:
        result = run(server)
    assert str(result.error) == f"{server.url}ev/poll/42 responded with 403 Forbidden: Not you."


def test_the_command_reconnects_after_the_read_timeout(waits: list[float]) -> None:
    with Server(keep_open(b": hello\n"), respond(204)) as server:
        result = run(server, "--read-timeout", "0.3")
    assert result.error is None
    assert result.err.endswith("no data was received for 0.3 s. Reconnecting.\n")
    assert waits == [3]


def test_an_untrusted_certificate_is_an_error(tmp_path: Path) -> None:
    """The error names --cafile and --insecure, and both work."""
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Server(respond(204), respond(204), context=context) as server:
        refused = run(server, "-S")
        assert run(server, "-S", "--cafile", str(file)).error is None
        assert run(server, "-S", "--insecure").error is None
    assert "certificate is not trusted" in str(refused.error)
    assert "--cafile" in str(refused.error)
    assert "--insecure" in str(refused.error)


# The process


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command in another process."""
    environment = os.environ | {
        "DJANGO_SETTINGS_MODULE": "testproject.test_settings",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'testproject'}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "django", "listen_events", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_ctrl_c_ends_a_silent_stream_with_status_0() -> None:
    with Server(keep_open(b"data: a\n\n")) as server:
        process = command(f"{server.url}")
        assert process.stdout is not None
        assert process.stdout.readline() == "message: a\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_ctrl_c_ends_a_wait_with_status_0(monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupt(self: EventSourceClient, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EventSourceClient, "wait", interrupt)
    with Server(stream(b"data: a\n\n")) as server:
        result = run(server, "-r", "5000", "-v", "2")
    assert result.error is None
    assert result.err.endswith("Interrupted\n")


def test_a_pipe_that_closes_ends_the_command_with_status_0() -> None:
    """The command prints no error, as with ``head``."""
    left = threading.Event()

    def step(connection: Connection) -> None:
        connection.open_stream()
        connection.chunk(b"data: a\n\n")
        assert left.wait(10)
        connection.chunk(b"data: b\n\n")
        connection.wait_for_close()

    with Server(step) as server:
        process = command(server.url)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "message: a\n"
        process.stdout.close()
        left.set()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(20) == 0
    assert err == ""


def test_a_closed_output_ends_the_command() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with Server(keep_open(b"data: a\n\n")) as server, open(writing, "w") as out:
        assert run(server, stdout=out).error is None


def test_a_refused_connection_is_printed_and_tried_again() -> None:
    with Server() as server:
        pass
    process = command("42", "-x", "events", "-P", str(server.port))
    assert process.stderr is not None
    assert process.stderr.readline() == (
        f"Cannot connect to {server.url}events/poll/42: connection refused. Reconnecting.\n"
    )
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


def test_an_error_status_exits_with_1() -> None:
    with Server(respond(404)) as server:
        process = command(server.url)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == f"CommandError: {server.url} responded with 404 Not Found.\n"
