"""Grants: signed, expiring permissions to listen or send on one token.

A grant is made with ``django.core.signing``: it holds the token, the rights and the
expiry in clear, and is worthless once any of them is changed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from django.core import signing

from .conf import conf, number_error
from .exceptions import InvalidGrant
from .tokens import check_token

_SALT = "django_eventsource.grant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a grant says once its signature and its expiry have been checked."""

    token: str
    listen: bool
    send: bool
    expires: int
    """Seconds since the epoch."""


def make_grant(
    token: str, *, listen: bool = False, send: bool = False, seconds: float | None = None
) -> str:
    """Make a grant for a token, as ASCII text that needs no quoting in a URL.

    :param listen: grant the right to listen.
    :param send: grant the right to send.
    :param seconds: its lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    :raises ValueError: for a bad token, no right at all, or a lifetime that is not positive.
    """
    check_token(token)
    if not (listen or send):
        raise ValueError("A grant needs a right: pass listen=True, send=True or both.")
    if seconds is None:
        seconds = conf.grant_seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(str(number_error("The lifetime of a grant", seconds, "positive seconds")))
    rights = "l" * listen + "s" * send
    return signing.dumps([token, rights, math.ceil(time.time() + seconds)], salt=_SALT)


def read_grant(text: str) -> Grant:
    """Check a grant's signature and expiry and give what it says.

    :raises InvalidGrant: when it is forged, damaged or expired.
    """
    try:
        token, rights, expires = signing.loads(text, salt=_SALT)
    except (signing.BadSignature, ValueError) as error:
        raise InvalidGrant("The grant is not valid: it was changed or not made here.") from error
    if expires <= time.time():
        raise InvalidGrant("The grant has expired.")
    return Grant(token=token, listen="l" in rights, send="s" in rights, expires=expires)
