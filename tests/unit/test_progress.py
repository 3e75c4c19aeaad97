"""``track()`` and ``atrack()``."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError, transaction
from django.template.loader import render_to_string
from django.test import RequestFactory, TestCase

import django_eventsource.progress
from django_eventsource import atrack, track
from django_eventsource.events import JSONEvent, StringIdEvent
from django_eventsource.exceptions import InvalidParameter, InvalidToken, UnknownAction
from django_eventsource.history import History
from tests.support.waiting import until


class Clock:
    """A clock that a test sets."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


class TextEvent(StringIdEvent):
    ACTIONS = ["progress", "done", "failed"]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of the module."""
    clock = Clock()
    monkeypatch.setattr(django_eventsource.progress, "time", clock)
    return clock


Stored = Callable[[], list[tuple[str, Any]]]


@pytest.fixture
def stored(memory_history: History) -> Stored:
    """Return a function for the actions and values of the token ``t``."""
    floor = memory_history.newest("t")[0]

    def read() -> list[tuple[str, Any]]:
        entries = memory_history.read("t", floor).entries
        return [(entry.draft.action, json.loads(entry.draft.data)) for entry in entries]

    return read


def figures(events: list[tuple[str, Any]]) -> list[tuple[str, int, int | None]]:
    """Return the action, the done and the total of each event."""
    return [(action, value["done"], value["total"]) for action, value in events]


async def arange(number: int) -> AsyncIterator[int]:
    for n in range(number):
        yield n


# The events


def test_a_loop_publishes_its_begin_one_event_an_interval_and_its_end(
    stored: Stored, clock: Clock
) -> None:
    """The first event is published before the first row is processed."""
    seen = []
    for row in track("abcdef", "t", interval_seconds=2):
        seen.append((row, len(stored())))
        clock.seconds += 1
    assert seen == [("a", 1), ("b", 1), ("c", 2), ("d", 2), ("e", 3), ("f", 3)]
    assert stored() == [
        ("progress", {"done": 0, "total": 6, "rate": None, "remaining_seconds": None}),
        ("progress", {"done": 2, "total": 6, "rate": 1.0, "remaining_seconds": 4}),
        ("progress", {"done": 4, "total": 6, "rate": 1.0, "remaining_seconds": 2}),
        ("progress", {"done": 6, "total": 6, "rate": 1.0, "remaining_seconds": 0}),
        ("done", {"done": 6, "total": 6, "rate": 1.0, "remaining_seconds": 0}),
    ]


def test_a_fast_loop_publishes_two_events(stored: Stored) -> None:
    """The end contains the number of all rows."""
    assert list(track(range(10_000), "t")) == list(range(10_000))
    assert figures(stored()) == [("progress", 0, 10_000), ("done", 10_000, 10_000)]


def test_the_rate_has_three_digits(stored: Stored, clock: Clock) -> None:
    for _ in track(range(3), "t", interval_seconds=1):
        clock.seconds += 7
    assert [value["rate"] for _, value in stored()] == [None, 0.143, 0.143, 0.143, 0.143]
    assert [value["remaining_seconds"] for _, value in stored()] == [None, 14, 7, 0, 0]


def test_a_loop_without_rows_is_done(stored: Stored) -> None:
    assert list(track([], "t")) == []
    assert figures(stored()) == [("progress", 0, 0), ("done", 0, 0)]


def test_a_loop_that_does_not_begin_publishes_nothing(stored: Stored) -> None:
    track([1], "t").close()
    assert stored() == []


# The total


@pytest.mark.parametrize(
    ("rows", "total", "expected"),
    [
        ([1, 2], None, [2, 2, 2, 2]),
        ([1, 2], 2, [2, 2, 2, 2]),
        (iter([1, 2]), 2, [2, 2, 2, 2]),
        (iter([1, 2]), None, [None, None, None, 2]),
        ([1, 2], 1, [1, 1, None, 2]),  # too few
        ([1, 2], 5, [5, 5, 5, 2]),  # too many
        ([1, 2], 0, [0, None, None, 2]),
    ],
)
def test_the_total_is_that_of_the_caller_or_the_length_of_the_rows(
    stored: Stored, clock: Clock, rows: Any, total: int | None, expected: list[int | None]
) -> None:
    """If it is too small it becomes unknown, and at the end it is the number of rows."""
    for _ in track(rows, "t", total):
        clock.seconds += 1
    assert [value["total"] for _, value in stored()] == expected
    if total == 1:
        assert [value["remaining_seconds"] for _, value in stored()] == [None, 0, None, 0]


@pytest.mark.django_db(transaction=True)
def test_a_queryset_is_counted_without_another_query(
    stored: Stored, django_assert_num_queries: Any
) -> None:
    number = Permission.objects.count()
    with django_assert_num_queries(1):
        rows = list(track(Permission.objects.all(), "t"))
    assert len(rows) == number > 0
    assert figures(stored()) == [("progress", 0, number), ("done", number, number)]


# The end of a loop


def leave(how: str) -> None:
    """Leave a loop of three rows at the second one."""
    for row in track([1, 2, 3], "t"):
        if row == 2 and how == "raise":
            raise LookupError
        if row == 2 and how == "break":
            break
        if row == 2 and how == "return":
            return


@pytest.mark.parametrize("how", ["raise", "break", "return"])
def test_a_loop_that_is_left_has_failed(stored: Stored, how: str) -> None:
    """The row in which it was left is not processed. The error of the loop is raised."""
    try:
        leave(how)
    except LookupError:
        assert how == "raise"
    assert figures(stored()) == [("progress", 0, 3), ("failed", 1, 3)]


def test_a_loop_whose_rows_raise_an_error_has_failed(stored: Stored) -> None:
    def rows() -> Iterator[int]:
        yield 1
        raise LookupError("rows")

    with pytest.raises(LookupError, match="rows"):
        list(track(rows(), "t", 3))
    assert figures(stored()) == [("progress", 0, 3), ("failed", 1, 3)]


def test_closing_ends_a_loop_to_which_a_name_refers(stored: Stored) -> None:
    with pytest.raises(LookupError), closing(track([1, 2], "t")) as rows:
        for _ in rows:
            raise LookupError
    assert figures(stored()) == [("progress", 0, 2), ("failed", 0, 2)]


async def test_a_loop_that_is_collected_in_a_thread_with_an_event_loop_has_failed(
    stored: Stored,
) -> None:
    """The garbage collector runs in any thread."""

    def leave() -> list[Any]:
        rows = track(range(3), "t")
        next(rows)
        return [rows]

    left = await asyncio.to_thread(leave)
    left.clear()
    await until(lambda: len(stored()) == 2)
    assert figures(stored()) == [("progress", 0, 3), ("failed", 0, 3)]
    await until(lambda: "eventsource-progress" not in {one.name for one in threading.enumerate()})


# Transactions


@pytest.mark.django_db(transaction=True)
def test_a_loop_inside_of_a_transaction_is_refused(stored: Stored) -> None:
    """No row is processed. The error names the way out."""
    with transaction.atomic():
        rows = track([1, 2], "t")
        with pytest.raises(transaction.TransactionManagementError) as caught:
            next(rows)
    assert "Put the transaction into the loop" in str(caught.value)
    assert stored() == []


@pytest.mark.django_db(transaction=True)
def test_a_transaction_inside_of_a_loop_does_not_delay_its_events(
    stored: Stored, clock: Clock
) -> None:
    """It also rolls back alone."""
    with pytest.raises(LookupError):
        for row in track([1, 2, 3], "t"):
            with transaction.atomic():
                assert len(stored()) == row
                clock.seconds += 1
                if row == 3:
                    raise LookupError
    assert figures(stored()) == [
        ("progress", 0, 3),
        ("progress", 1, 3),
        ("progress", 2, 3),
        ("failed", 2, 3),
    ]


@pytest.mark.usefixtures("memory_history")
class TestInATestCase(TestCase):
    """Each test of a ``TestCase`` runs inside of a transaction."""

    def test_a_loop_publishes_in_the_hooks_of_the_commit(self):
        with self.captureOnCommitCallbacks() as callbacks:
            assert list(track([1, 2], "t")) == [1, 2]
        assert len(callbacks) == 2

    def test_a_transaction_of_the_test_is_refused(self):
        with transaction.atomic(), pytest.raises(transaction.TransactionManagementError):
            list(track([1, 2], "t"))


# Errors


@pytest.mark.parametrize("function", [track, atrack])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((7, "t"), {}, InvalidParameter, "rows must be an iterable.*, not 7"),
        (("t", [1]), {}, InvalidToken, r"A token must be a string, not \[1\]"),
        (([1], ""), {}, InvalidToken, "token is empty"),
        (([1], "t", -1), {}, InvalidParameter, "total must be .* 0 or more, or None, not -1"),
        (([1], "t", "2"), {}, InvalidParameter, "total must be .*, not '2'"),
        (([1], "t", 2.0), {}, InvalidParameter, "total must be .*, not 2.0"),
        (([1], "t", True), {}, InvalidParameter, "total must be .*, not True"),
        (([1], "t"), {"interval_seconds": 0}, InvalidParameter, "must be a positive number, not"),
        (([1], "t"), {"interval_seconds": "1"}, InvalidParameter, "number, not '1'"),
        (([1], "t"), {"interval_seconds": float("nan")}, InvalidParameter, "number, not nan"),
        (([1], "t"), {"event_class": JSONEvent}, UnknownAction, "'progress': JSONEvent allows"),
    ],
)
def test_an_argument_that_is_not_valid_raises_at_the_call(
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    arguments: Any,
    options: Any,
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        function(*arguments, **options)
    assert stored() == []


def test_asynchronous_rows_need_atrack() -> None:
    with pytest.raises(InvalidParameter, match=r"not <async_generator.* Use atrack\(\) for it"):
        track(arange(2), "t")  # type: ignore[arg-type, type-var]


async def test_track_refuses_to_block_an_event_loop(stored: Stored) -> None:
    with pytest.raises(SynchronousOnlyOperation, match=r"async for row in atrack\(\.\.\.\)"):
        track([1], "t")
    assert stored() == []


def fail_on(history: History, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let some appends of a history fail."""
    append, calls = history.append, iter(range(100))

    def fail(*args: Any) -> Any:
        if next(calls) in numbers:
            raise OperationalError("The store is down.")
        return append(*args)

    monkeypatch.setattr(history, "append", fail)


