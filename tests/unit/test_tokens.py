"""Tests of tokens."""

from __future__ import annotations

import re

import pytest
from channels.layers import BaseChannelLayer

from django_eventsource.exceptions import InvalidToken
from django_eventsource.tokens import check_token, group_name, token_key

TOKENS = ["a", "42:42:42:42:42:42", "a" * 255, "a/b/../c", " ", "ünï😀", "\u2028", "%2F", "a\nb"]
UNLIKE = ["A", "a", "á", "a\u0301", "a ", " a", "ß", "ss", "①", "1"]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: ascii(token)[:20])
def test_any_text_is_a_token(token):
    """Any text of 1 to 255 characters is a token, and is given back as it is."""
    assert check_token(token) == token


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", r"^The token is empty; expected 1 to 255 characters\.$"),
        ("a" * 256, r"^The token is 256 characters long; at most 255 are allowed\.$"),
        ("a\0b", r"^The token 'a\\x00b' holds NUL\.$"),
        ("a\ud800", r"^The token 'a\\ud800' is not valid UTF-8\.$"),
        ("a\ufffd", r"^The token 'a\ufffd' is not valid UTF-8\.$"),
        (None, r"^A token must be a string, not None\.$"),
        (b"a", r"^A token must be a string, not b'a'\.$"),
    ],
    ids=["empty", "long", "nul", "surrogate", "replacement", "none", "bytes"],
)
def test_what_is_no_token(token, reason):
    """Anything else is refused with a ValueError that says why."""
    with pytest.raises(InvalidToken, match=reason) as caught:
        check_token(token)
    assert isinstance(caught.value, ValueError)


def test_key_is_short_and_stable():
    """The database key is 32 hexadecimal digits, the same in every process and release."""
    assert token_key("42:42:42:42:42:42") == "7aad3fe79a8eae38aca8426a59b0faae"
    assert all(re.fullmatch(r"[0-9a-f]{32}", token_key(token)) for token in TOKENS)


def test_tokens_that_collations_confuse_have_different_keys():
    """Case, accents and spaces make different tokens, whatever a database thinks of them."""
    assert len({token_key(token) for token in UNLIKE}) == len(UNLIKE)
    assert len({group_name(token) for token in UNLIKE}) == len(UNLIKE)


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: ascii(token)[:20])
def test_group_name_is_one_that_layers_accept(token):
    """Channels takes every token's group name, and the token does not show in it."""
    name = group_name(token)
    assert BaseChannelLayer().require_valid_group_name(name)
    assert re.fullmatch(r"eventsource\.[0-9a-f]{40}", name)
    assert group_name(token) == name


def test_group_name_depends_on_the_project(settings):
    """Two projects on one broker never meet, since their SECRET_KEY differs."""
    settings.SECRET_KEY = "one"
    one = group_name("token")
    settings.SECRET_KEY = "two"
    two = group_name("token")
    settings.SECRET_KEY = b"one"
    assert one != two
    assert group_name("token") == one
