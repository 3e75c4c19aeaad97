"""Tests of the settings."""

from __future__ import annotations

from decimal import Decimal

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_eventsource.conf import (
    PROPERTIES,
    check_event_class,
    check_positive,
    conf,
    number_error,
)
from django_eventsource.events import Event, JSONEvent, StringEvent, StringIdEvent
from django_eventsource.policies import AllowAny, DefaultPolicy

HERE = __name__
NUMBER = "must be a positive number or None, not "
WHOLE = "must be a positive whole number, not "
PAIR = "must be None or a pair of positive numbers, (events, seconds), not "

SECONDS_OR_NONE = [
    *("STREAM_STALL_SECONDS", "STREAM_MAX_AGE_SECONDS", "RECHECK_SECONDS", "PRESENCE_SECONDS")
]
LIMITS = [
    *("MAX_STREAMS", "MAX_STREAMS_PER_TOKEN", "MAX_STREAMS_PER_USER", "MAX_STREAMS_PER_ADDRESS")
]


class WithTuple(StringEvent):
    ACTIONS = ("ping", "pong")


class WithReset(StringEvent):
    ACTIONS = ["ping", "reset"]


class ListensForReset(StringEvent):
    LISTEN = "reset"


class WithCursor(StringEvent):
    ACTIONS = ["cursor", "ping"]


class WithSlash(StringEvent):
    ACTIONS = ["ping/pong"]


class WithNothing(StringEvent):
    ACTIONS = ["ping", ""]


class WithText(StringEvent):
    ACTIONS = "ping"


class WithNumbers(StringEvent):
    ACTIONS = [1]


class HalfAPolicy:
    can_listen = AllowAny.can_listen


class PlainPolicy:
    def can_listen(self, request, token):
        return True

    def can_send(self, request, token, action):
        return True


class ListensToSlash(StringEvent):
    LISTEN = "a/b"


class WithLineEnd(StringEvent):
    ACTIONS = ["a\nb"]


NOT_A_CLASS = object()
NAMES = "ACTIONS must be a list of action names, without slashes or line ends, not "


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("event_class", StringIdEvent),
        ("history", ("django_eventsource.history.database.DatabaseHistory", {})),
        ("policy", DefaultPolicy),
        ("channel_layer", "default"),
        ("keepalive_seconds", 15.0),
        ("retry_ms", None),
        ("poll_seconds", None),
        ("prune_seconds", 60.0),
        ("grant_seconds", 86_400.0),
        ("max_event_bytes", 1_048_576),
        ("stream_buffer_bytes", 262_144),
        ("stream_stall_seconds", 30.0),
        ("stream_max_age_seconds", 3600.0),
        ("stream_max_tokens", 16),
        ("recheck_seconds", 60.0),
        ("presence_seconds", 5.0),
        ("max_streams", None),
        ("max_streams_per_token", None),
        ("max_streams_per_user", None),
        ("max_streams_per_address", None),
        ("send_rate", None),
        ("coalesce_seconds", 0.005),
        ("login_rate", (10, 60.0)),
        ("retry_range_ms", (100, 3_600_000)),
    ],
)
def test_default(name, value):
    """Without any setting every property has its documented default."""
    assert getattr(conf, name) == value


