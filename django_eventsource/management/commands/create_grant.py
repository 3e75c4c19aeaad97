"""``manage.py create_grant TOKEN``: a grant for curl and other services."""

from __future__ import annotations

import shlex
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ... import endpoints
from ...conf import conf
from ...events import Event
from ...grants import make_grant


class Command(BaseCommand):
    """Print a grant, and the curl lines that use it."""

    help = "Prints a signed, expiring grant to listen or send, and how to use it with curl."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of the grant."""
        parser.add_argument("token", metavar="TOKEN", help="The token that the grant is for.")
        parser.add_argument(
            "--listen",
            action="store_true",
            help="Grant the right to listen (the default without --send and --action).",
        )
        parser.add_argument(
            "--send",
            action="store_true",
            help="Grant the right to send every action except the class's FINISH and RETRY.",
        )
        parser.add_argument(
            "--action",
            action="append",
            metavar="ACTION",
            help="Grant the right to send this action, whichever it is; repeatable.",
        )
        parser.add_argument(
            "--expires",
            metavar="SECONDS",
            help="How long the grant is valid (default: EVENTSOURCE_GRANT_SECONDS).",
        )
        endpoints.add_url_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the grant on the first line, then a curl line for each right.

        :raises CommandError: for a bad token or option, and for --send with a class of which it
            covers no action.
        """
        token, actions = options["token"], options["action"]
        send = options["send"] or actions is not None
        listen = options["listen"] or not send
        expires = options["expires"]
        seconds = None if expires is None else endpoints.positive_seconds("--expires", expires)
        try:
            grant = make_grant(token, listen=listen, send=send, actions=actions, seconds=seconds)
        except ValueError as error:
            raise CommandError(str(error)) from error
        lines = []
        unmounted = ""
        try:
            if listen:
                lines.append(self.listen_line(grant, options))
            if send:
                lines.append(self.send_line(grant, options))
        except endpoints.NotMountedError as error:
            unmounted = f"No curl line: {error}"
        self.stdout.write("\n".join([grant, *lines]))
        if unmounted:
            self.stderr.write(unmounted, style_func=str)

    def listen_line(self, grant: str, options: endpoints.Options) -> str:
        """Give the curl line that listens."""
        url = endpoints.event_url(conf.event_class.LISTEN, options["token"], options)
        return shlex.join(["curl", "-N", "-H", f"Authorization: Bearer {grant}", url])

    def send_line(self, grant: str, options: endpoints.Options) -> str:
        """Give the curl line that sends an event."""
        event_class = conf.event_class
        value = '"hello"' if event_class.content_type == "application/json" else "hello"
        action = options["action"][0] if options["action"] else _an_action(event_class)
        url = endpoints.event_url(action, options["token"], options)
        return shlex.join(["curl", "-H", f"Authorization: Bearer {grant}", "-d", value, url])


def _an_action(event_class: type[Event]) -> str:
    """Return an action that a grant to send covers.

    :raises CommandError: when the class has none.
    """
    special = (event_class.RETRY, event_class.FINISH)
    ordinary = [action for action in event_class.ACTIONS if action not in special]
    if not ordinary:
        raise CommandError(
            f"--send covers no action of {event_class.__name__}, which allows "
            f"{', '.join(event_class.ACTIONS) or 'none'}: name one with --action."
        )
    return ordinary[0]
