"""manage.py send_event: directly into the history, and over HTTP."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import OperationalError
from django.urls import include, path

from django_eventsource.events import Event
from django_eventsource.grants import read_grant
from django_eventsource.history import get_history
from django_eventsource.management.commands import send_event
from django_eventsource.publishing import Prepared
from tests.conftest import MEMORY
from tests.scripted import Connection, Server, Step, answer

urlpatterns = [path("ev/", include("django_eventsource.urls"))]

ROOT = Path(__file__).resolve().parent.parent
LIVE = "django_eventsource.events.StringEvent"


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs under a path of their own."""
    settings.ROOT_URLCONF = __name__


class Published(list[tuple[str, str, str]]):
    """What was published in this process, in order; ids count from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def publish(self, pairs: Sequence[Prepared]) -> Iterator[list[Event]]:
        """Publish two at a time."""
        for start in range(0, len(pairs), 2):
            batch = [event for event, _ in pairs[start : start + 2]]
            for event in batch:
                self.append((event.token, event.action, "\n".join(event.value)))
                event._seq = len(self)
            self.batches.append(len(batch))
            yield batch

    @property
    def values(self) -> list[str]:
        return [value for _, _, value in self]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Note what the command publishes, in place of publishing it."""
    noted = Published()
    monkeypatch.setattr(send_event, "publish_in_batches", noted.publish)
    return noted


class Run:
    """One run of the command in this process, and what it printed."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        self.error: CommandError | None = None
        try:
            call_command("send_event", *arguments, **{"stdout": out, "stderr": err} | options)
        except CommandError as error:
            self.error = error
        self.out = out.getvalue()
        self.err = err.getvalue()
        assert "\n" not in str(self.error)


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Make standard input hold these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


class Input(io.RawIOBase):
    """Standard input whose lines come one by one, from code."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        line = next(self._lines, b"")
        buffer[: len(line)] = line
        return len(line)


# Directly


@pytest.mark.django_db(transaction=True)
def test_an_event_is_in_the_history() -> None:
    """The event is published in this process, and its id printed."""
    result = Run("42", "ping", "hello")
    assert result.error is None
    seq = int(result.out)
    entries = get_history().read("42", seq - 1).entries
    assert [entry.seq for entry in entries] == [seq]
    assert b"data: hello\n" in entries[0].frame()


def test_no_data_is_an_empty_value(published: Published) -> None:
    """DATA may be left out."""
    assert Run("42", "close").out == "1\n"
    assert published == [("42", "close", "")]


def test_standard_input_is_one_event(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATA - reads all of standard input; the line end that ends a text is not part of it."""
    for text, value in [("é\n✓\n", "é\n✓"), ("a\r\n", "a"), ("b\n\n", "b\n"), ("c", "c")]:
        give(monkeypatch, text.encode())
        Run("42", "ping", "-")
        assert published.values.pop() == value


@pytest.mark.parametrize("arguments", [["-"], ["-", "--lines"]])
def test_closed_standard_input_is_told(
    published: Published, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Where nothing can be read, nothing is published."""
    monkeypatch.setattr(sys, "stdin", None)
    result = Run("42", "ping", *arguments)
    assert "Standard input is closed" in str(result.error)
    assert published.values == []


def test_closed_standard_output_is_no_failure(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event was published: a failure then would make a script send it again."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        result = Run("42", "ping", "x")
    assert result.error is None
    assert published.values == ["x"]


@pytest.mark.parametrize(
    "line", ["42 ping -j 1", "-j 42 ping 1", "42 -j ping 1", "42 ping 1 -j", "42 ping -j -- 1"]
)
def test_options_may_stand_anywhere(published: Published, line: str) -> None:
    """DATA is found before, between and after options."""
    assert Run(*line.split()).error is None
    assert published == [("42", "ping", "1")]


def test_negative_numbers_are_data(published: Published) -> None:
    """A value may begin with a minus sign, as a number does."""
    Run("42", "ping", "-5")
    assert published.values == ["-5"]


def test_json_is_checked_first(published: Published) -> None:
    """With -j only JSON is published; close needs none."""
    assert Run("42", "ping", "-j", '{"a": 1}').error is None
    assert Run("42", "close", "-j").error is None
    refused = Run("42", "ping", "-j", "{a: 1}")
    assert str(refused.error).startswith("The value is not JSON: Expecting property name")
    assert published.values == ['{"a": 1}', ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "ping"), "token"),
        (
            ("42", "nonsense"),
            "Unknown action 'nonsense': StringIdEvent allows ping, retry, close.",
        ),
        (("42", "retry", "soon"), "must be ASCII digits"),
        (("42", "ping", "a\udcffb"), "DATA is not UTF-8: byte 0xff at offset 1."),
        (("42", "ping", "\ud800"), "surrogates not allowed."),
        (("42", "ping", "-u", "u", "--insecure"), "-u/--user, --insecure: only of use over HTTP."),
        (("42", "ping", "--header", "x: y"), "--header: only of use over HTTP."),
    ],
)
def test_bad_input(published: Published, arguments: tuple[str, ...], message: str) -> None:
    """Each bad argument is one clear line, and nothing is published."""
    result = Run(*arguments)
    assert message in str(result.error)
    assert published == []


