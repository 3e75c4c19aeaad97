"""Tests of tokens."""

from __future__ import annotations

import re

import pytest
from channels.layers import BaseChannelLayer

from django_eventsource.delivery.layer import group_name
from django_eventsource.exceptions import InvalidEvent, InvalidToken
from django_eventsource.protocol.tokens import check_key, check_token, key_digest, token_key

TOKENS = ["a", "42:42:42:42:42:42", "a" * 255, "a/b/../c", " ", "ünï😀", "\u2028", "%2F", "a\nb"]
UNLIKE = ["A", "a", "á", "a\u0301", "a ", " a", "ß", "ss", "①", "1"]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: ascii(token)[:20])
def test_check_token_returns_text_of_1_to_255_characters(token):
    assert check_token(token) == token


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", r"^The token is empty; expected 1 to 255 characters\.$"),
        ("a" * 256, r"^The token is 256 characters long; at most 255 are allowed\.$"),
        ("a\0b", r"^The token 'a\\x00b' contains NUL\.$"),
        ("a\ud800", r"^The token 'a\\ud800' is not valid UTF-8\.$"),
        ("a\ufffd", r"^The token 'a\ufffd' is not valid UTF-8\.$"),
        (None, r"^A token must be a string, not None\.$"),
        (b"a", r"^A token must be a string, not b'a'\.$"),
    ],
    ids=["empty", "long", "nul", "surrogate", "replacement", "none", "bytes"],
)
def test_check_token_refuses_everything_else_with_the_reason(token, reason):
    with pytest.raises(InvalidToken, match=reason) as caught:
        check_token(token)
    assert isinstance(caught.value, ValueError)


def test_the_key_of_a_token_never_changes():
    """It is 32 hexadecimal digits, the same in every process and release."""
    assert token_key("42:42:42:42:42:42") == "7aad3fe79a8eae38aca8426a59b0faae"
    assert all(re.fullmatch(r"[0-9a-f]{32}", token_key(token)) for token in TOKENS)


def test_tokens_that_collations_confuse_have_different_keys():
    """Tokens differ in case, accents and spaces."""
    assert len({token_key(token) for token in UNLIKE}) == len(UNLIKE)
    assert len({group_name(token) for token in UNLIKE}) == len(UNLIKE)


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: ascii(token)[:20])
def test_the_group_name_of_any_token_is_valid(token):
    """The token cannot be read from it."""
    name = group_name(token)
    assert BaseChannelLayer().require_valid_group_name(name)
    assert re.fullmatch(r"eventsource\.[0-9a-f]{40}", name)
    assert group_name(token) == name


def test_group_name_depends_on_the_project(settings):
    """Two projects on one server have different values of SECRET_KEY."""
    settings.SECRET_KEY = "one"
    one = group_name("token")
    settings.SECRET_KEY = "two"
    two = group_name("token")
    settings.SECRET_KEY = b"one"
    assert one != two
    assert group_name("token") == one


@pytest.mark.parametrize("key", [*TOKENS, "\ufffd"], ids=lambda key: ascii(key)[:20])
def test_check_key_returns_text_of_1_to_255_characters(key):
    assert check_key(key) == key


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("", "The key is empty"),
        ("a" * 256, "The key is 256 characters long"),
        ("a\0b", r"The key 'a\x00b' contains NUL"),
        ("a\ud800", r"The key 'a\ud800' is not valid UTF-8"),
        (b"a", "The key is b'a'"),
        (5, "The key is 5"),
    ],
    ids=["empty", "long", "nul", "surrogate", "bytes", "number"],
)
def test_check_key_refuses_everything_else_with_what_is_allowed(key, given):
    with pytest.raises(InvalidEvent) as caught:
        check_key(key)
    assert str(caught.value).startswith(f"{given}; expected a text of 1 to 255 characters")
    assert isinstance(caught.value, ValueError)


def test_the_digest_of_a_key_never_changes():
    """It is 32 hexadecimal digits, the same in every process and release."""
    assert key_digest("", "order 5") == "f4aee19d3fc6f23850c6086f97143973"
    assert all(re.fullmatch(r"[0-9a-f]{32}", key_digest("", key)) for key in UNLIKE)


def test_keys_and_scopes_that_look_alike_have_different_digests():
    pairs = [(scope, key) for scope in ("", "a", "a\0", "\ud800") for key in [*UNLIKE, "\x01"]]
    assert len({key_digest(*pair) for pair in pairs}) == len(pairs)
