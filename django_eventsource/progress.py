"""Publish the progress of loops."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sized
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.utils.asyncio import async_unsafe

from ._logging import ThrottledLogger
from .conf import MAX_NUMBER, check_event_class
from .events import Event, JSONIdEvent, action_error
from .exceptions import DeliveryFailed, InvalidParameter
from .history import get_history
from .protocol.field_rules import shown
from .protocol.tokens import check_token
from .publishing import publish

__all__ = ["ProgressEvent", "atrack", "track"]

throttled = ThrottledLogger(logging.getLogger("django_eventsource.progress"))

T = TypeVar("T")

PROGRESS, DONE, FAILED = "progress", "done", "failed"
INTERVAL_SECONDS = 0.25


class ProgressEvent(JSONIdEvent):
    """The progress of a loop. Its value is an object with four members.

    ``done`` is the number of rows that have been processed, and ``total`` the number of all rows,
    or ``null``. ``rate`` is the number of rows per second since the start. ``remaining_seconds``
    is what the other rows will take at this rate. Both are ``null`` if they are not known.
    """

    ACTIONS = [PROGRESS, DONE, FAILED]


@async_unsafe("track() blocks: in async code use `async for row in atrack(...)` instead.")
def track(
    rows: Iterable[T],
    token: str,
    total: int | None = None,
    *,
    interval_seconds: float = INTERVAL_SECONDS,
    event_class: type[Event] = ProgressEvent,
) -> Generator[T, None, None]:
    """Yield the rows of a loop, and publish its progress.

    ``progress`` is published when the loop begins, and then at most once in an interval. The
    last event is ``done`` if the loop has processed all rows. It is ``failed`` if the loop ended
    before, by an exception, ``break`` or ``return``. A loop that has begun does not fail because
    an event cannot be published; this is logged.

    :param rows: the rows.
    :param token: the token, which should be for this run alone.
    :param total: the number of rows; ``None`` for ``len(rows)`` if the rows have a length, and
        otherwise unknown. If there are more rows, it becomes unknown. ``done`` contains the number
        of rows that were processed.
    :param interval_seconds: the fewest seconds between two ``progress`` events.
    :param event_class: a class that allows the three actions and accepts JSON text.
    :raises ValueError: if an argument is not valid.
    :raises TransactionManagementError: when the loop begins inside of a transaction, whose commit
        the events would wait for.
    :raises Exception: when the loop begins, if the first event cannot be published.
    """
    if not isinstance(rows, Iterable):
        raise InvalidParameter(_not_rows(rows, "an iterable"))
    return _track(rows, _Run(token, total, interval_seconds, event_class))


def atrack(
    rows: Iterable[T] | AsyncIterable[T],
    token: str,
    total: int | None = None,
    *,
    interval_seconds: float = INTERVAL_SECONDS,
    event_class: type[Event] = ProgressEvent,
) -> AsyncGenerator[T, None]:
    """Do the same as :func:`track` in asynchronous code, for rows of either kind.

    The events are published in Django's thread for synchronous work. If the loop is left by an
    exception, ``break`` or ``return``, the event loop publishes ``failed`` soon afterwards.
    """
    if not isinstance(rows, Iterable | AsyncIterable):
        raise InvalidParameter(_not_rows(rows, "an iterable or an asynchronous iterable"))
    return _atrack(rows, _Run(token, total, interval_seconds, event_class))


def _not_rows(rows: object, expected: str) -> str:
    advice = " Use atrack() for it." if isinstance(rows, AsyncIterable) else ""
    return f"rows must be {expected}, not {shown(rows)}.{advice}"


def _track(rows: Iterable[T], run: _Run) -> Generator[T, None, None]:
    run.begin(rows)
    end = FAILED
    try:
        for row in rows:
            yield row
            if run.count():
                run.publish(PROGRESS)
        end = DONE
    finally:
        run.end(end)


async def _atrack(rows: Iterable[T] | AsyncIterable[T], run: _Run) -> AsyncGenerator[T, None]:
    await sync_to_async(run.begin)(rows)
    apublish = sync_to_async(run.publish)
    end = FAILED
    try:
        if isinstance(rows, AsyncIterable):
            async for row in rows:
                yield row
                if run.count():
                    await apublish(PROGRESS)
        else:
            for row in rows:
                yield row
                if run.count():
                    await apublish(PROGRESS)
        end = DONE
    finally:
        await apublish(end)


class _Run:
    """One run of a loop.

    :raises ValueError: if an argument is not valid.
    """

    def __init__(
        self, token: str, total: int | None, interval_seconds: float, event_class: type[Event]
    ) -> None:
        self.token = check_token(token)
        if not (total is None or (_is_number(total, int) and total >= 0)):
            raise InvalidParameter(
                "total must be the number of rows, a whole number of 0 or more, or None, not "
                f"{shown(total)}."
            )
        if not (_is_number(interval_seconds, int | float) and 0 < interval_seconds <= MAX_NUMBER):
            raise InvalidParameter(
                f"interval_seconds must be a positive number, not {shown(interval_seconds)}."
            )
        for action in (PROGRESS, DONE, FAILED):
            if error := action_error(check_event_class(event_class), action):
                raise error
        self.total = total
        self.interval_seconds = interval_seconds
        self.event_class = event_class
        self.done = 0

    def begin(self, rows: object) -> None:
        """Publish the first event.

        :raises TransactionManagementError: inside of a transaction.
        """
        _refuse_transaction()
        if self.total is None and isinstance(rows, Sized):
            self.total = len(rows)
        self.started = self.published = time.monotonic()
        self._publish(PROGRESS)

    def count(self) -> bool:
        """Count a row, and return whether an event is due."""
        self.done += 1
        return time.monotonic() >= self.published + self.interval_seconds

    def publish(self, action: str) -> None:
        """Publish an event. If the store or the channel layer fails, this is logged."""
        self.published = time.monotonic()
        failures: tuple[type[Exception], ...] = (*get_history().storage_errors, DeliveryFailed)
        try:
            self._publish(action)
        except failures as error:
            throttled.error(
                "The event %r of the progress of %r could not be published.",
                action,
                self.token,
                error=error,
            )

    def end(self, action: str) -> None:
        """Publish the last event of a synchronous loop.

        The garbage collector may end the loop in a thread with a running event loop, which must
        not be blocked.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.publish(action)
        else:
            # Not a task of that loop, which may end before the task has run.
            threading.Thread(
                target=self._publish_in_thread, args=(action,), name="eventsource-progress"
            ).start()

    def _publish_in_thread(self, action: str) -> None:
        try:
            self.publish(action)
        finally:
            connections.close_all()

    def _publish(self, action: str) -> None:
        value = self._value(action)
        publish(self.token, action, json.dumps(value), self.event_class)

    def _value(self, action: str) -> dict[str, Any]:
        total = self.total
        if action == DONE:
            total = self.done
        elif total is not None and self.done > total:
            total = None
        seconds = time.monotonic() - self.started
        rate = self.done / seconds if self.done and seconds else None
        return {
            "done": self.done,
            "total": total,
            "rate": rate and float(f"{rate:.3g}"),
            "remaining_seconds": round((total - self.done) / rate) if total and rate else None,
        }


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refuse_transaction() -> None:
    # A TestCase wraps each test in a transaction, which durable=True of Django ignores too.
    blocks: Any = getattr(transaction.get_connection(get_history().using), "atomic_blocks", ())
    if not all(block._from_testcase for block in blocks):
        raise transaction.TransactionManagementError(
            "The progress of a loop inside of transaction.atomic() would be published at the "
            "commit, when the loop has ended. Put the transaction into the loop, around each row "
            "or some rows. A view with ATOMIC_REQUESTS needs @transaction.non_atomic_requests."
        )
