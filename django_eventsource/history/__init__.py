"""Histories, and the one that this process uses."""

from __future__ import annotations

import threading
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from ..conf import conf
from .base import Draft, Entry, Head, History, Kind, Position, Slice

__all__ = ["Draft", "Entry", "Head", "History", "Kind", "Position", "Slice", "get_history"]

_current: History | None = None
_lock = threading.Lock()


def get_history() -> History:
    """Give the process's history, made once from ``EVENTSOURCE_HISTORY``.

    :raises ImproperlyConfigured: when the setting is wrong.
    """
    global _current
    with _lock:
        if _current is None:
            _current = make_history()
        return _current


def make_history() -> History:
    """Make a history from ``EVENTSOURCE_HISTORY``.

    :raises ImproperlyConfigured: when the setting is wrong.
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


def _forget_history(*, setting: str, **kwargs: Any) -> None:
    global _current
    if setting in ("EVENTSOURCE_HISTORY", "DATABASES"):
        _current = None


setting_changed.connect(_forget_history)
