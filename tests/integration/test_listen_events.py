"""manage.py listen_events, against a server that plays scripts."""

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

import httpx
import pytest
import trustme
from django.core.management import call_command
from django.core.management.base import CommandError
from django.urls import include, path

from django_eventsource.client import EventSourceClient
from django_eventsource.events import StringIdEvent
from django_eventsource.grants import read_grant
from tests.scripted import Connection, Server, answer, cut, hold, redirect, stream

urlpatterns = [path("ev/", include("django_eventsource.urls"))]

ROOT = Path(__file__).resolve().parent.parent


class OtherNames(StringIdEvent):
    """A class with names of its own."""

    LISTEN = "listen"
    FINISH = "bye"
    ACTIONS = ["bye"]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs under a path of their own."""
    settings.ROOT_URLCONF = __name__


class Run:
    """One run of the command in this process, and what it printed."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        self.error: CommandError | None = None
        try:
            call_command("listen_events", *arguments, **{"stdout": out, "stderr": err} | options)
        except CommandError as error:
            self.error = error
        self.out = out.getvalue()
        self.err = err.getvalue()


def run(server: Server, *arguments: str, **options: Any) -> Run:
    return Run("42", "-P", str(server.port), *arguments, **options)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make the client note its waits, in seconds, in place of waiting."""
    noted: list[float] = []

    def wait(self: EventSourceClient, seconds: float) -> None:
        noted.append(seconds)
        assert len(noted) < 100, "it reconnects for ever"

    monkeypatch.setattr(EventSourceClient, "wait", wait)
    return noted


# What is printed


def test_events_are_printed_until_close() -> None:
    """One line for each event, further lines indented; close is printed and ends it."""
    with Server(
        hold(
            b"event: ping\ndata: a\ndata: b\n\ndata:\n\n", b"event: close\ndata: x\n\ndata: y\n\n"
        )
    ) as server:
        result = run(server)
    assert result.error is None
    assert result.out == "ping: a\n  b\nmessage: \nclose: x\n"
    assert result.err == ""


def test_each_event_is_printed_at_once() -> None:
    """An event does not wait for the next one in a buffer."""
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


def test_json_lines() -> None:
    """--json prints id, event and data, in the characters they have."""
    with Server(hold('id: 7\nevent: ping\ndata: "é\ndata: ✓\n\ndata:\n\n'.encode())) as server:
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
def test_an_output_of_another_encoding(arguments: tuple[str, ...], expected: str) -> None:
    """A terminal that lacks the characters gets them escaped; JSON stays JSON."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Server(hold("data: é\n\n".encode())) as server:
        run(server, "--count", "1", *arguments, stdout=out)
    out.seek(0)
    assert out.read() == expected


def test_count() -> None:
    """--count ends after that many events, though more have come."""
    with Server(hold(b"data: 1\n\ndata: 2\n\ndata: 3\n\n")) as server:
        assert run(server, "--count", "2").out == "message: 1\nmessage: 2\n"


def test_another_finish(settings: Any) -> None:
    """The event class says which action is the end."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.OtherNames"
    with Server(hold(b"event: close\ndata\n\nevent: bye\ndata\n\n")) as server:
        assert run(server).out == "close: \nbye: \n"
    assert server.requests[0].path == "/ev/listen/42"


# What is requested


def test_the_request_is_signed() -> None:
    """The command makes its own grant, to listen to this token only."""
    with Server(answer(204)) as server:
        assert run(server, "--last-event-id", "é").error is None
    request = server.requests[0]
    assert request.path == "/ev/poll/42"
    assert request.headers["last-event-id"] == "é".encode()
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert (grant.tokens, grant.listen, grant.send) == (("42",), True, False)


def test_several_tokens_on_one_stream() -> None:
    """One request and one grant for all; it ends when each of them is closed."""
    closes = (
        b"event: close\ndata: a\n\nevent: ping\ndata: x\n\n" + b"event: close\ndata: b\n\n" * 2
    )
    with Server(stream(closes)) as server:
        result = Run("42", "a b", "43", "-P", str(server.port))
    assert result.error is None
    assert result.out == "close: a\nping: x\nclose: b\nclose: b\n"
    request = server.requests[0]
    assert request.path == "/ev/poll/42?token=a+b&token=43"
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert grant.tokens == ("42", "a b", "43")


def test_options_make_the_request() -> None:
    """Action, prefix, user and headers are sent as given."""
    with Server(answer(204)) as server:
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
    assert request.headers["authorization"] == httpx.BasicAuth("u", "p")._auth_header.encode()
    assert request.headers["x-a"] == "é".encode()


def test_a_header_of_ones_own_wins() -> None:
    """An Authorization given as --header is sent in place of a grant."""
    with Server(answer(204)) as server:
        run(server, "--header", "Authorization: Bearer mine")
    assert server.requests[0].headers["authorization"] == b"Bearer mine"


def test_url_in_place_of_host_and_port() -> None:
    """--url is the base, with or without a path."""
    with Server(answer(204), answer(204)) as server:
        Run("4 2", "--url", server.origin)
        Run("4 2", "--url", f"{server.origin}/there/")
    assert [request.path for request in server.requests] == ["/ev/poll/4%202", "/there/poll/4%202"]


def test_a_whole_url_is_requested_as_given() -> None:
    """Any stream can be listened to; it gets no grant of ours."""
    with Server(hold(b"data: a\n\n")) as server:
        assert Run(f"{server.url}any/stream?of=this", "--count", "1").out == "message: a\n"
    assert server.requests[0].path == "/any/stream?of=this"
    assert "authorization" not in server.requests[0].headers


def test_a_whole_url_takes_user_and_headers() -> None:
    """Credentials of the user's own go to a whole URL as well."""
    with Server(answer(204)) as server:
        Run(server.url, "-u", "u", "-p", "p", "--header", "X-A: 1")
    assert server.requests[0].headers["authorization"].startswith(b"Basic ")
    assert server.requests[0].headers["x-a"] == b"1"


