"""Tokens, the names that publishers and listeners share, and the keys of events."""

import hashlib
from functools import lru_cache

from ..exceptions import InvalidEvent, InvalidToken

MAX_TOKEN_LENGTH = 255
MAX_KEY_LENGTH = 255

RESERVED_PREFIX = "\ufffd"
"""The first character of the names that only the package itself uses. Users cannot write it."""
CONTROL_TOKEN = "\ufffdcontrol"  # noqa: S105
"""The token of the events that processes send each other. Users cannot name it."""
PRODUCTIONS_TOKEN = "\ufffdproductions"  # noqa: S105
"""The token of the claims of productions, and of the presence of those that have no end yet."""
PRODUCING_TOKEN = "\ufffdproducing"  # noqa: S105
"""The token of the presence of the productions whose process is alive."""
DETAILS_TOKEN = "\ufffddetails"  # noqa: S105
"""The token of the details that processes write while a console is open."""
RESERVED_TOKENS = (CONTROL_TOKEN, PRODUCTIONS_TOKEN, PRODUCING_TOKEN, DETAILS_TOKEN)
"""The tokens that only the package itself uses."""


def check_token(token: str) -> str:
    """Return a token that is valid: a text of 1 to 255 characters.

    :raises InvalidToken: if it is not a text, is empty or too long, or contains NUL (which
        PostgreSQL cannot store), U+FFFD or a lone surrogate (the traces of bytes that are not
        UTF-8).
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
        raise InvalidToken(f"The token {token!r} contains NUL.")
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise InvalidToken(f"The token {token!r} is not valid UTF-8.") from error
    if "\ufffd" in token:
        raise InvalidToken(f"The token {token!r} is not valid UTF-8.")
    return token


@lru_cache(maxsize=4096)
def token_key(token: str) -> str:
    """Return the database key of a token: 32 hexadecimal digits.

    Some database collations ignore differences in case, accents and trailing spaces, so the token
    itself cannot be the key.
    """
    return _digest(token.encode())


def check_key(key: str) -> str:
    """Return a key of an event that is valid: a text of 1 to 255 characters.

    :raises InvalidEvent: if it is not a text, is empty or too long, or contains NUL or a lone
        surrogate.
    """
    allowed = f"expected a text of 1 to {MAX_KEY_LENGTH} characters"
    if not isinstance(key, str):
        raise InvalidEvent(f"The key is {key!r}; {allowed}.")
    if not key:
        raise InvalidEvent(f"The key is empty; {allowed}.")
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidEvent(f"The key is {len(key)} characters long; {allowed}.")
    if "\0" in key:
        raise InvalidEvent(f"The key {key!r} contains NUL; {allowed} without NUL.")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"The key {key!r} is not valid UTF-8; {allowed}.") from error
    return key


def key_digest(scope: str, key: str) -> str:
    """Return what a history stores of a key: 32 hexadecimal digits.

    :param scope: the sender whose keys are compared with each other; ``""`` for the project's
        own code.
    :param key: a valid key. It contains no NUL, so the two texts cannot be confused.
    """
    return _digest(f"{scope}\0{key}".encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
