"""Options, URLs and credentials of the commands."""

from __future__ import annotations

import getpass
import os
import ssl
import traceback
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from django.core.management.base import CommandError, OutputWrapper
from django.urls import include, path

from django_eventsource import endpoints
from django_eventsource.grants import read_grant

urlpatterns = [path("some/events/", include("django_eventsource.urls"))]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs under a path of their own."""
    settings.ROOT_URLCONF = __name__


def options(**given: Any) -> dict[str, Any]:
    """Give the options as a command gets them, with some of them given."""
    return {
        "host": None,
        "port": None,
        "prefix": None,
        "ssl": False,
        "url": None,
        "user": None,
        "password": None,
        "header": None,
        "cafile": None,
        "insecure": False,
    } | given


# Numbers


@pytest.mark.parametrize("value", [1, "1", 65535, "65535", "007"])
def test_whole_numbers(value: object) -> None:
    """Digits are a number, from the command line and from call_command."""
    assert endpoints.whole_number("-P/--port", value, 65535) == int(str(value))


@pytest.mark.parametrize("value", ["", "0", 0, "-1", "1.5", "x", "65536", "٣", "9" * 5000])
def test_no_whole_numbers(value: object) -> None:
    """Anything else is refused, naming option, value and range."""
    with pytest.raises(CommandError, match=r"^-P/--port must be a whole number, from 1 to 65535"):
        endpoints.whole_number("-P/--port", value, 65535)


def test_no_whole_number_without_maximum() -> None:
    """Without a maximum the error names none."""
    with pytest.raises(CommandError) as caught:
        endpoints.whole_number("--count", "no")
    assert str(caught.value) == "--count must be a whole number, 1 or more, not 'no'."


def test_positive_seconds() -> None:
    """Seconds may have a fraction."""
    assert endpoints.positive_seconds("--expires", "0.5") == 0.5


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "nan", "inf"])
def test_no_positive_seconds(value: str) -> None:
    """What is no positive number is refused, naming option and value."""
    with pytest.raises(CommandError) as caught:
        endpoints.positive_seconds("--expires", value)
    assert str(caught.value) == f"--expires must be a positive number of seconds, not {value!r}."


# URLs


@pytest.mark.parametrize(
    ("text", "expected"),
    [("http://h/x", True), ("HTTPS://h", True), ("http:h", False), ("42:42", False)],
)
def test_whole_urls(text: str, expected: bool) -> None:
    """What begins with http:// or https:// is a URL; a token may hold colons."""
    assert endpoints.is_whole_url(text) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http://127.0.0.1:8000/some/events/poll/42"),
        ({"host": "example.com"}, "http://example.com:8000/some/events/poll/42"),
        ({"host": "::1", "port": "81"}, "http://[::1]:81/some/events/poll/42"),
        ({"host": "[::1]"}, "http://[::1]:8000/some/events/poll/42"),
        ({"ssl": True, "port": 443}, "https://127.0.0.1:443/some/events/poll/42"),
        ({"prefix": "x"}, "http://127.0.0.1:8000/x/poll/42"),
        ({"prefix": "/x/é y/"}, "http://127.0.0.1:8000/x/%C3%A9%20y/poll/42"),
        ({"prefix": ""}, "http://127.0.0.1:8000/poll/42"),
        ({"prefix": "/"}, "http://127.0.0.1:8000/poll/42"),
        ({"url": "https://example.com"}, "https://example.com/some/events/poll/42"),
        ({"url": "https://example.com:81/"}, "https://example.com:81/some/events/poll/42"),
        ({"url": "http://example.com/e/"}, "http://example.com/e/poll/42"),
        ({"url": "http://example.com/a/b"}, "http://example.com/a/b/poll/42"),
    ],
)
def test_event_urls(given: dict[str, Any], expected: str) -> None:
    """Each way to say where the server is gives its URL."""
    assert endpoints.event_url("poll", "42", options(**given)) == expected


