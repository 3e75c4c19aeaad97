"""``manage.py listen_events TOKEN``: print the events of a token as they come."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ... import endpoints
from ...client import TRANSIENT_STATUSES, EventSourceClient
from ...conf import conf
from ...connection import hide_secrets
from ...exceptions import ClientError
from ...frames import ServerSentEvent
from ...tokens import check_token

DEFAULT_RETRY_MS = 3000


class Command(BaseCommand):
    """Listen until the token is closed, or as long as the options say."""

    help = "Listens to the events of a token over HTTP and prints them."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of the listener."""
        parser.add_argument(
            "tokens",
            metavar="TOKEN",
            nargs="+",
            help="The token, or several that one stream is to carry; or the http(s):// URL of "
            "any stream of server-sent events, which is requested as given and without a grant.",
        )
        endpoints.add_url_arguments(parser)
        endpoints.add_http_arguments(parser)
        parser.add_argument(
            "-a", "--action", help="The action that opens a stream (default: the class's LISTEN)."
        )
        parser.add_argument(
            "-r",
            "--retry",
            metavar="MS",
            help="The time before reconnecting, milliseconds, until the server sets another "
            f"(default: {DEFAULT_RETRY_MS}).",
        )
        parser.add_argument(
            "-k",
            "--keep-reconnecting",
            action="store_true",
            help="Reconnect after a status of 429, 500, 502, 503 or 504, too.",
        )
        parser.add_argument(
            "--read-timeout",
            metavar="SECONDS",
            help="The longest silence before the command reconnects (default: no limit).",
        )
        parser.add_argument(
            "--last-event-id", metavar="ID", default="", help="Go on after this event."
        )
        parser.add_argument("--count", metavar="N", help="End after N events.")
        parser.add_argument(
            "--json",
            action="store_true",
            help="Print a JSON object with id, event and data on one line for each event.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Listen.

        :raises CommandError: at the first failure that ends it.
        """
        self.as_json: bool = options["json"]
        self.verbosity: int = options["verbosity"]
        self.failures: set[str] = set()
        self.tokens: list[str] = options["tokens"]
        count = options["count"]
        limit = None if count is None else endpoints.whole_number("--count", count)
        try:
            with self.make_client(options) as client:
                self.listen(client, limit)
        except KeyboardInterrupt:
            self.diagnose("Interrupted")
        except BrokenPipeError:
            endpoints.discard_output(self.stdout)
        except (ClientError, ValueError) as error:
            raise CommandError(str(error)) from error

    def make_client(self, options: endpoints.Options) -> EventSourceClient:
        """Make the client that the options describe."""
        url = self.make_url(options)
        tokens = options["tokens"]
        grant = None
        if not endpoints.is_whole_url(tokens[0]):
            grant = endpoints.GrantAuth(tokens, listen=True)
        retry, timeout = options["retry"], options["read_timeout"]
        return EventSourceClient(
            url,
            headers=endpoints.make_headers(options),
            auth=endpoints.make_auth(options, grant),
            last_event_id=options["last_event_id"],
            retry_ms=DEFAULT_RETRY_MS
            if retry is None
            else endpoints.whole_number("-r/--retry", retry),
            retry_statuses=TRANSIENT_STATUSES if options["keep_reconnecting"] else (),
            read_timeout_seconds=None
            if timeout is None
            else endpoints.positive_seconds("--read-timeout", timeout),
            verify=endpoints.make_verify(options),
            on_diagnostic=self.diagnose,
            on_error=self.report,
        )

    def make_url(self, options: endpoints.Options) -> str:
        """Give the URL of the stream."""
        token, *further = options["tokens"]
        if endpoints.is_whole_url(token):
            others = endpoints.given(options, "host", "port", "prefix", "ssl", "url", "action")
            others += ["another TOKEN"] if further else []
            if others:
                raise CommandError(
                    f"{hide_secrets(token)!r} is a whole URL, which leaves no place for "
                    f"{', '.join(others)}."
                )
            return str(token)
        action = options["action"] or conf.event_class.LISTEN
        url = endpoints.event_url(action, check_token(token), options)
        query = urlencode([("token", check_token(other)) for other in further])
        return f"{url}?{query}" if query else url

    def listen(self, client: EventSourceClient, limit: int | None) -> None:
        """Print events until ``FINISH`` of every token, the limit, or 204."""
        finish = conf.event_class.FINISH
        unfinished = len(set(self.tokens))
        for number, event in enumerate(client, start=1):
            self.failures.clear()
            self.stdout.write(self.format(event))
            self.stdout.flush()
            unfinished -= event.event == finish
            if not unfinished or number == limit:
                return

    def format(self, event: ServerSentEvent) -> str:
        """Return the lines to print."""
        if self.as_json:
            text = self.format_json({"id": event.id, "event": event.event, "data": event.data})
        else:
            text = f"{event.event}: " + event.data.replace("\n", "\n  ")
        # The escapes for a terminal are JSON as well.
        return endpoints.displayable(text, self.stdout)

    def format_json(self, fields: dict[str, str]) -> str:
        """Return JSON, in ASCII if the output lacks a character."""
        text = json.dumps(fields, ensure_ascii=False)
        try:
            text.encode(endpoints.output_encoding(self.stdout))
        except UnicodeEncodeError:
            return json.dumps(fields)
        return text

    def diagnose(self, text: str) -> None:
        """Tell about a step of the client, when asked to be verbose."""
        if self.verbosity >= 2:
            self.stderr.write(text, style_func=str)

    def report(self, error: ClientError) -> None:
        """Print a failure that is answered by reconnecting, once until it is over."""
        text = f"{error} Reconnecting."
        if self.verbosity >= 1 and text not in self.failures:
            self.failures.add(text)
            self.stderr.write(text)
