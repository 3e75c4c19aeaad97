"""The histories, and the history of this process."""

import threading
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from .._runtime import on_reset
from ..conf import conf
from .base import History
from .records import Draft, Entry, Head, Kind, Position, Slice

__all__ = ["Draft", "Entry", "Head", "History", "Kind", "Position", "Slice", "get_history"]

_current: History | None = None
_lock = threading.Lock()


def get_history() -> History:
    """Return the history of this process.

    The first call makes it from ``EVENTSOURCE_HISTORY``. A forked process makes another one.

    :raises ImproperlyConfigured: if the setting is wrong.
    """
    global _current
    with _lock:
        if _current is None:
            _current = make_history()
        return _current


def make_history() -> History:
    """Return a new history from ``EVENTSOURCE_HISTORY``.

    :raises ImproperlyConfigured: if the setting is wrong.
    """
    path, options = conf.history
    try:
        backend = import_string(path)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ImproperlyConfigured(
            f"EVENTSOURCE_HISTORY BACKEND cannot be imported: {path!r} ({error})."
        ) from error
    if not (isinstance(backend, type) and issubclass(backend, History)):
        raise ImproperlyConfigured(
            "EVENTSOURCE_HISTORY BACKEND must name a subclass of "
            f"django_eventsource.history.History, not {path!r}."
        )
    try:
        return backend(**options)
    except TypeError as error:
        raise ImproperlyConfigured(
            f"EVENTSOURCE_HISTORY OPTIONS do not fit {path}: {error}."
        ) from error


@on_reset
def _reset() -> None:
    global _current, _lock
    _current = None
    # A thread of the parent process may have held the lock during the fork.
    _lock = threading.Lock()


def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting in ("EVENTSOURCE_HISTORY", "DATABASES"):
        _reset()


setting_changed.connect(_on_setting_changed)
