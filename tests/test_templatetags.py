"""Tests of the template tags."""

from __future__ import annotations

from html import unescape
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from django.template import Context, Template
from django.test import AsyncClient
from django.urls import NoReverseMatch

from django_eventsource import grants
from django_eventsource.exceptions import InvalidToken
from django_eventsource.grants import read_grant

urlpatterns: list[object] = []
"""The URLs of a project that does not include this app's."""

TOKENS = ["42:42:42", "a/b c?d#e&f%2F", "ünï😀", "<b>'\""]


def render(arguments, **context):
    """Render the tag in a page, and read the page as a browser does."""
    template = Template("{% load eventsource %}{% eventsource_url " + arguments + " %}")
    return unescape(template.render(Context(context)))


def grant_of(url):
    (text,) = parse_qs(urlsplit(url).query)["grant"]
    return read_grant(text)


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_url_to_listen(token):
    """The tag gives the URL of the token's stream, with a grant to listen to it alone."""
    url = render("token", token=token)
    assert unquote(urlsplit(url).path) == f"/events/poll/{token}"
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == ((token,), True, False)


def test_url_to_send():
    """With an action it is the URL of a POST, with a grant to send."""
    url = render("'42' 'ping'")
    assert urlsplit(url).path == "/events/ping/42"
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == (("42",), False, True)
    assert grant.actions == ("ping",)


def test_listen_action_by_name():
    """The Event class's own LISTEN, given by name, is the stream's URL too."""
    url = render("'42' 'poll'")
    assert urlsplit(url).path == "/events/poll/42"
    assert (grant_of(url).listen, grant_of(url).send) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "seconds"), [("'42'", 500), ("'42' seconds=60", 60), ("'42' None 60", 60)]
)
def test_lifetime(settings, monkeypatch, arguments, seconds):
    """The grant lives as long as the setting says, or the tag."""
    settings.EVENTSOURCE_GRANT_SECONDS = 500
    monkeypatch.setattr(grants.time, "time", lambda: 1_800_000_000)
    assert grant_of(render(arguments)).expires == 1_800_000_000 + seconds


HOSTILE = """</script><script>'"`${x}\\<b>&amp;&"""
"""What would break out of a string in a script, of an attribute, or of text."""


@pytest.mark.parametrize(
    "tokens", [HOSTILE, [HOSTILE, HOSTILE + "2"]], ids=["one token", "several tokens"]
)
def test_a_url_contains_no_character_that_ends_a_string_or_an_attribute(tokens):
    """It is printed as it is: a script does not decode ``&amp;``."""
    template = Template("{% load eventsource %}{% eventsource_url token %}")
    url = template.render(Context({"token": tokens}))
    assert set(url).isdisjoint("<>\"'`\\{} \n")
    assert "&amp;" not in url
    assert unquote(urlsplit(url).path) == f"/events/poll/{HOSTILE}"
    assert list(grant_of(url).tokens) == ([tokens] if isinstance(tokens, str) else tokens)


def test_a_url_of_several_tokens_means_the_same_in_a_script_and_in_an_attribute():
    """HTML leaves ``&token=`` and ``&grant=`` alone: no character has such a name."""
    url = Template("{% load eventsource %}{% eventsource_url token %}").render(
        Context({"token": ["a", "b"]})
    )
    assert "&grant=" in url
    assert unescape(url) == url


@pytest.mark.urls("tests.test_templatetags")
def test_a_project_without_the_urls_is_told_what_to_add():
    """The error names the line, and not a route and its arguments alone."""
    with pytest.raises(NoReverseMatch, match=r'Add path\("events/", include\("django_event'):
        render("token", token="t")


def test_bad_token_is_told():
    """A page that asks for an impossible token fails where its author sees it."""
    with pytest.raises(InvalidToken):
        render("token", token="")


@pytest.mark.parametrize("token", [token for token in TOKENS if token.isascii()])
async def test_url_opens_what_it_is_for(memory_history, token):
    """The view answers both URLs, as they are, to somebody it does not know."""
    client = AsyncClient()
    assert (await client.head(render("token", token=token))).status_code == 200
    url = render("token 'ping'", token=token)
    assert (await client.post(url, data="42", content_type="text/plain")).status_code == 200
    assert (await client.head(url.replace("/ping/", "/poll/"))).status_code == 403


def test_url_of_several_tokens():
    """A list gives one stream's URL, with one grant to listen to all of them."""
    url = render("tokens", tokens=TOKENS)
    parts = urlsplit(url)
    assert unquote(parts.path) == f"/events/poll/{TOKENS[0]}"
    assert parse_qs(parts.query)["token"] == TOKENS[1:]
    grant = grant_of(url)
    assert (grant.tokens, grant.listen, grant.send) == (tuple(TOKENS), True, False)


@pytest.mark.parametrize("tokens", [["42"], ("42",)])
def test_list_of_one_token(tokens):
    """It is the same as the token itself."""
    url = render("tokens", tokens=tokens)
    assert urlsplit(url).path == "/events/poll/42"
    assert "token=" not in urlsplit(url).query
    assert grant_of(url).tokens == ("42",)
    assert grant_of(render("tokens 'ping'", tokens=tokens)).send


def test_no_event_is_sent_to_several_tokens():
    """A list with an action is a mistake that the page's author sees."""
    with pytest.raises(ValueError, match="sent to one token, not to 4"):
        render("tokens 'ping'", tokens=TOKENS)
    assert grant_of(render("tokens 'poll'", tokens=TOKENS)).listen


@pytest.mark.parametrize("tokens", [[], ["", "b"], ["a", ""]], ids=["none", "first", "other"])
def test_bad_token_in_a_list(tokens):
    """An empty list is no token either."""
    with pytest.raises(InvalidToken):
        render("tokens", tokens=tokens)


async def test_url_of_several_opens_one_stream(memory_history):
    """The view takes it as it is; a token more is refused."""
    client = AsyncClient()
    url = render("tokens", tokens=["a", "b c"])
    assert (await client.head(url)).status_code == 200
    assert (await client.head(f"{url}&token=c")).status_code == 403
