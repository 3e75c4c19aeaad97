"""Wake-ups through SQLite's ``data_version``, which changes when another connection commits."""

import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..wake_ups import Groups, WakeUps


class SqliteWakeUps(WakeUps):
    """Wake-ups at each commit, also at those to other tables and those of this process.

    :param name: the ``NAME`` of the database: a path or a URI.
    """

    sends = False

    interval_seconds = 0.01
    """Seconds between two reads of the version. One takes some ten microseconds."""

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self._uri = str(name)
        if self._uri.startswith("file:"):
            self._path = url2pathname(urlsplit(self._uri).path)
        else:
            self._path = str(Path(name).absolute())
            # SQLite would create a file that is about to be replaced.
            self._uri = f"{Path(self._path).as_uri()}?mode=rw"

    def watch(self) -> Generator[Groups, None, None]:
        while True:
            # It is read before the connection is opened, so a replacement between is detected.
            file = self._file()
            connection = sqlite3.connect(self._uri, uri=True, timeout=0, isolation_level=None)
            with closing(connection):
                yield from self._watch(connection, file)

    def _watch(
        self, connection: sqlite3.Connection, file: tuple[int, int]
    ) -> Generator[Groups, None, None]:
        """Yield until the file has been replaced. The first version counts as a change."""
        version: int | None = 0
        while self._file() == file:
            before, version = version, _data_version(connection)
            yield () if version == before else None
            time.sleep(self.interval_seconds)

    def _file(self) -> tuple[int, int]:
        # SQLite does not notice a replacement. Opening and closing the file would drop the locks
        # that SQLite's connections of this process hold on it.
        found = os.stat(self._path)
        return found.st_dev, found.st_ino


def _data_version(connection: sqlite3.Connection) -> int | None:
    """Return the version; ``None``, which is a change, while a writer has locked the database."""
    try:
        # All rows are read, because a statement that is not finished holds a lock.
        [(version,)] = connection.execute("PRAGMA data_version").fetchall()
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return None
    return int(version)
