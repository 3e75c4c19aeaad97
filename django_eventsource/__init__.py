"""Server-sent events for Django.

The functions are imported at their first use, so that ``import django_eventsource.client``
imports neither Django nor Channels. A plain import here would import the whole server side.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "aclose_streams",
    "aget_cursor",
    "alisteners",
    "apublish",
    "apublish_many",
    "apublish_template",
    "aread_history",
    "astart_production",
    "astop_production",
    "atrack",
    "close_streams",
    "get_cursor",
    "listeners",
    "produce",
    "publish",
    "publish_changes",
    "publish_many",
    "publish_template",
    "read_history",
    "start_production",
    "stop_production",
    "track",
]

if TYPE_CHECKING:
    from .model_changes import publish_changes
    from .operations.close_requests import aclose_streams, close_streams
    from .operations.presence import alisteners, listeners
    from .producers import (
        astart_production,
        astop_production,
        produce,
        start_production,
        stop_production,
    )
    from .progress import atrack, track
    from .publishing import apublish, apublish_many, publish, publish_many
    from .reading import aget_cursor, aread_history, get_cursor, read_history
    from .rendering import apublish_template, publish_template
else:
    _MODULES = {
        "aclose_streams": ".operations.close_requests",
        "aget_cursor": ".reading",
        "alisteners": ".operations.presence",
        "apublish": ".publishing",
        "apublish_many": ".publishing",
        "apublish_template": ".rendering",
        "aread_history": ".reading",
        "astart_production": ".producers",
        "astop_production": ".producers",
        "atrack": ".progress",
        "close_streams": ".operations.close_requests",
        "get_cursor": ".reading",
        "listeners": ".operations.presence",
        "produce": ".producers",
        "publish": ".publishing",
        "publish_changes": ".model_changes",
        "publish_many": ".publishing",
        "publish_template": ".rendering",
        "read_history": ".reading",
        "start_production": ".producers",
        "stop_production": ".producers",
        "track": ".progress",
    }

    def __getattr__(name: str) -> Any:
        # PEP 562: Python calls it for a name that the module does not have yet.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
