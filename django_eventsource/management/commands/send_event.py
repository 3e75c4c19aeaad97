"""``manage.py send_event TOKEN ACTION [DATA]``: publish events, here or over HTTP."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ... import endpoints
from ...conf import conf
from ...events import JSONEvent, is_durable
from ...history import get_history
from ...layers import is_process_local
from ...publishing import Prepared, prepare, publish_in_batches
from ...sender import EventSender
from ...tokens import check_token

PROGRESS_SECONDS = 0.1
"""The time between two updates of the progress display."""

READ_BYTES = 64 * 1024


class Send(NamedTuple):
    """How events are published."""

    prepare: Callable[[str], Any]
    """Makes what is published of a value, or raises ``ValueError``."""
    send: Callable[[Sequence[Any]], Iterable[list[str | None]]]
    """Publishes such, and gives the events' ids as far as it has come."""


class Command(BaseCommand):
    """Publish one event, or one for each line."""

    help = "Publishes an event to the listeners of a token, directly or over HTTP."

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        """Make a parser that finds DATA after options as well as before them."""
        parser = super().create_parser(*args, **kwargs)
        # argparse otherwise takes an optional positional for left out at the first option.
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
            help="The event's value; - reads standard input (default: an empty value).",
        )
        parser.add_argument(
            "-j", "--json", action="store_true", help="Check first that DATA is JSON."
        )
        parser.add_argument(
            "--lines",
            action="store_true",
            help="Publish every line of DATA, or of standard input, as an event of its own.",
        )
        endpoints.add_url_arguments(parser)
        endpoints.add_http_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Publish, and print the ids.

        :raises CommandError: when something was not published.
        """
        self.token: str = options["token"]
        self.action: str = options["action"]
        self.as_json: bool = options["json"]
        self.verbosity: int = options["verbosity"]
        try:
            with self.make_send(options) as send:
                if options["lines"]:
                    data = "-" if options["data"] is None else options["data"]
                    Lines(self, send).publish(_open_data(data))
                else:
                    data = _open_data(options["data"] or "").read()
                    if options["data"] == "-":
                        # A text ends with a line end; an event's last line does not.
                        data = data.removesuffix(b"\n").removesuffix(b"\r")
                    for ids in send.send([send.prepare(self.read(data))]):
                        self.print_ids(ids)
        except KeyboardInterrupt:
            raise CommandError("Interrupted.") from None
        except BrokenPipeError:
            endpoints.discard_output(self.stdout)
            raise CommandError("Nobody reads standard output; the event was published.") from None
        except endpoints.expected() as error:
            raise CommandError(endpoints.sentence(error)) from error

    @contextlib.contextmanager
    def make_send(self, options: endpoints.Options) -> Iterator[Send]:
        """Give what publishes a value: directly, or over HTTP if the options name a server."""
        check_token(self.token)
        if not endpoints.given(options, "host", "port", "prefix", "ssl", "url"):
            self.check_direct(options)
            yield Send(self.prepare, publish_directly)
            return
        grant = endpoints.GrantAuth(self.token, action=self.action)
        content_type = conf.event_class.content_type
        with EventSender(
            endpoints.event_url(self.action, self.token, options),
            headers=endpoints.make_headers(options),
            auth=endpoints.make_auth(options, grant),
            verify=endpoints.make_verify(options),
            content_type=f"{content_type}; charset=utf-8"
            if content_type.startswith("text/")
            else content_type,
        ) as sender:
            yield Send(str, lambda values: ([sender.send(value)] for value in values))

    def prepare(self, value: str) -> Prepared:
        """Check an event.

        :raises ValueError: when it is not acceptable.
        """
        return prepare(self.token, self.action, value, conf.event_class)

    def check_direct(self, options: endpoints.Options) -> None:
        """Check that an event that this process publishes can reach a listener.

        :raises CommandError: if it cannot, or if options say how to talk to a server.
        """
        others = endpoints.given(options, "user", "password", "header", "cafile", "insecure")
        if others:
            raise CommandError(
                f"{', '.join(others)}: only of use over HTTP. Name the server, with --url or -H."
            )
        event_class = conf.event_class
        if is_durable(event_class):
            history = get_history()
            if not history.shared:
                raise CommandError(
                    f"{type(history).__name__} stores events in the memory of this process: no "
                    "listener would receive them. Send through the server with --url, or "
                    "configure a history that processes share in EVENTSOURCE_HISTORY."
                )
        elif is_process_local():
            raise CommandError(
                f"Events of {event_class.__name__} are live only, and the channel layer is "
                "in this process's memory: no listener would receive them. Send through the "
                "server with --url, or configure a shared channel layer in CHANNEL_LAYERS."
            )

    def read(self, data: bytes) -> str:
        """Decode a value, and check that it is JSON if that was asked for.

        :raises ValueError: when it is not UTF-8, or not JSON.
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
        """Print the ids of events that have one, at once."""
        lines = [event_id for event_id in ids if event_id is not None]
        if lines and sys.stdout is not None:
            self.stdout.write(endpoints.displayable("\n".join(lines), self.stdout))
            self.stdout.flush()


