"""Tests of attacks by requests: large, deeply nested, with control characters, or to enumerate."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.contrib.auth.models import User
from django.test import AsyncClient
from django.urls import include, path

import django_eventsource
from django_eventsource import apublish
from django_eventsource.events import JSONIdEvent
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.operations.control_receiver import ControlReceiver
from django_eventsource.policies import AllowAny
from django_eventsource.protocol.cursors import join_cursor, short_key
from django_eventsource.protocol.field_rules import CLOSE_STREAMS, DRAIN_HOST, WRITE_DETAILS
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import listen
from django_eventsource.views import EventSourceView
from tests.support.events import FaultyHistory

pytestmark = pytest.mark.usefixtures("memory_history")

PACKAGE = Path(django_eventsource.__file__).parent
CONTROL = "a\r\nERROR forged\x1b[31m\x9b\u202e\u2028"
"""A token that would add a line to a log, or change how a terminal shows it."""

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("open/<action>/<path:token>", EventSourceView.as_view(policy=AllowAny)),
    path(
        "json/<action>/<token>", EventSourceView.as_view(policy=AllowAny, event_class=JSONIdEvent)
    ),
]


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__


async def respond(
    method: str, url: str, body: str = "x", client: AsyncClient | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Return the status, the body and the headers of a response. A stream has no body."""
    client = client or AsyncClient()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await client.generic(method, url, body, "text/plain", headers=headers)
    if response.streaming:
        await response._stream.aclose()
    return (
        response.status_code,
        b"" if response.streaming else response.content,
        dict(response.headers),
    )


# Enumeration


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_response_without_permission_does_not_depend_on_the_token(
    method: str, accept: str
) -> None:
    """Neither for a client without credentials, nor for one with another grant, nor for a user."""
    await apublish("known", "ping", "x")
    await apublish("closed", "close", "")
    user = AsyncClient()
    await user.aforce_login(await User.objects.acreate_user("ada"))
    grant = make_grant("other", listen=True, send=True)
    async with listen("known", url=f"/events/poll/known?grant={make_grant('known', listen=True)}"):
        for client, query in ((None, ""), (None, f"?grant={grant}"), (user, "")):
            found = [
                await respond(method, f"/events/ping/{token}{query}", "x", client, Accept=accept)
                for token in ("known", "closed", "unknown")
            ]
            assert found[0] == found[1] == found[2]
            assert found[0][0] in (401, 403)


@pytest.mark.parametrize("action", ["stop", "delta", "close", "ping"])
async def test_the_holder_of_a_grant_to_listen_publishes_nothing(action: str) -> None:
    """The event ``stop`` would end a production."""
    grant = make_grant("t", listen=True)
    status, _, _ = await respond("POST", f"/events/{action}/t?grant={grant}")
    assert status == 403
    assert not get_history().heads(["t"])["t"].has_epoch


async def test_the_holder_of_a_grant_to_send_reads_no_stored_events() -> None:
    """Neither a stream nor a page of the history."""
    await apublish("t", "ping", "secret")
    grant = make_grant("t", send=True)
    for accept in ("text/event-stream", "application/json"):
        status, body, _ = await respond("GET", f"/events/poll/t?grant={grant}", Accept=accept)
        assert status == 403
        assert b"secret" not in body


# Headers


async def test_no_response_allows_another_origin_to_read_it() -> None:
    """The headers of CORS are those of the project alone."""
    await apublish("t", "ping", "x")
    evil = {"Origin": "https://evil.example", "Access_Control_Request_Method": "GET"}
    for method, accept in (
        ("GET", "text/event-stream"),
        ("GET", "application/json"),
        ("OPTIONS", "*/*"),
        ("POST", "*/*"),
    ):
        _, _, headers = await respond(method, "/open/poll/t", Accept=accept, **evil)
        assert not [name for name in headers if name.lower().startswith("access-control")]


async def test_a_header_of_the_client_does_not_change_its_address(settings: Any) -> None:
    """A proxy has to set the address for the server. The rate of an address cannot be evaded."""
    settings.EVENTSOURCE_SEND_RATE = (2, 3600)
    statuses = [
        (
            await respond(
                "POST", "/open/ping/t", X_Forwarded_For=f"10.0.0.{n}", X_Real_IP=f"1.1.1.{n}"
            )
        )[0]
        for n in range(3)
    ]
    assert statuses == [200, 200, 429]


# Sizes

LARGE = "x" * 60_000
"""About as much as servers accept in the head of a request."""


