"""A MariaDB server for the tests, on a unix socket; or the reason why it cannot run."""

from __future__ import annotations

import getpass
import importlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""Seconds in which the server must start or stop."""

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_SERVER = shutil.which("mariadbd", path=_PATH)
_INSTALL = shutil.which("mariadb-install-db", path=_PATH)


def _has_driver() -> bool:
    """Whether mysqlclient is installed, or PyMySQL, which then stands in for it."""
    for name in ("MySQLdb", "pymysql"):
        try:
            driver = importlib.import_module(name)
        except ImportError:
            continue
        if name == "pymysql":
            driver.install_as_MySQLdb()
            driver.connect = _closing(driver)
        return True
    return False


def _closing(pymysql: Any) -> type:
    """Return PyMySQL's connection class, changed to close its socket if it cannot connect.

    PyMySQL leaves the unix socket of such an attempt to the garbage collector, which
    warns of it in a later test.
    """

    class Connection(pymysql.connections.Connection):
        def connect(self, sock: None = None) -> None:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self.unix_socket)
            except OSError as error:
                sock.close()
                raise pymysql.OperationalError(2003, str(error)) from error
            super().connect(sock)

    return Connection


if not (_SERVER and _INSTALL):
    MISSING = "no mariadbd was found: install MariaDB's server (Debian: mariadb-server)"
elif not _has_driver():
    MISSING = "no driver for MariaDB was found: pip install PyMySQL (or mysqlclient)"
else:
    MISSING = ""


class Server:
    """The server process and its data, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "socket"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()
        # As root, the server requires the name of its user. Other users cannot open the socket.
        self.common = ["--no-defaults", f"--user={getpass.getuser()}"]
        self.common += [f"--datadir={directory / 'data'}"]
        # At its start the server removes all temporary tables in this directory.
        (directory / "tmp").mkdir()
        self.common += [f"--tmpdir={directory / 'tmp'}"]
        with self._log() as log:
            done = subprocess.run(
                [
                    str(_INSTALL),
                    *self.common,
                    "--auth-root-authentication-method=normal",
                    "--skip-test-db",
                ],
                check=False,
                stdout=log,
                stderr=log,
            )
        if done.returncode:
            raise RuntimeError((self.directory / "log").read_text(errors="replace"))

    def _log(self):
        return (self.directory / "log").open("ab")

    def start(self) -> None:
        """Start the process, and wait until it accepts connections."""
        with self._log() as log:
            self.process = subprocess.Popen(
                [
                    str(_SERVER),
                    *self.common,
                    f"--socket={self.socket}",
                    f"--pid-file={self.directory / 'pid'}",
                    "--skip-networking",
                    "--character-set-server=utf8mb4",
                    "--innodb-flush-log-at-trx-commit=0",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.directory / "log").read_text(errors="replace"))
            time.sleep(0.05)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        """Stop the process in order."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(SECONDS)