def test_every_setting_is_listed_in_order():
    """The list that the checks go through has every property, in the order of its id."""
    assert PROPERTIES == [
        "event_class",
        "history",
        "policy",
        "channel_layer",
        "keepalive_seconds",
        "retry_ms",
        "poll_seconds",
        "prune_seconds",
        "grant_seconds",
        "max_event_bytes",
        "stream_buffer_bytes",
        "stream_stall_seconds",
        "stream_max_age_seconds",
        "stream_max_tokens",
        "recheck_seconds",
        "presence_seconds",
        "max_streams",
        "max_streams_per_token",
        "max_streams_per_user",
        "max_streams_per_address",
        "send_rate",
        "coalesce_seconds",
        "login_rate",
        "retry_range_ms",
    ]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("EVENT_CLASS", "django_eventsource.events.JSONEvent", JSONEvent),
        ("EVENT_CLASS", "django_eventsource.events.Event", Event),
        ("EVENT_CLASS", f"{HERE}.WithTuple", WithTuple),
        ("HISTORY", {"BACKEND": "a.B", "OPTIONS": {"MAX_EVENTS": 1}}, ("a.B", {"MAX_EVENTS": 1})),
        ("POLICY", "django_eventsource.policies.AllowAny", AllowAny),
        ("CHANNEL_LAYER", "default", "default"),
        ("KEEPALIVE_SECONDS", 1, 1.0),
        ("KEEPALIVE_SECONDS", 0.5, 0.5),
        ("KEEPALIVE_SECONDS", None, None),
        ("RETRY_MS", 3000, 3000),
        ("RETRY_MS", None, None),
        ("POLL_SECONDS", 2.5, 2.5),
        ("PRUNE_SECONDS", None, None),
        ("GRANT_SECONDS", 60, 60.0),
        ("MAX_EVENT_BYTES", 10, 10),
        ("STREAM_BUFFER_BYTES", 10, 10),
        *(
            (name, value, None if value is None else float(value))
            for name in SECONDS_OR_NONE
            for value in (1, 0.5, None)
        ),
        ("STREAM_MAX_TOKENS", 1, 1),
        *((name, value, value) for name in LIMITS for value in (1, 5000, None)),
        ("SEND_RATE", (10, 60), (10, 60.0)),
        ("SEND_RATE", [1, 0.5], (1, 0.5)),
        ("SEND_RATE", None, None),
        ("LOGIN_RATE", (5, 300), (5, 300.0)),
        ("LOGIN_RATE", None, None),
        ("RETRY_RANGE_MS", [5, 5], (5, 5)),
    ],
    ids=str,
)
def test_setting_is_read_live(settings, name, given, value):
    """A setting that is changed, as override_settings does, has its value at once."""
    setattr(settings, f"EVENTSOURCE_{name}", given)
    found = getattr(conf, name.lower())
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("EVENT_CLASS", None, "must be a dotted path, not None."),
        ("EVENT_CLASS", StringEvent, "must be a dotted path, not <class "),
        ("EVENT_CLASS", "nowhere.Event", "cannot be imported: 'nowhere.Event' (No module named"),
        ("EVENT_CLASS", "django_eventsource.events.Nope", "Nope' (Module "),
        ("EVENT_CLASS", "Event", "cannot be imported: 'Event' (Event doesn't look like"),
        (
            "EVENT_CLASS",
            "django_eventsource.policies.AllowAny",
            "must name a subclass of django_eventsource.events.Event, not "
            "'django_eventsource.policies.AllowAny'.",
        ),
        ("EVENT_CLASS", f"{HERE}.NOT_A_CLASS", "must name a subclass of "),
        ("HISTORY", "a.B", 'must be a dictionary with "BACKEND" and "OPTIONS", not \'a.B\'.'),
        ("HISTORY", {"BACKENDS": "a.B"}, "must be a dictionary with "),
        ("HISTORY", {"OPTIONS": None}, "OPTIONS must be a dictionary, not None."),
        ("POLICY", 5, "must be a dotted path, not 5."),
        ("POLICY", "nowhere.Policy", "cannot be imported: 'nowhere.Policy'"),
        (
            "POLICY",
            f"{HERE}.HalfAPolicy",
            "must name a class with `async def can_listen()` and `async def can_send()`, "
            f"not '{HERE}.HalfAPolicy'.",
        ),
        (
            "POLICY",
            f"{HERE}.PlainPolicy",
            "must name a class with `async def can_listen()` and `async def can_send()`, "
            f"not '{HERE}.PlainPolicy'.",
        ),
        ("POLICY", ".dots", "cannot be imported: '.dots'"),
        ("CHANNEL_LAYER", None, "must be an alias in CHANNEL_LAYERS (none there), not None."),
        ("CHANNEL_LAYER", "fast", "must be an alias in CHANNEL_LAYERS (none there), not 'fast'."),
        ("KEEPALIVE_SECONDS", 0, f"{NUMBER}0."),
        ("KEEPALIVE_SECONDS", -1.5, f"{NUMBER}-1.5."),
        ("KEEPALIVE_SECONDS", "15", f"{NUMBER}'15'."),
        ("KEEPALIVE_SECONDS", True, f"{NUMBER}True."),
        ("KEEPALIVE_SECONDS", float("inf"), f"{NUMBER}inf."),
        ("KEEPALIVE_SECONDS", float("nan"), f"{NUMBER}nan."),
        ("KEEPALIVE_SECONDS", Decimal(1), f"{NUMBER}Decimal('1')."),
        ("POLL_SECONDS", 0, f"{NUMBER}0."),
        ("PRUNE_SECONDS", 0, f"{NUMBER}0."),
        ("GRANT_SECONDS", None, "must be a positive number, not None."),
        ("GRANT_SECONDS", 0, "must be a positive number, not 0."),
        ("RETRY_MS", 0, "must be a positive whole number or None, not 0."),
        ("RETRY_MS", 1.5, "must be a positive whole number or None, not 1.5."),
        ("RETRY_MS", "5", "must be a positive whole number or None, not '5'."),
        ("RETRY_MS", True, "must be a positive whole number or None, not True."),
        ("MAX_EVENT_BYTES", None, f"{WHOLE}None."),
        ("MAX_EVENT_BYTES", -1, f"{WHOLE}-1."),
        ("STREAM_BUFFER_BYTES", None, f"{WHOLE}None."),
        ("STREAM_BUFFER_BYTES", 1.0, f"{WHOLE}1.0."),
        *(
            (name, value, f"{NUMBER}{value!r}.")
            for name in SECONDS_OR_NONE
            for value in (0, -1, "1", True, float("inf"))
        ),
        *(("STREAM_MAX_TOKENS", value, f"{WHOLE}{value!r}.") for value in (None, 0, 1.5)),
        *(
            (name, value, f"must be a positive whole number or None, not {value!r}.")
            for name in LIMITS
            for value in (0, -1, 1.5, "5", True)
        ),
        *(
            ("SEND_RATE", value, f"{PAIR}{value!r}.")
            for value in (
                *(0, 5, "10/m", "10", (), (1,), (1, 2, 3), (0, 1), (1, 0), (-1, 1), (1, -1)),
                *((None, 1), (1, None), (1.5, 1), (True, 1), (1, True), ("1", 1), (1, "1")),
                *((1, float("nan")), {"events": 1, "seconds": 1}),
            )
        ),
        (
            "LOGIN_RATE",
            (0, 60),
            "must be None or a pair of positive numbers, (failures, seconds), not (0, 60).",
        ),
        *(
            (
                "RETRY_RANGE_MS",
                value,
                f"must be a pair of positive whole numbers, (least, greatest), not {value!r}.",
            )
            for value in (None, 5, (1,), (0, 1), (2, 1), (1.0, 2), (True, 2), (1, 10**13))
        ),
    ],
    ids=str,
)
def test_bad_setting_is_told(settings, name, given, reason):
    """A bad value raises an error with the setting, the value and what is expected."""
    setattr(settings, f"EVENTSOURCE_{name}", given)
    with pytest.raises(ImproperlyConfigured) as caught:
        getattr(conf, name.lower())
    assert str(caught.value).startswith(f"EVENTSOURCE_{name} ")
    assert reason in str(caught.value)


