"""``manage.py send_event`` without a server."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from django.db import OperationalError
from django.urls import include, path

from django_eventsource.events import Event
from django_eventsource.history import get_history
from django_eventsource.management.commands import send_event
from django_eventsource.publishing import Prepared, publish
from tests.conftest import MEMORY
from tests.support.commands import Run, Terminal

urlpatterns = [path("ev/", include("django_eventsource.urls"))]

LIVE = "django_eventsource.events.StringEvent"


def run(*arguments: str, **options: Any) -> Run:
    return Run("send_event", *arguments, **options)


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``ev/``."""
    settings.ROOT_URLCONF = __name__


class Published(list[tuple[str, str, str]]):
    """The events that this process published, in order. Their ids count from 1."""

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
    """Record the events of the command, and do not publish them."""
    recorded = Published()
    monkeypatch.setattr(send_event, "publish_in_batches", recorded.publish)
    return recorded


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Make standard input contain these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


class Input(io.RawIOBase):
    """Standard input whose lines arrive one by one, from a generator."""

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
def test_an_event_is_stored_and_its_id_printed() -> None:
    result = run("42", "ping", "hello")
    assert result.error is None
    seq = int(result.out)
    entries = get_history().read("42", seq - 1).entries
    assert [entry.seq for entry in entries] == [seq]
    assert b"data: hello\n" in entries[0].frame()


@pytest.mark.django_db(transaction=True)
def test_an_event_with_a_key_is_stored_once() -> None:
    """The id of the first event is printed again."""
    first = run("42", "ping", "a", "--key", "k")
    again = run("42", "ping", "b", "--key", "k")
    assert (first.error, again.error, again.out) == (None, None, first.out)
    assert publish("42", "ping", "c", key="k").id == first.out.strip()
    assert get_history().newest("42")[0] == int(first.out)


def test_no_data_is_an_empty_value(published: Published) -> None:
    assert run("42", "close").out == "1\n"
    assert published == [("42", "close", "")]


