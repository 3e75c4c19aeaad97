"""Processes for the tests: Python code with Django set up, and servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings

from tests.support.waiting import PROCESS_PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]

PLAIN = "tests.support.plain_asgi:application"
"""Django's application without the wrapper: streams are served inside of it."""

POSTGRES = {
    "BACKEND": "django_eventsource.history.database.DatabaseHistory",
    "OPTIONS": {"USING": "postgres"},
}


def environment(**overrides: Any) -> dict[str, str]:
    """Return the environment of a process on the test databases, with changed settings."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "testproject.test_settings",
        "EVENTSOURCE_TEST_DIR": str(settings.TEST_DIR),
        "EVENTSOURCE_TEST_DATABASE": str(settings.TEST_DIR / "test.sqlite3"),
        "EVENTSOURCE_TEST_SETTINGS": json.dumps(overrides),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), str(ROOT / "testproject"), os.environ.get("PYTHONPATH")])
        ),
        "PYTHONUNBUFFERED": "1",
    }


def start_python(code: str, *args: object, **overrides: Any) -> subprocess.Popen[str]:
    """Start a Python process with Django set up before the code."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import django; django.setup()\n{code}", *map(str, args)],
        env=environment(**overrides),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, *args: object, **overrides: Any) -> str:
    """Run such a process to its end and return what it printed."""
    process = start_python(code, *args, **overrides)
    out, err = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    assert process.returncode == 0, err
    return out


class Server:
    """An ASGI server process on a socket that the test keeps.

    The socket listens before the server runs. So a test need not wait for the server, and
    connections made during a restart wait in the socket's queue.
    """

    def __init__(self, kind: str, *options: str, **overrides: Any) -> None:
        self.kind, _, path = kind.partition(" ")
        self.application = {"plain": PLAIN, "": "testproject.asgi:application"}.get(path, path)
        self.options = options
        self.overrides = overrides
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.socket.getsockname()[1]
        self.address = ("127.0.0.1", self.port)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = settings.TEST_DIR / f"{self.kind}-{self.port}.log"
        if self.kind == "granian":
            self.socket.close()  # it takes no socket that listens already

    def start(self) -> None:
        """Start the process."""
        fd = str(self.socket.fileno())
        port = str(self.port)
        commands = {
            "daphne": ["daphne", "-v", "0", "--fd", fd],
            # uvicorn would use uvloop and httptools where they are installed. Options of a test
            # come later, and replace these.
            "uvicorn": [
                *["uvicorn", "--log-level", "warning", "--fd", fd],
                *["--loop", "asyncio", "--http", "h11"],
            ],
            "hypercorn": ["hypercorn", "-w", "0", "--bind", f"fd://{fd}", "--log-level", "ERROR"],
            "gunicorn": ["gunicorn", "-k", "asgi", "--bind", f"fd://{fd}", "--log-level", "error"],
            "granian": [
                *["granian", "--interface", "asginl", "--port", port, "--log-level", "error"],
                *["--backpressure", "10000"],
            ],
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *[sys.executable, "-W", "ignore", "-m", *commands[self.kind]],
                    *[*self.options, self.application],
                ],
                env=environment(**self.overrides),
                pass_fds=[] if self.kind == "granian" else [self.socket.fileno()],
                stdout=log,
                stderr=log,
            )
        if self.kind == "granian":
            self._until_ready()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + PROCESS_PATIENCE_SECONDS
        while True:
            try:
                socket.create_connection(self.address, PROCESS_PATIENCE_SECONDS).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> int:
        """End the process, by default at once, and return its exit status."""
        assert self.process is not None
        workers = []
        if how == signal.SIGKILL:
            # granian's workers outlive their supervisor when that is killed.
            workers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        return self.process.wait(PROCESS_PATIENCE_SECONDS)

    def close(self) -> None:
        """End the process if it runs, and close the socket."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        self.socket.close()


@contextmanager
def serve(kind: str, *options: str, **overrides: Any) -> Iterator[Server]:
    """Run a server during a block."""
    server = Server(kind, *options, **overrides)
    try:
        server.start()
        yield server
    finally:
        server.close()
