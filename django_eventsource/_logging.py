"""Logging of errors that repeat, such as those of each request while a database is down."""

import logging
import re
import time

from django.db import DatabaseError

from . import _runtime

TRACEBACK_SECONDS = 10.0
"""Seconds between two tracebacks of the same message."""
UNMIGRATED_SECONDS = 60.0
"""Seconds between two lines about missing tables, for all tasks and requests together."""
UNMIGRATED_TEXT = "The database is not migrated (%s): run `manage.py migrate`."

logger = logging.getLogger("django_eventsource.history")
_logged_at: dict[tuple[str, str], float] = {}
_runtime.on_reset(_logged_at.clear)


def is_unmigrated(error: BaseException) -> bool:
    """Return whether a database error reports a missing table or column."""
    if not isinstance(error, DatabaseError):
        return False
    return (
        # PostgreSQL: undefined_table, undefined_column.
        getattr(error.__cause__, "sqlstate", None) in ("42P01", "42703")
        # MySQL and MariaDB: ER_NO_SUCH_TABLE, ER_BAD_FIELD_ERROR.
        or (bool(error.args) and error.args[0] in (1146, 1054))
        # SQLite has no error codes for them.
        or bool(re.search("no such table|no such column|has no column named", str(error)))
    )


class ThrottledLogger:
    """Logs each error in one line, and the traceback of a message once in ten seconds.

    Missing tables are logged in one line a minute, because every task and request fails until
    the database is migrated.

    :param logger: the logger that receives the lines.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def error(self, text: str, *args: object, error: Exception) -> None:
        """Log an error.

        :param text: the message. Its tracebacks are throttled by this text, without the arguments.
        :param args: the arguments of the message.
        """
        if is_unmigrated(error):
            if _is_due(("", UNMIGRATED_TEXT), UNMIGRATED_SECONDS):
                logger.error(UNMIGRATED_TEXT, str(error).partition("\n")[0])
        elif _is_due((self._logger.name, text), TRACEBACK_SECONDS):
            self._logger.error(text, *args, exc_info=error)
        else:
            self._logger.error(text + " (%r)", *args, error)


def _is_due(key: tuple[str, str], seconds: float) -> bool:
    now = time.monotonic()
    if now - _logged_at.get(key, float("-inf")) < seconds:
        return False
    _logged_at[key] = now
    return True
