"""Server-sent events for Django."""

from .control import aclose_streams, close_streams
from .presence import alisteners, listeners
from .publishing import apublish, apublish_many, publish, publish_many

__version__ = "0.1.0"
__all__ = [
    "aclose_streams",
    "alisteners",
    "apublish",
    "apublish_many",
    "close_streams",
    "listeners",
    "publish",
    "publish_many",
]
