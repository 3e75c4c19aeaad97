"""Tests of the template tags."""

from __future__ import annotations

import re
from html import unescape
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

import pytest
from django.template import Context, Template
from django.test import AsyncClient
from django.urls import NoReverseMatch

from django_eventsource import get_cursor, grants
from django_eventsource.events import StringIdEvent
from django_eventsource.exceptions import InvalidEvent, InvalidToken, UnknownAction
from django_eventsource.grants import read_grant
from django_eventsource.history import Kind
from tests.support.cursors import cursor_texts
from tests.support.events import add, draft

urlpatterns: list[object] = []
"""The URLs of a project that does not include this app's."""


class AnyEvent(StringIdEvent):
    ACTIONS = ["*"]


TOKENS = ["42:42:42", "a/b c?d#e&f%2F", "ünï😀", "<b>'\""]


def render(arguments, **context):
    """Return the URL that a browser reads from a page with the tag."""
    template = Template("{% load eventsource %}{% eventsource_url " + arguments + " %}")
    return unescape(template.render(Context(context)))


def grant_of(url):
    (text,) = parse_qs(urlsplit(url).query)["grant"]
    return read_grant(text)


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_the_tag_returns_a_url_with_a_grant_to_listen(token):
    """The grant is valid for its token only."""
    url = render("token", token=token)
    assert unquote(urlsplit(url).path) == f"/events/poll/{token}"
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == ((token,), True, False)


def test_the_tag_with_an_action_returns_a_url_with_a_grant_to_send():
    url = render("'42' 'ping'")
    assert urlsplit(url).path == "/events/ping/42"
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == (("42",), False, True)
    assert grant.actions == ("ping",)


def test_the_tag_with_the_listen_action_returns_the_url_of_the_stream():
    url = render("'42' 'poll'")
    assert urlsplit(url).path == "/events/poll/42"
    assert (grant_of(url).listen, grant_of(url).send) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "seconds"), [("'42'", 500), ("'42' seconds=60", 60), ("'42' None 60", 60)]
)
def test_the_lifetime_of_the_grant_is_the_argument_or_the_setting(
    settings, monkeypatch, arguments, seconds
):
    settings.EVENTSOURCE_GRANT_SECONDS = 500
    monkeypatch.setattr(grants.time, "time", lambda: 1_800_000_000)
    assert grant_of(render(arguments)).expires == 1_800_000_000 + seconds


HOSTILE = """</script><script>'"`${x}\\<b>&amp;&"""
"""What would break out of a string in a script, of an attribute, or of text."""


@pytest.mark.parametrize(
    "tokens", [HOSTILE, [HOSTILE, HOSTILE + "2"]], ids=["one token", "several tokens"]
)
def test_a_url_contains_no_character_that_ends_a_string_or_an_attribute(tokens):
    """It is not escaped, because a script does not decode `&amp;`."""
    template = Template("{% load eventsource %}{% eventsource_url token %}")
    url = template.render(Context({"token": tokens}))
    assert set(url).isdisjoint("<>\"'`\\{} \n")
    assert "&amp;" not in url
    assert unquote(urlsplit(url).path) == f"/events/poll/{HOSTILE}"
    assert list(grant_of(url).tokens) == ([tokens] if isinstance(tokens, str) else tokens)


def test_a_url_of_several_tokens_means_the_same_in_a_script_and_in_an_attribute():
    """HTML has no characters named `&token` and `&grant`."""
    url = Template("{% load eventsource %}{% eventsource_url token %}").render(
        Context({"token": ["a", "b"]})
    )
    assert "&grant=" in url
    assert unescape(url) == url


@pytest.mark.urls("tests.unit.test_templatetags")
def test_the_error_without_the_urls_contains_the_line_to_add():
    with pytest.raises(NoReverseMatch, match=r'Add path\("events/", include\("django_event'):
        render("token", token="t")


@pytest.mark.parametrize("tag", ["token", "token 'ping'", "no_such_variable"])
def test_an_empty_token_raises_an_error_that_names_the_context(tag):
    """A variable that is not in the context is an empty text."""
    with pytest.raises(InvalidToken, match=r"^A token is empty\. Does the context of the"):
        render(tag, token="")


