"""Tests of the system checks."""

from __future__ import annotations

import re

import pytest
from channels.layers import BaseChannelLayer
from channels_redis.pubsub import RedisPubSubChannelLayer
from django.core.checks import Error, Warning, run_checks  # noqa: A004
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from django_eventsource import checks
from django_eventsource.asgi import Handover
from django_eventsource.checks import (
    SETTING_IDS,
    check_broker,
    check_handover,
    check_processes,
    check_server,
    check_settings,
)
from django_eventsource.conf import PROPERTIES
from django_eventsource.events import StringEvent
from django_eventsource.policies import AllowAny


class NeedsAnArgument(AllowAny):
    def __init__(self, argument):
        raise NotImplementedError


class SharedLayer(BaseChannelLayer):
    pass


class WithReset(StringEvent):
    ACTIONS = ["ping", "reset"]


BAD = {
    "EVENT_CLASS": "nowhere.Event",
    "HISTORY": 5,
    "POLICY": "nowhere.Policy",
    "CHANNEL_LAYER": "nowhere",
    "KEEPALIVE_SECONDS": 0,
    "RETRY_MS": 0,
    "POLL_SECONDS": "1",
    "PRUNE_SECONDS": -1,
    "GRANT_SECONDS": None,
    "MAX_EVENT_BYTES": 1.5,
    "STREAM_BUFFER_BYTES": None,
    "STREAM_STALL_SECONDS": 0,
    "STREAM_MAX_AGE_SECONDS": -1,
    "STREAM_MAX_TOKENS": 0,
    "RECHECK_SECONDS": "60",
    "PRESENCE_SECONDS": 0,
    "MAX_STREAMS": 0,
    "MAX_STREAMS_PER_TOKEN": 1.5,
    "MAX_STREAMS_PER_USER": "5",
    "MAX_STREAMS_PER_ADDRESS": True,
    "SEND_RATE": 10,
    "COALESCE_SECONDS": 0,
    "LOGIN_RATE": "10",
    "RETRY_RANGE_MS": (0, 1),
}


def test_defaults_are_fine():
    """The test project's settings, all defaults, give no message."""
    assert check_settings() == []
    assert check_server() == []
    assert check_processes() == []
    assert check_handover() == []


def test_every_setting_has_a_bad_value_here():
    """No setting is left out of these tests."""
    assert [name.lower() for name in BAD] == PROPERTIES


def test_every_setting_has_exactly_one_check_id():
    """A setting that is added without a check id, or with the id of another one, fails here."""
    assert set(SETTING_IDS) == set(PROPERTIES)
    assert len(set(SETTING_IDS.values())) == len(SETTING_IDS)
    assert all(re.fullmatch(r"eventsource\.E\d{3}", one) for one in SETTING_IDS.values())


def test_a_setting_added_before_others_changes_no_check_id(settings, monkeypatch):
    """The id of a setting does not depend on the order of the settings."""
    monkeypatch.setattr(checks, "PROPERTIES", [*reversed(PROPERTIES)])
    settings.EVENTSOURCE_SEND_RATE = 10
    settings.EVENTSOURCE_RETRY_MS = 0
    assert [message.id for message in check_settings()] == [
        "eventsource.E021",
        "eventsource.E006",
    ]


@pytest.mark.parametrize("name", BAD)
def test_bad_setting_is_an_error(settings, name):
    """Each bad setting is one error with an id of its own, naming setting and value."""
    setattr(settings, f"EVENTSOURCE_{name}", BAD[name])
    (message,) = check_settings()
    assert isinstance(message, Error)
    assert message.id == SETTING_IDS[name.lower()]
    assert message.msg.startswith(f"EVENTSOURCE_{name} ")
    assert repr(BAD[name]) in message.msg