@pytest.mark.parametrize("given", [{}, {"prefix": "some/events"}, {"url": "http://h/some/events"}])
@pytest.mark.parametrize("action", ["é/x", "eventsource-token"])
@pytest.mark.parametrize(
    "token", ["42:42", "a/b", "/", "a//b", "..", ".", "...", "é ?#%", "eventsource-action"]
)
def test_every_token_survives_its_url(given: dict[str, Any], action: str, token: str) -> None:
    """Action and token come out of the URL as they went in, even after httpx read it."""
    url = httpx.URL(endpoints.event_url(action, token, options(**given)))
    segments = [httpx.URL(f"http://h/?x={part}").params["x"] for part in _raw_segments(url)]
    assert segments == ["some", "events", action, token]


def _raw_segments(url: httpx.URL) -> list[str]:
    return url.raw_path.decode().replace("+", "%2B").strip("/").split("/")


def test_urls_that_are_not_mounted(settings: Any) -> None:
    """Without our URLs in the project's the error tells what to add, or to give."""
    settings.ROOT_URLCONF = ()
    with pytest.raises(endpoints.NotMountedError) as caught:
        endpoints.event_url("poll", "42", options())
    assert 'include("django_eventsource.urls")' in str(caught.value)
    assert "-x/--prefix or --url" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "0"}, "-P/--port must be a whole number, from 1 to 65535, not '0'."),
        ({"host": ""}, "-H/--host must be a host name or an address, not ''."),
        ({"host": "http://h"}, "and a whole URL with --url."),
        ({"host": "h:81"}, "A port is given with -P/--port"),
        ({"host": "a b"}, "-H/--host must be"),
        ({"url": "example.com"}, "--url must begin with http:// or https:// and a host"),
        ({"url": "ftp://example.com"}, "--url must begin with"),
        ({"url": "http://"}, "--url must begin with"),
        ({"url": "http://h:x"}, "--url 'http://h:x' is not a valid URL."),
        ({"url": "http://u:SECRET@h:x"}, "--url 'http://***@h:x' is not a valid URL."),
        ({"url": "u:SECRET@h"}, "and a host, not '***@h'."),
        ({"url": "http://h/?grant=SECRET"}, "no fragment, not 'http://h/'."),
        ({"host": "http://u:SECRET@h"}, "an address, not 'http://***@h'."),
        ({"url": "http://u:p@h"}, "--url holds a user: give -u/--user"),
        ({"url": "http://h/?a=1"}, "--url must have no query and no fragment"),
        ({"url": "http://h/#a"}, "--url must have no query and no fragment"),
        (
            {"url": "http://h", "host": "h", "port": 1, "prefix": "", "ssl": True},
            "--url holds all of -H/--host, -P/--port, -x/--prefix, -S/--ssl: give one",
        ),
    ],
)
def test_options_that_make_no_url(given: dict[str, Any], message: str) -> None:
    """Each bad option is named in one line, with what was given."""
    with pytest.raises(CommandError) as caught:
        endpoints.event_url("poll", "42", options(**given))
    assert message in str(caught.value)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value, limit=0))


# Credentials


def test_headers() -> None:
    """Name and value are split at the first colon."""
    given = options(header=["X-A: 1", "X-B:a:b ", "X-C:"])
    assert endpoints.make_headers(given) == [("X-A", "1"), ("X-B", "a:b"), ("X-C", "")]
    assert endpoints.make_headers(options()) == []


@pytest.mark.parametrize("line", ["", "X-A", ": 1", " : 1"])
def test_bad_headers(line: str) -> None:
    """A header without name or colon is refused."""
    with pytest.raises(CommandError, match=r"^--header must be 'Name: value', not"):
        endpoints.make_headers(options(header=[line]))


def test_requests_sign_themselves() -> None:
    """Each request carries a grant of its own, for its token and right alone."""
    auth = endpoints.GrantAuth("42", listen=True)
    request = next(auth.auth_flow(httpx.Request("GET", "http://h/")))
    scheme, _, text = request.headers["Authorization"].partition(" ")
    grant = read_grant(text)
    assert scheme == "Bearer"
    assert (grant.tokens, grant.listen, grant.send) == (("42",), True, False)