def test_channel_layer_is_one_of_those_configured(settings):
    """An alias is looked up in CHANNEL_LAYERS, and the error lists what is there."""
    settings.CHANNEL_LAYERS = {"default": {}, "fast": {}}
    settings.EVENTSOURCE_CHANNEL_LAYER = "fast"
    assert conf.channel_layer == "fast"
    settings.EVENTSOURCE_CHANNEL_LAYER = "slow"
    with pytest.raises(ImproperlyConfigured, match=r"\(default, fast\), not 'slow'"):
        conf.channel_layer  # noqa: B018


def test_history_options_are_a_copy(settings):
    """Whoever is given the options cannot change the setting with them."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_AGE": 5}}
    conf.history[1].clear()
    assert conf.history[1] == {"MAX_AGE": 5}


@pytest.mark.parametrize(
    "cls", [StringIdEvent, WithTuple], ids=lambda event_class: event_class.__name__
)
def test_usable_event_class(cls):
    """A usable class is given back."""
    assert check_event_class(cls) is cls


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithReset, "lists the action 'reset', which is reserved"),
        (ListensForReset, "lists the action 'reset', which is reserved"),
        (WithCursor, "lists the action 'cursor', which is reserved"),
        (WithSlash, f"{NAMES}['ping/pong']."),
        (WithLineEnd, f"{NAMES}['a\\nb']."),
        (ListensToSlash, "LISTEN must be an action name, not 'a/b'."),
        (WithNothing, f"{NAMES}['ping', '']."),
        (WithText, f"{NAMES}'ping'."),
        (WithNumbers, f"{NAMES}[1]."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusable_event_class(settings, cls, reason):
    """A class with a reserved or impossible action is refused, named in full."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{HERE}.{cls.__name__}"
    for ask in (lambda: check_event_class(cls), lambda: conf.event_class):
        with pytest.raises(ImproperlyConfigured) as caught:
            ask()
        assert f"{HERE}.{cls.__name__}" in str(caught.value)
        assert reason in str(caught.value)


def test_positive_number_of_any_name():
    """A number that is given elsewhere than in the settings is checked in the same way."""
    assert check_positive("keepalive_seconds", 5) == 5.0
    assert check_positive("keepalive_seconds", None) is None
    with pytest.raises(ImproperlyConfigured, match=r"^keepalive_seconds must be .*, not 0\.$"):
        check_positive("keepalive_seconds", 0)


def test_number_error_is_a_whole_sentence():
    """The error of a number says the setting, what is expected and what was given."""
    error = number_error("EVENTSOURCE_X", "1", "a positive number")
    assert isinstance(error, ImproperlyConfigured)
    assert str(error) == "EVENTSOURCE_X must be a positive number, not '1'."
