"""Ending streams from anywhere: processes tell each other on a token of their own.

The word is a durable event like any other: it reaches every process through the channel
layer at once, and through the history whatever the layer loses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async

from .events import JSONIdEvent
from .listeners import Listener, hide_session
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
    :raises ValueError: when neither is given, or the token is none.
    """
    if token is None and user is None:
        raise ValueError("close_streams() needs to know which: give token=, user= or both.")
    if token is not None:
        check_token(token)
    _tell({"token": token, "user": None if user is None else user_id(user)})


async def aclose_streams(*, token: str | None = None, user: Any = None) -> None:
    """Await :func:`close_streams`, which runs in Django's thread for synchronous work."""
    await sync_to_async(close_streams)(token=token, user=user)


def user_id(user: Any) -> str:
    """Give a user's id: the text of its primary key."""
    return str(getattr(user, "pk", user))


def on_logout(sender: Any, request: Any, **kwargs: Any) -> None:
    """Receive Django's ``user_logged_out``: the session's streams end at once."""
    session_key = getattr(getattr(request, "session", None), "session_key", None)
    if session_key is None:
        return
    try:
        _tell({"session": hide_session(session_key)})
    except Exception:
        # Who logs out must get out. The recheck ends the streams a little later.
        logger.exception("The streams of a session that was logged out go on until rechecked.")


def _tell(selection: dict[str, str | None]) -> None:
    publish_event(ControlEvent(CONTROL_TOKEN, CLOSE, selection))