def test_the_grant_does_not_follow_a_redirect_elsewhere() -> None:
    """Another origin does not get the project's grant."""
    with Server(answer(204)) as other, Server(redirect(other.url)) as server:
        assert run(server).error is None
    assert "authorization" not in other.requests[0].headers


# Ends and failures


def test_ends_and_network_failures_reconnect(waits: list[float]) -> None:
    """By default the command listens until the token is closed, after the time the server sets."""
    with Server(
        stream(b"id: 1\ndata: a\n\n"),
        stream(b"retry: 200\ndata: b\n\n"),
        cut(b"data: c\n\n"),
        hold(b"event: close\ndata\n\n"),
    ) as server:
        result = run(server)
    assert result.error is None
    assert result.out == "message: a\nmessage: b\nmessage: c\nclose: \n"
    assert waits == [3, 0.2, 0.2]
    assert server.requests[1].headers["last-event-id"] == b"1"
    assert result.err == (
        f"Lost the stream of {server.url}ev/poll/42: the connection was closed in the middle of "
        "it. Reconnecting.\n"
    )


def test_a_refusal_is_final(waits: list[float]) -> None:
    """A status other than 200 and 204 ends the command, with status 1, also after a stream."""
    with Server(stream(b"data: a\n\n"), answer(503)) as server:
        result = run(server)
    assert str(result.error) == f"{server.url}ev/poll/42 answered 503 Service Unavailable."
    assert result.out == "message: a\n"
    assert waits == [3]


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


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
    """An event cannot command the terminal or reorder its text; scripts get it unchanged."""
    out = output()
    with Server(hold(HOSTILE)) as server:
        assert run(server, stdout=out).error is None
    assert out.getvalue() == shown


def test_json_is_escaped_on_a_terminal() -> None:
    """On a terminal --json prints no control character and no bidirectional one, and is JSON."""
    out = Terminal()
    with Server(hold(HOSTILE)) as server:
        assert run(server, "--json", stdout=out).error is None
    text = out.getvalue().removesuffix("\n")
    assert text.isprintable()
    data = "\x1b[31mred\x07\x9b\u202e\u2066\u061c\x7f\u2028\tend"
    assert json.loads(text) == {"id": "", "event": "close", "data": data}


def test_json_keeps_its_characters_in_a_pipe() -> None:
    """Elsewhere --json prints characters as they are, as far as JSON has them."""
    with Server(hold("event: close\ndata: \x9b\u202eé\n\n".encode())) as server:
        result = run(server, "--json")
    assert result.out == '{"id": "", "event": "close", "data": "\x9b\u202eé"}\n'


def test_retry_is_the_time_before_reconnecting(waits: list[float]) -> None:
    """-r is the time until the server sets another."""
    with Server(stream(b"data: a\n\n"), stream(b"retry: 200\ndata: b\n\n"), answer(204)) as server:
        result = run(server, "-r", "5000")
    assert result.error is None
    assert waits == [5, 0.2]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_keep_reconnecting_survives_a_failing_server(waits: list[float], status: int) -> None:
    """With -k these statuses are answered by reconnecting, when Retry-After says."""
    with Server(answer(status, Retry_After="70"), answer(204)) as server:
        result = run(server, "-k")
    assert result.error is None
    assert waits == [70]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_keep_reconnecting_does_not_repeat_a_refusal(waits: list[float], status: int) -> None:
    """With -k a refusal is final, too."""
    with Server(answer(status)) as server:
        result = run(server, "-k")
    assert f"answered {status}" in str(result.error)
    assert waits == []


def test_each_failure_is_printed_once(waits: list[float]) -> None:
    """A failure that is answered by reconnecting is printed again only after an event."""
    steps = [answer(503), answer(503), answer(502), answer(503), stream(b"data: a\n\n")]
    with Server(*steps, answer(503), answer(204)) as server:
        result = run(server, "-k")
    assert result.error is None
    assert result.out == "message: a\n"
    assert [line.split(" answered ")[1] for line in result.err.splitlines()] == [
        "503 Service Unavailable. Reconnecting.",
        "502 Bad Gateway. Reconnecting.",
        # An event came in between: this is a new failure.
        "503 Service Unavailable. Reconnecting.",
    ]
    assert waits[0] == 3
    assert len(waits) == 6


