"""Cursors: what a client sends back in ``Last-Event-ID``.

The cursor of one token is a sequence number or an event's own id. A sequence number is followed
by ``+`` if the client opened the token again after the close at that number.

A stream with several tokens has one cursor for all: ``~`` and, in base64url, fourteen bytes for
each token. Six bytes are the token's hash, and eight its sequence number. A token is found by its
hash, so a page may reconnect with other tokens than before. Those that are new to it start at
their newest event. ``get_cursor()`` and the pages of the history return this form also for one
token, because an event's own id may look like a sequence number.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .field_rules import CURSOR_MARK, MAX_ID_LENGTH
from .tokens import token_key

MAX_SEQ = 10**18 - 1
"""The largest sequence number that a cursor can name."""

_SEQUENCE = re.compile(r"([0-9]{1,18})(\+?)")
_PART = struct.Struct(">6sQ")
_REOPENED = 1 << 63


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in the history of one token. ``str(cursor)`` is its :attr:`text`."""

    text: str
    """The form on the wire of the cursor of one token, which may be an event's own id; empty for a
    part of a joined cursor, and for text that was never a cursor."""
    seq: int | None
    """The sequence number, or ``None`` if the text can only be an event's own id."""
    reopened: bool = False
    """Whether the client opened the token again after the close at this position."""

    @classmethod
    def at(cls, seq: int, *, reopened: bool = False) -> Cursor:
        """Return the cursor of a sequence number."""
        return cls(f"{seq}+" if reopened else str(seq), seq, reopened)

    def __str__(self) -> str:
        return self.text


UNKNOWN = Cursor("", None)
"""The cursor of text that was never one."""


def parse_cursor(text: str | None) -> Cursor | None:
    """Return the cursor of one token, or ``None`` for an empty text.

    The text is untrusted. Text that was never a cursor becomes :data:`UNKNOWN`.
    """
    if not text:
        return None
    if len(text) > MAX_ID_LENGTH or not _is_visible(text) or text.startswith(CURSOR_MARK):
        return UNKNOWN
    match = _SEQUENCE.fullmatch(text)
    return Cursor(text, int(match[1]), bool(match[2])) if match else Cursor(text, None)


def parse_cursors(
    text: str | None, tokens: Sequence[str], max_tokens: int | None = None
) -> dict[str, Cursor | None]:
    """Return the cursor of each token of a stream, or ``None`` where a token has none.

    The cursor of a single token belongs to the first token: a page that listened to it alone may
    reconnect with more. Text that was never a cursor is :data:`UNKNOWN` for every token.

    :param text: the untrusted last event id.
    :param tokens: the tokens of the stream, at least one.
    :param max_tokens: the most tokens that a cursor may name, if that is more than ``tokens``.
    """
    if not text:
        return dict.fromkeys(tokens)
    if text.startswith(CURSOR_MARK):
        parts = _parse_joined(text, max(len(tokens), max_tokens or 0))
        if parts is None:
            return dict.fromkeys(tokens, UNKNOWN)
        return {token: parts.get(short_key(token)) for token in tokens}
    cursor = parse_cursor(text)
    if cursor is UNKNOWN:
        return dict.fromkeys(tokens, UNKNOWN)
    return {token: (cursor if token == tokens[0] else None) for token in tokens}


def join_cursor(parts: Iterable[tuple[bytes, int, bool]]) -> str:
    """Return one cursor for several tokens.

    :param parts: each token's short key, its sequence number, and whether the client opened the
        token again after the close there.
    """
    packed = b"".join(
        _PART.pack(key, seq | (_REOPENED if reopened else 0)) for key, seq, reopened in parts
    )
    return CURSOR_MARK + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def short_key(token: str) -> bytes:
    """Return the six bytes that stand for a token in a joined cursor."""
    return bytes.fromhex(token_key(token)[:12])


def max_length(tokens: int) -> int:
    """Return the length of the longest cursor of a number of tokens."""
    return len(CURSOR_MARK) + -(-_PART.size * tokens * 4 // 3)


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _parse_joined(text: str, max_tokens: int) -> dict[bytes, Cursor] | None:
    if text == CURSOR_MARK or len(text) > max(max_length(max_tokens), MAX_ID_LENGTH):
        return None
    try:
        packed = base64.b64decode(
            text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True
        )
        parts = list(_PART.iter_unpack(packed))
    except (ValueError, struct.error):
        return None
    found = {}
    for key, number in parts:
        seq, reopened = number & ~_REOPENED, bool(number & _REOPENED)
        # Without a text, so that no event's own id is looked up: it may look like the number.
        found[key] = Cursor("", seq, reopened) if seq <= MAX_SEQ else UNKNOWN
    return found
