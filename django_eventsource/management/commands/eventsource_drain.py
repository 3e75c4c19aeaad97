"""``manage.py eventsource_drain``: drain the server processes of this host."""

import os
import socket
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...history import get_history
from ...operations.drain import request_drain
from .. import cli

MARGIN_SECONDS = 1.0
"""Seconds until the processes have received the request and sent the last bytes."""


class Command(BaseCommand):
    """End the streams of the server processes of this host, before they are stopped."""

    help = (
        "Ends the streams of the server processes of this host one after the other, and lets "
        "them open no others. Returns when that is done. Their readiness view then responds with "
        "503. To serve streams again, restart the processes."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--seconds",
            default="10",
            metavar="SECONDS",
            help="Seconds over which the ends of the streams are spread (default: 10).",
        )
        parser.add_argument(
            "--pid",
            type=int,
            metavar="PID",
            help="Drain only the process with this id, or the workers of this server.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Request the processes to drain, and wait for it.

        :raises CommandError: if an option is not valid, if the history belongs to one process, if
            its store fails, and at Ctrl-C.
        """
        seconds = cli.positive_seconds("--seconds", options["seconds"])
        check_pid(options["pid"])
        try:
            self.drain(seconds, options)
        except KeyboardInterrupt:
            raise CommandError("Interrupted: a drain that has begun continues.") from None

    def drain(self, seconds: float, options: cli.Options) -> None:
        """Send the request, and wait."""
        try:
            if not get_history().shared:
                raise CommandError(
                    "No server process can receive the request, because the history belongs to "
                    "one process. Use DatabaseHistory or RedisHistory."
                )
            request_drain(seconds, options["pid"])
        except cli.reportable_errors() as error:
            raise CommandError(cli.error_message(error)) from error
        if options["verbosity"]:
            self.stdout.write(f"Draining {socket.gethostname()} for {seconds:g} s.")
        time.sleep(seconds + MARGIN_SECONDS)


def check_pid(pid: int | None) -> None:
    """Check that a process runs, because no other one would drain.

    :raises CommandError: if it does not.
    """
    if pid is None:
        return
    if pid <= 0:
        raise CommandError(f"--pid must be the id of a process, not {pid}.")
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # the process of another user
    except (ProcessLookupError, OverflowError):
        raise CommandError(
            f"--pid: no process of {socket.gethostname()} has the id {pid}. Pass the id of the "
            "server's main process, and run this command on its host."
        ) from None
