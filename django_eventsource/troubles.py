"""Troubles that come by the thousand: each is told, one of many with its traceback."""

from __future__ import annotations

import logging
import time

QUIET_SECONDS = 10.0


class Troubles:
    """Logs what fails for every request alike while something is away.

    :param logger: where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told: dict[str, float] = {}

    def tell(self, text: str, about: object, error: Exception) -> None:
        """Log an error, with its traceback if that was not logged a short while ago.

        :param text: with a place for what it is about.
        """
        now = time.monotonic()
        if now - self._told.get(text, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._told[text] = now
            self._logger.error(text, about, exc_info=error)
        else:
            self._logger.error(text + " (%r)", about, error)