def test_a_token_that_is_not_valid_raises_an_error():
    with pytest.raises(InvalidToken, match="256"):
        render("token", token="t" * 256)


@pytest.mark.parametrize("action", ["poll", "ping"])
@pytest.mark.parametrize("token", ["../../admin/logout/", "a/./b", "a/..", "./&'?#%2e/.."])
def test_a_token_with_dot_segments_does_not_lead_out_of_its_path(token, action):
    """A browser removes the segments, and would send the grant to another URL of the site."""
    url = render("token action", token=token, action=action)
    path = urlsplit(urljoin("http://testserver/page/", url)).path
    assert path.startswith(f"/events/{action}/")
    assert unquote(path.removeprefix(f"/events/{action}/")) == token
    assert grant_of(url).tokens == (token,)


@pytest.mark.parametrize("token", ["a..b", "...", "a/.b/c", "~"])
def test_a_token_with_other_dots_keeps_its_slashes(token):
    """Some proxies refuse an encoded slash."""
    assert urlsplit(render("token", token=token)).path == f"/events/poll/{token}"


@pytest.mark.parametrize("token", [".", ".."])
def test_a_token_that_browsers_remove_raises_an_error(token):
    """A browser removes the segment also if it is percent-encoded."""
    with pytest.raises(InvalidToken, match=rf"^The token '{re.escape(token)}' cannot be in the"):
        render("token", token=token)


@pytest.mark.parametrize("bind", ["", "bind=False"])
def test_an_action_that_the_event_class_does_not_allow_raises_an_error(settings, bind):
    """The response to its POST would be 404. The class is that of the tag's URLs."""
    with pytest.raises(UnknownAction, match="'pnig': StringIdEvent allows ping, retry, close"):
        render(f"'42' 'pnig' {bind}")
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.AnyEvent"
    assert grant_of(render("'42' 'pnig'")).actions == ("pnig",)
    with pytest.raises(InvalidEvent, match="reserved"):
        render("'42' 'reset'")


@pytest.mark.parametrize("token", [token for token in TOKENS if token.isascii()])
async def test_the_urls_work_for_a_client_without_credentials(memory_history, token):
    client = AsyncClient()
    assert (await client.head(render("token", token=token))).status_code == 200
    url = render("token 'ping'", token=token)
    assert (await client.post(url, data="42", content_type="text/plain")).status_code == 200
    assert (await client.head(url.replace("/ping/", "/poll/"))).status_code == 403


def test_the_tag_with_a_list_returns_one_url_with_one_grant():
    url = render("tokens", tokens=TOKENS)
    parts = urlsplit(url)
    assert unquote(parts.path) == f"/events/poll/{TOKENS[0]}"
    assert parse_qs(parts.query)["token"] == TOKENS[1:]
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == (tuple(TOKENS), True, False)


@pytest.mark.parametrize("tokens", [["42"], ("42",)])
def test_a_list_of_one_token_is_the_same_as_the_token(tokens):
    url = render("tokens", tokens=tokens)
    assert urlsplit(url).path == "/events/poll/42"
    assert "token=" not in urlsplit(url).query
    assert grant_of(url).tokens == ("42",)
    assert grant_of(render("tokens 'ping'", tokens=tokens)).send


def test_a_list_with_an_action_raises_an_error():
    with pytest.raises(ValueError, match="sent to one token, not to 4"):
        render("tokens 'ping'", tokens=TOKENS)
    assert grant_of(render("tokens 'poll'", tokens=TOKENS)).listen


@pytest.mark.parametrize("tokens", [[], ["", "b"], ["a", ""]], ids=["none", "first", "other"])
def test_an_empty_list_or_a_token_that_is_not_valid_raises_an_error(tokens):
    with pytest.raises(InvalidToken):
        render("tokens", tokens=tokens)


async def test_the_url_of_several_tokens_opens_one_stream(memory_history):
    """A further token in the query is refused."""
    client = AsyncClient()
    url = render("tokens", tokens=["a", "b c"])
    assert (await client.head(url)).status_code == 200
    assert (await client.head(f"{url}&token=c")).status_code == 403


def query_of(url):
    return parse_qs(urlsplit(url).query)