def test_all_bad_settings_are_told_at_once(settings):
    """Several bad settings are told together, not one at each start."""
    for name, value in BAD.items():
        setattr(settings, f"EVENTSOURCE_{name}", value)
    assert len(check_settings()) == len(BAD)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"BACKEND": "nowhere.History"}, "BACKEND cannot be imported: 'nowhere.History'"),
        ({"BACKEND": None}, "BACKEND cannot be imported: None"),
        ({"BACKEND": "django.http.HttpRequest"}, "BACKEND must name a subclass of"),
        ({"OPTIONS": {"MAX_EVENT": 5}}, "OPTIONS do not fit"),
        ({"OPTIONS": {"MAX_EVENTS": 0}}, "MAX_EVENTS must be a positive number, not 0."),
        ({"OPTIONS": {"USING": "nowhere"}}, "USING must be an alias in DATABASES, not 'nowhere'."),
    ],
    ids=["path", "none", "class", "option", "value", "alias"],
)
def test_history_is_made_to_check_it(settings, value, reason):
    """A backend or an option that does not work is told at start."""
    settings.EVENTSOURCE_HISTORY = value
    (message,) = check_settings()
    assert message.id == "eventsource.E002"
    assert message.msg.startswith(f"EVENTSOURCE_HISTORY {reason}")


def test_reserved_action_is_an_error(settings):
    """A class that lists `reset` is an error of the setting that names it."""
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.WithReset"
    (message,) = check_settings()
    assert message.id == "eventsource.E001"
    assert "'reset', which is reserved" in message.msg


def test_policy_is_made_to_check_it(settings):
    """A policy that cannot be made without arguments is told at start."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.NeedsAnArgument"
    (message,) = check_settings()
    assert message.id == "eventsource.E003"
    assert "NeedsAnArgument" in message.msg
    assert "argument" in message.msg


@pytest.mark.parametrize("value", [None, ""])
def test_project_without_asgi_is_warned(settings, value):
    """A project that is not set up for ASGI is warned, with the way out."""
    settings.ASGI_APPLICATION = value
    (message,) = check_server()
    assert isinstance(message, Warning)
    assert message.id == "eventsource.W001"
    assert "daphne" in message.hint


def test_project_that_never_heard_of_asgi_is_warned(settings):
    """A project without the setting is warned like one with an empty setting."""
    del settings.ASGI_APPLICATION
    assert [message.id for message in check_server()] == ["eventsource.W001"]


MEMORY = "django_eventsource.history.memory.MemoryHistory"
DATABASE = "django_eventsource.history.database.DatabaseHistory"
IN_MEMORY = "channels.layers.InMemoryChannelLayer"


@pytest.mark.parametrize(
    ("history", "layer", "ids"),
    [
        (MEMORY, f"{__name__}.SharedLayer", ["eventsource.W002"]),
        (MEMORY, IN_MEMORY, []),
        (DATABASE, f"{__name__}.SharedLayer", []),
        ("nowhere.History", f"{__name__}.SharedLayer", []),
    ],
    ids=["lonely-history", "one-process", "both-shared", "reported-elsewhere"],
)
def test_history_of_one_process_behind_a_shared_layer(settings, history, layer, ids):
    """A history that other processes do not see does not go with a layer that they share."""
    settings.EVENTSOURCE_HISTORY = {"BACKEND": history}
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": layer}}
    found = check_processes()
    assert [message.id for message in found] == ids
    assert all(
        isinstance(message, Warning) and "DatabaseHistory" in message.hint for message in found
    )


def test_manage_py_check_stops_on_a_bad_setting(settings):
    """`manage.py check` runs the checks, and fails on a bad setting."""
    call_command("check")
    settings.EVENTSOURCE_RETRY_MS = -1
    with pytest.raises(SystemCheckError, match="EVENTSOURCE_RETRY_MS must be"):
        call_command("check")
    assert [message.id for message in run_checks(tags=["eventsource"])] == ["eventsource.E006"]


@pytest.mark.parametrize(
    ("arguments", "provider", "ids"),
    [
        (["manage.py", "runserver"], "django.core", ["eventsource.W003"]),
        (["manage.py", "runserver"], "django.contrib.staticfiles", ["eventsource.W003"]),
        (["manage.py", "runserver"], "daphne", []),
        (["manage.py", "check"], "django.core", []),
    ],
)
def test_runserver_that_serves_wsgi_is_warned(monkeypatch, arguments, provider, ids):
    """Who starts Django's own runserver is told at start that streams will not work."""
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("django_eventsource.checks.get_commands", lambda: {"runserver": provider})
    assert [message.id for message in check_server()] == ids


