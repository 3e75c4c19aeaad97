"""Management commands in the process of the test."""

from __future__ import annotations

import io
from typing import Any

from django.core.management import call_command
from django.core.management.base import CommandError


class Run:
    """One run of a command, its output and its error."""

    def __init__(self, command: str, *arguments: str, **options: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        self.error: CommandError | None = None
        try:
            call_command(command, *arguments, **{"stdout": out, "stderr": err} | options)
        except CommandError as error:
            self.error = error
        self.out = out.getvalue()
        self.err = err.getvalue()
        assert "\n" not in str(self.error)


class Terminal(io.StringIO):
    """An output that is a terminal."""

    def isatty(self) -> bool:
        return True
