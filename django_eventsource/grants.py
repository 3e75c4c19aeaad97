"""Grants: signed, expiring permissions to listen or send on named tokens.

A grant is signed with ``django.core.signing``. Its tokens, rights, time of expiry and bindings can
be read by its holder. A grant that was changed is not valid.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core import signing
from django.utils.crypto import salted_hmac

from .conf import conf, number_error
from .exceptions import InvalidGrant
from .protocol.field_rules import check_action
from .protocol.tokens import check_token

__all__ = ["Grant", "make_grant", "read_grant"]

_SALT = "django_eventsource.grant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The content of a grant whose signature and expiry have been checked."""

    tokens: tuple[str, ...]
    """The tokens for which it is valid."""
    listen: bool
    """Whether it allows listening."""
    send: bool
    """Whether it allows sending."""
    expires: int
    """When it expires, in seconds since the epoch."""
    actions: tuple[str, ...] | None = None
    """The actions that may be sent; ``None``: all except the class's ``LISTEN``, ``FINISH`` and
    ``RETRY``, and those of the events that the package itself publishes."""
    session: str = ""
    """The hash of the key of the session that it is bound to, or ``""``."""
    user: str = ""
    """The id of the user that it is bound to, or ``""``."""


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
    :param send: grant the right to send every action of the class except its ``LISTEN``,
        ``FINISH`` and ``RETRY``, and those of the events that the package itself publishes.
    :param actions: grant the right to send this action, or these actions, and no other one.
    :param seconds: the lifetime in seconds; ``EVENTSOURCE_GRANT_SECONDS`` if not passed.
    :param session_key: bind the grant to the session with this key: it is valid for requests of
        this session only, while its user is logged in.
    :param user: bind the grant to a user, an instance or a primary key: it is valid only for
        requests of this user, logged in by session or HTTP Basic.
    :raises ValueError: for a token or action that is not valid, a grant without a right, a user
        without a primary key, or a lifetime that is not positive.
    """
    tokens = [check_token(one) for one in ([token] if isinstance(token, str) else token)]
    if not tokens:
        raise ValueError("A grant needs a token, and the list is empty: pass one or more.")
    if actions is not None:
        actions = [actions] if isinstance(actions, str) else list(actions)
        if not actions:
            raise ValueError("The list of actions is empty: leave it out, or name an action.")
        for action in actions:
            check_action(action)
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
    """Check the signature and the expiry of a grant, and return its content.

    :func:`django_eventsource.policies.check_grant` checks the session and the user that it is
    bound to.

    :param text: the grant.
    :param at: the time for the check of the expiry, in seconds since the epoch; now if not passed.
    :raises InvalidGrant: if it is forged, damaged or expired.
    """
    try:
        tokens, rights, expires, actions, session, user = signing.loads(text, salt=_SALT)
    except (signing.BadSignature, ValueError) as error:
        raise InvalidGrant(
            "The grant is not valid: it was changed, or made with another SECRET_KEY."
        ) from error
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
    """Return the hash of a session's key, for grants and lists that other clients can read."""
    digest = salted_hmac("django_eventsource.session", session_key, algorithm="sha256")
    return digest.hexdigest()[:32]


def lasting_session_key(session: Any) -> str | None:
    """Return the key of a session, to which a grant can be bound.

    :param session: the session of a request, or ``None``.
    :returns: the key; ``None`` without a session, and for a ``signed_cookies`` session, whose key
        changes with its data.
    """
    if session is None or isinstance(session, SignedCookies):
        return None
    key: str | None = session.session_key
    return key


def user_id(user: Any) -> str:
    """Return the id of a user: its primary key as text.

    :param user: an instance, or its primary key.
    :raises ValueError: if it has no primary key, as an anonymous or unsaved user.
    """
    key = getattr(user, "pk", user)
    if key is None or key == "":
        raise ValueError(f"The user has no primary key: {user!r}.")
    return str(key)
