"""Short ways to make and to read the records of a history."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django_eventsource.history import Draft, Entry, History, Kind, get_history
from django_eventsource.protocol.tokens import key_digest


def draft(
    text: str = "x",
    *,
    own_id: str | None = None,
    kind: Kind = Kind.EVENT,
    key: str | None = None,
) -> Draft:
    """Return a draft with a text as its data.

    :param key: a text whose digest is the key, or ``None``.
    """
    action = {Kind.EVENT: "ping", Kind.RETRY: "retry", Kind.CLOSE: "close"}.get(kind, "ping")
    digest = None if key is None else key_digest("", key)
    return Draft(action=action, data=text.encode(), event_id=own_id, kind=kind, key=digest)


def add(history: History, *texts: str, token: str = "t") -> list[Entry]:
    """Append one event for each text."""
    return history.append(token, [draft(text) for text in texts])


def texts(entries: Iterable[Entry]) -> list[str]:
    """Return the data of entries as texts."""
    return [entry.draft.data.decode() for entry in entries]


class FaultyHistory:
    """A history whose methods fail a given number of times, and then work."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.real = get_history()

    def __getattr__(self, name: str) -> Any:
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise ConnectionError(f"{name} failed")
        return getattr(self.real, name)
