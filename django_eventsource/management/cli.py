"""The options, URLs and credentials that the commands share."""

import getpass
import math
import os
import re
import ssl
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx2
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser, OutputWrapper
from django.db import DatabaseError
from django.urls import NoReverseMatch, reverse

from ..client._http import Auth, hide_secrets, parse_url
from ..exceptions import EventSourceError
from ..grants import make_grant
from ..history import get_history

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
PASSWORD_VARIABLE = "EVENTSOURCE_PASSWORD"  # noqa: S105
GRANT_SECONDS = 60
"""Seconds for which the grant of one request is valid."""

Options = Mapping[str, Any]

# Control characters except tab and line feed, bidirectional ones, U+2028 and U+2029.
_TERMINAL_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
# Placeholders for reverse(), which are then replaced by the action and the token.
_ACTION = "eventsource-action"
_TOKEN = "eventsource-token"  # noqa: S105


class NotMountedError(CommandError):
    """The project's URL patterns do not include ``django_eventsource.urls``."""


class GrantAuth(httpx2.Auth):
    """Sign every request with a new grant, made with the project's ``SECRET_KEY``.

    :param token: the token or tokens of the grant.
    :param listen: whether the grant allows listening.
    :param action: the action that the grant allows to send, or ``None``.
    """

    def __init__(
        self, token: str | Sequence[str], *, listen: bool = False, action: str | None = None
    ) -> None:
        self.token = token
        self.listen = listen
        self.action = action

    def auth_flow(
        self, request: httpx2.Request
    ) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Add the grant to the request."""
        grant = make_grant(
            self.token, listen=self.listen, actions=self.action, seconds=GRANT_SECONDS
        )
        request.headers["Authorization"] = f"Bearer {grant}"
        yield request


# Options


def add_url_arguments(parser: CommandParser) -> None:
    """Add the options that make the URL of the server."""
    group = parser.add_argument_group("server")
    group.add_argument("-H", "--host", help=f"Host name or address (default: {DEFAULT_HOST}).")
    group.add_argument("-P", "--port", help=f"Port (default: {DEFAULT_PORT}).")
    group.add_argument(
        "-x",
        "--prefix",
        help="Path before /<action>/<token> (default: the path of the project's URL patterns).",
    )
    group.add_argument("-S", "--ssl", action="store_true", help="Use https.")
    group.add_argument(
        "--url",
        metavar="BASE",
        help="Replaces the other options of this group: https://host:port, or with the path "
        "before /<action>/<token>: https://host/events.",
    )


def add_http_arguments(parser: CommandParser) -> None:
    """Add the options of the HTTP requests."""
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "-u",
        "--user",
        help="User for HTTP Basic (default: sign the request with the SECRET_KEY).",
    )
    group.add_argument(
        "-p",
        "--password",
        help=f"Password of the user (default: ${PASSWORD_VARIABLE}, or a prompt).",
    )
    group.add_argument(
        "--header",
        action="append",
        metavar="'NAME: VALUE'",
        help="Additional request header; repeatable.",
    )
    group.add_argument(
        "--cafile", metavar="FILE", help="Trust the certificate authorities of this PEM file."
    )
    group.add_argument(
        "--insecure", action="store_true", help="Accept any certificate of the server."
    )


def given_options(options: Options, *names: str) -> list[str]:
    """Return the command-line names of the options that the user passed."""
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
    """Return the value of an option as a whole number from 1.

    :raises CommandError: if it is not one, or greater than the maximum.
    """
    text = str(value)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
    if number < 1 or (maximum is not None and number > maximum):
        expected = "1 or more" if maximum is None else f"from 1 to {maximum}"
        raise CommandError(f"{name} must be a whole number, {expected}, not {text!r}.")
    return number


def positive_seconds(name: str, value: object) -> float:
    """Return the value of an option as a positive number of seconds.

    :raises CommandError: if it is not one.
    """
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise CommandError(f"{name} must be a positive number of seconds, not {str(value)!r}.")
    return seconds


def reportable_errors() -> tuple[type[Exception], ...]:
    """Return the errors that a command reports in one line, without a traceback."""
    return (EventSourceError, ValueError, ImproperlyConfigured, *get_history().storage_errors)


def error_message(error: Exception) -> str:
    """Return one line about an error, with a hint if the history's store failed."""
    notes = getattr(error, "__notes__", [])
    text = " ".join(" ".join([str(error), *notes]).split()).rstrip(".") + "."
    if isinstance(error, DatabaseError):
        text += " If tables are missing, run `manage.py migrate`."
        return f"The history's database failed: {text}"
    if not isinstance(error, EventSourceError | ValueError | ImproperlyConfigured):
        return f"The history's store failed: {text}"
    return text


