"""Cursors of streams that carry several tokens: one id that resumes them all.

Such a cursor is opaque text: ``~`` and, in base64url, fourteen bytes for each token: six
of the token's hash, and eight with its place. A token is found again by its hash, so a
page may come back with other tokens than before; those that are new to it start afresh.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence

from .events import CURSOR_MARK
from .tokens import token_key

_PLACE = struct.Struct(">6sQ")
_OPENED_ANEW = 1 << 63


def short_key(token: str) -> bytes:
    """Give the six bytes by which a cursor knows a token."""
    return bytes.fromhex(token_key(token)[:12])


def join_cursor(places: Iterable[tuple[bytes, int, bool]]) -> str:
    """Make one cursor of each token's short key, place, and whether it was opened anew there."""
    packed = b"".join(
        _PLACE.pack(key, seq | (_OPENED_ANEW if anew else 0)) for key, seq, anew in places
    )
    return CURSOR_MARK + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def split_cursor(text: str | None, tokens: Sequence[str]) -> Mapping[str, str | None]:
    """Give each token its own cursor, or ``None`` where it has none.

    An id that is no joined cursor belongs to the first token: a page that listened to it
    alone may come back with more. Text that never was an id is unknown to every token.
    """
    places = _places(text) if text else {}
    if places is not None:
        return {token: places.get(short_key(token)) for token in tokens}
    if text and (text.startswith(CURSOR_MARK) or " " in text):
        return dict.fromkeys(tokens, text)
    return {token: (text if token == tokens[0] else None) for token in tokens}


def _places(text: str) -> dict[bytes, str] | None:
    if not text.startswith(CURSOR_MARK) or text == CURSOR_MARK:
        return None
    try:
        packed = base64.b64decode(
            text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True
        )
        places = list(_PLACE.iter_unpack(packed))
    except (ValueError, struct.error):
        return None
    return {
        key: f"{place & ~_OPENED_ANEW}{'+' if place & _OPENED_ANEW else ''}"
        for key, place in places
    }


def max_length(tokens: int) -> int:
    """Give the length of the longest cursor of so many tokens."""
    return len(CURSOR_MARK) + -(-_PLACE.size * tokens * 4 // 3)
