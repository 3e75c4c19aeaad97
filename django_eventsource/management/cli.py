"""What the commands share to reach a server: options, URLs and credentials."""

from __future__ import annotations

import getpass
import math
import os
import re
import ssl
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser, OutputWrapper
from django.db import DatabaseError
from django.urls import NoReverseMatch, reverse

from .connection import Auth, hide_secrets
from .exceptions import EventSourceError
from .grants import make_grant
from .history import get_history

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
PASSWORD_VARIABLE = "EVENTSOURCE_PASSWORD"  # noqa: S105
GRANT_SECONDS = 60
"""The lifetime of the grant that a command makes for one request of its own."""

Options = Mapping[str, Any]

_HOST = re.compile(r"[^\s/?#@\[\]\\]+")
_WHOLE_URL = re.compile(r"https?://", re.IGNORECASE)
# The control characters but tab and line feed, the bidirectional ones, and U+2028 and U+2029.
_COMMANDING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
# Stand for action and token where the project's URL patterns are asked.
_ACTION = "eventsource-action"
_TOKEN = "eventsource-token"  # noqa: S105


class NotMountedError(CommandError):
    """The project's URL patterns do not include ours."""


class GrantAuth(httpx.Auth):
    """Sign every request with a fresh grant, made with the project's ``SECRET_KEY``.

    :param token: the token it is for, or several.
    :param listen: grant the right to listen.
    :param action: grant the right to send this action.
    """

    def __init__(
        self, token: str | Sequence[str], *, listen: bool = False, action: str | None = None
    ) -> None:
        self.token = token
        self.listen = listen
        self.action = action

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the grant to the request."""
        grant = make_grant(
            self.token, listen=self.listen, actions=self.action, seconds=GRANT_SECONDS
        )
        request.headers["Authorization"] = f"Bearer {grant}"
        yield request


# Options


def add_url_arguments(parser: CommandParser) -> None:
    """Add the options that say where the server is."""
    group = parser.add_argument_group("server")
    group.add_argument("-H", "--host", help=f"Host name or address (default: {DEFAULT_HOST}).")
    group.add_argument("-P", "--port", help=f"Port (default: {DEFAULT_PORT}).")
    group.add_argument(
        "-x",
        "--prefix",
        help="Path before /<action>/<token> (default: where the project mounts the URLs).",
    )
    group.add_argument("-S", "--ssl", action="store_true", help="Use https.")
    group.add_argument(
        "--url",
        metavar="BASE",
        help="All of these in one: https://host:port, or with the path that the URLs are "
        "mounted under: https://host/events.",
    )


def add_http_arguments(parser: CommandParser) -> None:
    """Add the options that say how to talk to the server."""
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "-u",
        "--user",
        help="Log in with HTTP Basic (default: sign the request with the SECRET_KEY).",
    )
    group.add_argument(
        "-p",
        "--password",
        help=f"The user's password (default: ${PASSWORD_VARIABLE}, or a prompt).",
    )
    group.add_argument(
        "--header",
        action="append",
        metavar="'NAME: VALUE'",
        help="Send this request header too; repeatable.",
    )
    group.add_argument(
        "--cafile", metavar="FILE", help="Trust the certificate authorities of this PEM file."
    )
    group.add_argument(
        "--insecure", action="store_true", help="Accept any certificate of the server."
    )


def given(options: Options, *names: str) -> list[str]:
    """Give the command-line names of those options that were given."""
    flags = {
        "host": "-H/--host",
        "port": "-P/--port",
        "prefix": "-x/--prefix",
        "ssl": "-S/--ssl",
        "user": "-u/--user",
        "password": "-p/--password",
        "action": "-a/--action",
    }
    return [
        flags.get(name, f"--{name}")
        for name in names
        if options[name] is not None and options[name] is not False
    ]


def whole_number(name: str, value: object, maximum: int | None = None) -> int:
    """Read an option that must be a whole number from 1.

    :raises CommandError: when it is anything else.
    """
    text = str(value)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
    if number < 1 or (maximum is not None and number > maximum):
        expected = "1 or more" if maximum is None else f"from 1 to {maximum}"
        raise CommandError(f"{name} must be a whole number, {expected}, not {text!r}.")
    return number


def positive_seconds(name: str, value: object) -> float:
    """Read an option that must be a positive number of seconds.

    :raises CommandError: when it is anything else.
    """
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise CommandError(f"{name} must be a positive number of seconds, not {str(value)!r}.")
    return seconds


def expected() -> tuple[type[Exception], ...]:
    """Give what publishing may raise that is to be told in one line."""
    return (EventSourceError, ValueError, ImproperlyConfigured, *get_history().failures)


def sentence(error: Exception) -> str:
    """Put an error in one line, with the way out where the history's store is what failed."""
    notes = getattr(error, "__notes__", [])
    text = " ".join(" ".join([str(error), *notes]).split()).rstrip(".") + "."
    if isinstance(error, DatabaseError):
        return f"The history's database failed: {text} Was `manage.py migrate` run?"
    if not isinstance(error, EventSourceError | ValueError | ImproperlyConfigured):
        return f"The history's store failed: {text}"
    return text


def discard_output(output: OutputWrapper) -> None:
    """Keep the interpreter from failing at exit on output that nobody reads any more."""
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), output.fileno())


def displayable(text: str, output: OutputWrapper) -> str:
    """Return text of a server for an output, in characters that the output's encoding has.

    On a terminal, characters that command it or reorder what it shows are escaped.
    """
    if output.isatty():
        text = _COMMANDING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    encoding = output_encoding(output)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def output_encoding(output: OutputWrapper) -> str:
    """Return the encoding of an output. One without a name accepts any text."""
    return getattr(output, "encoding", None) or "utf-8"


