"""Ending streams from anywhere: processes tell each other on a token of their own.

The word is a durable event like any other: it reaches every process through the channel
layer at once, and through the history whatever the layer loses.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.db import transaction

from .events import JSONIdEvent
from .grants import hash_session_key, user_id
from .history import get_history
from .listeners import Listener
from .publishing import publish_event
from .tokens import CONTROL_TOKEN, check_token

logger = logging.getLogger("django_eventsource.control")

CLOSE = "close-streams"


class ControlEvent(JSONIdEvent):
    """What one process tells all."""

    ACTIONS = [CLOSE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which streams are meant: those that match all that is named."""

    token: str | None = None
    user: str | None = None
    session: str | None = None

    @classmethod
    def read(cls, data: str) -> Selection:
        """Read what another process wrote.

        :raises ValueError: when it is not understood.
        """
        names = json.loads(data)
        if not isinstance(names, dict) or not names.keys() <= {"token", "user", "session"}:
            raise ValueError("It names what is not known here.")
        if not all(value is None or isinstance(value, str) for value in names.values()):
            raise ValueError("It names something by what is no text.")
        selection = cls(**names)
        if selection == cls():
            raise ValueError("It names nothing.")
        return selection

    def matches(self, listener: Listener) -> bool:
        """Tell whether a listener's stream is meant."""
        return (
            (self.token is None or self.token in listener.tokens)
            and (self.user is None or self.user == listener.user)
            and (self.session is None or self.session == listener.session)
        )


def close_streams(*, token: str | None = None, user: Any = None) -> None:
    """End streams, in every process. Their listeners come back if the policy lets them.

    Inside a transaction the streams are ended when it commits.

    :param token: end the streams of this token,
    :param user: and of this user: an instance, or its primary key.
    :raises ValueError: when neither is given, the token is none, or the user has no primary
        key.
    """
    if token is None and user is None:
        raise ValueError("close_streams() needs to know which: give token=, user= or both.")
    if token is not None:
        check_token(token)
    _tell({"token": token, "user": None if user is None else user_id(user)})


async def aclose_streams(*, token: str | None = None, user: Any = None) -> None:
    """Await :func:`close_streams`, which runs in Django's thread for synchronous work."""
    await sync_to_async(close_streams)(token=token, user=user)


def on_logout(sender: Any, request: Any, user: Any = None, **kwargs: Any) -> None:
    """Receive Django's ``user_logged_out``: the session's streams end at once."""
    session = getattr(request, "session", None)
    session_key = getattr(session, "session_key", None)
    if session_key is None:
        return
    selection: dict[str, str | None] = {"session": hash_session_key(session_key)}
    if isinstance(session, SignedCookies) and user is not None:
        # Its key is all its data, and changes with it: the listener's may be another one.
        selection = {"user": user_id(user)}
    using = get_history().using
    try:
        # In a transaction of the caller's, a savepoint: its own work must not be lost.
        inside = transaction.get_connection(using).in_atomic_block
        with transaction.atomic(using) if inside else nullcontext():
            _tell(selection)
    except Exception:
        # Who logs out must get out. The recheck ends the streams a little later.
        logger.exception("The streams of a session that was logged out go on until rechecked.")


def _tell(selection: dict[str, str | None]) -> None:
    publish_event(ControlEvent(CONTROL_TOKEN, CLOSE, selection))
