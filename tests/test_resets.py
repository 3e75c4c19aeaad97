"""The event that tells a listener that it missed some."""

from __future__ import annotations

import json

import pytest

from django_eventsource.frames import Decoder
from django_eventsource.resets import reset_frame


@pytest.mark.parametrize("token", [None, "t"])
@pytest.mark.parametrize("commit", [True, False])
def test_reset_frame(token: str | None, commit: bool) -> None:
    """It names what is missing, and moves the listener on only if told."""
    frame = reset_frame("expired", after="5", resume="9+", token=token, commit=commit)
    decoder = Decoder("before")
    (event,) = decoder.feed(frame)
    named = {"reason": "expired", "after": "5", "resume": "9+"} | (
        {"token": token} if token else {}
    )
    assert (event.event, json.loads(event.data)) == ("reset", named)
    assert decoder.last_event_id == ("9+" if commit else "before")


def test_reset_frame_without_a_place() -> None:
    """It leaves the last event id alone."""
    assert b"id:" not in reset_frame("overflow", after=None, resume=None)
