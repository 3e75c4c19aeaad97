"""Grants: signed, expiring permissions to listen or send on named tokens.

A grant is made with ``django.core.signing``: it contains the tokens, the rights, the expiry and
what it is bound to in clear, and is worthless once any of them is changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.core import signing
from django.utils.crypto import salted_hmac

from .conf import conf, number_error
from .events import MAX_ACTION_LENGTH, check_field
from .exceptions import InvalidGrant
from .tokens import check_token

_SALT = "django_eventsource.grant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The content of a grant whose signature and expiry have been checked."""

    tokens: tuple[str, ...]
    listen: bool
    send: bool
    expires: int
    """Seconds since the epoch."""
    actions: tuple[str, ...] | None = None
    """The actions that may be sent; ``None``: all but the class's ``FINISH`` and ``RETRY``."""
    session: str = ""
    """The hash of the key of the session that it is bound to; empty: to none."""
    user: str = ""
    """The id of the user that it is bound to; empty: to none."""


def make_grant(
    token: str | Sequence[str],
    *,
    listen: bool = False,
    send: bool = False,
    actions: str | Sequence[str] | None = None,
    seconds: float | None = None,
    session_key: str | None = None,
    user: Any = None,
) -> str:
    """Return a grant for a token or for several, as ASCII text that needs no quoting in a URL.

    :param token: the token, or a list of tokens.
    :param listen: grant the right to listen.
    :param send: grant the right to send every action except the class's ``FINISH`` and
        ``RETRY``.
    :param actions: grant the right to send this action, or these, whichever they are, and no
        others.
    :param seconds: its lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    :param session_key: bind it to the session with this key: it is valid for requests of that
        session only, while its user is logged in.
    :param user: bind it to a user, an instance or a primary key: it is valid only for requests
        that this user is logged in with, by session or HTTP Basic.
    :raises ValueError: for a bad token or action, no right at all, a user without a primary
        key, or a lifetime that is not positive.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    if not tokens:
        raise ValueError("A grant needs a token: the list is empty.")
    for one in tokens:
        check_token(one)
    if actions is not None:
        actions = [actions] if isinstance(actions, str) else list(actions)
        if not actions:
            raise ValueError("The list of actions is empty: leave it out, or name an action.")
        for action in actions:
            check_field("action", action, MAX_ACTION_LENGTH)
        send = True
    if not (listen or send):
        raise ValueError("A grant needs a right: pass listen=True, send=True or both.")
    if seconds is None:
        seconds = conf.grant_seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(str(number_error("The lifetime of a grant", seconds, "positive seconds")))
    content = [
        tokens,
        "l" * listen + "s" * send,
        math.ceil(time.time() + seconds),
        actions,
        "" if session_key is None else hash_session_key(session_key),
        "" if user is None else user_id(user),
    ]
    return signing.dumps(content, salt=_SALT)


def read_grant(text: str, at: float | None = None) -> Grant:
    """Check a grant's signature and expiry and return its content.

    It does not check what the grant is bound to:
    :func:`django_eventsource.policies.check_grant` does.

    :param at: the time at which it must not have expired, in seconds since the epoch;
        now if not given.
    :raises InvalidGrant: when it is forged, damaged or expired.
    """
    try:
        tokens, rights, expires, actions, session, user = signing.loads(text, salt=_SALT)
    except (signing.BadSignature, ValueError) as error:
        raise InvalidGrant("The grant is not valid: it was changed or not made here.") from error
    if expires <= (time.time() if at is None else at):
        raise InvalidGrant("The grant has expired.")
    return Grant(
        tokens=tuple(tokens),
        listen="l" in rights,
        send="s" in rights,
        expires=expires,
        actions=None if actions is None else tuple(actions),
        session=session,
        user=user,
    )


def hash_session_key(session_key: str) -> str:
    """Return a hash that stands for a session's key where others can read it."""
    salt = "django_eventsource.session"
    return salted_hmac(salt, session_key, algorithm="sha256").hexdigest()[:32]


def user_id(user: Any) -> str:
    """Return a user's id: the text of its primary key.

    :param user: an instance, or its primary key.
    :raises ValueError: when it has none: an anonymous or unsaved user.
    """
    key = getattr(user, "pk", user)
    if key is None or key == "":
        raise ValueError(f"The user has no primary key: {user!r}.")
    return str(key)
