"""The control token in tests."""

from __future__ import annotations

import json
from typing import Any

from django_eventsource.history import get_history
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from tests.support.events import texts


def close_requests() -> list[dict[str, Any]]:
    """Return the close requests that were published, at most 20."""
    history = get_history()
    newest = history.newest(CONTROL_TOKEN)[0]
    slices = (history.read(CONTROL_TOKEN, seq) for seq in range(newest - 20, newest))
    complete = next((slice_ for slice_ in slices if slice_.complete), None)
    return [json.loads(text) for text in texts(complete.entries)] if complete else []