def discard_output(output: OutputWrapper) -> None:
    """Discard buffered output, which would make the interpreter fail at exit."""
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), output.fileno())


def displayable(text: str, output: OutputWrapper) -> str:
    """Return the text of a server in characters that the encoding of an output contains.

    On a terminal, characters that control it or reorder its text are escaped.
    """
    if output.isatty():
        text = _TERMINAL_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    encoding = output_encoding(output)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def output_encoding(output: OutputWrapper) -> str:
    """Return the encoding of an output, UTF-8 if it has none."""
    return getattr(output, "encoding", None) or "utf-8"


# URLs


def is_whole_url(text: str) -> bool:
    """Whether the text that was passed as a token is a URL instead."""
    return text.lower().startswith(("http://", "https://"))


def event_url(action: str, token: str, options: Options) -> str:
    """Return the URL of an action and a token on the server of the options.

    :raises NotMountedError: if neither the options nor the project's URL patterns have the path.
    :raises CommandError: if an option is not valid.
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
    others = given_options(options, "host", "port", "prefix", "ssl")
    if others:
        raise CommandError(
            f"--url replaces {', '.join(others)}: pass either --url or these options."
        )
    try:
        url = parse_url(base)
    except ValueError as error:
        raise CommandError(f"--url: {error}") from None
    if url.userinfo:
        raise CommandError("--url contains a user: pass it with -u/--user and -p/--password.")
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
    # A host that contains a separator is replaced by an empty one, which is not valid.
    is_host = re.fullmatch(r"[^\s/?#@\[\]\\]+", bare)
    try:
        parse_url(f"http://{text if is_host else ''}/")
    except ValueError:
        raise CommandError(
            f"-H/--host must be a host name or an address, not {hide_secrets(host)!r}. "
            "Pass a port with -P/--port, and a whole URL with --url."
        ) from None
    return text


def _mounted_path(action: str, token: str) -> str:
    try:
        path = reverse("eventsource:event", kwargs={"action": _ACTION, "token": _TOKEN})
    except NoReverseMatch as error:
        raise NotMountedError(
            "The project's URL patterns do not include django_eventsource.urls. Add "
            'path("events/", include("django_eventsource.urls")), '
            "or pass their path with -x/--prefix or --url."
        ) from error
    # reverse() would change slashes and dots in a real action or token.
    segments = {_ACTION: _segment(action), _TOKEN: _segment(token)}
    return re.sub("|".join(segments), lambda match: segments[match[0]], path)


def _last_segments(action: str, token: str) -> str:
    return f"{_segment(action)}/{_segment(token)}"


def _segment(text: str) -> str:
    # Clients remove a segment of one or two dots unless the dots are encoded.
    return text.replace(".", "%2E") if text in (".", "..") else quote(text, safe="")


# Credentials


def make_headers(options: Options) -> list[tuple[str, str]]:
    """Return the --header options as pairs of name and value.

    :raises CommandError: if one is not ``Name: value``.
    """
    headers = []
    for line in options["header"] or []:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise CommandError(f"--header must be 'Name: value', not {line!r}.")
        headers.append((name.strip(), value.strip()))
    return headers


def make_auth(options: Options, default: Auth | None) -> Auth | None:
    """Return the authentication of the requests.

    An Authorization header wins over a user, and both win over the default.

    :raises CommandError: if the user contains a colon, if there is a password without a user,
        or if there is no password and no terminal to ask for it.
    """
    user, password = options["user"], options["password"]
    if any(name.lower() == "authorization" for name, _ in make_headers(options)):
        return None
    if user is None:
        if password is not None:
            raise CommandError("-p/--password needs a user: pass it with -u/--user.")
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
            # Without a terminal getpass would read the DATA of standard input.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(f"Password for {user}: ")
    except (getpass.GetPassWarning, EOFError) as error:
        raise CommandError(
            f"There is no terminal to ask for the password of {user!r}: pass it with "
            f"-p/--password or ${PASSWORD_VARIABLE}."
        ) from error


def make_verify(options: Options) -> bool | ssl.SSLContext:
    """Return the ``verify`` argument of the clients.

    :raises CommandError: if the file contains no certificates, or if both options are passed.
    """
    cafile = options["cafile"]
    if cafile is None:
        return not options["insecure"]
    if options["insecure"]:
        raise CommandError("--cafile and --insecure contradict each other: pass one of them.")
    try:
        return ssl.create_default_context(cafile=cafile)
    except ssl.SSLError as error:
        raise CommandError(
            f"--cafile {cafile!r} contains no certificates in PEM format."
        ) from error
    except OSError as error:
        raise CommandError(f"--cafile {cafile!r} cannot be read: {error.strerror}.") from error