def publish_directly(prepared: Sequence[Prepared]) -> Iterator[list[str | None]]:
    """Publish, and give the ids of each batch."""
    for batch in publish_in_batches(prepared):
        yield [event.id for event in batch]


class Lines:
    """Publish each line as an event, and tell how far it came."""

    def __init__(self, command: Command, send: Send) -> None:
        self.command = command
        self.send = send
        self.published = 0
        self.under_way = 0
        self.started = time.monotonic()
        self.shown = self.started
        self.shows = command.verbosity >= 1 and command.stderr.isatty()

    def publish(self, data: BinaryIO) -> None:
        """Publish the lines as they come.

        :raises CommandError: at the first line that cannot be published, or at Ctrl-C.
        """
        try:
            for lines in read_lines(data):
                self.publish_all(lines)
            self.clear_progress()
            self.summarize()
        except KeyboardInterrupt:
            self.clear_progress()
            raise CommandError(f"Interrupted: {self.count()} published{self.doubt()}.") from None
        except BrokenPipeError:
            endpoints.discard_output(self.command.stdout)
            raise CommandError(
                f"Nobody reads standard output any more: {self.count()} published."
            ) from None
        except endpoints.expected() as error:
            self.clear_progress()
            raise CommandError(
                f"Line {self.published + 1}: {endpoints.sentence(error)} "
                f"Before it, {self.count()} published."
            ) from error

    def publish_all(self, lines: Sequence[bytes]) -> None:
        """Publish lines that came together; those before a bad one first.

        :raises ValueError: when one cannot be published.
        """
        items = []
        failure: Exception | None = None
        for line in lines:
            try:
                items.append(self.send.prepare(self.command.read(line.removesuffix(b"\r"))))
            except endpoints.expected() as error:
                failure = error
                break
        self.under_way = len(items)
        for ids in self.send.send(items):
            self.published += len(ids)
            self.under_way -= len(ids)
            self.command.print_ids(ids)
            self.show_progress()
        if failure is not None:
            raise failure

    def doubt(self) -> str:
        """Say how many more may have been published when it was interrupted."""
        return f", and perhaps some of {self.under_way} more" if self.under_way else ""

    def count(self) -> str:
        """Say how many events were published."""
        return "1 event" if self.published == 1 else f"{self.published} events"

    def rate(self) -> str:
        """Say how fast."""
        seconds = max(time.monotonic() - self.started, 0.001)
        return f"{self.published / seconds:.0f} a second"

    def show_progress(self) -> None:
        """Update the display, where there is a terminal, but not at every event."""
        now = time.monotonic()
        if self.shows and now - self.shown >= PROGRESS_SECONDS:
            self.shown = now
            self.write(f"\r{self.count()}, {self.rate()}\x1b[K")

    def clear_progress(self) -> None:
        """Take the display off the terminal's line."""
        if self.shows:
            self.write("\r\x1b[K")

    def summarize(self) -> None:
        """Tell how many events were published, unless asked to be quiet."""
        if self.command.verbosity >= 1:
            self.command.stderr.write(f"{self.count()} published, {self.rate()}.", style_func=str)

    def write(self, text: str) -> None:
        """Write on the terminal, without a line end."""
        self.command.stderr.write(text, style_func=str, ending="")
        self.command.stderr.flush()


def read_lines(data: BinaryIO) -> Iterator[list[bytes]]:
    """Read lines without their ends: at a time what is there already, or the next one."""
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
            raise CommandError("Standard input is closed: there is no DATA to read.")
        return sys.stdin.buffer
    # What the shell passed may be no UTF-8: Python keeps such bytes as surrogates.
    return io.BytesIO(data.encode("utf-8", "surrogateescape"))