# URLs


def is_whole_url(text: str) -> bool:
    """Tell whether what was given as a token is a URL instead."""
    return _WHOLE_URL.match(text) is not None


def event_url(action: str, token: str, options: Options) -> str:
    """Give the URL of an action and a token on the server that the options name.

    :raises NotMountedError: when the path is not given and the project's URLs do not tell it.
    :raises CommandError: for options that make no URL.
    """
    if options["url"] is not None:
        return _url_under(options["url"], action, token, options)
    port = DEFAULT_PORT if options["port"] is None else options["port"]
    port = whole_number("-P/--port", port, 65535)
    host = _check_host(DEFAULT_HOST if options["host"] is None else options["host"])
    scheme = "https" if options["ssl"] else "http"
    if options["prefix"] is None:
        path = _mounted_path(action, token)
    else:
        prefix = quote(options["prefix"].strip("/"), safe="/%:@!$&'()*+,;=~")
        path = f"/{prefix}/".replace("//", "/") + _last_segments(action, token)
    return f"{scheme}://{host}:{port}{path}"


def _url_under(base: str, action: str, token: str, options: Options) -> str:
    others = given(options, "host", "port", "prefix", "ssl")
    if others:
        raise CommandError(f"--url holds all of {', '.join(others)}: give one or the other.")
    try:
        url = httpx.URL(base)
    except httpx.InvalidURL:
        # The error of httpx may quote a part of the password.
        raise CommandError(f"--url {hide_secrets(base)!r} is not a valid URL.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise CommandError(
            f"--url must begin with http:// or https:// and a host, not {hide_secrets(base)!r}."
        )
    if url.userinfo:
        raise CommandError("--url holds a user: give -u/--user and -p/--password instead.")
    if url.query or url.fragment:
        raise CommandError(
            f"--url must have no query and no fragment, not {hide_secrets(base)!r}."
        )
    root = str(url).rstrip("/")
    if url.path == "/":
        return root + _mounted_path(action, token)
    return f"{root}/{_last_segments(action, token)}"


def _check_host(host: str) -> str:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    text = f"[{bare}]" if ":" in bare else bare
    try:
        if not _HOST.fullmatch(bare):
            raise httpx.InvalidURL("not a host")
        httpx.URL(f"http://{text}/")
    except httpx.InvalidURL:
        raise CommandError(
            f"-H/--host must be a host name or an address, not {hide_secrets(host)!r}. "
            "A port is given with -P/--port, and a whole URL with --url."
        ) from None
    return text


def _mounted_path(action: str, token: str) -> str:
    try:
        path = reverse("eventsource:event", kwargs={"action": _ACTION, "token": _TOKEN})
    except NoReverseMatch as error:
        raise NotMountedError(
            "The project's URLs do not include django_eventsource.urls: add "
            'path("events/", include("django_eventsource.urls")) to them, '
            "or say where they are with -x/--prefix or --url."
        ) from error
    # Not reversed with the real ones, whose slashes and dots would not survive.
    segments = {_ACTION: _segment(action), _TOKEN: _segment(token)}
    return re.sub("|".join(segments), lambda match: segments[match[0]], path)


def _last_segments(action: str, token: str) -> str:
    return f"{_segment(action)}/{_segment(token)}"


def _segment(text: str) -> str:
    # A segment of one or two dots is resolved away unless they are encoded.
    return text.replace(".", "%2E") if text in (".", "..") else quote(text, safe="")


# Credentials


def make_headers(options: Options) -> list[tuple[str, str]]:
    """Read the --header options.

    :raises CommandError: for one that is not ``Name: value``.
    """
    headers = []
    for line in options["header"] or []:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise CommandError(f"--header must be 'Name: value', not {line!r}.")
        headers.append((name.strip(), value.strip()))
    return headers


def make_auth(options: Options, default: Auth | None) -> Auth | None:
    """Give what the requests authenticate with.

    A header of the user's own wins over a user, and both over the default.

    :raises CommandError: for a user name that HTTP Basic cannot carry, a password without
        a user, or a password that can be asked from nobody.
    """
    user, password = options["user"], options["password"]
    if any(name.lower() == "authorization" for name, _ in make_headers(options)):
        return None
    if user is None:
        if password is not None:
            raise CommandError("-p/--password needs a user: give -u/--user.")
        return default
    if ":" in user:
        raise CommandError(
            "-u/--user must not contain a colon. Pass the password with -p/--password or "
            f"${PASSWORD_VARIABLE}."
        )
    if password is None:
        password = os.environ.get(PASSWORD_VARIABLE)
    return user, _ask_password(user) if password is None else password


def _ask_password(user: str) -> str:
    try:
        with warnings.catch_warnings():
            # Without a terminal getpass would read the data from standard input.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(f"Password for {user}: ")
    except (getpass.GetPassWarning, EOFError) as error:
        raise CommandError(
            f"There is no terminal to ask for the password of {user!r}: give it with "
            f"-p/--password or ${PASSWORD_VARIABLE}."
        ) from error


def make_verify(options: Options) -> bool | ssl.SSLContext:
    """Give how the server's certificate is verified.

    :raises CommandError: for a file that holds no certificates, or contradictory options.
    """
    cafile = options["cafile"]
    if cafile is None:
        return not options["insecure"]
    if options["insecure"]:
        raise CommandError("--cafile and --insecure contradict each other: give one.")
    try:
        return ssl.create_default_context(cafile=cafile)
    except ssl.SSLError as error:
        raise CommandError(f"--cafile {cafile!r} holds no certificates in PEM format.") from error
    except OSError as error:
        raise CommandError(f"--cafile {cafile!r} cannot be read: {error.strerror}.") from error
