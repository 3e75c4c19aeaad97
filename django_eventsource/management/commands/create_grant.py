"""``manage.py create_grant TOKEN``: print a grant for curl and for other services."""

import shlex
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...conf import conf
from ...events import Event, action_error, must_be_named
from ...grants import make_grant
from .. import cli

EXAMPLES = ("ping", "message", "news", "sample")
"""The actions to show for a class that allows every action. They are one more than its ``LISTEN``,
``FINISH`` and ``RETRY``, so that one is left."""


class Command(BaseCommand):
    """Print a grant, and the curl lines that use it."""

    help = "Prints a signed, expiring grant to listen or send, and the curl lines that use it."

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
            help="Grant the right to send every action except the class's LISTEN, FINISH and "
            "RETRY, and those of the package's own events.",
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
            help="Seconds for which the grant is valid (default: EVENTSOURCE_GRANT_SECONDS).",
        )
        cli.add_url_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the grant on the first line, then a curl line for each right.

        :raises CommandError: if the token or an option is not valid, or if --send allows no
            action of the event class.
        """
        token, actions = options["token"], options["action"]
        send = options["send"] or actions is not None
        listen = options["listen"] or not send
        expires = options["expires"]
        seconds = None if expires is None else cli.positive_seconds("--expires", expires)
        try:
            grant = make_grant(token, listen=listen, send=send, actions=actions, seconds=seconds)
        except ValueError as error:
            raise CommandError(str(error)) from error
        lines = [grant]
        try:
            if listen:
                lines.append(self.listen_line(grant, options))
            if send:
                lines.append(self.send_line(grant, options))
        except cli.NotMountedError as error:
            self.stderr.write(f"No curl line: {error}", style_func=str)
        self.stdout.write("\n".join(lines))

    def listen_line(self, grant: str, options: cli.Options) -> str:
        """Return the curl line that listens."""
        url = cli.event_url(conf.event_class.LISTEN, options["token"], options)
        return shlex.join(["curl", "-N", "-H", f"Authorization: Bearer {grant}", url])

    def send_line(self, grant: str, options: cli.Options) -> str:
        """Return the curl line that sends an event."""
        event_class = conf.event_class
        value = '"hello"' if event_class.content_type == "application/json" else "hello"
        action = options["action"][0] if options["action"] else _example_action(event_class)
        url = cli.event_url(action, options["token"], options)
        return shlex.join(["curl", "-H", f"Authorization: Bearer {grant}", "-d", value, url])


def _example_action(event_class: type[Event]) -> str:
    """Return an action that a grant to send allows.

    :raises CommandError: if the class has none.
    """
    for action in (*event_class.ACTIONS, *EXAMPLES):
        if action_error(event_class, action) is None and not must_be_named(event_class, action):
            return action
    raise CommandError(
        f"--send allows no action of {event_class.__name__}, whose ACTIONS are "
        f"{', '.join(event_class.ACTIONS) or 'empty'}. Name an action with --action."
    )
