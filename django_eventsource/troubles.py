"""Troubles that come by the thousand: each is told, one of many with its traceback."""

from __future__ import annotations

import logging
import time

from django.db import DatabaseError

QUIET_SECONDS = 10.0
UNMIGRATED_SECONDS = 60.0
"""Seconds between two lines about missing tables, for all tasks and requests together."""
MISSING_STATES = ("42P01", "42703")
"""PostgreSQL: undefined_table, undefined_column."""
MISSING_NUMBERS = (1146, 1054)
"""MySQL and MariaDB: ER_NO_SUCH_TABLE, ER_BAD_FIELD_ERROR."""
MISSING_TEXTS = ("no such table", "no such column", "has no column named")
"""SQLite, which has no code for them."""

logger = logging.getLogger("django_eventsource.history")
_last_line = -UNMIGRATED_SECONDS


def is_unmigrated(error: BaseException) -> bool:
    """Whether a database error reports a missing table or column."""
    if not isinstance(error, DatabaseError):
        return False
    return (
        getattr(error.__cause__, "sqlstate", None) in MISSING_STATES
        or (bool(error.args) and error.args[0] in MISSING_NUMBERS)
        or any(text in str(error) for text in MISSING_TEXTS)
    )


def log_failure(log: logging.Logger, text: str, *args: object, error: Exception) -> None:
    """Log the failure of a task that tries again, with its traceback.

    Missing tables are reported in one line, since each task fails until they are there.
    """
    if is_unmigrated(error):
        _log_unmigrated(error)
    else:
        log.error(text, *args, exc_info=error)


def _log_unmigrated(error: BaseException) -> None:
    global _last_line
    now = time.monotonic()
    if now - _last_line >= UNMIGRATED_SECONDS:
        _last_line = now
        reason = str(error).partition("\n")[0]
        logger.error("The database is not migrated (%s): run `manage.py migrate`.", reason)


class Troubles:
    """Logs what fails for every request alike while something is away.

    :param logger: where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told: dict[str, float] = {}

    def tell(self, text: str, about: object, error: Exception) -> None:
        """Log an error, with its traceback if that was not logged a short while ago.

        Missing tables are reported in one line for all of them.

        :param text: with a place for what it is about.
        """
        if is_unmigrated(error):
            _log_unmigrated(error)
            return
        now = time.monotonic()
        if now - self._told.get(text, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._told[text] = now
            self._logger.error(text, about, exc_info=error)
        else:
            self._logger.error(text + " (%r)", about, error)
