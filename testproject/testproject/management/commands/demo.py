"""``manage.py demo``: the demo site, with the machine's figures."""

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
    """Daphne, which says why it cannot listen."""

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
            help="Where to listen (default: %(default)s). A name other than this machine's own "
            "must be in ALLOWED_HOSTS as well.",
        )
        parser.add_argument(
            "--port",
            type=int,
            default=DEFAULT_PORT,
            help="Which port to listen on; 0 picks a free one (default: %(default)s).",
        )

    def handle(self, *args: Any, host: str, port: int, **options: Any) -> None:
        # Until daphne takes them. A script's background job is started with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        server = DemoServer(
            ASGIStaticFilesHandler(Handover(get_asgi_application())),
            endpoints=build_endpoint_description_strings(host=address(host, port), port=port),
            ready_callable=lambda: self.say(host, *server.listening_addresses[0]),
        )
        publisher = Publisher()
        try:
            call_command("migrate", verbosity=0, interactive=False)
            publisher.start()
            server.run()
        except KeyboardInterrupt:
            pass  # before daphne was there to take it
        finally:
            if publisher.is_alive():
                publisher.stop()
        if server.failure is not None:
            reason = getattr(server.failure, "socketError", server.failure)
            raise CommandError(
                f"Cannot listen on {host}:{port}: {getattr(reason, 'strerror', None) or reason}. "
                "Choose another port with --port (or `make demo PORT=...`)."
            )

    def say(self, host: str, _: str, port: int) -> None:
        """Say where the demo is, and what to do with it."""
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        lines = [
            f"The demo is at {self.style.SUCCESS(url)} (Ctrl-C ends it). In another terminal:",
            "",
            *[f"    {command}" for command in commands(DEFAULT_TOKEN, host, port)],
            "",
        ]
        self.stdout.write("\n".join(lines))
        self.stdout.flush()


def address(host: str, port: int) -> str:
    """Give a host's IP address, which is what Twisted wants.

    :raises CommandError: when it has none, or the port is no port.
    """
    if not 0 <= port <= 65535:
        raise CommandError(f"The port must be 0 to 65535, not {port}.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"{host!r} is no host to listen on: {reason}.") from error
    return str(found[0][4][0])
