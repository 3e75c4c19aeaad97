"""Tests of the settings."""

from __future__ import annotations

from decimal import Decimal

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_eventsource.conf import (
    PROPERTIES,
    check_count,
    check_event_class,
    check_positive_or_none,
    conf,
    define_defaults,
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


class ListensToSlash(StringEvent):
    LISTEN = "a/b"


class WithLineEnd(StringEvent):
    ACTIONS = ["a\nb"]


class WithAny(StringEvent):
    ACTIONS = ["*"]


class WithAnyAndNames(StringEvent):
    ACTIONS = ("ping", "*", StringEvent.FINISH)


class WithAnyAndReset(StringEvent):
    ACTIONS = ["*", "reset"]


class ListensToAny(StringEvent):
    LISTEN = "*"


class WithAnyAsText(StringEvent):
    ACTIONS = "*"


NOT_A_CLASS = object()
NAMES = 'ACTIONS must be a list of action names, or ["*"], not '
NAME = "ACTIONS has an action that is not valid. "


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
        ("write_to_transport", True),
        ("metrics_token", None),
    ],
)
def test_every_setting_has_its_documented_default(name, value):
    assert getattr(conf, name) == value


def test_the_app_has_defined_the_settings_that_the_project_does_not_define(settings):
    for name in PROPERTIES:
        assert hasattr(settings, f"EVENTSOURCE_{name.upper()}")
    assert settings.EVENTSOURCE_COALESCE_SECONDS == 0.005


def test_a_default_does_not_replace_the_value_of_the_project(settings):
    settings.EVENTSOURCE_RETRY_MS = 700
    del settings.EVENTSOURCE_COALESCE_SECONDS
    define_defaults()
    assert settings.EVENTSOURCE_RETRY_MS == 700
    assert settings.EVENTSOURCE_COALESCE_SECONDS == 0.005


def test_every_setting_is_listed_in_order():
    """The list that the checks use contains every property, in the order of the ids."""
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
        "write_to_transport",
        "metrics_token",
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
        ("WRITE_TO_TRANSPORT", False, False),
        ("METRICS_TOKEN", "0123456789abcdef", "0123456789abcdef"),
    ],
    ids=str,
)
def test_a_changed_setting_has_its_value_at_once(settings, name, given, value):
    """override_settings changes it."""
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
        *(
            ("WRITE_TO_TRANSPORT", value, f"must be True or False, not {value!r}.")
            for value in (None, 0, 1, "yes")
        ),
        *(
            ("METRICS_TOKEN", value, "of at least 16 ASCII characters without spaces")
            for value in (5, "", "0123456789abcde", "0123456789 abcdef", "0123456789äbcdef")
        ),
    ],
    ids=str,
)
def test_a_value_that_is_not_valid_raises_an_error(settings, name, given, reason):
    """The error contains the setting, the value and what is expected."""
    setattr(settings, f"EVENTSOURCE_{name}", given)
    with pytest.raises(ImproperlyConfigured) as caught:
        getattr(conf, name.lower())
    assert str(caught.value).startswith(f"EVENTSOURCE_{name} ")
    assert reason in str(caught.value)


def test_the_error_of_a_secret_does_not_contain_it(settings):
    settings.EVENTSOURCE_METRICS_TOKEN = "too short"
    with pytest.raises(ImproperlyConfigured) as caught:
        _ = conf.metrics_token
    assert "too short" not in str(caught.value)


def test_the_channel_layer_must_be_an_alias_in_channel_layers(settings):
    """The error lists the aliases."""
    settings.CHANNEL_LAYERS = {"default": {}, "fast": {}}
    settings.EVENTSOURCE_CHANNEL_LAYER = "fast"
    assert conf.channel_layer == "fast"
    settings.EVENTSOURCE_CHANNEL_LAYER = "slow"
    with pytest.raises(ImproperlyConfigured, match=r"\(default, fast\), not 'slow'"):
        conf.channel_layer  # noqa: B018


def test_history_options_are_a_copy(settings):
    """A change of the options does not change the setting."""
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"MAX_AGE": 5}}
    conf.history[1].clear()
    assert conf.history[1] == {"MAX_AGE": 5}


@pytest.mark.parametrize(
    "cls",
    [StringIdEvent, WithTuple, WithAny, WithAnyAndNames],
    ids=lambda event_class: event_class.__name__,
)
def test_check_event_class_returns_a_valid_class(cls):
    assert check_event_class(cls) is cls


def test_check_event_class_checks_a_list_that_was_changed_again():
    class Changing(StringEvent):
        ACTIONS = ["ping"]

    assert check_event_class(Changing) is Changing
    Changing.ACTIONS.append("pong")
    assert check_event_class(Changing) is Changing
    Changing.ACTIONS.append("reset")
    for _ in range(2):
        with pytest.raises(ImproperlyConfigured, match="reserved"):
            check_event_class(Changing)
    Changing.ACTIONS.pop()
    assert check_event_class(Changing) is Changing
    Changing.LISTEN = "a/b"
    with pytest.raises(ImproperlyConfigured, match="slash"):
        check_event_class(Changing)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithReset, f"{NAME}The action 'reset' is reserved"),
        (WithAnyAndReset, f"{NAME}The action 'reset' is reserved"),
        (
            ListensForReset,
            "LISTEN has an action that is not valid. The action 'reset' is reserved",
        ),
        (WithCursor, f"{NAME}The action 'cursor' is reserved"),
        (WithSlash, f"{NAME}The action 'ping/pong' contains a slash."),
        (WithLineEnd, f"{NAME}The action 'a\\nb' contains LF at position 1."),
        (ListensToSlash, "LISTEN has an action that is not valid. The action 'a/b' contains a"),
        (ListensToAny, "LISTEN has an action that is not valid. '*' is not an action: "),
        (WithNothing, f"{NAME}The action is empty."),
        (WithText, f"{NAMES}'ping'."),
        (WithAnyAsText, f"{NAMES}'*'."),
        (WithNumbers, f"{NAME}An action must be a text, not 1."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_event_class_with_a_reserved_or_malformed_action_is_refused(settings, cls, reason):
    """The error contains the full name of the class."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{HERE}.{cls.__name__}"
    for ask in (lambda: check_event_class(cls), lambda: conf.event_class):
        with pytest.raises(ImproperlyConfigured) as caught:
            ask()
        assert f"{HERE}.{cls.__name__}" in str(caught.value)
        assert reason in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", None, 10**13])
def test_only_positive_whole_numbers_pass_the_check(value):
    """The error contains the name, the value and what is expected."""
    assert check_count("tokens", 5) == 5
    with pytest.raises(ImproperlyConfigured, match=f"^tokens must be .*, not {value!r}.$"):
        check_count("tokens", value)


def test_check_positive_or_none_returns_a_float_or_none():
    assert check_positive_or_none("keepalive_seconds", 5) == 5.0
    assert check_positive_or_none("keepalive_seconds", None) is None
    with pytest.raises(ImproperlyConfigured, match=r"^keepalive_seconds must be .*, not 0\.$"):
        check_positive_or_none("keepalive_seconds", 0)


def test_number_error_contains_the_name_the_range_and_the_value():
    error = number_error("EVENTSOURCE_X", "1", "a positive number")
    assert isinstance(error, ImproperlyConfigured)
    assert str(error) == "EVENTSOURCE_X must be a positive number, not '1'."
