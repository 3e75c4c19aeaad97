"""Short ways to look at cursors."""

from __future__ import annotations

from collections.abc import Sequence

from django_eventsource.protocol.cursors import Cursor, parse_cursors


def cursor_texts(text: str | None, tokens: Sequence[str]) -> dict[str, str | None]:
    """Return the text of each token's cursor, as if it were the cursor of one token."""
    found = parse_cursors(text, tokens)
    return {token: None if cursor is None else _text(cursor) for token, cursor in found.items()}


def _text(cursor: Cursor) -> str:
    if cursor.text or cursor.seq is None:
        return cursor.text
    return Cursor.at(cursor.seq, reopened=cursor.reopened).text