def test_standard_input_that_is_not_utf8(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no UTF-8 are refused, naming the first and where it is."""
    give(monkeypatch, b"abc\xe9")
    assert str(Run("42", "ping", "-").error) == "DATA is not UTF-8: byte 0xe9 at offset 3."
    assert published == []


def test_a_failing_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database without the tables is one line with the way out."""

    def fail(*args: object) -> None:
        raise OperationalError("no such table: x\nLINE 1.")

    monkeypatch.setattr(send_event, "publish_in_batches", fail)
    assert str(Run("42", "ping").error) == (
        "The history's database failed: no such table: x LINE 1. Was `manage.py migrate` run?"
    )


def test_live_only_events_that_nobody_would_get(settings: Any, published: Published) -> None:
    """A live-only event is not dropped silently into a layer that only this process has."""
    settings.EVENTSOURCE_EVENT_CLASS = LIVE
    result = Run("42", "ping", "x")
    assert "no listener would receive them" in str(result.error)
    assert "--url" in str(result.error)
    assert "CHANNEL_LAYERS" in str(result.error)
    assert published == []


def test_events_that_only_this_process_would_store(settings: Any, published: Published) -> None:
    """A history in the memory of the command is refused: no listener would receive the event."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    result = Run("42", "ping", "x")
    assert "MemoryHistory stores events in the memory of this process" in str(result.error)
    assert "no listener would receive them" in str(result.error)
    assert "--url" in str(result.error)
    assert "EVENTSOURCE_HISTORY" in str(result.error)
    assert (result.out, published) == ("", [])


def test_a_server_with_a_memory_history_is_sent_to(settings: Any) -> None:
    """Over HTTP the history is the server's."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    with Server(accept("7")) as server:
        assert Run("42", "ping", "-P", str(server.port)).out == "7\n"


def test_live_only_events_over_a_shared_layer(
    settings: Any, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shared layer a live-only event is published; without an id none is printed."""
    settings.EVENTSOURCE_EVENT_CLASS = LIVE
    monkeypatch.setattr(send_event, "is_process_local", lambda: False)
    monkeypatch.setattr(send_event, "publish_in_batches", Published().publish)
    result = Run("42", "ping", "x")
    assert (result.error, result.out) == (None, "")


def test_interrupted_while_reading(monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    """Ctrl-C before the data is complete publishes nothing and is a failure."""

    def lines() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    assert str(Run("42", "ping", "-").error) == "Interrupted."
    assert published == []


def test_nobody_reads_the_id(published: Published) -> None:
    """A closed output is an error that says that the event was published."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        result = Run("42", "ping", stdout=out)
    assert str(result.error) == "Nobody reads standard output; the event was published."


# Lines


def test_lines(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is an event, without its line end; empty ones too, and the last without end."""
    give(monkeypatch, b"a\nb\r\n\n c ")
    result = Run("42", "ping", "--lines", "-")
    assert published.values == ["a", "b", "", " c "]
    assert published.batches == [2, 1, 1], "what is there is published together"
    assert result.out == "1\n2\n3\n4\n"
    assert result.err.startswith("4 events published, ")
    assert result.err.endswith(" a second.\n")


def test_lines_of_standard_input_by_default(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without DATA the lines are those of standard input; -v 0 tells no count."""
    give(monkeypatch, b"a\n")
    assert Run("42", "ping", "--lines", "-v", "0").err == ""
    assert published.values == ["a"]


def test_lines_of_data(published: Published) -> None:
    """The lines of DATA are events as well; an empty DATA has none."""
    assert Run("42", "ping", "a\nb", "--lines").err.startswith("2 events published")
    assert Run("42", "ping", "", "--lines").err.startswith("0 events published")
    assert Run("42", "ping", "c", "--lines").err.startswith("1 event published")
    assert published.values == ["a", "b", "c"]


def test_lines_are_published_as_they_come(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line does not wait for the next one."""
    before: list[int] = []

    def lines() -> Iterator[bytes]:
        for line in (b"a\n", b"b\n"):
            before.append(len(published))
            yield line
        before.append(len(published))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    Run("42", "ping", "--lines", "-")
    assert before == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1\n2\n{\n4\n", "Line 3: The value is not JSON: Expecting"),
        (b"1\n2\n\xff\n", "Line 3: DATA is not UTF-8: byte 0xff at offset 0."),
    ],
)
def test_a_bad_line(
    published: Published, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    """The error names the line, and how many events were published before it."""
    give(monkeypatch, data)
    result = Run("42", "ping", "--lines", "-", "-j")
    assert str(result.error).startswith(message)
    assert str(result.error).endswith(" Before it, 2 events published.")
    assert published.values == ["1", "2"]


def test_lines_interrupted(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says how many were published, and is a failure."""

    def lines() -> Iterator[bytes]:
        yield b"a\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    assert str(Run("42", "ping", "--lines").error) == "Interrupted: 1 event published."


def test_lines_interrupted_under_way(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the batch that was being published nobody knows, and it says so."""

    def interrupted(pairs: Sequence[Prepared]) -> Iterator[list[Event]]:
        yield from published.publish(pairs[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(send_event, "publish_in_batches", interrupted)
    error = Run("42", "ping", "a\nb\nc\nd\ne\n", "--lines").error
    assert str(error) == "Interrupted: 2 events published, and perhaps some of 3 more."
    assert published.values == ["a", "b"]


def test_nobody_reads_the_ids(published: Published) -> None:
    """A closed output ends the lines and says how far they came."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        result = Run("42", "ping", "a\nb\nc\n", "--lines", stdout=out)
    assert str(result.error) == "Nobody reads standard output any more: 2 events published."


class Terminal(io.StringIO):
    """An output that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows the count as it grows, not at every event, and is left clean."""
    clock = itertools.count(0, 0.04)
    monkeypatch.setattr(send_event.time, "monotonic", lambda: next(clock))
    err = Terminal()
    Run("42", "ping", "a\nb\nc\nd\ne\nf\n", "--lines", stderr=err, no_color=True)
    shown = err.getvalue().split("\r")
    assert shown == [
        "",
        "6 events, 38 a second\x1b[K",
        "\x1b[K6 events published, 30 a second.\n",
    ]


def test_progress_is_cleared_before_an_error(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error stands on a line of its own."""
    err = Terminal()
    result = Run("42", "ping", "x", "--lines", "-j", stderr=err, no_color=True)
    assert err.getvalue() == "\r\x1b[K"
    assert str(result.error).endswith(" Before it, 0 events published.")


# Over HTTP


def accept(event_id: str | None) -> Step:
    """The server's answer to an event."""
    return answer(200, json.dumps({"id": event_id}).encode())


def test_over_http(published: Published) -> None:
    """With a server named the event is posted there, with a grant to send, and not here."""
    with Server(accept("7")) as server:
        result = Run("4/2", "ping", "é", "-P", str(server.port))
    request = server.requests[0]
    assert result.out == "7\n"
    assert (request.method, request.path, request.body) == ("POST", "/ev/ping/4%2F2", "é".encode())
    assert request.headers["content-type"] == b"text/plain; charset=utf-8"
    grant = read_grant(request.headers["authorization"].decode().removeprefix("Bearer "))
    assert (grant.tokens, grant.listen, grant.actions) == (("4/2",), False, ("ping",))
    assert published == []


def test_the_id_of_a_server_is_escaped_on_a_terminal() -> None:
    """A server cannot command the terminal by its id; a script gets the id unchanged."""
    hostile = "7\x1b]0;x\x07\x9b\u202e"
    out = Terminal()
    with Server(accept(hostile), accept(hostile)) as server:
        Run("42", "ping", "-P", str(server.port), stdout=out)
        assert Run("42", "ping", "-P", str(server.port)).out == f"{hostile}\n"
    assert out.getvalue() == "7\\u001b]0;x\\u0007\\u009b\\u202e\n"


def test_an_id_that_the_output_cannot_encode_is_no_failure() -> None:
    """The event was published: its id is printed with escapes."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Server(accept("é"), accept("\ud800")) as server:
        for _ in range(2):
            assert Run("42", "ping", "-P", str(server.port), stdout=out).error is None
    out.seek(0)
    assert out.read() == "\\xe9\n\\ud800\n"


def test_over_http_with_options(settings: Any) -> None:
    """A live-only class may be sent through the server, with its content type and a user."""
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.JSONEvent"
    with Server(accept(None)) as server:
        result = Run(
            *("42", "ping", "1", "--url", f"{server.origin}/x"),
            *("-u", "u", "-p", "p", "--header", "X-A: 1", "--insecure"),
        )
    request = server.requests[0]
    assert (result.error, result.out) == (None, "")
    assert request.path == "/x/ping/42"
    assert request.headers["content-type"] == b"application/json"
    assert request.headers["authorization"].startswith(b"Basic ")
    assert request.headers["x-a"] == b"1"


def test_lines_over_http() -> None:
    """Lines go over one connection, and a refusal names its line."""

    def step(connection: Connection) -> None:
        accept("1")(connection)
        request = connection.read_request()
        assert request is not None
        assert request.body == b"b"
        answer(413, b"Too large.", Content_Type="text/plain")(connection)

    with Server(step) as server:
        result = Run("42", "ping", "a\nb\nc", "--lines", "-P", str(server.port))
    assert result.out == "1\n"
    assert str(result.error) == (
        f"Line 2: {server.url}ev/ping/42 answered 413 Request Entity Too Large: Too large. "
        "Before it, 1 event published."
    )


def test_nobody_there() -> None:
    """A refused connection is one clear line."""
    with Server() as server:
        pass
    result = Run("42", "ping", "-P", str(server.port))
    assert str(result.error) == f"Cannot send to {server.url}ev/ping/42: connection refused."


def test_a_bad_token_is_not_sent() -> None:
    """The token is checked before anything is requested."""
    assert "token" in str(Run("", "ping", "-P", "1").error)
    assert "token" in str(Run("", "ping", "-P", "1", "-u", "u", "-p", "p").error)


# The process


def test_interrupted() -> None:
    """Ctrl-C while lines are awaited: one line, status 1, no traceback."""
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