def test_who_authenticates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header wins over a user, and a user over the default."""
    monkeypatch.delenv(endpoints.PASSWORD_VARIABLE, raising=False)
    default = httpx.BasicAuth("a", "b")
    assert endpoints.make_auth(options(), default) is default
    user = options(user="u", password="p")
    assert endpoints.make_auth(user, default) == ("u", "p")
    header = options(user="u", header=["authorization: Bearer x"])
    assert endpoints.make_auth(header, default) is None
    other = options(header=["X-A: 1"])
    assert endpoints.make_auth(other, default) is default


def test_where_the_password_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, else the environment, else the prompt; an empty one is a password."""
    prompts: list[str] = []

    def prompt(text: str) -> str:
        prompts.append(text)
        return "asked"

    monkeypatch.setattr(getpass, "getpass", prompt)
    monkeypatch.setenv(endpoints.PASSWORD_VARIABLE, "environment")
    assert endpoints.make_auth(options(user="u", password=""), None) == ("u", "")
    assert endpoints.make_auth(options(user="u"), None) == ("u", "environment")
    monkeypatch.delenv(endpoints.PASSWORD_VARIABLE)
    assert endpoints.make_auth(options(user="u"), None) == ("u", "asked")
    assert prompts == ["Password for u: "]


@pytest.mark.parametrize("failure", ["warning", "end"])
def test_no_terminal_to_ask(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """Without a terminal the data on standard input is not taken for a password."""

    def prompt(text: str) -> str:
        if failure == "end":
            raise EOFError
        warnings.warn("Can not control echo.", getpass.GetPassWarning, stacklevel=2)
        raise AssertionError("the password was read all the same")

    monkeypatch.setattr(getpass, "getpass", prompt)
    monkeypatch.delenv(endpoints.PASSWORD_VARIABLE, raising=False)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(CommandError, match=r"no terminal .* 'u': give it with -p/--password"),
    ):
        endpoints.make_auth(options(user="u"), None)


def test_bad_users() -> None:
    """A password needs a user, and a user has no colon."""
    with pytest.raises(CommandError, match="give -u/--user"):
        endpoints.make_auth(options(password="p"), None)
    with pytest.raises(CommandError, match="must not contain a colon") as caught:
        endpoints.make_auth(options(user="u:SECRET"), None)
    assert "SECRET" not in str(caught.value)


# Certificates


def test_certificates_are_verified_unless_told_otherwise() -> None:
    """--insecure is the only way to accept any certificate."""
    assert endpoints.make_verify(options()) is True
    assert endpoints.make_verify(options(insecure=True)) is False


def test_a_cafile_is_trusted(tmp_path: Path) -> None:
    """The context verifies, with the authority of the file."""
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(file)
    context = endpoints.make_verify(options(cafile=str(file)))
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1


def test_bad_cafiles(tmp_path: Path) -> None:
    """A missing file, a file of something else, and a contradiction are told apart."""
    file = tmp_path / "no.pem"
    with pytest.raises(CommandError, match="cannot be read: No such file or directory"):
        endpoints.make_verify(options(cafile=str(file)))
    file.write_text("no certificate")
    with pytest.raises(CommandError, match="holds no certificates in PEM format"):
        endpoints.make_verify(options(cafile=str(file)))
    with pytest.raises(CommandError, match="contradict each other"):
        endpoints.make_verify(options(cafile=str(file), insecure=True))


def test_output_that_nobody_reads_is_discarded() -> None:
    """After the pipe broke, what is still buffered neither fails nor goes anywhere."""
    reading, writing = os.pipe()
    os.close(reading)
    output = open(writing, "w")  # noqa: SIM115
    wrapper = OutputWrapper(output)
    wrapper.write("buffered")
    endpoints.discard_output(wrapper)
    output.close()