def test_a_url_after_a_cursor_opens_the_stream_there(memory_history):
    """A client that reconnects sends a newer cursor in its header."""
    (entry,) = add(memory_history, "a", token="42")
    (cursor,) = query_of(render("'42' after=cursor", cursor=get_cursor("42")))["last_event_id"]
    assert cursor_texts(cursor, ["42"]) == {"42": str(entry.seq)}
    memory_history.append("42", [draft(kind=Kind.CLOSE)])
    (cursor,) = query_of(render("'42' after=cursor", cursor=get_cursor("42")))["last_event_id"]
    assert cursor_texts(cursor, ["42"]) == {"42": f"{entry.seq + 1}+"}
    url = render("tokens after=cursor", tokens=["42", "43"], cursor=get_cursor(["42", "43"]))
    assert query_of(url)["last_event_id"] == [get_cursor(["42", "43"])]


@pytest.mark.parametrize("cursor", ["a b", "~"])
def test_a_cursor_that_is_not_valid_raises_an_error(cursor):
    with pytest.raises(ValueError, match=r"after must be a cursor that get_cursor\(\) returned"):
        render("'42' after=cursor", cursor=cursor)


@pytest.mark.parametrize("variable", ["cursor", "no_such_variable"])
def test_an_empty_cursor_raises_an_error_that_names_the_context(variable):
    """A variable that is not in the context is an empty text."""
    with pytest.raises(ValueError, match=r"^after is empty\. Does the context of the template"):
        render(f"'42' after={variable}", cursor="")


@pytest.mark.parametrize("cursor", [5, b"5", ["5"]])
def test_a_cursor_that_is_not_a_text_raises_an_error_that_names_it(cursor):
    with pytest.raises(ValueError, match=r"after must be a cursor that .*, not ") as caught:
        render("'42' after=cursor", cursor=cursor)
    assert str(caught.value).endswith(f"not {cursor!r}.")


@pytest.mark.parametrize(
    ("covered", "tokens"),
    [("42", ["42", "43"]), (["42", "43"], ["42", "44"]), ("42", "43")],
)
def test_a_cursor_that_lacks_a_token_of_the_stream_raises_an_error(
    memory_history, covered, tokens
):
    """The stream would start at the newest event of that token, and miss those before it."""
    with pytest.raises(ValueError, match="after is a cursor of other tokens"):
        render("tokens after=cursor", tokens=tokens, cursor=get_cursor(covered))
    url = render("tokens after=cursor", tokens=["42"], cursor=get_cursor(["42", "43"]))
    assert query_of(url)["last_event_id"] == [get_cursor(["42", "43"])]


def test_a_url_with_a_rewind_starts_with_stored_events():
    assert query_of(render("'42' rewind=10"))["rewind"] == ["10"]
    assert query_of(render("'42' rewind='2h'"))["rewind"] == ["2h"]
    assert "rewind" not in query_of(render("'42'"))
    with pytest.raises(ValueError, match=r"rewind must be a number of events .*, not '5d'"):
        render("'42' rewind='5d'")


@pytest.mark.parametrize("start", ["after='5'", "rewind=5"])
def test_a_url_to_send_to_has_no_start(start):
    with pytest.raises(ValueError, match="for a stream, not for the action 'ping'"):
        render(f"'42' 'ping' {start}")
    assert grant_of(render(f"'42' 'poll' {start}")).listen


def test_the_script_is_an_element_with_the_url_of_the_module(settings):
    template = Template("{% load eventsource %}{% eventsource_script %}")
    settings.STATIC_URL = "https://static.example.com/a&b/"
    assert template.render(Context()) == (
        '<script type="module" id="eventsource" '
        'src="https://static.example.com/a&amp;b/eventsource/eventsource.js"></script>'
    )


def test_the_script_has_the_nonce_of_the_page():
    """It is made at its first use as a text, and is false before."""

    class Nonce(str):
        __slots__ = ()

        def __bool__(self):
            return False

    template = Template("{% load eventsource %}{% eventsource_script nonce=csp_nonce %}")
    html = template.render(Context({"csp_nonce": Nonce('a"b')}))
    assert html.endswith(' nonce="a&quot;b"></script>')
    with pytest.raises(ValueError, match=r"^nonce is empty\. Does the context"):
        template.render(Context())
