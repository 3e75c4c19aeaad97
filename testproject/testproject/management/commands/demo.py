"""``manage.py demo``: serve the demo site and publish this machine's figures."""

from __future__ import annotations

import signal
import socket
from typing import Any

from daphne.endpoints import build_endpoint_description_strings
from daphne.server import Server
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser

from django_eventsource.asgi import Handover
from testproject.hints import DEFAULT_PORT, DEFAULT_TOKEN, commands
from testproject.machine import Publisher


class DemoServer(Server):  # type: ignore[misc]
    """A daphne server that keeps the reason why it cannot listen."""

    failure: BaseException | None = None

    def listen_error(self, failure: Any) -> None:
        self.failure = failure.value
        self.stop()


class Command(BaseCommand):
    """Serve the demo site."""

    help = (
        "Serve the demo site with daphne, and publish this machine's load and memory once per "
        "second. Ctrl-C ends both."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            help="Host to listen on (default: %(default)s). A name other than this machine's own "
            "must also be in ALLOWED_HOSTS.",
        )
        parser.add_argument(
            "--port",
            type=int,
            default=DEFAULT_PORT,
            help="Port to listen on; 0 chooses a free one (default: %(default)s).",
        )

    def handle(self, *args: Any, host: str, port: int, **options: Any) -> None:
        # Until daphne installs its handlers. Shells start background jobs with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        server = DemoServer(
            ASGIStaticFilesHandler(Handover(get_asgi_application())),
            endpoints=build_endpoint_description_strings(host=address(host, port), port=port),
            ready_callable=lambda: self.print_urls(host, *server.listening_addresses[0]),
        )
        publisher = Publisher()
        try:
            call_command("migrate", verbosity=0, interactive=False)
            publisher.start()
            server.run()
        except KeyboardInterrupt:
            pass  # before daphne has installed its handlers
        finally:
            if publisher.is_alive():
                publisher.stop()
        if server.failure is not None:
            reason = getattr(server.failure, "socketError", server.failure)
            raise CommandError(
                f"Cannot listen on {host}:{port}: {getattr(reason, 'strerror', None) or reason}. "
                "Choose another port with --port (or `make demo PORT=...`)."
            )

    def print_urls(self, host: str, _: str, port: int) -> None:
        """Print the URL of the demo, and the commands to try."""
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        lines = [
            f"The demo is at {self.style.SUCCESS(url)} (Ctrl-C ends it). "
            'Open "Live ping" there, and type in another terminal:',
            "",
            *[f"    {command}" for command in commands(DEFAULT_TOKEN, host, port)],
            "",
        ]
        self.stdout.write("\n".join(lines))
        self.stdout.flush()


def address(host: str, port: int) -> str:
    """Return the IP address of a host, which Twisted requires.

    :raises CommandError: if the host has none, or the port is not a valid port.
    """
    if not 0 <= port <= 65535:
        raise CommandError(f"The port must be 0 to 65535, not {port}.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"{host!r} is not a host to listen on: {reason}.") from error
    return str(found[0][4][0])
