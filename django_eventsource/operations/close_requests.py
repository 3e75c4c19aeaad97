"""Close requests, which end streams in all processes."""

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.db import transaction

from ..grants import hash_session_key, user_id
from ..history import get_history
from ..protocol.field_rules import CLOSE_STREAMS
from ..protocol.tokens import CONTROL_TOKEN, check_token
from ..publishing import publish_event
from ..signals import Listener
from .control import ControlEvent

logger = logging.getLogger("django_eventsource.operations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The streams that a close request ends: those that match all fields that are not ``None``."""

    token: str | None = None
    user: str | None = None
    session: str | None = None

    @classmethod
    def read(cls, data: str) -> Self:
        """Return the selection of a close request.

        :param data: the JSON text of the event.
        :raises ValueError: if it is not a valid selection.
        """
        fields = json.loads(data)
        if not isinstance(fields, dict) or not fields.keys() <= {"token", "user", "session"}:
            raise ValueError("A close request must be an object of token, user and session.")
        if not all(value is None or isinstance(value, str) for value in fields.values()):
            raise ValueError("The values of a close request must be strings or null.")
        selection = cls(**fields)
        if selection == cls():
            raise ValueError("A close request must name a token, a user or a session.")
        return selection

    def matches(self, listener: Listener) -> bool:
        """Return whether the request ends the stream of a listener."""
        return (
            (self.token is None or self.token in listener.tokens)
            and (self.user is None or self.user == listener.user)
            and (self.session is None or self.session == listener.session)
        )


def close_streams(*, token: str | None = None, user: Any = None) -> None:
    """End streams in all processes. Their clients reconnect if the policy allows it.

    Inside a transaction, the streams end after the commit.

    :param token: end the streams of this token; ``None`` for all tokens.
    :param user: end the streams of this user, an instance or a primary key; ``None`` for all
        users.
    :raises ValueError: if both are ``None``, the token is not valid, or the user has no primary
        key.
    """
    if token is None and user is None:
        raise ValueError("close_streams() requires token=, user= or both.")
    if token is not None:
        check_token(token)
    selection = {"token": token, "user": None if user is None else user_id(user)}
    publish_event(ControlEvent(CONTROL_TOKEN, CLOSE_STREAMS, selection))


async def aclose_streams(*, token: str | None = None, user: Any = None) -> None:
    """Call :func:`close_streams` from asynchronous code; with the same arguments and errors."""
    await sync_to_async(close_streams)(token=token, user=user)


def on_logout(sender: Any, request: Any, user: Any = None, **kwargs: Any) -> None:
    """Receive Django's ``user_logged_out``, and end the streams of the session."""
    session = getattr(request, "session", None)
    session_key = getattr(session, "session_key", None)
    if session_key is None:
        return
    selection = {"session": hash_session_key(session_key)}
    if isinstance(session, SignedCookies) and user is not None:
        # The key of such a session contains its data, so the listener's may be an older one.
        selection = {"user": user_id(user)}
    using = get_history().using
    try:
        # Inside a transaction of the caller, a savepoint keeps a failure from breaking it.
        inside = transaction.get_connection(using).in_atomic_block
        with transaction.atomic(using) if inside else nullcontext():
            publish_event(ControlEvent(CONTROL_TOKEN, CLOSE_STREAMS, selection))
    except Exception:
        # The logout must succeed. The next recheck ends the streams.
        logger.exception(
            "The streams of a session that logged out cannot be ended before their next recheck."
        )
