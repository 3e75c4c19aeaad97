"""The options, URLs and credentials of the commands."""

from __future__ import annotations

import getpass
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import httpx2
import pytest
from django.core.management.base import CommandError, OutputWrapper
from django.urls import include, path

from django_eventsource.grants import read_grant
from django_eventsource.management import cli

urlpatterns = [path("some/events/", include("django_eventsource.urls"))]


@pytest.fixture(autouse=True)
def mounted(settings: Any) -> None:
    """Mount the URLs at ``some/events/``."""
    settings.ROOT_URLCONF = __name__


def options(**given: Any) -> dict[str, Any]:
    """Return the options that a command receives, with some of them set."""
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
def test_digits_are_a_whole_number(value: object) -> None:
    """The command line passes text, and call_command() may pass a number."""
    assert cli.whole_number("-P/--port", value, 65535) == int(str(value))


@pytest.mark.parametrize("value", ["", "0", 0, "-1", "1.5", "x", "65536", "٣", "9" * 5000])
def test_a_value_that_is_not_a_whole_number_raises(value: object) -> None:
    """The error has the option, the range and the value."""
    with pytest.raises(CommandError, match=r"^-P/--port must be a whole number, from 1 to 65535"):
        cli.whole_number("-P/--port", value, 65535)


def test_without_a_maximum_the_error_has_none() -> None:
    with pytest.raises(CommandError) as caught:
        cli.whole_number("--count", "no")
    assert str(caught.value) == "--count must be a whole number, 1 or more, not 'no'."


def test_seconds_may_have_a_fraction() -> None:
    assert cli.positive_seconds("--expires", "0.5") == 0.5


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "nan", "inf"])
def test_a_value_that_is_not_a_positive_number_raises(value: str) -> None:
    with pytest.raises(CommandError) as caught:
        cli.positive_seconds("--expires", value)
    assert str(caught.value) == f"--expires must be a positive number of seconds, not {value!r}."


def test_the_error_of_a_store_is_one_line_with_its_notes() -> None:
    error = ConnectionError("No\nserver.")
    error.add_note("Start it.")
    assert cli.error_message(error) == "The history's store failed: No server. Start it."


# URLs


@pytest.mark.parametrize(
    ("text", "expected"),
    [("http://h/x", True), ("HTTPS://h", True), ("http:h", False), ("42:42", False)],
)
def test_text_with_an_http_scheme_is_a_whole_url(text: str, expected: bool) -> None:
    """A token may contain colons."""
    assert cli.is_whole_url(text) is expected


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
def test_the_options_make_the_url(given: dict[str, Any], expected: str) -> None:
    assert cli.event_url("poll", "42", options(**given)) == expected


@pytest.mark.parametrize("given", [{}, {"prefix": "some/events"}, {"url": "http://h/some/events"}])
@pytest.mark.parametrize("action", ["é/x", "eventsource-token"])
@pytest.mark.parametrize(
    "token", ["42:42", "a/b", "/", "a//b", "..", ".", "...", "é ?#%", "eventsource-action"]
)
def test_the_url_contains_action_and_token_unchanged(
    given: dict[str, Any], action: str, token: str
) -> None:
    """The two segments are the same after httpx2 has parsed the URL."""
    url = httpx2.URL(cli.event_url(action, token, options(**given)))
    segments = [httpx2.URL(f"http://h/?x={part}").params["x"] for part in _raw_segments(url)]
    assert segments == ["some", "events", action, token]


def _raw_segments(url: httpx2.URL) -> list[str]:
    return url.raw_path.decode().replace("+", "%2B").strip("/").split("/")


def test_without_mounted_urls_the_error_names_the_pattern_and_the_options(settings: Any) -> None:
    settings.ROOT_URLCONF = ()
    with pytest.raises(cli.NotMountedError) as caught:
        cli.event_url("poll", "42", options())
    assert 'include("django_eventsource.urls")' in str(caught.value)
    assert "-x/--prefix or --url" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "0"}, "-P/--port must be a whole number, from 1 to 65535, not '0'."),
        ({"host": ""}, "-H/--host must be a host name or an address, not ''."),
        ({"host": "http://h"}, "and a whole URL with --url."),
        ({"host": "h:81"}, "Pass a port with -P/--port"),
        ({"host": "a b"}, "-H/--host must be"),
        (
            {"url": "example.com"},
            "--url: 'example.com' is not a valid http:// or https:// URL with a host.",
        ),
        ({"url": "ftp://example.com"}, "--url: 'ftp://example.com' is not a valid"),
        ({"url": "http://"}, "--url: 'http://' is not a valid"),
        ({"url": "http://h:x"}, "--url: 'http://h:x' is not a valid"),
        ({"url": "http://u:SECRET@h:x"}, "--url: 'http://***@h:x' is not a valid"),
        ({"url": "u:SECRET@h"}, "--url: '***@h' is not a valid"),
        ({"url": "http://h/?grant=SECRET"}, "no fragment, not 'http://h/'."),
        ({"host": "http://u:SECRET@h"}, "an address, not 'http://***@h'."),
        ({"url": "http://u:p@h"}, "--url contains a user: pass it with -u/--user"),
        ({"url": "http://h/?a=1"}, "--url must have no query and no fragment"),
        ({"url": "http://h/#a"}, "--url must have no query and no fragment"),
        (
            {"url": "http://h", "host": "h", "port": 1, "prefix": "", "ssl": True},
            "--url replaces -H/--host, -P/--port, -x/--prefix, -S/--ssl: pass either --url",
        ),
    ],
)
def test_an_option_that_is_not_valid_raises(given: dict[str, Any], message: str) -> None:
    """The error is one line and has the value without its secrets."""
    with pytest.raises(CommandError) as caught:
        cli.event_url("poll", "42", options(**given))
    assert message in str(caught.value)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value, limit=0))