def test_standard_input_is_one_event(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is all of standard input, without the line end at its end."""
    for text, value in [("é\n✓\n", "é\n✓"), ("a\r\n", "a"), ("b\n\n", "b\n"), ("c", "c")]:
        set_stdin(monkeypatch, text.encode())
        run("42", "ping", "-")
        assert published.values.pop() == value


@pytest.mark.parametrize("arguments", [["-"], ["-", "--lines"]])
def test_closed_standard_input_publishes_nothing(
    published: Published, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    result = run("42", "ping", *arguments)
    assert "Standard input is closed" in str(result.error)
    assert published.values == []


def test_missing_standard_output_is_not_a_failure(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure a script would send the event again."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        result = run("42", "ping", "x")
    assert result.error is None
    assert published.values == ["x"]


@pytest.mark.parametrize(
    "line", ["42 ping -j 1", "-j 42 ping 1", "42 -j ping 1", "42 ping 1 -j", "42 ping -j -- 1"]
)
def test_data_may_stand_before_between_and_after_options(published: Published, line: str) -> None:
    assert run(*line.split()).error is None
    assert published == [("42", "ping", "1")]


def test_a_negative_number_is_data(published: Published) -> None:
    run("42", "ping", "-5")
    assert published.values == ["-5"]


def test_json_publishes_only_json(published: Published) -> None:
    """An empty value is published too."""
    assert run("42", "ping", "-j", '{"a": 1}').error is None
    assert run("42", "close", "-j").error is None
    refused = run("42", "ping", "-j", "{a: 1}")
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
        (("42", "ping", "-u", "u", "--insecure"), "-u/--user, --insecure: only valid over HTTP."),
        (("42", "ping", "--header", "x: y"), "--header: only valid over HTTP."),
        (("42", "ping", "--key", ""), "The key is empty"),
        (("42", "ping", "--key", "a\udcffb"), "is not valid UTF-8; expected a text of 1 to 255"),
        (("42", "ping", "x", "--key", "k", "--lines"), "--key is for one event"),
    ],
)
def test_an_argument_that_is_not_valid_publishes_nothing(
    published: Published, arguments: tuple[str, ...], message: str
) -> None:
    """The error is one line."""
    result = run(*arguments)
    assert message in str(result.error)
    assert published == []


def test_standard_input_that_is_not_utf8_publishes_nothing(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the first such byte and its offset."""
    set_stdin(monkeypatch, b"abc\xe9")
    assert str(run("42", "ping", "-").error) == "DATA is not UTF-8: byte 0xe9 at offset 3."
    assert published == []


def test_a_database_without_tables_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the command that creates them."""

    def fail(*args: object) -> None:
        raise OperationalError("no such table: x\nLINE 1.")

    monkeypatch.setattr(send_event, "publish_in_batches", fail)
    assert str(run("42", "ping").error) == (
        "The history's database failed: no such table: x LINE 1. If tables are missing, run "
        "`manage.py migrate`."
    )


def test_a_live_only_event_needs_a_shared_channel_layer(
    settings: Any, published: Published
) -> None:
    """Without one, no listener would receive the event."""
    settings.EVENTSOURCE_EVENT_CLASS = LIVE
    result = run("42", "ping", "x")
    assert "no listener would receive them" in str(result.error)
    assert "--url" in str(result.error)
    assert "CHANNEL_LAYERS" in str(result.error)
    assert published == []


def test_a_durable_event_needs_a_shared_history(settings: Any, published: Published) -> None:
    """Without one, no listener would receive the event."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    result = run("42", "ping", "x")
    assert "MemoryHistory stores events in the memory of this process" in str(result.error)
    assert "no listener would receive them" in str(result.error)
    assert "--url" in str(result.error)
    assert "EVENTSOURCE_HISTORY" in str(result.error)
    assert (result.out, published) == ("", [])


def test_a_live_only_event_is_published_over_a_shared_layer(
    settings: Any, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No id is printed."""
    settings.EVENTSOURCE_EVENT_CLASS = LIVE
    monkeypatch.setattr(send_event, "is_process_local", lambda: False)
    monkeypatch.setattr(send_event, "publish_in_batches", Published().publish)
    result = run("42", "ping", "x")
    assert (result.error, result.out) == (None, "")


def test_ctrl_c_before_the_end_of_data_publishes_nothing(
    monkeypatch: pytest.MonkeyPatch, published: Published
) -> None:

    def lines() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    assert str(run("42", "ping", "-").error) == "Interrupted."
    assert published == []


def test_a_closed_output_is_an_error_after_publishing(published: Published) -> None:
    """The error states that the event was published."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        result = run("42", "ping", stdout=out)
    assert str(result.error) == "Standard output is closed, but the event was published."


# Lines


def test_each_line_is_an_event(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines and a last line without an end are events too."""
    set_stdin(monkeypatch, b"a\nb\r\n\n c ")
    result = run("42", "ping", "--lines", "-")
    assert published.values == ["a", "b", "", " c "]
    assert published.batches == [2, 1, 1], "what is there is published together"
    assert result.out == "1\n2\n3\n4\n"
    assert result.err.startswith("4 events published, ")
    assert result.err.endswith(" a second.\n")


def test_lines_are_read_from_standard_input_by_default(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With verbosity 0 the count is not printed."""
    set_stdin(monkeypatch, b"a\n")
    assert run("42", "ping", "--lines", "-v", "0").err == ""
    assert published.values == ["a"]


def test_each_line_of_data_is_an_event(published: Published) -> None:
    """An empty DATA has no line."""
    assert run("42", "ping", "a\nb", "--lines").err.startswith("2 events published")
    assert run("42", "ping", "", "--lines").err.startswith("0 events published")
    assert run("42", "ping", "c", "--lines").err.startswith("1 event published")
    assert published.values == ["a", "b", "c"]


def test_a_line_is_published_before_the_next_one_arrives(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[int] = []

    def lines() -> Iterator[bytes]:
        for line in (b"a\n", b"b\n"):
            before.append(len(published))
            yield line
        before.append(len(published))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    run("42", "ping", "--lines", "-")
    assert before == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1\n2\n{\n4\n", "Line 3: The value is not JSON: Expecting"),
        (b"1\n2\n\xff\n", "Line 3: DATA is not UTF-8: byte 0xff at offset 0."),
    ],
)
def test_the_lines_before_a_bad_line_are_published(
    published: Published, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    """The error has the line's number and the count of published events."""
    set_stdin(monkeypatch, data)
    result = run("42", "ping", "--lines", "-", "-j")
    assert str(result.error).startswith(message)
    assert str(result.error).endswith(" Before it, 2 events published.")
    assert published.values == ["1", "2"]


def test_ctrl_c_reports_the_published_lines(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:

    def lines() -> Iterator[bytes]:
        yield b"a\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Input(lines()))))
    assert str(run("42", "ping", "--lines").error) == "Interrupted: 1 event published."


def test_ctrl_c_reports_the_lines_that_may_be_published(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command cannot detect how much of the current batch was published."""

    def interrupted(pairs: Sequence[Prepared]) -> Iterator[list[Event]]:
        yield from published.publish(pairs[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(send_event, "publish_in_batches", interrupted)
    error = run("42", "ping", "a\nb\nc\nd\ne\n", "--lines").error
    assert str(error) == "Interrupted: 2 events published, and perhaps some of 3 more."
    assert published.values == ["a", "b"]


def test_a_closed_output_ends_the_lines(published: Published) -> None:
    """The error has the count of published events."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        result = run("42", "ping", "a\nb\nc\n", "--lines", stdout=out)
    assert str(result.error) == "Standard output is closed: 2 events published."


def test_a_terminal_shows_the_progress(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The display is not updated for every event, and is removed at the end."""
    clock = itertools.count(0, 0.04)
    monkeypatch.setattr(send_event.time, "monotonic", lambda: next(clock))
    err = Terminal()
    run("42", "ping", "a\nb\nc\nd\ne\nf\n", "--lines", stderr=err, no_color=True)
    shown = err.getvalue().split("\r")
    assert shown == [
        "",
        "6 events, 38 a second\x1b[K",
        "\x1b[K6 events published, 30 a second.\n",
    ]


def test_the_progress_is_removed_before_an_error(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = Terminal()
    result = run("42", "ping", "x", "--lines", "-j", stderr=err, no_color=True)
    assert err.getvalue() == "\r\x1b[K"
    assert str(result.error).endswith(" Before it, 0 events published.")
