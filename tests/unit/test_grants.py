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
INVALID = r"^The grant is not valid: it was changed or not made here\.$"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Stop the clock; a test moves it with clock(seconds)."""
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
def test_grant_says_what_it_was_made_for(token, listen, send):
    """A grant has its token, its rights and its expiry, rounded up to a second."""
    grant = read_grant(make_grant(token, listen=listen, send=send, seconds=60))
    assert grant == Grant(tokens=(token,), listen=listen, send=send, expires=1_800_000_061)


def test_grant_that_is_bound():
    """A grant contains its actions, the hash of its session's key and the id of its user."""
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


def test_grant_needs_no_quoting():
    """A grant is ASCII text that stands in a URL as it is."""
    text = make_grant("ünï😀/?&" * 9, listen=True)
    assert quote(text, safe=":") == text
    assert re.fullmatch(r"[\w:.-]+", text, re.ASCII)


def test_lifetime_is_the_settings_unless_given(settings):
    """EVENTSOURCE_GRANT_SECONDS is the lifetime of a grant that names none."""
    assert read_grant(make_grant("token", listen=True)).expires == 1_800_086_401
    settings.EVENTSOURCE_GRANT_SECONDS = 0.5
    assert read_grant(make_grant("token", listen=True)).expires == 1_800_000_001


def test_grant_expires(clock):
    """A grant is good until the second of its expiry, and not after."""
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
        ("token", {"actions": ["ping", "a\nb"]}, "holds LF"),
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
def test_grant_that_makes_no_sense_is_not_made(token, options, reason):
    """A bad token, no right or no lifetime is a ValueError."""
    with pytest.raises(ValueError, match=reason):
        make_grant(token, **options)


def test_bad_token_is_told_as_such():
    """A bad token's error is the token's own."""
    with pytest.raises(InvalidToken):
        make_grant("\0", listen=True)


@pytest.mark.parametrize(
    "text",
    ["", "x", "a:b:c", "::", "\ud800", "é:é:é", "\0", "." * 9, "x" * 100_000],
    ids=lambda text: ascii(text)[:20],
)
def test_what_never_was_a_grant(text):
    """Any other text is no grant, and nothing else is raised."""
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_every_change_of_a_character_is_noticed():
    """A grant with any character changed, removed or added is worthless."""
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


def test_payload_of_another_grant_is_noticed():
    """The rights of one grant cannot be moved under the signature of another."""
    payload = base64.urlsafe_b64encode(b'["token","ls",9999999999]').decode().rstrip("=")
    _, stamp, signature = make_grant("token", listen=True).split(":")
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(f"{payload}:{stamp}:{signature}")


@pytest.mark.parametrize("salt", ["django.core.signing", "other"])
def test_other_signed_values_are_no_grants(salt):
    """What the project signs for another purpose opens nothing here."""
    text = signing.dumps(["token", "ls", 9_999_999_999], salt=salt)
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_value_of_another_shape_is_no_grant():
    """A value with the right signature and the wrong number of parts is refused."""
    text = signing.dumps(["token", "ls"], salt=grants._SALT)
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)


def test_secret_key_can_be_rotated(settings):
    """SECRET_KEY_FALLBACKS keeps the grants of the old key good, and no longer than that."""
    text = make_grant("token", listen=True)
    old, settings.SECRET_KEY = settings.SECRET_KEY, "new"
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(text)
    settings.SECRET_KEY_FALLBACKS = [old]
    assert read_grant(text).tokens == ("token",)
    settings.SECRET_KEY_FALLBACKS = []
    with pytest.raises(InvalidGrant):
        read_grant(text)


def test_clock_is_the_wall_clock(monkeypatch):
    """A grant made on one machine is read on another: its expiry is the time of day."""
    monkeypatch.undo()
    before = time.time()
    expires = read_grant(make_grant("token", listen=True, seconds=100)).expires
    assert before + 100 <= expires <= time.time() + 101


@pytest.mark.parametrize("tokens", [["a"], ["a", "b"], ("a", "ünï😀"), ["a", "a"]], ids=ascii)
def test_grant_for_several_tokens(tokens):
    """A grant may hold a list of tokens, in their order."""
    assert read_grant(make_grant(tokens, listen=True)).tokens == tuple(tokens)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [([], "the list is empty"), (["a", ""], "token is empty"), (["a", "\0"], "holds NUL")],
    ids=["none", "empty", "nul"],
)
def test_grant_for_several_of_which_one_is_bad(tokens, reason):
    """One bad token is enough that no grant is made."""
    with pytest.raises(ValueError, match=reason):
        make_grant(tokens, listen=True)


def test_grant_is_read_as_of_another_time(clock):
    """A stream that began before the expiry keeps what its grant gave it."""
    text = make_grant("token", listen=True, seconds=59.75)
    clock(1000)
    assert read_grant(text, NOW + 59.5).listen
    for at in (NOW + 59.75, NOW + 2000, None):
        with pytest.raises(InvalidGrant, match="expired"):
            read_grant(text, at)


def test_time_does_not_make_a_forged_grant_good():
    """The signature counts at any time."""
    with pytest.raises(InvalidGrant, match=INVALID):
        read_grant(make_grant("token", listen=True)[:-1], 0.0)


def test_a_session_key_is_hashed() -> None:
    """Its key cannot be read from what stands for it, and another one differs."""
    hidden = hash_session_key("secret-key")
    assert "secret" not in hidden
    assert hidden == hash_session_key("secret-key") != hash_session_key("secret-kez")
    assert len(hidden) == 32