# Credentials


def test_a_header_is_split_at_its_first_colon() -> None:
    given = options(header=["X-A: 1", "X-B:a:b ", "X-C:"])
    assert cli.make_headers(given) == [("X-A", "1"), ("X-B", "a:b"), ("X-C", "")]
    assert cli.make_headers(options()) == []


@pytest.mark.parametrize("line", ["", "X-A", ": 1", " : 1"])
def test_a_header_without_a_name_or_a_colon_raises(line: str) -> None:
    with pytest.raises(CommandError, match=r"^--header must be 'Name: value', not"):
        cli.make_headers(options(header=[line]))


def test_a_request_is_signed_with_a_new_grant() -> None:
    """The grant is for the token and the right of the request only."""
    auth = cli.GrantAuth("42", listen=True)
    request = next(auth.auth_flow(httpx2.Request("GET", "http://h/")))
    scheme, _, text = request.headers["Authorization"].partition(" ")
    grant = read_grant(text)
    assert scheme == "Bearer"
    assert (grant.tokens, grant.listen, grant.send) == (("42",), True, False)


def test_a_header_wins_over_a_user_and_a_user_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(cli.PASSWORD_VARIABLE, raising=False)
    default = httpx2.BasicAuth("a", "b")
    assert cli.make_auth(options(), default) is default
    user = options(user="u", password="p")
    assert cli.make_auth(user, default) == ("u", "p")
    header = options(user="u", header=["authorization: Bearer x"])
    assert cli.make_auth(header, default) is None
    other = options(header=["X-A: 1"])
    assert cli.make_auth(other, default) is default


def test_the_password_is_that_of_the_option_the_environment_or_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An empty password of the option is used."""
    prompts: list[str] = []

    def prompt(text: str) -> str:
        prompts.append(text)
        return "asked"

    monkeypatch.setattr(getpass, "getpass", prompt)
    monkeypatch.setenv(cli.PASSWORD_VARIABLE, "environment")
    assert cli.make_auth(options(user="u", password=""), None) == ("u", "")
    assert cli.make_auth(options(user="u"), None) == ("u", "environment")
    monkeypatch.delenv(cli.PASSWORD_VARIABLE)
    assert cli.make_auth(options(user="u"), None) == ("u", "asked")
    assert prompts == ["Password for u: "]


@pytest.mark.parametrize("failure", ["warning", "end"])
def test_without_a_terminal_a_missing_password_raises(
    monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """The command does not read a password from standard input, which may be DATA."""

    def prompt(text: str) -> str:
        if failure == "end":
            raise EOFError
        warnings.warn("Can not control echo.", getpass.GetPassWarning, stacklevel=2)
        raise AssertionError("the password was read all the same")

    monkeypatch.setattr(getpass, "getpass", prompt)
    monkeypatch.delenv(cli.PASSWORD_VARIABLE, raising=False)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(CommandError, match=r"no terminal .* 'u': pass it with -p/--password"),
    ):
        cli.make_auth(options(user="u"), None)


def test_a_password_without_a_user_and_a_user_with_a_colon_raise() -> None:
    with pytest.raises(CommandError, match="pass it with -u/--user"):
        cli.make_auth(options(password="p"), None)
    with pytest.raises(CommandError, match="must not contain a colon") as caught:
        cli.make_auth(options(user="u:SECRET"), None)
    assert "SECRET" not in str(caught.value)


# Certificates


def test_only_insecure_accepts_any_certificate() -> None:
    assert cli.make_verify(options()) is True
    assert cli.make_verify(options(insecure=True)) is False


def test_a_cafile_that_is_not_valid_raises(tmp_path: Path) -> None:
    """A missing file, a file of other content and --insecure have their own errors."""
    file = tmp_path / "no.pem"
    with pytest.raises(CommandError, match="cannot be read: No such file or directory"):
        cli.make_verify(options(cafile=str(file)))
    file.write_text("no certificate")
    with pytest.raises(CommandError, match="contains no certificates in PEM format"):
        cli.make_verify(options(cafile=str(file)))
    with pytest.raises(CommandError, match="contradict each other"):
        cli.make_verify(options(cafile=str(file), insecure=True))


def test_buffered_output_of_a_broken_pipe_is_discarded() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = open(writing, "w")  # noqa: SIM115
    wrapper = OutputWrapper(output)
    wrapper.write("buffered")
    cli.discard_output(wrapper)
    output.close()