@pytest.mark.parametrize(
    ("method", "url", "headers", "expected"),
    [
        ("GET", f"/open/poll/{LARGE}", {}, 400),
        ("GET", f"/open/poll/t?token={LARGE}", {}, 400),
        ("GET", "/open/poll/t?" + "token=a&" * 900, {}, 200),
        ("GET", "/open/poll/t?" + "&".join(f"token={n}" for n in range(900)), {}, 400),
        ("GET", "/open/poll/t?" + "&".join(f"token={n}" for n in range(2000)), {}, 400),
        ("GET", f"/open/poll/t?rewind={'9' * 60_000}", {}, 400),
        ("GET", f"/open/poll/t?last_event_id={LARGE}", {}, 200),
        ("GET", f"/open/poll/t?last_event_id=~{'A' * 60_000}", {}, 200),
        ("GET", "/open/poll/t", {"Last_Event_ID": LARGE}, 200),
        ("GET", "/open/poll/t", {"Accept": "application/json;q=0," * 3000}, 200),
        ("GET", f"/open/poll/t?after={LARGE}", {"Accept": "application/json"}, 400),
        ("GET", f"/open/poll/t?limit={'9' * 60_000}", {"Accept": "application/json"}, 400),
        ("GET", f"/open/poll/t?action={LARGE}", {"Accept": "application/json"}, 400),
        ("GET", f"/events/poll/t?grant={LARGE}", {}, 401),
        ("GET", f"/events/poll/t?grant={'.' * 60_000}", {}, 401),
        ("GET", "/events/poll/t", {"Authorization": f"Bearer {LARGE}"}, 401),
        ("GET", "/events/poll/t", {"Authorization": f"Basic {LARGE}"}, 401),
        ("POST", "/open/ping/t", {"Origin": f"https://{LARGE}"}, 403),
        ("GET", f"/open/{LARGE}/t", {}, 404),
        ("POST", f"/open/{LARGE}/t", {}, 404),
        ("POST", f"/events/{LARGE}/t?grant=ONE_ACTION", {}, 403),
        ("POST", "/open/ping/t", {"Idempotency_Key": LARGE}, 400),
        ("POST", "/events/ping/t?grant=GRANT", {"Idempotency_Key": LARGE}, 400),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_large_part_of_a_request_is_refused_or_ignored_in_few_words(
    method: str, url: str, headers: dict[str, str], expected: int
) -> None:
    url = url.replace("GRANT", make_grant("t", send=True))
    url = url.replace("ONE_ACTION", make_grant("t", actions="ping"))
    status, body, _ = await respond(method, url, **headers)
    assert status == expected
    assert len(body) < 1000


async def test_a_long_last_event_id_is_not_sent_back() -> None:
    """Its listener receives ``reset`` with the position, and not its own text."""
    async with listen("t", url="/open/poll/t", headers={"Last-Event-ID": LARGE}) as stream:
        assert (await stream.next()).event == "reset"
        assert len(stream.body) < 1000


CURSOR_OF_TWO = join_cursor((short_key(token), 10**15, False) for token in "tu")


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("<img/src=x>", False),
        ('"},"x":"', False),
        ("own-id", False),
        ("~<img>", False),
        ("1" * 19, False),
        ("12345", True),
        ("12345+", True),
        (CURSOR_OF_TWO, True),
    ],
)
async def test_only_the_form_of_a_position_is_sent_back(text: str, repeated: bool) -> None:
    """It consists of digits and a plus sign, or of a tilde and base64."""
    await apublish("t", "ping", "x")
    async with listen("t", url="/open/poll/t", headers={"Last-Event-ID": text}) as stream:
        reset = await stream.next("reset")
    assert json.loads(reset.data)["after"] == (text if repeated else None)


@pytest.mark.parametrize(
    "body",
    ["[" * 500_000, '{"a":' * 150_000, "9" * 900_000, "1e400", "-" * 1000, '"\\ud800' * 1000],
    ids=lambda body: body[:8],
)
async def test_a_json_value_that_is_too_deep_or_too_large_is_refused_in_few_words(
    body: str,
) -> None:
    """No event is published."""
    status, text, _ = await respond("POST", "/json/ping/t", body)
    assert status == 400
    assert len(text) < 1000
    assert not get_history().heads(["t"])["t"].has_epoch


# Logs


async def test_a_token_adds_no_line_and_no_control_character_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The token of the path, and one of the query."""
    history = FaultyHistory(alocate=2, aread=1, append=1)
    caplog.set_level(logging.DEBUG, "django_eventsource")
    for name in ("django_eventsource.views", "django_eventsource.reading"):
        monkeypatch.setattr(f"{name}.get_history", lambda: history)
    monkeypatch.setattr("django_eventsource.publishing.get_history", lambda: history)
    token = quote(CONTROL, safe="")
    await respond("GET", f"/open/poll/{token}")
    await respond("GET", f"/open/poll/t?token={token}")
    await respond("GET", f"/open/poll/{token}", Accept="application/json")
    await respond("POST", f"/open/ping/{token}")
    lines = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert len(lines) >= 4
    assert all(line.isprintable() for line in lines)


# Between processes


@pytest.mark.parametrize("data", ["[" * 100_000, '{"token":' * 100_000, "9" * 5000, '"\\'])
async def test_a_forged_close_request_ends_no_stream_and_no_task(
    data: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All streams are rechecked instead, because a newer version may have sent it."""
    async with listen("t", url="/open/poll/t") as stream:
        ControlReceiver(asyncio.get_running_loop(), print).apply(CLOSE_STREAMS, data)
        mine = [one for one in registry.streams() if one.listener.tokens == ("t",)]
        assert [one.recheck_at for one in mine] == [0]
        await apublish("t", "ping", "x")
        assert (await stream.next()).data == "x"
    assert "A close request is not valid" in caplog.text


@pytest.mark.parametrize(
    ("action", "message"),
    [(WRITE_DETAILS, "A request for details"), (DRAIN_HOST, "A drain request")],
)
@pytest.mark.parametrize("data", ["[" * 100_000, "9" * 5000, '"\\'])
async def test_a_forged_control_event_is_skipped(
    action: str, message: str, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would let the receiver read it again and again."""
    ControlReceiver(asyncio.get_running_loop(), pytest.fail).apply(action, data)
    assert f"{message} is not valid" in caplog.text


def test_no_module_decodes_pickles_or_runs_code_that_it_receives() -> None:
    """Whatever a client, a broker or a store sends is parsed as text, numbers or JSON."""
    forbidden = {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "yaml",
        "eval",
        "exec",
        "compile",
        "__import__",
    }
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names: set[str] = set()
            match node:
                case ast.Import(names=found):
                    names = {one.name.partition(".")[0] for one in found}
                case ast.ImportFrom(module=str(name), level=0):
                    names = {name.partition(".")[0]}
                case ast.Call(func=ast.Name(id=name)):
                    names = {name}
            assert not names & forbidden, f"{module.name}:{node.lineno}"  # type: ignore[attr-defined]