def test_failures_are_not_printed_with_verbosity_0(waits: list[float]) -> None:
    """-v 0 prints no failure that is answered by reconnecting."""
    with Server(answer(503), answer(204)) as server:
        assert run(server, "-k", "-r", "1000", "-v", "0").err == ""
    assert waits == [1]


def test_diagnostics(waits: list[float]) -> None:
    """-v 2 tells every step on standard error."""
    with Server(stream(b"data: a\n\n"), answer(204)) as server:
        result = run(server, "-r", "1500", "-v", "2")
    url = f"{server.url}ev/poll/42"
    assert result.err.splitlines() == [
        f"Connecting to {url}",
        f"Connected to {url}",
        "The server ended the stream",
        "Reconnecting in 1.5 s",
        f"Connecting to {url}",
        f"{url} answered 204 No Content: there is nothing to listen to",
    ]
    assert result.out == "message: a\n"


def test_refused_by_the_server() -> None:
    """What the server says is in the one line of the error."""
    with Server(answer(403, b"Not you.", Content_Type="text/plain")) as server:
        result = run(server)
    assert str(result.error) == f"{server.url}ev/poll/42 answered 403 Forbidden: Not you."


def test_read_timeout(waits: list[float]) -> None:
    """--read-timeout makes a silence a failure, which is answered by reconnecting."""
    with Server(hold(b": hello\n"), answer(204)) as server:
        result = run(server, "--read-timeout", "0.05")
    assert result.error is None
    assert result.err.endswith("nothing was received for 0.05 s. Reconnecting.\n")
    assert waits == [3]


def test_certificates(tmp_path: Path) -> None:
    """An unknown authority is an error that names both ways out, and both work."""
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Server(answer(204), answer(204), context=context) as server:
        refused = run(server, "-S")
        assert run(server, "-S", "--cafile", str(file)).error is None
        assert run(server, "-S", "--insecure").error is None
    assert "certificate is not trusted" in str(refused.error)
    assert "--cafile" in str(refused.error)
    assert "--insecure" in str(refused.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "token"),
        (("x" * 256,), "token"),
        (("42", "-P", "x"), "-P/--port must be a whole number, from 1 to 65535, not 'x'."),
        (("42", "-r", "0"), "-r/--retry must be a whole number, 1 or more, not '0'."),
        (("42", "--count", "-1"), "--count must be a whole number, 1 or more, not '-1'."),
        (("42", "--read-timeout", "0"), "--read-timeout must be a positive number of seconds"),
        (("42", "--header", "x"), "--header must be 'Name: value', not 'x'."),
        (("42", "--header", "a b: x"), "'a b' is no HTTP header name."),
        (("42", "--cafile", "/nowhere"), "--cafile '/nowhere' cannot be read"),
        (("42", "-p", "x"), "-p/--password needs a user"),
        (("42", "--last-event-id", "a\nb"), "cannot be sent"),
        (("http://",), "'http://' is not a valid http:// or https:// URL with a host."),
        (
            ("http://h/", "-H", "h", "-a", "x"),
            "'http://h/' is a whole URL, which leaves no place for -H/--host, -a/--action.",
        ),
        (("http://u:SECRET@h:x/?grant=SECRET",), "'http://***@h:x/' is not a valid http://"),
        (("http://u:SECRET@h/?grant=SECRET", "-a", "x"), "'http://***@h/' is a whole URL"),
        (("http://h/", "b"), "is a whole URL, which leaves no place for another TOKEN."),
        (("42", ""), "token"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    """Each bad argument is one clear line, before anything is requested."""
    result = Run(*arguments)
    assert message in str(result.error)
    assert "\n" not in str(result.error)
    assert "SECRET" not in str(result.error)


# The process


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
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


def test_interrupted() -> None:
    """Ctrl-C ends a silent stream with status 0 and no traceback."""
    with Server(hold(b"data: a\n\n")) as server:
        process = command(f"{server.url}")
        assert process.stdout is not None
        assert process.stdout.readline() == "message: a\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_interrupted_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the wait before a reconnection as well."""

    def interrupt(self: EventSourceClient, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EventSourceClient, "wait", interrupt)
    with Server(stream(b"data: a\n\n")) as server:
        result = run(server, "-r", "5000", "-v", "2")
    assert result.error is None
    assert result.err.endswith("Interrupted\n")


def test_a_broken_pipe() -> None:
    """A reader that leaves, as head does, ends the command with status 0, silently."""
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


def test_a_pipe_that_nobody_reads() -> None:
    """The end of the reader is the end of the listener, not an error."""
    reading, writing = os.pipe()
    os.close(reading)
    with Server(hold(b"data: a\n\n")) as server, open(writing, "w") as out:
        assert run(server, stdout=out).error is None


def test_a_refused_connection_is_printed() -> None:
    """A server that does not run is one line on standard error; the command waits for it."""
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


def test_a_refusal_exits_with_1() -> None:
    """A refusal is one line on standard error and status 1."""
    with Server(answer(404)) as server:
        process = command(server.url)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == f"CommandError: {server.url} answered 404 Not Found.\n"
