"""The demo site as its users run it: a process, with a database of its own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANAGE = ROOT / "testproject" / "manage.py"
DEADLINE = 60.0
"""Seconds after which a process that says nothing fails its test."""

PUBLISH = """
import sys, django
django.setup()
from django_eventsource import publish
token, action, *values = sys.argv[1:]
for value in values:
    publish(token, action, value)
"""


class DemoSite:
    """A demo site that can be started again on the port and the database that it had."""

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
        """The demo page."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def errors(self) -> str:
        """What the site has written to its standard error."""
        return (self.directory / "stderr").read_text()

    def start(self) -> str:
        """Start it in a process group of its own; give the line in which it says where it is."""
        with (self.directory / "stderr").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(MANAGE), "demo", "--port", str(self.port)],
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        select.select([self.process.stdout], [], [], DEADLINE)
        line = self.process.stdout.readline()
        match = re.search(r":(\d+)/", line)
        assert match, self.errors
        self.port = int(match[1])
        return line

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; give the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        try:
            return self.process.wait(DEADLINE)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()

    def kill(self) -> None:
        """End it as a power failure does, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)

    def publish(self, token: str, action: str, *values: str) -> None:
        """Publish events, one for each value, in another process."""
        self.run(PUBLISH, token, action, *values)

    def run(self, code: str, *args: str) -> None:
        """Run code with the site's settings, in another process."""
        subprocess.run(
            [sys.executable, "-c", code, *args], env=self.env, check=True, timeout=DEADLINE
        )