def test_a_missing_layer_package_is_told(settings):
    """A channel layer that cannot be imported is a check error, not a traceback."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "nowhere.Layer"}}
    (message,) = check_settings()
    assert "CHANNEL_LAYERS['default'] cannot be used" in message.msg
    assert check_processes() == []


class OwnPubSub(RedisPubSubChannelLayer):
    """A project's own subclass."""


@pytest.mark.parametrize(
    ("layer", "config", "ids"),
    [
        ("channels_redis.core.RedisChannelLayer", {}, ["eventsource.W005"]),
        ("channels_redis.pubsub.RedisPubSubChannelLayer", {}, ["eventsource.W005"]),
        (f"{__name__}.OwnPubSub", {}, ["eventsource.W005"]),
        ("channels_redis.core.RedisChannelLayer", {"symmetric_encryption_keys": ["x"]}, []),
        (
            "channels_redis.pubsub.RedisPubSubChannelLayer",
            {"symmetric_encryption_keys": ["x"]},
            [],
        ),
        (IN_MEMORY, {}, []),
        (f"{__name__}.SharedLayer", {}, []),
        ("nowhere.Layer", {}, []),
    ],
)
def test_a_redis_layer_without_encryption_is_warned_at_deploy(settings, layer, config, ids):
    """The warning is given by `manage.py check --deploy`, and not by `manage.py check`."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": layer, "CONFIG": config}}
    found = run_checks(tags=["eventsource"], include_deployment_checks=True)
    assert [message.id for message in found if message.id != "eventsource.E004"] == ids
    assert all("symmetric_encryption_keys" in message.hint for message in found if message.hint)
    plain = run_checks(tags=["eventsource"])
    assert [message.id for message in plain if message.id != "eventsource.E004"] == []


def test_a_project_without_a_layer_is_not_warned_at_deploy(settings):
    """Nothing is sent to a broker."""
    del settings.CHANNEL_LAYERS
    assert check_broker() == []


def test_the_layer_of_the_setting_is_checked_at_deploy(settings):
    """Another layer of the project does not matter, and CONFIG may be missing."""
    settings.CHANNEL_LAYERS = {
        "default": {"BACKEND": IN_MEMORY},
        "events": {"BACKEND": "channels_redis.core.RedisChannelLayer"},
    }
    assert check_broker() == []
    settings.EVENTSOURCE_CHANNEL_LAYER = "events"
    (message,) = check_broker()
    assert "CHANNEL_LAYERS['events']" in message.msg


@pytest.fixture
def nothing_made(monkeypatch):
    """Begin as a process does that has not loaded its ASGI application."""
    monkeypatch.setattr(Handover, "made", 0)


@pytest.mark.usefixtures("nothing_made")
def test_application_without_the_wrapper_is_warned(settings):
    """Streams that Django serves itself work, and cost more: that is a warning."""
    settings.ASGI_APPLICATION = "tests.plain_asgi.application"
    (message,) = check_handover()
    assert isinstance(message, Warning)
    assert message.id == "eventsource.W004"
    assert "Handover(get_asgi_application())" in message.hint


@pytest.mark.usefixtures("nothing_made")
@pytest.mark.parametrize("value", [None, "", "nowhere.application", "tests.plain_asgi.nothing"])
def test_application_that_cannot_be_loaded_is_reported_elsewhere(settings, value):
    """Without an ASGI application there is nothing to say about it."""
    settings.ASGI_APPLICATION = value
    assert check_handover() == []


@pytest.mark.usefixtures("nothing_made")
def test_application_that_breaks_does_not_break_the_check(settings, monkeypatch):
    """Whatever its module raises, `manage.py check` says the rest."""

    def fail(path):
        raise RuntimeError(path)

    monkeypatch.setattr("django_eventsource.checks.import_string", fail)
    assert check_handover() == []


def test_wrapper_is_found_wherever_it_is(settings):
    """An application that holds the wrapper inside of something else is not warned."""
    settings.ASGI_APPLICATION = "testproject.asgi.application"
    assert check_handover() == []
    assert Handover.made >= 1
