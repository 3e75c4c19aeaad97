"""``manage.py send_event TOKEN ACTION [DATA]``: publish events, directly or over HTTP."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...client.sender import EventSender
from ...conf import conf
from ...delivery.layer import is_process_local
from ...events import JSONEvent, is_durable
from ...history import get_history
from ...protocol.tokens import check_token
from ...publishing import Prepared, prepare, publish_in_batches
from .. import cli

PROGRESS_SECONDS = 0.1
"""Seconds between two updates of the progress display."""

READ_BYTES = 64 * 1024


class Publisher(NamedTuple):
    """The two steps of publishing, directly or over HTTP."""

    prepare: Callable[[str], Any]
    """Returns the item to publish for a value. Raises ``ValueError`` if the value is not valid."""
    publish: Callable[[Sequence[Any]], Iterable[list[str | None]]]
    """Publishes items in batches, and yields the ids of the events of each batch."""


class Command(BaseCommand):
    """Publish one event, or one for each line."""

    help = "Publishes an event to the listeners of a token, directly or over HTTP."

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        """Return a parser that accepts DATA after options as well as before them."""
        parser = super().create_parser(*args, **kwargs)
        # By default argparse decides at the first option that an optional DATA is missing.
        parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]
        return parser

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of the sender."""
        parser.add_argument("token", metavar="TOKEN", help="The token.")
        parser.add_argument("action", metavar="ACTION", help="The event's action.")
        parser.add_argument(
            "data",
            metavar="DATA",
            nargs="?",
            help="The event's value; - reads it from standard input (default: an empty value).",
        )
        parser.add_argument(
            "-j", "--json", action="store_true", help="Publish only if DATA is JSON."
        )
        parser.add_argument(
            "--lines",
            action="store_true",
            help="Publish each line of DATA, or of standard input, as one event.",
        )
        parser.add_argument(
            "--key",
            help="Publish only if the token has no event with this key; otherwise print the id of "
            "that event. Over HTTP the keys of each user and of each grant are separate.",
        )
        cli.add_url_arguments(parser)
        cli.add_http_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Publish, and print the ids.

        :raises CommandError: if an event was not published.
        """
        self.token: str = options["token"]
        self.action: str = options["action"]
        self.as_json: bool = options["json"]
        self.key: str | None = options["key"]
        self.verbosity: int = options["verbosity"]
        if self.key is not None and options["lines"]:
            raise CommandError("--key is for one event: it cannot be used with --lines.")
        try:
            with self.open_publisher(options) as publisher:
                if options["lines"]:
                    data = "-" if options["data"] is None else options["data"]
                    LinePublisher(self, publisher).publish(_open_data(data))
                else:
                    data = _open_data(options["data"] or "").read()
                    if options["data"] == "-":
                        # The line end at the end of a text is not part of the value.
                        data = data.removesuffix(b"\n").removesuffix(b"\r")
                    for ids in publisher.publish([publisher.prepare(self.decode(data))]):
                        self.print_ids(ids)
        except KeyboardInterrupt:
            raise CommandError("Interrupted.") from None
        except BrokenPipeError:
            cli.discard_output(self.stdout)
            raise CommandError("Standard output is closed, but the event was published.") from None
        except cli.reportable_errors() as error:
            raise CommandError(cli.error_message(error)) from error

    @contextlib.contextmanager
    def open_publisher(self, options: cli.Options) -> Iterator[Publisher]:
        """Return a direct publisher, or one over HTTP if the options name a server."""
        check_token(self.token)
        if not cli.given_options(options, "host", "port", "prefix", "ssl", "url"):
            self.check_direct(options)
            event_class = conf.event_class
            yield Publisher(
                lambda value: prepare(self.token, self.action, value, event_class, self.key),
                publish_directly,
            )
            return
        auth = cli.make_auth(options, cli.GrantAuth(self.token, action=self.action))
        if self.key is not None and isinstance(auth, cli.GrantAuth):
            raise CommandError(
                "--key over HTTP needs the same sender in each attempt, but without a user each "
                "attempt is signed with a new grant: pass -u/--user, or a grant of create_grant "
                "with --header 'Authorization: Bearer GRANT'."
            )
        content_type = conf.event_class.content_type
        with EventSender(
            cli.event_url(self.action, self.token, options),
            headers=cli.make_headers(options),
            auth=auth,
            verify=cli.make_verify(options),
            content_type=f"{content_type}; charset=utf-8"
            if content_type.startswith("text/")
            else content_type,
        ) as sender:
            yield Publisher(
                str, lambda values: ([sender.send(value, self.key)] for value in values)
            )

    def check_direct(self, options: cli.Options) -> None:
        """Check that an event of this process can reach a listener.

        :raises CommandError: if it cannot, or if there are options for HTTP.
        """
        others = cli.given_options(options, "user", "password", "header", "cafile", "insecure")
        if others:
            raise CommandError(
                f"{', '.join(others)}: only valid over HTTP. Name the server with --url or -H."
            )
        event_class = conf.event_class
        if is_durable(event_class):
            history = get_history()
            if not history.shared:
                raise CommandError(
                    f"{type(history).__name__} stores events in the memory of this process, so "
                    "no listener would receive them. Send to the server with --url, or set "
                    "EVENTSOURCE_HISTORY to a history that processes share."
                )
        elif is_process_local():
            raise CommandError(
                f"Events of {event_class.__name__} are not stored, and the channel layer is in "
                "the memory of this process, so no listener would receive them. Send to the "
                "server with --url, or set CHANNEL_LAYERS to a channel layer that processes share."
            )

    def decode(self, data: bytes) -> str:
        """Return the value of UTF-8 bytes.

        :raises ValueError: if they are not UTF-8 or, with --json, not JSON.
        """
        try:
            value = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"DATA is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}."
            ) from error
        if self.as_json:
            JSONEvent(self.token, self.action, value)
        return value

    def print_ids(self, ids: list[str | None]) -> None:
        """Print and flush the ids of events that have one."""
        lines = [event_id for event_id in ids if event_id is not None]
        if lines and sys.stdout is not None:
            self.stdout.write(cli.displayable("\n".join(lines), self.stdout))
            self.stdout.flush()


def publish_directly(prepared: Sequence[Prepared]) -> Iterator[list[str | None]]:
    """Publish events, and yield the ids of each batch."""
    for batch in publish_in_batches(prepared):
        yield [event.id for event in batch]


class LinePublisher:
    """Publish each line as an event, and report the progress."""

    def __init__(self, command: Command, publisher: Publisher) -> None:
        self.command = command
        self.publisher = publisher
        self.published = 0
        """The number of published events."""
        self.unconfirmed = 0
        """The number of events that are being published."""
        self.started_at = time.monotonic()
        self.shown_at = self.started_at
        self.shows_progress = command.verbosity >= 1 and command.stderr.isatty()

    def publish(self, data: BinaryIO) -> None:
        """Publish each line when it arrives.

        :raises CommandError: at the first line that cannot be published, and at Ctrl-C.
        """
        try:
            for lines in read_lines(data):
                self.publish_all(lines)
        except KeyboardInterrupt:
            more = f", and perhaps some of {self.unconfirmed} more" if self.unconfirmed else ""
            raise CommandError(f"Interrupted: {self.count()} published{more}.") from None
        except BrokenPipeError:
            cli.discard_output(self.command.stdout)
            raise CommandError(f"Standard output is closed: {self.count()} published.") from None
        except cli.reportable_errors() as error:
            raise CommandError(
                f"Line {self.published + 1}: {cli.error_message(error)} "
                f"Before it, {self.count()} published."
            ) from error
        finally:
            # Remove the progress display from the terminal.
            self.show("\r\x1b[K")
        if self.command.verbosity >= 1:
            self.command.stderr.write(f"{self.count()} published, {self.rate()}.", style_func=str)

    def publish_all(self, lines: Sequence[bytes]) -> None:
        """Publish lines that arrived together, up to the first that is not valid.

        :raises ValueError: if one is not valid.
        """
        items = []
        failure: Exception | None = None
        for line in lines:
            try:
                value = self.command.decode(line.removesuffix(b"\r"))
                items.append(self.publisher.prepare(value))
            except cli.reportable_errors() as error:
                failure = error
                break
        self.unconfirmed = len(items)
        for ids in self.publisher.publish(items):
            self.published += len(ids)
            self.unconfirmed -= len(ids)
            self.command.print_ids(ids)
            self.show_progress()
        if failure is not None:
            raise failure

    def count(self) -> str:
        """Return the number of published events as text."""
        return "1 event" if self.published == 1 else f"{self.published} events"

    def rate(self) -> str:
        """Return the rate of publishing as text."""
        seconds = max(time.monotonic() - self.started_at, 0.001)
        return f"{self.published / seconds:.0f} a second"

    def show_progress(self) -> None:
        """Update the progress display of a terminal, if the last update is old enough."""
        now = time.monotonic()
        if now - self.shown_at >= PROGRESS_SECONDS:
            self.shown_at = now
            self.show(f"\r{self.count()}, {self.rate()}\x1b[K")

    def show(self, text: str) -> None:
        """Write to a terminal without a line end."""
        if self.shows_progress:
            self.command.stderr.write(text, style_func=str, ending="")
            self.command.stderr.flush()


def read_lines(data: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines that are available, without line ends; wait for one if there are none."""
    rest = b""
    while chunk := data.read1(READ_BYTES):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _open_data(data: str) -> BinaryIO:
    if data == "-":
        if sys.stdin is None:
            raise CommandError("Standard input is closed, so there is no DATA to read.")
        return sys.stdin.buffer
    # Python represents the bytes of an argument that are not UTF-8 as surrogates.
    return io.BytesIO(data.encode("utf-8", "surrogateescape"))
