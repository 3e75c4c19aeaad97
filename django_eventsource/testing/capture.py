"""Capture of the events that a test publishes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Self

from asgiref.sync import sync_to_async
from django.db import transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase
from django.utils.asyncio import async_unsafe

from ..events import Event, JSONEvent
from ..history import Draft, get_history
from ..signals import event_published


class _Published(NamedTuple):
    token: str
    action: str
    value: Any


class CapturedEvent(_Published):
    """A published event, which is equal to the tuple ``(token, action, value)``.

    The value is the text that listeners receive, or what that text means for a JSON class.
    """

    event: Event
    """The event object, with its class and its id."""

    # As a tuple is shown, so that the differences to a list of tuples are easy to read.
    __repr__ = tuple.__repr__

    @classmethod
    def of(cls, event: Event) -> Self:
        """Return a published event in the form in which tests compare it.

        :param event: the event.
        """
        text = Draft.of(event).data.decode()
        value = json.loads(text) if isinstance(event, JSONEvent) else text
        captured = cls(event.token, event.action, value)
        captured.event = event
        return captured


class capture_events:  # noqa: N801 (in the manner of Django's override_settings)
    """Capture the events that are published inside of a ``with`` block, in any thread.

    ``with capture_events() as events:`` sets ``events`` to a list of :class:`CapturedEvent`, to
    compare with a list of tuples. In asynchronous code use ``async with``.

    An event is captured when it is published. So inside a transaction that is after the commit,
    and never after a rollback. The transaction of Django's ``TestCase`` does not commit.
    Therefore the end of the block runs the commit hooks that were registered inside of it, once,
    and the list is complete after the block.

    :param token: capture the events of this token; ``None`` for all tokens.
    :param action: capture the events with this action; ``None`` for all actions.
    :param using: the alias of the database whose commit hooks run at the end of the block;
        ``None`` for that of the history.
    :raises TransactionManagementError: at the beginning of the block, if it is inside
        ``transaction.atomic()``.
    """

    def __init__(
        self, *, token: str | None = None, action: str | None = None, using: str | None = None
    ) -> None:
        self._token = token
        self._action = action
        self._using = using

    @async_unsafe("In asynchronous code use `async with capture_events()`.")
    def __enter__(self) -> list[CapturedEvent]:
        return self._begin()

    def __exit__(self, *error: object) -> None:
        self._end()

    async def __aenter__(self) -> list[CapturedEvent]:
        return await sync_to_async(self._begin)()

    async def __aexit__(self, *error: object) -> None:
        await sync_to_async(self._end)()

    def _begin(self) -> list[CapturedEvent]:
        using = self._using or get_history().using
        self._connection = connection = transaction.get_connection(using)
        inside = connection.in_atomic_block
        # Django sets the attribute on the transactions in which TestCase runs a test.
        if inside and not connection.atomic_blocks[-1]._from_testcase:
            raise TransactionManagementError(
                "capture_events() was called inside transaction.atomic(). What is published there "
                "is published at the commit, which comes after the block. Call capture_events() "
                "around transaction.atomic()."
            )
        self._events: list[CapturedEvent] = []
        self._first_hook = len(connection.run_on_commit)
        hooks = TestCase.captureOnCommitCallbacks(using=using, execute=True)
        self._hooks = hooks if inside else None
        if self._hooks is not None:
            self._hooks.__enter__()
        event_published.connect(self._on_published, weak=False)
        return self._events

    def _end(self) -> None:
        try:
            if self._hooks is not None:
                self._hooks.__exit__(None, None, None)
        finally:
            event_published.disconnect(self._on_published)
            if self._hooks is not None:
                # So that a capture around this one does not run them again.
                del self._connection.run_on_commit[self._first_hook :]

    def _on_published(self, event: Event, **kwargs: Any) -> None:
        if self._token in (None, event.token) and self._action in (None, event.action):
            self._events.append(CapturedEvent.of(event))
