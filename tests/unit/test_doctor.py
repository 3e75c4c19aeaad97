"""Tests of the findings of ``manage.py eventsource_doctor`` that need no server."""

from __future__ import annotations

import asyncio
import json
import os
import re
from email.utils import formatdate
from typing import Any, cast

import pytest
from channels.layers import BaseChannelLayer
from django.core import checks
from django.core.management.base import CommandError
from django.db import OperationalError, connection
from django.db.migrations.recorder import MigrationRecorder
from django.utils.module_loading import import_string

from django_eventsource.asgi import Handover
from django_eventsource.events import StringEvent
from django_eventsource.exceptions import ClientError, DeliveryFailed
from django_eventsource.history import get_history
from django_eventsource.monitoring.doctor import path, stores
from django_eventsource.monitoring.doctor import settings as settings_findings
from django_eventsource.monitoring.doctor.canary import MARGIN_SECONDS, Canary, Observation, Server
from django_eventsource.monitoring.doctor.clocks import describe, difference_seconds
from django_eventsource.protocol.frames import KEEPALIVE
from tests.conftest import MEMORY
from tests.support.commands import Run

pytestmark = pytest.mark.django_db

HEALTHY: dict[str, Any] = {
    "url": "https://example.com/events/poll/t",
    "direct": True,
    "sent": 1,
    "arrived": 1,
    "http_version": "HTTP/1.1",
    "offers_http2": True,
    "requested_at": 1000.0,
    "responded_at": 1001.0,
    "date": formatdate(1000, usegmt=True),
    "idle_seconds": 15.0,
    "keepalives": 1,
}


class DropsMessages(BaseChannelLayer):
    """A layer that accepts each message, and returns none."""

    async def new_channel(self) -> str:
        return "channel"

    async def group_add(self, group: str, channel: str) -> None:
        pass

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        pass

    async def receive(self, channel: str) -> dict[str, Any]:
        await asyncio.sleep(3600)
        raise AssertionError


class OnlyCloses(StringEvent):
    ACTIONS = ["close"]


def found(**changes: Any) -> list[int]:
    """Return the numbers of the findings about an observation."""
    seen = Observation(**HEALTHY | changes)
    return [int(str(one.id)[-3:]) for find in path.FINDINGS for one in find(seen)]


def settings_found() -> list[str]:
    """Return the texts of the findings about the settings."""
    history = get_history()
    return [one.msg for find in settings_findings.FINDINGS for one in find(history)]


# The findings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"served_by_wsgi": True, "sent": 0, "arrived": 0}, [14]),
        ({"arrived": 0, "buffered": True}, [15]),
        ({"direct": False, "sent": 6, "arrived": 6}, []),
        ({"direct": False, "sent": 6, "arrived": 1}, [16]),
        ({"arrived": 0}, [17]),
        ({"direct": False, "sent": 6, "arrived": 0}, [17]),
        ({"encoding": "gzip", "sent": 0, "arrived": 0}, [18]),
        ({"accepted_encoding": "br"}, [19]),
        ({"encoding": "br", "accepted_encoding": "br"}, [18]),
        ({"delayed_if_accepted": True}, [26]),
        ({"cut_seconds": 5.0, "keepalives": 0}, [20]),
        ({"idle_seconds": 26.0, "keepalives": 0}, [21]),
        ({"idle_seconds": 20.0, "keepalives": 0}, []),
        ({"http_version": "HTTP/1.0"}, [22]),
        ({"offers_http2": False}, [23]),
        ({"offers_http2": None}, []),
        ({"url": "http://example.com/events/poll/t"}, [24]),
        ({"url": "http://127.0.0.1/events/poll/t"}, []),
        ({"url": "http://[::1]/events/poll/t"}, []),
        ({"url": "http://localhost/events/poll/t"}, []),
        ({"date": formatdate(1004, usegmt=True)}, [25]),
        ({"date": formatdate(992, usegmt=True)}, [25]),
        ({"date": formatdate(1003, usegmt=True)}, []),
        ({"date": formatdate(993, usegmt=True)}, []),
        ({"date": "no date"}, []),
        ({"date": None}, []),
    ],
)
def test_an_observation_has_the_expected_findings(
    changes: dict[str, Any], expected: list[int]
) -> None:
    assert found(**changes) == expected


def test_without_keepalives_none_is_missing(settings: Any) -> None:
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = None
    assert found(idle_seconds=1000.0, keepalives=0) == []
    assert found(cut_seconds=60.0, keepalives=0) == [20]


@pytest.mark.parametrize(("seconds", "text"), [(None, "None"), (60, "60"), (90.5, "90.5")])
def test_keepalives_that_are_rare_are_found(settings: Any, seconds: Any, text: str) -> None:
    assert settings_found() == []
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = seconds
    (message,) = settings_found()
    assert message.startswith(f"EVENTSOURCE_KEEPALIVE_SECONDS is {text}: ")


