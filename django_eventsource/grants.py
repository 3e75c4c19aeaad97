"""Grants: signed, expiring permissions to listen or send on named tokens.

A grant is made with ``django.core.signing``: it holds the tokens, the rights and the
expiry in clear, and is worthless once any of them is changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from django.core import signing

from .conf import conf, number_error
from .exceptions import InvalidGrant
from .tokens import check_token

_SALT = "django_eventsource.grant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a grant says once its signature and its expiry have been checked."""

    tokens: tuple[str, ...]
    listen: bool
    send: bool
    expires: int
    """Seconds since the epoch."""


def make_grant(
    token: str | Sequence[str],
    *,
    listen: bool = False,
    send: bool = False,
    seconds: float | None = None,
) -> str:
    """Make a grant for a token or for several, as ASCII text that needs no quoting in a URL.

    :param token: the token, or a list of tokens.
    :param listen: grant the right to listen.
    :param send: grant the right to send.
    :param seconds: its lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    :raises ValueError: for a bad token, no right at all, or a lifetime that is not positive.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    if not tokens:
        raise ValueError("A grant needs a token: the list is empty.")
    for one in tokens:
        check_token(one)
    if not (listen or send):
        raise ValueError("A grant needs a right: pass listen=True, send=True or both.")
    if seconds is None:
        seconds = conf.grant_seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(str(number_error("The lifetime of a grant", seconds, "positive seconds")))
    rights = "l" * listen + "s" * send
    return signing.dumps([tokens, rights, math.ceil(time.time() + seconds)], salt=_SALT)


def read_grant(text: str, at: float | None = None) -> Grant:
    """Check a grant's signature and expiry and give what it says.

    :param at: the time at which it must not have expired, in seconds since the epoch;
        now if not given.
    :raises InvalidGrant: when it is forged, damaged or expired.
    """
    try:
        tokens, rights, expires = signing.loads(text, salt=_SALT)
    except (signing.BadSignature, ValueError) as error:
        raise InvalidGrant("The grant is not valid: it was changed or not made here.") from error
    if expires <= (time.time() if at is None else at):
        raise InvalidGrant("The grant has expired.")
    return Grant(tokens=tuple(tokens), listen="l" in rights, send="s" in rights, expires=expires)
