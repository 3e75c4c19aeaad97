"""Server-sent events for Django."""

from .publishing import apublish, publish

__version__ = "0.1.0"
__all__ = ["apublish", "publish"]