def test_more_streams_than_open_files_are_found(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = os.sysconf("SC_OPEN_MAX")
    settings.EVENTSOURCE_MAX_STREAMS = limit + 1
    (message,) = settings_found()
    assert f"may open {limit} files" in message
    assert message.endswith(f"; EVENTSOURCE_MAX_STREAMS is {limit + 1}.")
    settings.EVENTSOURCE_MAX_STREAMS = None
    monkeypatch.setattr(os, "sysconf", lambda name: 256)
    (message,) = settings_found()
    assert message.endswith("may open 256 files, and each stream is one.")
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    assert settings_found() == []
    monkeypatch.delattr(os, "sysconf_names")
    assert settings_found() == []


def test_a_layer_that_drops_messages_is_found(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_findings, "ECHO_SECONDS", 0.01)
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": f"{__name__}.DropsMessages"}}
    (message,) = settings_found()
    assert message.endswith("does not return a message: no message arrived within 0.01 s.")


def test_a_clock_counts_as_different_beyond_the_time_of_the_reading() -> None:
    assert difference_seconds(10.0, 12.0, 13.0) == 0
    assert difference_seconds(10.0, 15.0, 13.0) == 2
    assert difference_seconds(10.0, 7.0, 13.0) == -3
    assert describe(61.2) == "61 s ahead of this machine's clock"
    assert describe(-61.2) == "61 s behind this machine's clock"


def test_a_migration_that_was_not_applied_is_found() -> None:
    MigrationRecorder(connection).record_unapplied("django_eventsource", "0001_initial")
    (finding,) = stores.unapplied_migrations(get_history())
    assert finding.msg.endswith("were not applied to the database 'default': 0001_initial.")
    assert finding.hint == "Run `manage.py migrate --database default`."


# The command


def test_the_checks_of_a_deployment_are_part_of_it(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing Handover and an open policy are warnings, and exit with 1."""
    # Otherwise the check imports it, and counts the instance that it makes.
    import_string(settings.ASGI_APPLICATION)
    monkeypatch.setattr(Handover, "made", 0)
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    run = Run("eventsource_doctor")
    assert re.findall(r"^\S+ \w+(?=:)", run.out, re.M) == [
        "eventsource.W004 WARNING",
        "eventsource.W007 WARNING",
    ]
    assert "    See docs/reference/checks.rst\n" in run.out
    assert isinstance(run.error, CommandError)
    assert (str(run.error), run.error.returncode) == ("2 findings.", 1)


@pytest.mark.parametrize(("level", "fails"), [("INFO", True), ("WARNING", True), ("ERROR", False)])
def test_findings_below_the_fail_level_exit_with_0(settings: Any, level: str, fails: bool) -> None:
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = None
    run = Run("eventsource_doctor", "--fail-level", level)
    assert run.out.startswith("eventsource.D004 WARNING: ")
    assert run.out.endswith("name the public URL with --url to send one.\n")
    assert (str(run.error) == "1 finding.") is fails


def test_a_silenced_finding_is_not_reported(settings: Any) -> None:
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = None
    settings.SILENCED_SYSTEM_CHECKS = ["eventsource.D004"]
    run = Run("eventsource_doctor")
    assert (run.error, run.out.splitlines()[0]) == (None, "No findings.")


def test_a_setting_that_is_not_valid_is_the_only_finding(settings: Any) -> None:
    """Nothing else can be checked, and no canary is sent."""
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = "x"
    run = Run("eventsource_doctor", "--json", "-P", "1")
    result = json.loads(run.out)
    assert [(one["id"], one["level"]) for one in result["findings"]] == [
        ("eventsource.E005", "ERROR")
    ]
    assert (result["canary"], result["error"], str(run.error)) == (None, None, "1 finding.")


def test_every_level_of_the_checks_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of another app may have a level that the doctor does not use."""
    messages = [checks.Critical("a", id="x.E1"), checks.Debug("b", id="x.D1")]
    monkeypatch.setattr(checks, "run_checks", lambda **_: messages)
    out = Run("eventsource_doctor").out
    assert "x.E1 ERROR: a\n    See " in out
    assert "x.D1 DEBUG: b\n" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--idle", "5", "--cafile", "x"], "--cafile, --idle: only valid with a server."),
        (["-P", "0"], "-P/--port must be a whole number"),
        (["-P", "1", "--timeout", "0"], "--timeout must be a positive number of seconds"),
        (["-P", "1", "--idle", "x"], "--idle must be a positive number of seconds"),
        (["-P", "1", "--token", ""], "The token is empty"),
        (["--url", "ftp://x"], "--url: 'ftp://x' is not a valid http:// or https:// URL"),
    ],
)
def test_an_option_that_is_not_valid_exits_with_2(arguments: list[str], error: str) -> None:
    run = Run("eventsource_doctor", *arguments)
    assert isinstance(run.error, CommandError)
    assert error in str(run.error)
    assert (run.error.returncode, run.out) == (2, "")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (KeyboardInterrupt(), "Interrupted."),
        (OperationalError("locked"), "The history's database failed: locked. If tables are"),
        (DeliveryFailed("The layer failed."), "The layer failed."),
    ],
)
def test_a_failure_while_the_canary_is_sent_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, settings: Any, failure: BaseException, error: str
) -> None:
    """The findings before it are printed."""

    def fail(self: Canary) -> None:
        raise failure

    monkeypatch.setattr(Canary, "observe", fail)
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = None
    run = Run("eventsource_doctor", "-P", "1")
    assert isinstance(run.error, CommandError)
    assert str(run.error).startswith(error)
    assert run.error.returncode == 2
    assert run.out.startswith("eventsource.D004 WARNING: ")
    assert run.out.endswith("\nNo canary was sent.\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "The canary arrived after 12 ms. The stream was then watched for 15 s.\n"),
        (None, "A canary was sent.\n"),
    ],
)
def test_what_was_measured_is_printed(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, text: str
) -> None:
    def observe(self: Canary) -> None:
        self.seen = Observation(**HEALTHY | {"arrival_seconds": seconds})

    monkeypatch.setattr(Canary, "observe", observe)
    monkeypatch.setattr(path, "FINDINGS", [])
    assert Run("eventsource_doctor", "-P", "1").out == f"No findings.\n{text}"


