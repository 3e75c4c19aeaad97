"""``manage.py listen_events TOKEN``: print the events of a token when they arrive."""

import json
from typing import Any
from urllib.parse import urlencode

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...client._http import hide_secrets
from ...client.client import TRANSIENT_STATUSES, EventSourceClient
from ...conf import conf
from ...exceptions import ClientError
from ...protocol.frames import ServerSentEvent
from ...protocol.tokens import check_token
from .. import cli

DEFAULT_RETRY_MS = 3000


class Command(BaseCommand):
    """Listen until each token is closed, or until the options end the command."""

    help = "Listens to the events of a token over HTTP and prints them."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of the listener."""
        parser.add_argument(
            "tokens",
            metavar="TOKEN",
            nargs="+",
            help="One token or several, whose events arrive on one stream; or the http(s):// URL "
            "of any stream of server-sent events, which is requested without a grant.",
        )
        cli.add_url_arguments(parser)
        cli.add_http_arguments(parser)
        parser.add_argument(
            "-a", "--action", help="The action that opens a stream (default: the class's LISTEN)."
        )
        parser.add_argument(
            "-r",
            "--retry",
            metavar="MS",
            help="Milliseconds before a reconnection, until the server sets another time "
            f"(default: {DEFAULT_RETRY_MS}).",
        )
        parser.add_argument(
            "-k",
            "--keep-reconnecting",
            action="store_true",
            help="Reconnect also after a status of 429, 500, 502, 503 or 504.",
        )
        parser.add_argument(
            "--read-timeout",
            metavar="SECONDS",
            help="Seconds without data after which the command reconnects (default: no limit).",
        )
        parser.add_argument(
            "--last-event-id", metavar="ID", default="", help="Start after this event."
        )
        parser.add_argument(
            "--rewind",
            metavar="EVENTS",
            help="Start with stored events: a number (10), an age (30s, 5m, 2h), or all.",
        )
        parser.add_argument("--count", metavar="N", help="Exit after N events.")
        parser.add_argument(
            "--json",
            action="store_true",
            help="Print a JSON object with id, event and data on one line for each event.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Listen, and print the events.

        :raises CommandError: if an option is not valid, and at a failure that is final.
        """
        self.as_json: bool = options["json"]
        self.verbosity: int = options["verbosity"]
        self.failures: set[str] = set()
        self.tokens: list[str] = options["tokens"]
        count = options["count"]
        limit = None if count is None else cli.whole_number("--count", count)
        try:
            with self.make_client(options) as client:
                self.listen(client, limit)
        except KeyboardInterrupt:
            self.diagnose("Interrupted")
        except BrokenPipeError:
            cli.discard_output(self.stdout)
        except (ClientError, ValueError) as error:
            raise CommandError(str(error)) from error

    def make_client(self, options: cli.Options) -> EventSourceClient:
        """Return the client for the options."""
        url = self.make_url(options)
        grant = (
            None if cli.is_whole_url(self.tokens[0]) else cli.GrantAuth(self.tokens, listen=True)
        )
        retry, timeout = options["retry"], options["read_timeout"]
        return EventSourceClient(
            url,
            headers=cli.make_headers(options),
            auth=cli.make_auth(options, grant),
            last_event_id=options["last_event_id"],
            rewind=options["rewind"],
            retry_ms=DEFAULT_RETRY_MS if retry is None else cli.whole_number("-r/--retry", retry),
            retry_statuses=TRANSIENT_STATUSES if options["keep_reconnecting"] else (),
            read_timeout_seconds=None
            if timeout is None
            else cli.positive_seconds("--read-timeout", timeout),
            verify=cli.make_verify(options),
            on_diagnostic=self.diagnose,
            on_error=self.report,
        )

    def make_url(self, options: cli.Options) -> str:
        """Return the URL of the stream."""
        token, *further = self.tokens
        if cli.is_whole_url(token):
            others = cli.given_options(options, "host", "port", "prefix", "ssl", "url", "action")
            others += ["another TOKEN"] if further else []
            if others:
                raise CommandError(
                    f"{hide_secrets(token)!r} is a whole URL and cannot be combined with "
                    f"{', '.join(others)}."
                )
            return token
        action = options["action"] or conf.event_class.LISTEN
        url = cli.event_url(action, check_token(token), options)
        query = urlencode([("token", check_token(other)) for other in further])
        return f"{url}?{query}" if query else url

    def listen(self, client: EventSourceClient, limit: int | None) -> None:
        """Print events until each token is closed, until the limit, or until 204."""
        close_action = conf.event_class.FINISH
        open_tokens = len(set(self.tokens))
        for number, event in enumerate(client, start=1):
            self.failures.clear()
            self.stdout.write(self.format(event))
            self.stdout.flush()
            open_tokens -= event.event == close_action
            if not open_tokens or number == limit:
                return

    def format(self, event: ServerSentEvent) -> str:
        """Return the lines to print."""
        if self.as_json:
            text = self.format_json({"id": event.id, "event": event.event, "data": event.data})
        else:
            text = f"{event.event}: " + event.data.replace("\n", "\n  ")
        # The escapes for a terminal are valid JSON too.
        return cli.displayable(text, self.stdout)

    def format_json(self, fields: dict[str, str]) -> str:
        """Return JSON, in ASCII if the encoding of the output lacks a character."""
        text = json.dumps(fields, ensure_ascii=False)
        try:
            text.encode(cli.output_encoding(self.stdout))
        except UnicodeEncodeError:
            return json.dumps(fields)
        return text

    def diagnose(self, text: str) -> None:
        """Print a step of the client with a verbosity of 2 or more."""
        if self.verbosity >= 2:
            self.stderr.write(text, style_func=str)

    def report(self, error: ClientError) -> None:
        """Print a failure after which the client reconnects, once until the next event."""
        text = f"{error} Reconnecting."
        if self.verbosity >= 1 and text not in self.failures:
            self.failures.add(text)
            self.stderr.write(text)
