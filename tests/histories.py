"""The histories that the contract is tested over, and short ways to fill them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from django.db.models import F

from django_eventsource.history import Draft, Entry, History, Kind
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.memory import MemoryHistory

HISTORIES = {
    "memory": MemoryHistory,
    "sqlite": DatabaseHistory,
    "postgres": lambda **options: DatabaseHistory(USING="postgres", **options),
}


def make(name: str, **options: object) -> History:
    """Make a history by its name in the contract."""
    return HISTORIES[name](**options)


def draft(text: str = "x", *, own_id: str | None = None, kind: Kind = Kind.EVENT) -> Draft:
    """Make a draft with a text as its data."""
    action = {Kind.EVENT: "ping", Kind.RETRY: "retry", Kind.FINISH: "close"}[kind]
    return Draft(action=action, data=text.encode(), event_id=own_id, kind=kind)


def add(history: History, *texts: str, token: str = "t") -> list[Entry]:
    """Append one event for each text."""
    return history.append(token, [draft(text) for text in texts])


def texts(entries: Iterable[Entry]) -> list[str]:
    """Give the entries' data as texts."""
    return [entry.draft.data.decode() for entry in entries]


def age(history: History, seconds: float) -> None:
    """Make all that the history holds older by as much."""
    if isinstance(history, MemoryHistory):
        for life in history._lives.values():
            life.updated -= seconds
            life.entries = {
                seq: (at - seconds, entry) for seq, (at, entry) in life.entries.items()
            }
        return
    assert isinstance(history, DatabaseHistory)
    history._heads.update(updated=F("updated") - timedelta(seconds=seconds))
    history._events.update(created=F("created") - timedelta(seconds=seconds))
