"""Read the history: cursors for pages, and pages of stored events."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from django.utils.asyncio import async_unsafe

from .conf import conf
from .exceptions import InvalidParameter
from .history import Entry, Position, Slice, get_history
from .history.base import READ_EVENTS
from .history.records import Missing
from .protocol.cursors import UNKNOWN, Cursor, join_cursor, parse_cursors, short_key
from .protocol.field_rules import MAX_ACTION_LENGTH, check_field, shown
from .protocol.tokens import check_token

__all__ = [
    "HistoryEvent",
    "HistoryPage",
    "aget_cursor",
    "aread_history",
    "get_cursor",
    "read_history",
]

DEFAULT_LIMIT = 100
MAX_LIMIT = READ_EVENTS
"""The most events of one page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """A stored event."""

    id: str
    """The id on the wire."""
    action: str
    value: str
    """The lines of the value, joined with LF: the ``data`` of the event in a browser."""
    time: datetime.datetime
    """When the event was stored, in UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPage:
    """Some stored events of a token, in their order."""

    events: tuple[HistoryEvent, ...]
    """The events, the oldest first."""
    cursor: str
    """The position after the events: the ``after`` of the next page, or of a stream."""
    more: bool
    """Whether the history has events after the cursor."""
    missing: Missing | None
    """Why events after ``after`` are missing: ``"expired"`` if the history has dropped some,
    ``"unknown"`` if it never assigned that cursor; ``None`` if none are missing. If some are, the
    page begins with the oldest stored event."""


@async_unsafe("get_cursor() blocks: in async code call `await aget_cursor(...)` instead.")
def get_cursor(token: str | Sequence[str]) -> str:
    """Return the cursor of the newest position of a token, or of several tokens.

    A page that gets the cursor, then reads its data, and opens a stream after the cursor misses
    no change: ``{% eventsource_url token after=cursor %}``. In a transaction whose snapshot is
    older than the cursor (REPEATABLE READ), the data may lack a change before the cursor.

    :param token: the token, or the tokens of one stream.
    :returns: opaque text.
    :raises InvalidToken: if a token is not valid, or there is none.
    """
    tokens = _check_tokens(token)
    return _cursor_of([(one, get_history().locate(one, None)) for one in tokens])


async def aget_cursor(token: str | Sequence[str]) -> str:
    """Do the same as :func:`get_cursor` in asynchronous code."""
    tokens = _check_tokens(token)
    return _cursor_of([(one, await get_history().alocate(one, None)) for one in tokens])


def _check_tokens(token: str | Sequence[str]) -> list[str]:
    several = isinstance(token, Iterable) and not isinstance(token, str | bytes)
    tokens = (list(token) or [""]) if several else [cast("str", token)]
    return list(dict.fromkeys(check_token(one) for one in tokens))


def _cursor_of(positions: Sequence[tuple[str, Position]]) -> str:
    return join_cursor(
        (short_key(token), position.seq, position.cursor.reopened) for token, position in positions
    )


@async_unsafe("read_history() blocks: in async code call `await aread_history(...)` instead.")
def read_history(
    token: str, *, after: str = "", limit: int = DEFAULT_LIMIT, action: str | None = None
) -> HistoryPage:
    """Return stored events of a token, the oldest first.

    To read all of them, pass the ``cursor`` of a page as ``after`` while its ``more`` is true. A
    page can have fewer events than the limit, or none, if the events are large or ``action``
    excludes some.

    :param token: the token.
    :param after: the cursor after which the events begin: that of a page, the id of an event, or
        what :func:`get_cursor` returned. Without it the page begins with the oldest event.
    :param limit: the most events, up to 500.
    :param action: the only action to return; ``None`` for all.
    :raises ValueError: if an argument is not valid.
    """
    cursor = _check_arguments(token, after, limit, action)
    history = get_history()
    position = None if cursor is None else history.locate(token, cursor)
    slice_ = history.read(token, _start(position), **_options(limit, action))
    return _page_of(token, slice_, position, limit, action)


async def aread_history(
    token: str, *, after: str = "", limit: int = DEFAULT_LIMIT, action: str | None = None
) -> HistoryPage:
    """Do the same as :func:`read_history` in asynchronous code."""
    cursor = _check_arguments(token, after, limit, action)
    history = get_history()
    position = None if cursor is None else await history.alocate(token, cursor)
    slice_ = await history.aread(token, _start(position), **_options(limit, action))
    return _page_of(token, slice_, position, limit, action)


def _check_arguments(token: str, after: str, limit: int, action: str | None) -> Cursor | None:
    """Return the cursor of ``after``, or ``None`` if it is empty."""
    check_token(token)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
        raise InvalidParameter(
            f"limit must be a number from 1 to {MAX_LIMIT}, not {shown(limit)}."
        )
    if action is not None:
        check_field("action", action, MAX_ACTION_LENGTH)
    cursor = None
    if isinstance(after, str | None):
        cursor = parse_cursors(after, [token], conf.stream_max_tokens)[token]
    if after not in ("", None) and cursor in (None, UNKNOWN):
        raise InvalidParameter(
            "after must be a cursor of this token (that of a page, the id of an event, or what "
            f"get_cursor() returned), not {shown(after)}."
        )
    return cursor


def _start(position: Position | None) -> int:
    # No event has a sequence number of 0 or less, so the oldest event follows it.
    return 0 if position is None or position.missing else position.seq


def _options(limit: int, action: str | None) -> dict[str, Any]:
    return {"max_events": limit if action is None else READ_EVENTS, "times": True}


def _page_of(
    token: str, slice_: Slice, position: Position | None, limit: int, action: str | None
) -> HistoryPage:
    found = [one for one in slice_.entries if action in (None, one.draft.action)]
    if len(found) > limit:
        last: Entry | None = found[limit - 1]
    else:
        last = slice_.entries[-1] if slice_.entries else None
    if last is not None:
        seq, reopened = last.seq, last.closes
    elif position is not None:
        seq, reopened = position.seq, position.cursor.reopened
    else:
        seq, reopened = slice_.last, slice_.closed
    missing = None if position is None else position.missing
    if position is not None and not missing and not slice_.complete:
        missing = "expired"  # since the position was looked up
    return HistoryPage(
        events=tuple(_event_of(one) for one in found[:limit]),
        cursor=join_cursor([(short_key(token), seq, reopened)]),
        more=last is not None and last.seq < slice_.last,
        missing=missing,
    )


def _event_of(entry: Entry) -> HistoryEvent:
    return HistoryEvent(
        id=entry.id,
        action=entry.draft.action,
        value=entry.draft.data.decode(),
        # Without USE_TZ the database returns the project's time zone.
        time=cast("datetime.datetime", entry.created).astimezone(datetime.UTC),
    )