def test_a_loop_does_not_begin_if_its_first_event_cannot_be_published(
    memory_history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(memory_history, monkeypatch, 0)
    with pytest.raises(OperationalError):
        next(track([1], "t"))


def test_a_loop_continues_if_a_later_event_cannot_be_published(
    memory_history: History,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stored: Stored,
    clock: Clock,
) -> None:
    """The error is logged, and the next event contains the state."""
    fail_on(memory_history, monkeypatch, 1, 3)
    for _ in track([1, 2, 3], "t", interval_seconds=1):
        clock.seconds += 1
    assert figures(stored()) == [("progress", 0, 3), ("progress", 2, 3), ("done", 3, 3)]
    first, second = caplog.records
    text = "The event 'progress' of the progress of 't' could not be published."
    assert (first.name, first.levelno) == ("django_eventsource.progress", logging.ERROR)
    assert first.getMessage() == text
    assert second.getMessage().startswith(text)


def test_a_class_for_text_receives_json(stored: Stored) -> None:
    list(track([1], "t", event_class=TextEvent))
    assert figures(stored()) == [("progress", 0, 1), ("done", 1, 1)]


# Asynchronous code


@pytest.mark.parametrize("rows", [range(4), arange(4)], ids=["sync", "async"])
async def test_atrack_publishes_the_same_events(stored: Stored, clock: Clock, rows: Any) -> None:
    total = None if isinstance(rows, range) else 4
    async for _ in atrack(rows, "t", total, interval_seconds=2):
        clock.seconds += 1
    assert figures(stored()) == [
        ("progress", 0, 4),
        ("progress", 2, 4),
        ("progress", 4, 4),
        ("done", 4, 4),
    ]


@pytest.mark.django_db(transaction=True)
async def test_atrack_counts_a_queryset_off_the_event_loop(stored: Stored) -> None:
    number = len([row async for row in atrack(Permission.objects.all(), "t")])
    assert figures(stored()) == [("progress", 0, number), ("done", number, number)]


@pytest.mark.parametrize("rows", [range(3), arange(3)], ids=["sync", "async"])
async def test_an_asynchronous_loop_that_is_left_has_failed(stored: Stored, rows: Any) -> None:
    async for _ in atrack(rows, "t", 3):
        break
    await until(lambda: len(stored()) == 2)
    assert figures(stored()) == [("progress", 0, 3), ("failed", 0, 3)]


async def test_aclosing_publishes_the_failure_at_once(stored: Stored) -> None:
    with pytest.raises(LookupError):
        async with aclosing(atrack(range(3), "t")) as rows:
            async for _ in rows:
                raise LookupError
    assert figures(stored()) == [("progress", 0, 3), ("failed", 0, 3)]


@pytest.mark.parametrize("how", ["raise", "cancel"])
def test_the_failure_is_published_before_the_event_loop_ends(stored: Stored, how: str) -> None:
    async def main() -> None:
        async for _ in atrack(arange(3), "t", 3):
            if how == "raise":
                raise LookupError
            raise asyncio.CancelledError

    with pytest.raises((LookupError, asyncio.CancelledError)):
        asyncio.run(main())
    assert figures(stored()) == [("progress", 0, 3), ("failed", 0, 3)]


def test_both_functions_have_the_same_parameters() -> None:
    names = [list(inspect.signature(function).parameters) for function in (track, atrack)]
    assert names[0] == names[1]


# The template


def test_the_template_contains_the_url_of_a_stream_and_the_module(settings: Any) -> None:
    """The stream starts with the newest event. A page without another label has the default."""
    request = RequestFactory().get("/")
    request.session = SimpleNamespace(session_key=None)  # type: ignore[assignment]
    context = {"token": "import:7"}
    html = render_to_string("eventsource/progress.html", context, request)
    assert '<eventsource-progress src="/events/poll/import:7?grant=' in html
    assert '&rewind=1"' in html
    assert 'aria-label="Progress"' in html
    assert 'src="/static/eventsource/progress.js"' in html
    context["label"] = "Tea & cake"
    html = render_to_string("eventsource/progress.html", context, request)
    assert 'aria-label="Tea &amp; cake"' in html