def test_a_class_without_a_usable_action_cannot_be_posted(settings: Any) -> None:
    settings.EVENTSOURCE_HISTORY = MEMORY
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.OnlyCloses"
    sender = Canary(server(), "t", 1, None)
    with pytest.raises(ClientError, match=r"Its ACTIONS are close: add another one\."):
        sender._posted_action()
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.StringEvent"
    assert sender._posted_action() == "ping"


def server() -> Server:
    return Server(
        url=lambda action: f"http://127.0.0.1:1/{action}/t",
        listen_auth=None,
        send_auth=lambda action: None,
    )


# The idle stream


class ScriptedReader:
    """A stream on which each wait receives one chunk, and which is cut after the last one."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)
        self.body = b": open\n\n"
        self.ended = False
        self.error: ClientError | None = None

    def wait(self, condition: Any, seconds: float) -> bool:
        if self.chunks:
            self.body += self.chunks.pop(0)
        else:
            self.ended, self.error = True, ClientError("cut")
        return True


OTHER = b"id: 2\nevent: canary\ndata: of another run\n\n"


@pytest.mark.parametrize(
    ("chunks", "cut", "keepalives"),
    [
        ([KEEPALIVE], True, 1),
        ([KEEPALIVE, KEEPALIVE, OTHER], False, 2),
        ([OTHER], True, 0),
        ([KEEPALIVE, OTHER, KEEPALIVE], True, 2),
        ([KEEPALIVE, b"", OTHER, KEEPALIVE, KEEPALIVE], False, 3),
    ],
)
def test_the_stream_is_watched_until_two_keepalives_follow_each_other(
    chunks: list[bytes], cut: bool, keepalives: int
) -> None:
    """The first one comes early. After the event of another run, the next one does, too."""
    canary = Canary(server(), "t", 1, None)
    canary._watch(cast("Any", ScriptedReader(*chunks)), canary.seen)
    assert (canary.seen.cut_seconds is not None, canary.seen.keepalives) == (cut, keepalives)


def test_the_doctor_has_two_intervals_for_two_keepalives(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    waits: list[float] = []

    def wait(self: ScriptedReader, condition: Any, seconds: float) -> bool:
        waits.append(seconds)
        self.ended = True
        return True

    monkeypatch.setattr(ScriptedReader, "wait", wait)
    settings.EVENTSOURCE_KEEPALIVE_SECONDS = 1000
    canary = Canary(server(), "t", 1, None)
    canary._watch(cast("Any", ScriptedReader()), canary.seen)
    assert 2000 < waits[0] <= 2000 + MARGIN_SECONDS


def test_what_was_measured_before_an_interruption_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The canary is in the history, so the command must not deny it."""

    def interrupt(self: Canary) -> None:
        self.seen.sent = 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Canary, "observe", interrupt)
    run = Run("eventsource_doctor", "-P", "1")
    assert (str(run.error), run.out) == ("Interrupted.", "A canary was sent.\n")
    result = json.loads(Run("eventsource_doctor", "-P", "1", "--json").out)
    assert (result["canary"]["sent"], result["error"]) == (1, "Interrupted.")
