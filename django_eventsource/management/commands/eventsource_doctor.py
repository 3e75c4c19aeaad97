"""``manage.py eventsource_doctor``: find the mistakes of a deployment."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage
from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...exceptions import ClientError
from ...history import get_history
from ...monitoring.doctor import path, settings, stores
from ...monitoring.doctor.canary import CANARY, Canary, Server
from ...monitoring.doctor.finding import Finding, page_of
from ...protocol.tokens import check_token
from .. import cli

DEFAULT_TIMEOUT_SECONDS = 10
LEVELS = ("INFO", "WARNING", "ERROR")
PERMISSION = (
    "Start this command with the SECRET_KEY of the server, or pass a user with the permission to "
    "listen with -u/--user."
)
HINTS: dict[int | None, list[str]] = {
    401: [PERMISSION],
    403: [PERMISSION],
    404: ["Pass the path before /<action>/<token> in --url, and a --token that it accepts."],
}
"""What to do about a response that is not a stream, by its status."""
CANARY_OPTIONS = (
    *("user", "password", "header", "cafile", "insecure"),
    *("token", "timeout", "idle"),
)
"""The options that need a server."""
FOUND = 1
COULD_NOT_RUN = 2
"""The exit statuses, besides 0."""


class Command(BaseCommand):
    """Check the settings and the stores, and send a canary through the public URL."""

    help = (
        "Finds mistakes of a deployment, each with its remedy: in the settings, in the stores, "
        "and with --url between a publisher and a listener of the public URL."
    )
    # The doctor runs the checks itself, and reports an error among them as a finding.
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of the doctor."""
        cli.add_url_arguments(parser)
        cli.add_http_arguments(parser)
        parser.add_argument(
            "--token",
            help="The token of the canary, for URL patterns that do not accept every token "
            f"(default: {stores.DOCTOR_TOKEN}). Pass one that is not in use, because the doctor "
            "may close it.",
        )
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            help="Seconds to wait for the response and for an event "
            f"(default: {DEFAULT_TIMEOUT_SECONDS}).",
        )
        parser.add_argument(
            "--idle",
            metavar="SECONDS",
            help="Seconds for which to watch the idle stream (default: until the "
            "second keepalive).",
        )
        parser.add_argument(
            "--fail-level",
            choices=LEVELS,
            default="WARNING",
            help="The lowest level of a finding with which the command exits with 1 "
            "(default: WARNING).",
        )
        parser.add_argument(
            "--json", action="store_true", help="Print one JSON object with all findings."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the findings.

        :raises CommandError: with the exit status 1 if there are findings of the level of
            ``--fail-level``, and with 2 if an option is not valid or the canary cannot be sent.
        """
        self.findings: list[CheckMessage] = []
        self.canary: Canary | None = None
        failure: str | None = None
        try:
            make_canary = self.make_canary(options)
        except (CommandError, ValueError) as error:
            raise CommandError(str(error), returncode=COULD_NOT_RUN) from error
        try:
            self.examine(make_canary)
        except KeyboardInterrupt:
            failure = "Interrupted."
        except ClientError as error:
            failure = " ".join([str(error), *HINTS.get(error.status, [])])
        except cli.reportable_errors() as error:
            failure = cli.error_message(error)
        self.findings = [found for found in self.findings if not found.is_silenced()]
        if options["json"]:
            self.print_json(failure)
        else:
            self.print_text(failure, sends_canary=make_canary is not None)
        if failure is not None:
            raise CommandError(failure, returncode=COULD_NOT_RUN)
        level = getattr(checks, options["fail_level"])
        serious = [found for found in self.findings if found.level >= level]
        if serious:
            raise CommandError(f"{_count(serious)}.", returncode=FOUND)

    def make_canary(self, options: cli.Options) -> Callable[[], Canary] | None:
        """Return a function that makes the canary, or ``None`` if the options name no server.

        :raises CommandError: if an option is not valid.
        :raises ValueError: if the token is not valid.
        """
        if not cli.given_options(options, "host", "port", "prefix", "ssl", "url"):
            others = cli.given_options(options, *CANARY_OPTIONS)
            if others:
                raise CommandError(
                    f"{', '.join(others)}: only valid with a server. Name it with --url or -H."
                )
            return None
        token = stores.DOCTOR_TOKEN if options["token"] is None else options["token"]
        url = partial(cli.event_url, token=check_token(token), options=options)
        url(CANARY)  # An option that is not valid is reported before anything is checked.
        auth = cli.make_auth(options, cli.GrantAuth(token, listen=True))
        server = Server(
            url=url,
            listen_auth=auth,
            send_auth=lambda action: (
                cli.GrantAuth(token, action=action) if isinstance(auth, cli.GrantAuth) else auth
            ),
            headers=cli.make_headers(options),
            verify=cli.make_verify(options),
        )
        timeout, idle = options["timeout"], options["idle"]
        return partial(
            Canary,
            server,
            token,
            cli.positive_seconds(
                "--timeout", DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout
            ),
            None if idle is None else cli.positive_seconds("--idle", idle),
        )

    def examine(self, make_canary: Callable[[], Canary] | None) -> None:
        """Collect the findings, and send the canary if nothing prevents it.

        :raises ClientError: if the canary cannot be sent.
        """
        self.findings += checks.run_checks(
            tags=["eventsource"], include_deployment_checks=True, databases=[]
        )
        if any(found.level >= checks.ERROR for found in self.findings):
            return  # The functions below would fail for a setting that is not valid.
        self.findings += project_findings()
        if make_canary is None or any(found.id == stores.FAILED_ID for found in self.findings):
            return
        self.canary = make_canary()
        self.canary.observe()
        for find in path.FINDINGS:
            self.findings += find(self.canary.seen)

    def print_text(self, failure: str | None, *, sends_canary: bool) -> None:
        """Print the findings, and what the canary has measured."""
        for found in self.findings:
            name = level_name(found)
            style = getattr(self.style, "ERROR" if name == "ERROR" else "WARNING")
            self.write(f"{found.id} {name}: {found.msg}", style)
            if found.hint:
                self.write(f"    Remedy: {found.hint}")
            self.write(f"    See {page_of(found)}")
        if not self.findings and failure is None:
            self.write("No findings.", self.style.SUCCESS)
        if not sends_canary:
            self.write("No canary was sent: name the public URL with --url to send one.")
        elif self.canary is None or not self.canary.seen.sent:
            self.write("No canary was sent.")
        elif (seconds := self.canary.seen.arrival_seconds) is None:
            self.write("A canary was sent.")
        else:
            self.write(
                f"The canary arrived after {seconds * 1000:.0f} ms. "
                f"The stream was then watched for {self.canary.seen.idle_seconds:.0f} s."
            )

    def write(self, text: str, style: Any = str) -> None:
        """Print text that may contain what a server has sent."""
        self.stdout.write(style(cli.displayable(text, self.stdout)))

    def print_json(self, failure: str | None) -> None:
        """Print the findings and what the canary has measured as one JSON object."""
        findings = [
            {
                "id": found.id,
                "level": level_name(found),
                "message": found.msg,
                "remedy": found.hint,
                "page": page_of(found),
            }
            for found in self.findings
        ]
        seen = None
        if self.canary is not None and (failure is None or self.canary.seen.sent):
            seen = asdict(self.canary.seen)
        self.stdout.write(json.dumps({"findings": findings, "canary": seen, "error": failure}))


def project_findings() -> Iterator[Finding]:
    """Yield the findings about this process, and then those about the stores."""
    history = get_history()
    for group in (settings.FINDINGS, stores.FINDINGS):
        try:
            for find in group:
                yield from find(history)
        except history.storage_errors as error:
            yield stores.failed_store(history, error)


def level_name(found: CheckMessage) -> str:
    """Return the name of the level of a finding."""
    names = (name for name in reversed(LEVELS) if found.level >= getattr(checks, name))
    return next(names, "DEBUG")


def _count(findings: list[CheckMessage]) -> str:
    """Return the number of findings as text."""
    return "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
