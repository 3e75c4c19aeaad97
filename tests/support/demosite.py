"""The demo site as users run it: a process with a database of its own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import PROCESS_PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
MANAGE = ROOT / "testproject" / "manage.py"

PUBLISH = """
import sys, django
django.setup()
from django_eventsource import publish
token, action, *values = sys.argv[1:]
for value in values:
    publish(token, action, value)
"""


class DemoSite:
    """A demo site that can be started again on the same port and database."""

    command: tuple[str, ...] = (sys.executable, str(MANAGE))
    """The command that runs ``manage.py``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "testproject.settings",
            "EVENTSOURCE_DEMO_DATABASE": str(directory / "demo.sqlite3"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "testproject")]),
        }

    @property
    def url(self) -> str:
        """The URL of the start page."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def live_url(self) -> str:
        """The URL of the page with the chart and the events of a token."""
        return f"{self.url}live/"

    @property
    def errors(self) -> str:
        """What the site has written to its standard error."""
        return (self.directory / "stderr").read_text()

    def start(self) -> str:
        """Start it in a process group of its own; return the line with its URL."""
        with (self.directory / "stderr").open("a") as errors:
            self.process = subprocess.Popen(
                [*self.command, "demo", "--port", str(self.port)],
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        select.select([self.process.stdout], [], [], PROCESS_PATIENCE_SECONDS)
        line = self.process.stdout.readline()
        match = re.search(r":(\d+)/", line)
        assert match, self.errors
        self.port = int(match[1])
        return line

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        try:
            return self.process.wait(PROCESS_PATIENCE_SECONDS)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()

    def kill(self) -> None:
        """Kill the process if it runs, as a power failure does."""
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)

    def publish(self, token: str, action: str, *values: str) -> None:
        """Publish events, one for each value, in another process."""
        self.run(PUBLISH, token, action, *values)

    def run(self, code: str, *args: str) -> str:
        """Run code with the site's settings, in another process; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=self.env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PROCESS_PATIENCE_SECONDS,
        )
        return done.stdout
