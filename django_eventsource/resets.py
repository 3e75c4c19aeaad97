"""The event ``reset``: how a listener is told that it missed events."""

from __future__ import annotations

import json

from .events import RESET
from .frames import encode_event


def reset_frame(
    reason: str,
    *,
    after: str | None,
    resume: str | None,
    token: str | None = None,
    commit: bool = True,
) -> bytes:
    """Encode the event that tells a listener that it missed events.

    :param reason: ``unknown`` (an id never given out), ``expired`` (events after it are
        gone) or ``overflow`` (live-only events came faster than they were read).
    :param after: the last event id before what is missing, if it is known.
    :param resume: the id from which the stream goes on, if it moves the listener there.
    :param token: whose events they are, on a stream that carries several tokens.
    :param commit: make that id the listener's last event id.
    """
    data = {"reason": reason, "after": after, "resume": resume}
    if token is not None:
        data["token"] = token
    return encode_event(RESET, json.dumps(data).encode(), resume if commit else None)
