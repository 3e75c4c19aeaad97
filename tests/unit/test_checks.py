"""Tests of the system checks."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from textwrap import dedent
from types import ModuleType

import pytest
from channels.layers import BaseChannelLayer
from django.core.checks import Error, Tags, Warning, run_checks  # noqa: A004
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from django_eventsource import checks
from django_eventsource.asgi import Handover
from django_eventsource.checks import (
    SETTING_IDS,
    check_access,
    check_broker,
    check_handover,
    check_metrics,
    check_outbox,
    check_processes,
    check_server,
    check_settings,
)
from django_eventsource.conf import PROPERTIES
from django_eventsource.events import StringEvent
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.history.outbox import Outbox
from django_eventsource.models import PendingEvent
from django_eventsource.policies import AllowAny
from tests.support.events import draft


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
    "WRITE_TO_TRANSPORT": 1,
    "METRICS_TOKEN": 5,
}


def test_the_default_settings_have_no_messages():
    assert check_settings() == []
    assert check_server() == []
    assert check_processes() == []
    assert check_handover() == []


def test_every_setting_is_tested():
    assert [name.lower() for name in BAD] == PROPERTIES


def test_every_setting_has_exactly_one_check_id():
    """A setting without an id, or with the id of another setting, fails here."""
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
def test_a_setting_that_is_not_valid_is_an_error(settings, name):
    """The error has the id of the setting, and contains its name and value."""
    setattr(settings, f"EVENTSOURCE_{name}", BAD[name])
    (message,) = check_settings()
    assert isinstance(message, Error)
    assert message.id == SETTING_IDS[name.lower()]
    assert message.msg.startswith(f"EVENTSOURCE_{name} ")
    assert repr(BAD[name]) in message.msg


def test_all_settings_that_are_not_valid_are_reported_together(settings):
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
        ({"OPTIONS": {"MAX_EVENTS": 0}}, "MAX_EVENTS must be a positive whole number, not 0."),
        ({"OPTIONS": {"USING": "nowhere"}}, "USING must be an alias in DATABASES, not 'nowhere'."),
        ({"OPTIONS": {"WAKE_UP": 1}}, "WAKE_UP must be True or False, not 1."),
        ({"OPTIONS": {"LISTEN_DSN": "port=1"}}, "LISTEN_DSN requires PostgreSQL with psycopg 3"),
    ],
    ids=["path", "none", "class", "option", "value", "alias", "wake-up", "listen"],
)
def test_the_backend_and_the_options_of_the_history_are_checked(settings, value, reason):
    settings.EVENTSOURCE_HISTORY = value
    (message,) = check_settings()
    assert message.id == "eventsource.E002"
    assert message.msg.startswith(f"EVENTSOURCE_HISTORY {reason}")


def test_a_reserved_action_is_an_error_of_the_event_class(settings):
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.WithReset"
    (message,) = check_settings()
    assert message.id == "eventsource.E001"
    assert "'reset' is reserved" in message.msg


def test_a_policy_that_needs_arguments_is_an_error(settings):
    settings.EVENTSOURCE_POLICY = f"{__name__}.NeedsAnArgument"
    (message,) = check_settings()
    assert message.id == "eventsource.E003"
    assert "NeedsAnArgument" in message.msg
    assert "argument" in message.msg


@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_asgi_application_is_a_warning(settings, value):
    """The hint contains the solution."""
    settings.ASGI_APPLICATION = value
    (message,) = check_server()
    assert isinstance(message, Warning)
    assert message.id == "eventsource.W001"
    assert "daphne" in message.hint


def test_a_missing_asgi_application_is_a_warning(settings):
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
def test_a_history_of_one_process_with_a_shared_layer_is_a_warning(settings, history, layer, ids):
    settings.EVENTSOURCE_HISTORY = {"BACKEND": history}
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": layer}}
    found = check_processes()
    assert [message.id for message in found] == ids
    assert all(
        isinstance(message, Warning) and "DatabaseHistory" in message.hint for message in found
    )


@pytest.mark.django_db
def test_manage_py_check_fails_on_a_setting_that_is_not_valid(settings):
    # Without the databases, Django 6.1 uses all of them.
    call_command("check", databases=["default"])
    settings.EVENTSOURCE_RETRY_MS = -1
    with pytest.raises(SystemCheckError, match="EVENTSOURCE_RETRY_MS must be"):
        call_command("check", databases=["default"])
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
def test_runserver_that_serves_wsgi_is_a_warning(monkeypatch, arguments, provider, ids):
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("django_eventsource.checks.get_commands", lambda: {"runserver": provider})
    assert [message.id for message in check_server()] == ids


def test_a_channel_layer_that_cannot_be_imported_is_an_error(settings):
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "nowhere.Layer"}}
    (message,) = check_settings()
    assert "CHANNEL_LAYERS['default'] cannot be used" in message.msg
    assert check_processes() == []


def test_a_project_without_a_layer_has_no_warning_of_check_deploy(settings):
    """Its messages are not sent to a server."""
    del settings.CHANNEL_LAYERS
    assert check_broker() == []


class OwnPolicy(AllowAny):
    pass


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ({}, []),
        ({"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}, ["eventsource.W007"]),
        ({"EVENTSOURCE_POLICY": f"{__name__}.OwnPolicy"}, []),
        ({"EVENTSOURCE_POLICY": "nowhere.Policy"}, []),
        ({"EVENTSOURCE_GRANT_SECONDS": 86_400}, []),
        ({"EVENTSOURCE_GRANT_SECONDS": 86_401}, ["eventsource.W008"]),
        ({"EVENTSOURCE_GRANT_SECONDS": "1"}, []),
        ({"CORS_ALLOW_ALL_ORIGINS": True}, []),
        ({"CORS_ALLOW_CREDENTIALS": True}, []),
        ({"CORS_ALLOW_ALL_ORIGINS": True, "CORS_ALLOW_CREDENTIALS": True}, ["eventsource.W009"]),
        ({"CORS_ORIGIN_ALLOW_ALL": True, "CORS_ALLOW_CREDENTIALS": True}, ["eventsource.W009"]),
    ],
)
def test_settings_that_admit_too_many_clients_are_warnings(settings, values, ids):
    for name, value in values.items():
        setattr(settings, name, value)
    assert [message.id for message in check_access()] == ids


@pytest.mark.parametrize("deployed", [True, False])
def test_settings_that_admit_too_many_clients_are_reported_for_a_deployment(settings, deployed):
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    messages = run_checks(tags=["eventsource"], include_deployment_checks=deployed)
    assert ("eventsource.W007" in {message.id for message in messages}) is deployed


@pytest.fixture
def metrics_library(monkeypatch):
    """Install a stand-in for prometheus-client, which the unit tests do not need."""
    library = ModuleType("prometheus_client")
    library.__spec__ = ModuleSpec("prometheus_client", loader=None)
    monkeypatch.setitem(sys.modules, "prometheus_client", library)


@pytest.mark.usefixtures("metrics_library")
@pytest.mark.parametrize("token", [None, "a-secret-of-the-tests"])
def test_a_token_of_the_metrics_without_their_library_is_a_warning(settings, monkeypatch, token):
    settings.EVENTSOURCE_METRICS_TOKEN = token
    assert check_metrics() == []
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "nowhere")  # it is not used
    found = [message.id for message in check_metrics()]
    assert found == ([] if token is None else ["eventsource.W011"])


@pytest.mark.usefixtures("metrics_library")
def test_a_directory_of_the_metrics_that_does_not_exist_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert check_metrics() == []
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "absent"))
    found = run_checks(tags=["eventsource"], include_deployment_checks=True)
    (message,) = [one for one in found if one.id == "eventsource.W012"]
    assert f"{str(tmp_path / 'absent')!r}, which is not a directory" in message.msg


@pytest.fixture
def no_handover_made(monkeypatch):
    """Start as a process that has not loaded its ASGI application."""
    monkeypatch.setattr(Handover, "made", 0)


@pytest.mark.usefixtures("no_handover_made")
def test_an_application_without_handover_is_a_warning(settings):
    """Django can serve its streams, at a higher cost."""
    settings.ASGI_APPLICATION = "tests.support.plain_asgi.application"
    (message,) = check_handover()
    assert isinstance(message, Warning)
    assert message.id == "eventsource.W004"
    assert "Handover(get_asgi_application())" in message.hint


@pytest.mark.usefixtures("no_handover_made")
@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_asgi_application_is_not_imported(settings, value):
    """Another check reports it."""
    settings.ASGI_APPLICATION = value
    assert check_handover() == []


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("nowhere.application", "ModuleNotFoundError: No module named 'nowhere'"),
        ("application", "ImportError: application doesn't look like a module path"),
        (
            "tests.support.plain_asgi.nothing",
            'ImportError: Module "tests.support.plain_asgi" does not define a "nothing" '
            "attribute/class",
        ),
    ],
    ids=["module", "path", "attribute"],
)
def test_an_application_that_cannot_be_imported_is_a_warning(settings, value, error):
    """It contains the error, and the lines of an asgi.py."""
    settings.ASGI_APPLICATION = value
    (message,) = check_handover()
    assert isinstance(message, Warning)
    assert message.id == "eventsource.W006"
    assert message.msg == f"ASGI_APPLICATION {value!r} cannot be imported: {error}"
    _, *lines = message.hint.splitlines()
    assert len(lines) == 5
    names: dict[str, object] = {}
    exec(dedent("\n".join(lines)), names)
    assert isinstance(names["application"], Handover)


@pytest.mark.usefixtures("no_handover_made")
def test_an_application_that_raises_is_a_warning_with_its_error(settings, monkeypatch):

    def fail(path):
        raise RuntimeError("no database")

    monkeypatch.setattr("django_eventsource.checks.import_string", fail)
    (message,) = check_handover()
    assert message.id == "eventsource.W006"
    assert message.msg.endswith("cannot be imported: RuntimeError: no database")


def test_an_application_that_contains_handover_has_no_warning(settings):
    """The wrapper may be inside another ASGI application."""
    settings.ASGI_APPLICATION = "testproject.asgi.application"
    assert check_handover() == []
    assert Handover.made >= 1


# Pending events


@pytest.fixture
def pending(db):
    """Leave an event in the outbox of the default database."""
    Outbox("default").add("t", [draft()])


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("using", ["default", "other"])
def test_pending_events_that_the_history_does_not_publish_are_a_warning(
    settings, monkeypatch, using
):
    """The history has no outbox, or one in another database."""
    monkeypatch.setattr(MemoryHistory, "has_outbox", using == "other")
    monkeypatch.setattr(MemoryHistory, "using", using)
    settings.EVENTSOURCE_HISTORY = {"BACKEND": MEMORY}
    assert run_checks(tags=["eventsource"]) == []
    (warning,) = run_checks(tags=[Tags.database], databases=["default"])
    assert warning.id == "eventsource.W010"
    assert "'default' has pending events (1)" in warning.msg
    assert "PendingEvent" in warning.hint


@pytest.mark.usefixtures("pending")
def test_pending_events_of_the_outbox_of_the_history_are_no_warning():
    assert check_outbox(databases=["default"]) == []
    assert check_outbox() == []


@pytest.mark.django_db
def test_a_database_without_pending_events_has_no_warning(settings, monkeypatch):
    """Neither one whose history cannot be made, nor one that is not migrated."""
    settings.EVENTSOURCE_HISTORY = {"BACKEND": MEMORY}
    assert check_outbox(databases=["default"]) == []
    with monkeypatch.context() as patch:
        patch.setattr(PendingEvent._meta, "db_table", "missing")
        assert check_outbox(databases=["default"]) == []
    settings.EVENTSOURCE_HISTORY = {"BACKEND": "nowhere.History"}
    assert check_outbox(databases=["default"]) == []
