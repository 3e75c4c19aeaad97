"""Tokens: the names that listeners and publishers share."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from django.conf import settings

from .exceptions import InvalidToken

MAX_TOKEN_LENGTH = 255

CONTROL_TOKEN = "\ufffdcontrol"  # noqa: S105
"""The token on which the processes tell each other what to do. It is none that a user can name."""


def check_token(token: str) -> str:
    """Give the token back if it is one: non-empty text of up to 255 characters.

    :raises InvalidToken: for empty or over-long text, NUL (which PostgreSQL cannot
        store), and what a decoder leaves of bytes that are no UTF-8: U+FFFD or a
        lone surrogate.
    """
    if not isinstance(token, str):
        raise InvalidToken(f"A token must be a string, not {token!r}.")
    if not token:
        raise InvalidToken("The token is empty; expected 1 to 255 characters.")
    if len(token) > MAX_TOKEN_LENGTH:
        raise InvalidToken(
            f"The token is {len(token)} characters long; at most {MAX_TOKEN_LENGTH} are allowed."
        )
    if "\0" in token:
        raise InvalidToken(f"The token {token!r} holds NUL.")
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise InvalidToken(f"The token {token!r} is not valid UTF-8.") from error
    if "\ufffd" in token:
        raise InvalidToken(f"The token {token!r} is not valid UTF-8.")
    return token


def token_key(token: str) -> str:
    """Give a token's fixed-length database key: 32 hexadecimal digits.

    Tokens differ in case, accents and trailing space, which some database collations
    do not see.
    """
    return hashlib.blake2b(token.encode(), digest_size=16).hexdigest()


def group_name(token: str) -> str:
    """Give the channel-layer group of a token.

    Layers accept only short ASCII names. The hash is keyed with ``SECRET_KEY``, so that
    tokens never show in the broker and two projects on one broker never meet.
    """
    return _group_name(token, settings.SECRET_KEY)


@lru_cache(maxsize=4096)
def _group_name(token: str, secret_key: str | bytes) -> str:
    secret = secret_key.encode() if isinstance(secret_key, str) else secret_key
    key = hashlib.blake2b(secret, digest_size=32, person=b"dj-eventsource").digest()
    digest = hashlib.blake2b(token.encode(), digest_size=20, key=key).hexdigest()
    return f"eventsource.{digest}"
