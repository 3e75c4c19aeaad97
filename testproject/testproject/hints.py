"""The commands to type in another terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from django.conf import settings

DEFAULT_TOKEN = "42:42:42:42:42:42"
MACHINE_TOKEN = "demo:machine"
"""The token of the machine's load and memory."""
DEFAULT_PORT = 8000
# The hosts that the commands use by default.
HERE = ("127.0.0.1", "localhost", "0.0.0.0", "::")  # noqa: S104


def commands(token: str, host: str = HERE[0], port: int = DEFAULT_PORT) -> list[str]:
    """Return the commands that listen to a token, send an event to it, and close it."""
    manage = f"{short(sys.executable)} {short(settings.BASE_DIR / 'manage.py')}"
    where = "" if host in HERE else f" -H {shlex.quote(host)}"
    where += "" if port == DEFAULT_PORT else f" -P {port}"
    quoted = shlex.quote(token)
    return [
        f"{manage} listen_events {quoted}{where} -r 5000",
        f'{manage} send_event {quoted} ping "42"',
        f"{manage} send_event {quoted} close",
    ]


def short(path: str | Path) -> str:
    """Return a path, relative to the working directory if it is inside of it."""
    path, here = Path(path), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
