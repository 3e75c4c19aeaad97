"""Tests of grants."""

from __future__ import annotations

import base64
import re
import time
from urllib.parse import quote

import pytest
from django.contrib.auth.models import User
from django.core import signing

from django_eventsource import grants
from django_eventsource.exceptions import InvalidGrant, InvalidToken
from django_eventsource.grants import Grant, hash_session_key, make_grant, read_grant

NOW = 1_800_000_000.25
INVALID = r"^The grant is not valid: it was changed, or made with another SECRET_KEY\.$"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Stop the clock, and return a function that moves it."""
    moved = 0.0

    def move(seconds):
        nonlocal moved
        moved += seconds

    monkeypatch.setattr(grants.time, "time", lambda: NOW + moved)
    return move


@pytest.mark.parametrize("token", ["42:42:42:42:42:42", "ünï😀/?&", "a" * 255], ids=ascii)
@pytest.mark.parametrize(
    ("listen", "send"), [(True, False), (False, True), (True, True)], ids=["l", "s", "ls"]
)
def test_a_grant_contains_its_tokens_rights_and_expiry(token, listen, send):
    """The expiry is rounded up to a second."""
    grant = read_grant(make_grant(token, listen=listen, send=send, seconds=60))
    assert grant == Grant(tokens=(token,), listen=listen, send=send, expires=1_800_000_061)


def test_a_grant_contains_its_actions_session_and_user():
    """The key of the session is hashed."""
    text = make_grant("t", actions="ping", session_key="key", user=User(pk=7), seconds=60)
    assert read_grant(text) == Grant(
        tokens=("t",),
        listen=False,
        send=True,
        expires=1_800_000_061,
        actions=("ping",),
        session=hash_session_key("key"),
        user="7",
    )
    assert read_grant(make_grant("t", listen=True, user=0)).user == "0"


def test_a_grant_needs_no_quoting_in_a_url():
    text = make_grant("ünï😀/?&" * 9, listen=True)
    assert quote(text, safe=":") == text
    assert re.fullmatch(r"[\w:.-]+", text, re.ASCII)


def test_the_default_lifetime_is_the_setting(settings):
    assert read_grant(make_grant("token", listen=True)).expires == 1_800_086_401
    settings.EVENTSOURCE_GRANT_SECONDS = 0.5
    assert read_grant(make_grant("token", listen=True)).expires == 1_800_000_001


def test_a_grant_is_valid_until_the_second_of_its_expiry(clock):
    text = make_grant("token", listen=True, seconds=59.75)
    clock(59.5)
    assert read_grant(text).listen
    clock(0.25)
    with pytest.raises(InvalidGrant, match=r"^The grant has expired\.$"):
        read_grant(text)


@pytest.mark.parametrize(
    ("token", "options", "reason"),
    [
        ("", {"listen": True}, "token is empty"),
        ("a" * 256, {"listen": True}, "256 characters"),
        ("token", {}, r"needs a right: pass listen=True, send=True or both"),
        ("token", {"actions": []}, "The list of actions is empty"),
        ("token", {"actions": ["ping", "a\nb"]}, "contains LF"),
        ("token", {"listen": True, "user": User()}, "The user has no primary key"),
        *(
            (
                "token",
                {"send": True, "seconds": seconds},
                f"must be positive seconds, not {seconds}",
            )
            for seconds in (0, -1, float("inf"), float("nan"))
        ),
    ],
    ids=[
        "empty",
        "long",
        "no-right",
        "no-action",
        "action",
        "user",
        "zero",
        "negative",
        "infinite",
        "nan",
    ],
)
def test_make_grant_refuses_arguments_that_are_not_valid(token, options, reason):
    with pytest.raises(ValueError, match=reason):
        make_grant(token, **options)


def test_make_grant_raises_the_error_of_the_token():
    with pytest.raises(InvalidToken):
        make_grant("\0", listen=True)


@pytest.mark.parametrize(
    "text",
    ["", "x", "a:b:c", "::", "\ud800", "é:é:é", "\0", "." * 9, "x" * 100_000],
    ids=lambda text: ascii(text)[:20],
)
def test_text_that_is_not_a_grant_raises_invalid_grant(text):
    """No other exception is raised."""
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_a_grant_with_a_changed_character_is_not_valid():
    """A character is replaced, removed or added at every position."""
    text = make_grant("token", listen=True)
    for place, character in enumerate(text):
        other = "B" if character == "A" else "A"
        for damaged in (
            text[:place] + other + text[place + 1 :],
            text[:place] + text[place + 1 :],
            text[:place] + "A" + text[place:],
        ):
            with pytest.raises(InvalidGrant, match=INVALID):
                read_grant(damaged)


def test_a_signature_is_valid_for_its_own_content_only():
    payload = base64.urlsafe_b64encode(b'["token","ls",9999999999]').decode().rstrip("=")
    _, stamp, signature = make_grant("token", listen=True).split(":")
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(f"{payload}:{stamp}:{signature}")


@pytest.mark.parametrize("salt", ["django.core.signing", "other"])
def test_values_signed_for_other_purposes_are_not_grants(salt):
    text = signing.dumps(["token", "ls", 9_999_999_999], salt=salt)
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_a_signed_value_of_another_shape_is_not_a_grant():
    text = signing.dumps(["token", "ls"], salt=grants._SALT)
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_secret_key_fallbacks_keep_old_grants_valid(settings):
    """Without the fallback they are not valid."""
    text = make_grant("token", listen=True)
    old, settings.SECRET_KEY = settings.SECRET_KEY, "new"
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)
    settings.SECRET_KEY_FALLBACKS = [old]
    assert read_grant(text).tokens == ("token",)
    settings.SECRET_KEY_FALLBACKS = []
    with pytest.raises(InvalidGrant):
        read_grant(text)


def test_the_expiry_is_a_time_of_day(monkeypatch):
    """A grant that one machine makes is read on another one."""
    monkeypatch.undo()
    before = time.time()
    expires = read_grant(make_grant("token", listen=True, seconds=100)).expires
    assert before + 100 <= expires <= time.time() + 101


@pytest.mark.parametrize("tokens", [["a"], ["a", "b"], ("a", "ünï😀"), ["a", "a"]], ids=ascii)
def test_a_grant_contains_several_tokens_in_their_order(tokens):
    assert read_grant(make_grant(tokens, listen=True)).tokens == tuple(tokens)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [([], "the list is empty"), (["a", ""], "token is empty"), (["a", "\0"], "contains NUL")],
    ids=["none", "empty", "nul"],
)
def test_make_grant_refuses_a_list_with_a_token_that_is_not_valid(tokens, reason):
    with pytest.raises(ValueError, match=reason):
        make_grant(tokens, listen=True)


def test_the_expiry_is_checked_at_the_time_that_is_passed(clock):
    """The recheck of a stream passes the time when it was opened."""
    text = make_grant("token", listen=True, seconds=59.75)
    clock(1000)
    assert read_grant(text, NOW + 59.5).listen
    for at in (NOW + 59.75, NOW + 2000, None):
        with pytest.raises(InvalidGrant, match="expired"):
            read_grant(text, at)


def test_a_forged_grant_is_not_valid_at_any_time():
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(make_grant("token", listen=True)[:-1], 0.0)


def test_the_hash_of_a_session_key_does_not_contain_the_key() -> None:
    """Different keys have different hashes."""
    hidden = hash_session_key("secret-key")
    assert "secret" not in hidden
    assert hidden == hash_session_key("secret-key") != hash_session_key("secret-kez")
    assert len(hidden) == 32
