"""Tests of the view: its responses, and streams that pass through middleware."""

from __future__ import annotations

import ast
import asyncio
import base64
import gzip
import json
from pathlib import Path
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.contrib.auth.models import Permission, User
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import OperationalError, connections
from django.http import Http404, HttpRequest, RawPostDataException, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import include, path

from django_eventsource.events import Event, JSONIdEvent, StringEvent, StringIdEvent
from django_eventsource.exceptions import DeliveryFailed, NotAuthenticated
from django_eventsource.grants import make_grant
from django_eventsource.history import Kind, get_history
from django_eventsource.operations.presence import Lease
from django_eventsource.operations.shutdown import shutdown
from django_eventsource.operations.supervisor import get_supervisor
from django_eventsource.policies import AllowAny
from django_eventsource.protocol.frames import Decoder
from django_eventsource.publishing import apublish
from django_eventsource.signals import Listener, Reason, stream_opened
from django_eventsource.streaming.registry import registry
from django_eventsource.streaming.response import Slot
from django_eventsource.views import EventSourceView
from tests.support.events import add, draft, texts
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("memory_history", "allow_any")


class Reasoned(AllowAny):
    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        raise PermissionDenied("not on Sundays")

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        raise NotAuthenticated("who are you?")


class Never(AllowAny):
    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        return False

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        raise PermissionDenied


class ListenAndSend(StringEvent):
    LISTEN = "talk"
    ACTIONS = ["talk"]


class Stateful(EventSourceView):
    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        return [("ping", f"state of {token}"), ("ping", "two\nlines")]


class Changing(EventSourceView):
    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        add(get_history(), "new", token=token)
        return [("ping", "state with new")]


class Broken(EventSourceView):
    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        raise LookupError("no state")


class Odd(EventSourceView):
    """A view whose initial state depends on the token."""

    async def initial_state(self, request: HttpRequest, token: str) -> Any:
        if token == "forbidden":
            raise PermissionDenied("Not your state.")
        if token == "nowhere":
            raise Http404
        return [(token, "x")]


class Nameless(AllowAny):
    async def identify(self, request: HttpRequest) -> None:
        return None


class Down(AllowAny):
    """A policy whose database is down."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        raise OperationalError("away")

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        raise OperationalError("away")


class Unidentified(AllowAny):
    async def identify(self, request: HttpRequest) -> str:
        raise OperationalError("away")


class Fickle(AllowAny):
    """A policy whose answer a test sets."""

    answer: Any = True

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("json/<action>/<token>", EventSourceView.as_view(event_class=JSONIdEvent)),
    path(
        "live/<action>/<token>",
        EventSourceView.as_view(event_class=StringEvent, keepalive_seconds=None),
    ),
    path("cursor/<action>/<token>", EventSourceView.as_view(cursor_event=True)),
    path("begun/<action>/<token>", Stateful.as_view(cursor_event=True)),
    path(
        "livecursor/<action>/<token>",
        EventSourceView.as_view(event_class=StringEvent, cursor_event=True),
    ),
    path("both/<action>/<token>", EventSourceView.as_view(event_class=ListenAndSend)),
    path("reasoned/<action>/<token>", EventSourceView.as_view(policy=Reasoned)),
    path("never/<action>/<token>", EventSourceView.as_view(policy=Never)),
    path("alone/<action>/<token>", EventSourceView.as_view(exclusive=True)),
    path("heard/<action>/<token>", EventSourceView.as_view(require_listener=True)),
    path("fickle/<action>/<token>", EventSourceView.as_view(policy=Fickle)),
    path("state/<action>/<token>", Stateful.as_view()),
    path("changing/<action>/<token>", Changing.as_view()),
    path("broken/<action>/<token>", Broken.as_view()),
    path("odd/<action>/<token>", Odd.as_view()),
    path("nameless/<action>/<token>", EventSourceView.as_view(policy=Nameless)),
    path("down/<action>/<token>", EventSourceView.as_view(policy=Down)),
    path("unidentified/<action>/<token>", EventSourceView.as_view(policy=Unidentified)),
    path("quick/<action>/<token>", EventSourceView.as_view(keepalive_seconds=0.02)),
]


@pytest.fixture
def allow_any(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


@pytest.fixture(autouse=True)
def no_open_streams() -> None:
    """End the streams that a failed test has left open."""
    for stream in registry.streams():
        stream.abort(Reason.CLOSE_REQUESTED)


@pytest.fixture
def client() -> AsyncClient:
    return AsyncClient()


async def start(response: Any, count: int = 1) -> bytes:
    """Return the first chunks of a stream, and end it."""
    assert response.status_code == 200, response.content
    stream = aiter(response)
    chunks = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(count):
            chunks += await anext(stream)
    await stream.aclose()
    return chunks


def send(client: AsyncClient, url: str, body: bytes | str = b"", **extra: Any) -> Any:
    return client.post(url, body, content_type=extra.pop("content_type", "text/plain"), **extra)


# Listening


async def test_get_opens_a_stream(client: AsyncClient) -> None:
    """GET of the LISTEN action responds with a stream and its first bytes."""
    (entry,) = add(get_history(), "a", token="42:42")
    response = await client.get("/events/poll/42:42")
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert await start(response) == f"id: {entry.seq}\n\n".encode()


async def test_get_resumes_after_the_last_event_id(client: AsyncClient) -> None:
    """The header takes precedence over the query."""
    entries = add(get_history(), *"abc")
    for url, headers in [
        ("/events/poll/t", {"Last-Event-ID": str(entries[1].seq)}),
        (f"/events/poll/t?last_event_id={entries[1].seq}", {}),
        ("/events/poll/t?last_event_id=1", {"Last-Event-ID": str(entries[1].seq)}),
    ]:
        body = await start(await client.get(url, headers=headers), 2)
        assert [event.data for event in Decoder().feed(body)] == ["c"]


async def test_cursor_event_sends_the_opening_cursor_as_an_event(client: AsyncClient) -> None:
    """The data of the event is the id."""
    (entry,) = add(get_history(), "a")
    expected = f"id: {entry.seq}\nevent: cursor\ndata: {entry.seq}\n\n"
    assert await start(await client.get("/cursor/poll/t")) == expected.encode()
    resumed = await client.get("/cursor/poll/t", headers={"Last-Event-ID": str(entry.seq)})
    assert await start(resumed) == expected.encode()


@pytest.mark.parametrize("url", ["/cursor/poll/t", "/cursor/poll/t?token=u", "/begun/poll/t"])
async def test_a_client_that_ignores_an_id_without_data_resumes_from_the_cursor_event(
    client: AsyncClient, url: str
) -> None:
    """The client was disconnected before its first event."""
    add(get_history(), "before")
    opening = Decoder().feed(await start(await client.get(url)))
    assert opening[-1].event == "cursor"
    add(get_history(), "missed")
    response = await client.get(url, headers={"Last-Event-ID": opening[-1].id})
    events = Decoder().feed(await start(response, 2))
    assert [(event.event, event.data) for event in events if event.event != "cursor"] == [
        ("ping", "missed")
    ]


async def test_a_reset_with_a_cursor_replaces_the_cursor_event(
    client: AsyncClient,
) -> None:
    """The reset commits the cursor."""
    add(get_history(), "a")
    (event,) = Decoder().feed(await start(await client.get("/cursor/poll/t?last_event_id=1")))
    assert event.event == "reset"
    assert event.id == json.loads(event.data)["resume"]


async def test_a_live_only_url_has_no_cursor_event(client: AsyncClient) -> None:
    """A listener of a live-only class reconnects without an id."""
    assert await start(await client.get("/livecursor/poll/t")) == b": open\n"


@pytest.mark.parametrize(
    "cursor",
    [
        "1",
        "x:abc",
        "9" * 18,
        "9" * 30,
        "x" * 10_000,
        "a b",
        "é",
        b"\xff\xfe".decode("latin-1"),
        "€".encode().decode("latin-1"),
        "\x00",
    ],
    ids=[
        "expired",
        "unknown",
        "future",
        "huge",
        "10 kB",
        "space",
        "latin-1",
        "bytes",
        "utf-8",
        "nul",
    ],
)
async def test_a_last_event_id_that_is_not_in_the_history_is_responded_with_reset(
    client: AsyncClient, cursor: str
) -> None:
    """The status is 200, and live events follow the reset."""
    (entry,) = add(get_history(), "old")
    response = await client.get("/events/poll/t", headers={"Last-Event-ID": cursor})
    stream = aiter(response)
    (event,) = Decoder().feed(await anext(stream))
    assert (event.event, event.id) == ("reset", str(entry.seq))
    add(get_history(), "new")
    (event,) = Decoder().feed(await anext(stream))
    assert event.data == "new"
    await stream.aclose()


async def test_a_client_that_received_the_close_is_responded_with_204(client: AsyncClient) -> None:
    """A client without an id opens the token again and resumes there."""
    history = get_history()
    (start_entry,) = add(history, "a")
    (close,) = history.append("t", [draft("bye", kind=Kind.CLOSE)])
    response = await client.get("/events/poll/t", headers={"Last-Event-ID": str(close.seq)})
    assert (response.status_code, response.content) == (204, b"")
    before = await client.get("/events/poll/t", headers={"Last-Event-ID": str(start_entry.seq)})
    chunks = [chunk async for chunk in before]
    assert [event.data for event in Decoder().feed(b"".join(chunks))] == ["bye"]
    fresh = await start(await client.get("/events/poll/t"))
    assert fresh == f"id: {close.seq}+\n\n".encode()
    again = await client.get("/events/poll/t", headers={"Last-Event-ID": f"{close.seq}+"})
    assert await start(again) == fresh


async def test_a_client_is_asked_to_reconnect_if_the_history_cannot_be_read(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other response would stop a browser's EventSource."""
    monkeypatch.setattr(get_history(), "locate", lambda *args: 1 / 0)
    response = await client.get("/events/poll/t")
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    decoder = Decoder()
    assert decoder.feed(response.content) == []
    assert decoder.retry_ms is not None
    assert 2_000 <= decoder.retry_ms <= 10_000
    assert "cannot be read" in caplog.text


async def test_head_responds_with_headers_only(client: AsyncClient) -> None:
    """HEAD opens no stream."""
    response = await client.head("/events/poll/t")
    assert (response.status_code, response.content) == (200, b"")
    assert response["Content-Type"] == "text/event-stream"
    assert not response.streaming


def test_a_stream_is_read_on_another_event_loop_than_its_view(client: AsyncClient) -> None:
    """Synchronous tests do this."""
    (entry,) = add(get_history(), "a")
    response = async_to_sync(client.get)("/events/poll/t")
    add(get_history(), "b")
    body = async_to_sync(start)(response, 2)
    assert body.startswith(f"id: {entry.seq}\n\n".encode())
    assert [event.data for event in Decoder().feed(body)] == ["b"]


async def test_a_url_has_its_own_event_class_keepalive_and_policy(client: AsyncClient) -> None:
    assert await start(await client.get("/live/poll/t")) == b": open\n"
    assert b": keepalive\n" in await start(await client.get("/quick/poll/t"), 2)
    response = await client.get("/reasoned/poll/t")
    assert (response.status_code, response.content) == (403, b"not on Sundays\n")


@pytest.mark.parametrize("seconds", [0, -1, "5"])
def test_as_view_refuses_keepalive_seconds_that_are_not_positive(seconds: object) -> None:
    with pytest.raises(ImproperlyConfigured, match="keepalive_seconds must be a positive number"):
        EventSourceView.as_view(keepalive_seconds=seconds)


def test_as_view_refuses_an_event_class_with_a_reserved_action() -> None:

    class Bad(Event):
        ACTIONS = ["reset"]

    with pytest.raises(ImproperlyConfigured, match="reserved"):
        EventSourceView.as_view(event_class=Bad)


# Several tokens


async def test_one_stream_carries_the_tokens_of_the_path_and_the_query(
    client: AsyncClient,
) -> None:
    """A token that is repeated is carried once, and one cursor is valid for all tokens."""
    history = get_history()
    for token in "abc":
        add(history, f"{token}0", token=token)
    url = "/events/poll/a?token=b&token=c&token=a"
    stream = aiter(await client.get(url))
    decoder = Decoder()
    assert decoder.feed(await anext(stream)) == []
    first = decoder.last_event_id
    for token in "abc":
        await send(client, f"/events/ping/{token}", f"{token}1")
    got: list[str] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(got) < 3:
            got += [event.data for event in decoder.feed(await anext(stream))]
    assert sorted(got) == ["a1", "b1", "c1"]
    await stream.aclose()
    # The cursor is sent in a header or in the query, and the tokens may have any order.
    for text in (f"/events/poll/c?token=a&token=b&last_event_id={first}", ""):
        headers = {} if text else {"Last-Event-ID": first}
        got = await read(await client.get(text or url, headers=headers), 3)
        assert sorted(got) == ["a1", "b1", "c1"]


async def read(response: Any, count: int) -> list[str]:
    """Return the data of the first events of a stream, and end it."""
    assert response.status_code == 200, response.content
    stream = aiter(response)
    decoder = Decoder()
    got: list[str] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(got) < count:
            got += [event.data for event in decoder.feed(await anext(stream))]
    await stream.aclose()
    return got


async def opened(response: Any) -> tuple[list[Any], str]:
    """Return the events and the cursor of the first chunk of a stream, and end it."""
    decoder = Decoder()
    events = decoder.feed(await start(response))
    return events, decoder.last_event_id


async def test_a_client_that_drops_tokens_resumes_the_others(client: AsyncClient) -> None:
    """None of them starts at its newest event."""
    tokens = [f"t{n}" for n in range(16)]
    for token in tokens:
        add(get_history(), "old", token=token)
    _, cursor = await opened(await client.get(url_of(tokens)))
    for token in tokens:
        add(get_history(), f"{token} new", token=token)
    for kept in (tokens[4:], tokens[3:5], tokens[7:8]):
        got = await read(
            await client.get(url_of(kept), headers={"Last-Event-ID": cursor}), len(kept)
        )
        assert sorted(got) == sorted(f"{token} new" for token in kept)


def url_of(tokens: list[str]) -> str:
    query = "&".join(f"token={token}" for token in tokens[1:])
    return f"/events/poll/{tokens[0]}?{query}"


@pytest.mark.parametrize("cursor", ["~", "~!", "~AAAA", "~" + "A" * 1000, "a b"])
async def test_a_cursor_that_is_not_valid_resets_every_token(
    client: AsyncClient, cursor: str
) -> None:
    """The status is 200."""
    for token in "ab":
        add(get_history(), "old", token=token)
    response = await client.get("/events/poll/a?token=b", headers={"Last-Event-ID": cursor})
    events, _ = await opened(response)
    assert sorted(json.loads(event.data)["token"] for event in events) == ["a", "b"]
    assert {json.loads(event.data)["reason"] for event in events} == {"unknown"}


async def test_a_client_that_received_the_close_of_every_token_is_responded_with_204(
    client: AsyncClient,
) -> None:
    """A close of one token alone does not end its stream."""
    history = get_history()
    for token in "ab":
        add(history, "old", token=token)
    url = "/events/poll/a?token=b"
    _, cursor = await opened(await client.get(url))
    history.append("a", [draft("bye", kind=Kind.CLOSE)])
    history.append("b", [draft("bye", kind=Kind.CLOSE)])
    response = await client.get(url, headers={"Last-Event-ID": cursor})
    decoder = Decoder()
    async with asyncio.timeout(PATIENCE_SECONDS):
        events = [event async for chunk in response for event in decoder.feed(chunk)]
    assert [event.event for event in events] == ["close", "close"]
    seen = [(await client.get(url, headers={"Last-Event-ID": event.id})) for event in events]
    assert [response.status_code for response in seen] == [200, 204]
    assert await start(seen[0])
    assert (await client.get(url)).status_code == 200, "a fresh listener opens them anew"


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        (
            "/events/poll/a?token=b&token=c",
            "The request has 3 tokens; one stream carries at most 2",
        ),
        ("/events/poll/a?token=", "The token is empty"),
        ("/events/poll/a?token=%00", "contains NUL"),
        (f"/events/poll/a?token={'x' * 256}", "at most 255"),
    ],
)
async def test_tokens_that_are_not_valid_or_too_many_are_responded_with_400(
    client: AsyncClient, settings, url: str, answer: str
) -> None:
    """The response is one line."""
    settings.EVENTSOURCE_STREAM_MAX_TOKENS = 2
    response = await client.get(url)
    assert response.status_code == 400
    assert answer in response.content.decode()


async def test_every_token_of_a_stream_needs_permission(client: AsyncClient, settings) -> None:
    """A grant for one of two tokens opens no stream of both."""
    del settings.EVENTSOURCE_POLICY
    headers = {"Authorization": f"Bearer {make_grant('a', listen=True)}"}
    assert (await client.get("/events/poll/a?token=b", headers=headers)).status_code == 403
    assert (await client.get("/events/poll/b?token=a", headers=headers)).status_code == 403
    assert await start(await client.get("/events/poll/a?token=a", headers=headers))


# Limits


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("MAX_STREAMS", "/events/poll/other"),
        ("MAX_STREAMS_PER_TOKEN", "/events/poll/x?token=t"),
        ("MAX_STREAMS_PER_ADDRESS", "/events/poll/other"),
    ],
)
async def test_a_listener_over_a_limit_is_asked_to_reconnect(
    client: AsyncClient, settings, name: str, url: str
) -> None:
    """It does not count as a stream."""
    setattr(settings, f"EVENTSOURCE_{name}", 1)
    first = await client.get("/events/poll/t")
    for _ in range(3):
        response = await client.get(url)
        assert not response.streaming
        assert response.status_code == 200
        assert response["Content-Type"] == "text/event-stream"
        decoder = Decoder()
        assert decoder.feed(response.content) == []
        assert decoder.retry_ms is not None
        assert 2_000 <= decoder.retry_ms <= 10_000
    assert await start(first)
    await first._stream.aclose()
    assert await start(await client.get(url))


@pytest.mark.django_db(transaction=True)
async def test_the_limit_of_a_user_counts_all_sessions_of_the_user(settings) -> None:
    """Clients without a user have no such limit."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_USER = 1
    ada, bob = [await User.objects.acreate_user(name) for name in ("ada", "bob")]
    clients = [AsyncClient() for _ in range(3)]
    for client, user in zip(clients, (ada, ada, bob), strict=True):
        await client.aforce_login(user)
    responses = [await client.get("/events/poll/t") for client in clients]
    assert [response.streaming for response in responses] == [True, False, True]
    strangers = [await AsyncClient().get("/events/poll/t") for _ in range(2)]
    assert all(response.streaming for response in strangers)
    for response in [*responses, *strangers]:
        if response.streaming:
            await start(response)


async def test_a_limit_that_is_reached_while_a_stream_is_prepared_is_kept(
    client: AsyncClient, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is checked again when the stream is admitted."""
    settings.EVENTSOURCE_MAX_STREAMS = 1
    first = await client.get("/events/poll/t")
    monkeypatch.setattr(registry, "limit", looks(registry.limit, None))
    response = await client.get("/events/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert await start(first)


def looks(real: Any, *answers: Any) -> Any:
    """Return a function that returns these answers first, and the real ones after that."""
    given = list(answers)
    return lambda listener: given.pop(0) if given else real(listener)


async def test_no_stream_is_opened_during_the_shutdown(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is asked to reconnect."""
    monkeypatch.setattr(shutdown, "begun", True)
    response = await client.get("/events/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert registry.count("t") == 0


# Exclusive


async def test_a_second_listener_of_an_exclusive_token_is_responded_with_423(
    client: AsyncClient,
) -> None:
    """It can listen after the first one has left."""
    first = await client.get("/alone/poll/t?token=u")
    for url in ("/alone/poll/t", "/alone/poll/u", "/alone/poll/x?token=u"):
        response = await client.get(url)
        assert response.status_code == 423
        assert response.content == b"This token has a listener already, and only one is allowed.\n"
    assert await start(first)
    await first._stream.aclose()
    assert await start(await client.get("/alone/poll/u"))


async def test_an_exclusive_token_counts_the_listeners_of_other_processes(
    client: AsyncClient,
) -> None:
    """A listener counts as long as the lease of its process lists it."""
    history = get_history()
    history.announce("elsewhere", {"t": ["7"]}, 60)
    assert (await client.get("/alone/poll/t")).status_code == 423
    assert (await client.get("/alone/poll/x?token=t")).status_code == 423
    history.announce("elsewhere", {"t": []}, 60)
    assert await start(await client.get("/alone/poll/t"))


async def test_one_of_two_simultaneous_listeners_of_an_exclusive_token_is_admitted(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both checked for listeners before either was admitted."""
    asked = asyncio.Event()

    async def has_listener(self: Lease, token: str) -> bool:
        if waiting.done():
            asked.set()
        await asked.wait()
        return False

    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(Lease, "has_listener", has_listener)
    both = [asyncio.ensure_future(client.get("/alone/poll/t")) for _ in range(2)]
    waiting.set_result(None)
    async with asyncio.timeout(PATIENCE_SECONDS):
        responses = await asyncio.gather(*both)
    assert sorted(response.status_code for response in responses) == [200, 423]
    for response in responses:
        if response.status_code == 200:
            await start(response)


async def test_require_listener_refuses_a_post_without_a_listener(client: AsyncClient) -> None:
    """A listener of this process or of another one is sufficient."""
    response = await send(client, "/heard/ping/t", "x")
    assert (response.status_code, response.content) == (404, b"This token has no listener.\n")
    assert not get_history().heads(["t"])["t"].has_epoch
    listening = await client.get("/events/poll/t")
    assert (await send(client, "/heard/ping/t", "x")).status_code == 200
    await get_supervisor().lease.renew()
    await start(listening)
    (stream,) = registry.streams()
    stream.abort(Reason.CLIENT_DISCONNECTED)
    # The history lists the listener until the next announcement; this process counts its own.
    assert get_history().present("t")
    assert (await send(client, "/heard/ping/t", "x")).status_code == 404
    get_history().announce("elsewhere", {"u": [""]}, 60)
    assert (await send(client, "/heard/ping/u", "x")).status_code == 200


# Initial state


async def test_a_new_listener_receives_the_initial_state_before_its_cursor(
    client: AsyncClient,
) -> None:
    """The events of the state have no ids."""
    (entry,) = add(get_history(), "old")
    body = await start(await client.get("/state/poll/t"))
    assert body.endswith(f"\n\nid: {entry.seq}\n\n".encode())
    events = Decoder("before").feed(body)
    assert [(event.event, event.data, event.id) for event in events] == [
        ("ping", "state of t", "before"),
        ("ping", "two\nlines", "before"),
    ]


async def test_a_listener_that_resumes_receives_no_initial_state(client: AsyncClient) -> None:
    """A listener that missed events receives it after the reset."""
    entries = add(get_history(), "a", "b")
    url = "/state/poll/t"
    good = {"Last-Event-ID": str(entries[0].seq)}
    assert await read(await client.get(url, headers=good), 1) == ["b"]
    events, cursor = await opened(await client.get(url, headers={"Last-Event-ID": "1"}))
    assert [event.event for event in events] == ["reset", "ping", "ping"]
    assert cursor == str(entries[1].seq)


async def test_a_listener_disconnected_in_the_initial_state_receives_it_again(
    client: AsyncClient,
) -> None:
    """No cursor is committed before the last byte of the state, wherever it is cut."""
    (old, _) = add(get_history(), "old", "older")
    for headers in ({}, {"Last-Event-ID": "1"}):
        body = await start(await client.get("/state/poll/t", headers=headers))
        before = headers.get("Last-Event-ID", "")
        for cut in range(len(body)):
            decoder = Decoder(before)
            decoder.feed(body[:cut])
            assert decoder.last_event_id == before
    assert old.seq


async def test_only_new_tokens_of_a_stream_have_an_initial_state(client: AsyncClient) -> None:
    for token in "ab":
        add(get_history(), "old", token=token)
    _, cursor = await opened(await client.get("/events/poll/a?token=b"))
    response = await client.get(
        "/state/poll/c?token=a&token=d&token=b", headers={"Last-Event-ID": cursor}
    )
    events, _ = await opened(response)
    assert [event.data for event in events if "state" in event.data] == [
        "state of c",
        "state of d",
    ]


async def test_an_event_published_during_initial_state_is_received_after_it(
    client: AsyncClient,
) -> None:
    """It may be received twice, but is never missed."""
    add(get_history(), "old")
    got = await read(await client.get("/changing/poll/t"), 2)
    assert got == ["state with new", "new"]


async def test_a_client_is_asked_to_reconnect_if_initial_state_raises(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not count as a stream."""
    response = await client.get("/broken/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert "initial_state() of" in caplog.text
    assert "no state" in caplog.text
    assert registry.count("t") == 0


@pytest.mark.parametrize("token", ["close", "reset", "nonsense"])
async def test_an_initial_state_with_an_action_that_is_not_allowed_is_not_sent(
    client: AsyncClient, caplog: pytest.LogCaptureFixture, token: str
) -> None:
    """Allowed are the actions that may be published, except FINISH."""
    response = await client.get(f"/odd/poll/{token}")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert "initial_state() of" in caplog.text


@pytest.mark.parametrize(("token", "status"), [("forbidden", 403), ("nowhere", 404)])
async def test_initial_state_can_refuse_a_listener(
    client: AsyncClient, token: str, status: int
) -> None:
    """PermissionDenied is 403 and Http404 is 404. No cache may store either for other users."""
    response = await client.get(f"/odd/poll/{token}")
    assert response.status_code == status
    assert response["Cache-Control"] == "private, no-store"
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert registry.count(token) == 0


async def test_a_client_is_asked_to_reconnect_if_the_policys_database_is_down(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A POST is responded with 503 and publishes no event."""
    for url in ("/down/poll/t", "/unidentified/poll/t"):
        response = await client.get(url)
        assert response.status_code == 200
        assert response.content.startswith(b"event: retry\nretry: ")
    assert "cannot be checked" in caplog.text
    response = await send(client, "/down/ping/t", "x")
    assert (response.status_code, response.content) == (
        503,
        b"The database failed; the event was not published.\n",
    )
    assert not get_history().heads(["t"])["t"].has_epoch


async def test_a_policy_that_returns_none_identifies_no_user(
    client: AsyncClient, settings
) -> None:
    """Such listeners do not share a limit."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_USER = 1
    responses = [await client.get("/nameless/poll/t") for _ in range(2)]
    assert [stream.listener.user for stream in registry.streams()] == ["", ""]
    for response in responses:
        await start(response)


# The signal and the recheck


async def test_stream_opened_is_sent_with_the_listener(client: AsyncClient) -> None:
    """A receiver that raises does not affect the stream."""
    told: list[Any] = []

    async def receiver(sender: type, listener: Listener, request: HttpRequest, **kwargs: Any):
        told.append((sender, listener.tokens, listener.address, request.path))
        raise ValueError("no matter")

    stream_opened.connect(receiver)
    try:
        assert await start(await client.get("/events/poll/t?token=u"))
        assert (await client.head("/events/poll/t")).status_code == 200
    finally:
        stream_opened.disconnect(receiver)
    assert told == [(EventSourceView, ("t", "u"), "127.0.0.1", "/events/poll/t")]


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        (True, True),
        (False, False),
        (PermissionDenied(), False),
        (NotAuthenticated("x"), False),
        (Http404(), False),
    ],
    ids=["yes", "no", "denied", "unknown", "hidden"],
)
async def test_a_recheck_calls_the_policy_with_the_same_request(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, answer: Any, allowed: bool
) -> None:
    """A result of False, PermissionDenied, NotAuthenticated and Http404 are refusals."""
    response = await client.get("/fickle/poll/t?token=u")
    (stream,) = [one for one in registry.streams() if "u" in one.listener.tokens]
    monkeypatch.setattr(Fickle, "answer", answer)
    assert stream.recheck is not None
    assert await stream.recheck() is allowed
    assert await start(response)


async def test_a_stream_is_placed_in_the_slot_of_the_scope() -> None:
    """If the ASGI wrapper has made a slot, Django's response is empty."""
    request = AsyncRequestFactory().get("/")
    slot = request.scope[Slot.KEY] = Slot(request.scope)
    response: Any = await EventSourceView.as_view()(request, action="poll", token="t")
    response._handler_class = object  # as Django's handler marks what it sends
    assert [chunk async for chunk in response] == []
    assert slot.stream is not None
    assert slot.stream.listener.tokens == ("t",)
    assert registry.count("t") == 1
    await slot.stream.aclose()
    assert registry.count("t") == 0


# Sending


async def test_posts_over_the_rate_are_responded_with_429(client: AsyncClient, settings) -> None:
    """Retry-After contains the seconds, and no event is published."""
    cache.clear()
    settings.EVENTSOURCE_SEND_RATE = (2, 10**9)
    answers = [await send(client, "/events/ping/t", str(n)) for n in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 0 < int(answers[2]["Retry-After"]) <= 10**9
    assert answers[2].content.startswith(b"Too many events")
    first = int(answers[0].json()["id"])
    assert texts(get_history().read("t", first - 1).entries) == ["0", "1"]
    cache.clear()


async def test_post_publishes_its_body_and_responds_with_the_id(client: AsyncClient) -> None:
    """The Accept header contains the media type of the class."""
    response = await send(client, "/events/ping/a/b%20c", "grüße\nzwei")
    assert response.status_code == 200
    assert response["Accept"] == "text/plain"
    event_id = response.json()["id"]
    (entry,) = get_history().read("a/b c", int(event_id) - 1).entries
    assert entry.draft.data == "grüße\nzwei".encode()


async def test_post_of_a_live_only_class_responds_without_an_id(client: AsyncClient) -> None:
    response = await send(client, "/live/ping/t", "x")
    assert response.json() == {"id": None}


async def test_post_of_a_json_class_responds_with_its_media_type(client: AsyncClient) -> None:
    response = await send(client, "/json/ping/t", '{"a": [1]}')
    assert response["Accept"] == "application/json"
    assert (await send(client, "/json/close/t")).status_code == 200


async def test_a_posted_event_reaches_a_listener(client: AsyncClient) -> None:
    response = await client.get("/events/poll/t")
    stream = aiter(response)
    await anext(stream)
    posted = await send(client, "/events/ping/t", "hello")
    (event,) = Decoder().feed(await anext(stream))
    assert (event.event, event.data, event.id) == ("ping", "hello", posted.json()["id"])
    await stream.aclose()


# Keys


class ByHeader(AllowAny):
    """A policy that identifies the sender by a header."""

    async def identify(self, request: HttpRequest) -> str:
        return request.headers.get("X-Sender", "")


class ClientAt(AsyncClient):
    """A client with an address."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def _base_scope(self, **request: Any) -> Any:
        return super()._base_scope(client=[self.address, 0], **request)


async def post_with_key(
    client: AsyncClient, value: str, key: str = "k", url: str = "/events/ping/t", **headers: str
) -> str:
    """Post a value with a key, and return the id of the response."""
    headers = {"Idempotency-Key": key, "X-Sender": "ada", **headers}
    response = await send(client, url, value, headers=headers)
    assert response.status_code == 200, response.content
    return str(response.json()["id"])


@pytest.fixture
def ada(settings) -> AsyncClient:
    """Return a client whose user is the header `X-Sender`."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.ByHeader"
    return AsyncClient()


def published() -> list[str]:
    """Return the texts of all events of the token `t`."""
    floor = get_history().newest("a token without events")[0]
    return texts(get_history().read("t", floor).entries)


async def test_a_repeated_post_with_a_key_is_responded_with_the_first_id(
    ada: AsyncClient,
) -> None:
    first = await post_with_key(ada, "a")
    assert await post_with_key(ada, "b") == first
    assert await post_with_key(ada, "c", "other key") != first
    assert (await send(ada, "/events/ping/t", "d")).status_code == 200
    assert published() == ["a", "c", "d"]


async def test_the_value_of_the_header_is_not_parsed(ada: AsyncClient) -> None:
    """Quotes, case and inner spaces count."""
    keys = ['"k"', "k", "K", "k; a=1", "k  x", "k x", "é"]
    ids = [await post_with_key(ada, key, key) for key in keys]
    assert len(set(ids)) == len(keys)


@pytest.mark.parametrize(
    ("url", "key", "answer"),
    [
        ("/events/ping/t", "", "The key is empty; expected a text of 1 to 255 characters."),
        ("/events/ping/t", "x" * 256, "256 characters long; expected a text of 1 to 255"),
        ("/events/ping/t", "a\0", "contains NUL"),
        ("/live/ping/t", "k", "Events of StringEvent are live only"),
    ],
)
async def test_a_post_with_a_key_that_is_not_valid_is_responded_with_400(
    ada: AsyncClient, url: str, key: str, answer: str
) -> None:
    headers = {"Idempotency-Key": key, "X-Sender": "ada"}
    response = await send(ada, url, "x", headers=headers)
    assert response.status_code == 400
    assert answer in response.content.decode()
    assert response.content.count(b"\n") == 1
    assert published() == []


async def test_a_key_of_a_client_is_not_a_key_of_the_project(ada: AsyncClient) -> None:
    """Neither prevents an event of the other."""
    await post_with_key(ada, "client 1")
    await apublish("t", "ping", "project 1", key="k")
    await apublish("t", "ping", "project 2", key="k")
    await apublish("t", "ping", "project 3", key="j")
    await post_with_key(ada, "client 2", "j")
    assert published() == ["client 1", "project 1", "project 3", "client 2"]


async def test_the_keys_of_two_users_are_separate(settings) -> None:
    """The policy identifies them. A user may have several addresses."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.ByHeader"
    ids = [
        await post_with_key(ClientAt(address), text, **{"X-Sender": user})
        for text, user, address in [
            ("ada", "ada", "10.0.0.1"),
            ("bob", "bob", "10.0.0.1"),
            ("ada again", "ada", "10.0.0.2"),
        ]
    ]
    assert ids[0] == ids[2]
    assert published() == ["ada", "bob"]


@pytest.mark.parametrize("policy", ["ByHeader", "Nameless"])
async def test_a_post_with_a_key_and_without_a_sender_is_responded_with_400(
    client: AsyncClient, settings, policy: str
) -> None:
    """Clients behind one proxy could suppress each other's events. A policy may return no text."""
    settings.EVENTSOURCE_POLICY = f"{__name__}.{policy}"
    response = await send(client, "/events/ping/t", "x", headers={"Idempotency-Key": "k"})
    assert response.status_code == 400
    assert response.content.startswith(b"Idempotency-Key needs a user or a grant")
    assert (await send(client, "/events/ping/t", "without a key")).status_code == 200
    assert published() == ["without a key"]


async def test_the_keys_of_two_grants_are_separate(client: AsyncClient, settings) -> None:
    """Whether a grant is sent in the header or in the query does not matter, nor does the
    address."""
    del settings.EVENTSOURCE_POLICY
    one, two = (make_grant("t", send=True, seconds=seconds) for seconds in (100, 200))
    await post_with_key(client, "one", Authorization=f"Bearer {one}")
    await post_with_key(client, "two", Authorization=f"Bearer {two}")
    other = ClientAt("10.0.0.2")
    await post_with_key(other, "again", Authorization=f"bearer  {one}")
    await post_with_key(client, "again", url=f"/events/ping/t?grant={two}")
    assert published() == ["one", "two"]


async def test_a_grant_that_no_check_has_verified_is_not_a_sender(client: AsyncClient) -> None:
    headers = {"Idempotency-Key": "k", "Authorization": "Bearer one"}
    response = await send(client, "/events/ping/t", "x", headers=headers)
    assert response.status_code == 400
    assert published() == []


@pytest.mark.django_db(transaction=True)
async def test_a_user_has_the_same_keys_with_a_grant_and_with_a_password(
    client: AsyncClient, settings
) -> None:
    del settings.EVENTSOURCE_POLICY
    user = await User.objects.acreate_superuser("ada", password="secret")
    await client.aforce_login(user)
    grant = make_grant("t", send=True)
    basic = base64.b64encode(b"ada:secret").decode()
    first = await post_with_key(client, "one", Authorization=f"Bearer {grant}")
    assert await post_with_key(AsyncClient(), "two", Authorization=f"Basic {basic}") == first
    assert published() == ["one"]


async def test_a_post_with_a_key_is_responded_with_503_if_its_user_cannot_be_read(
    client: AsyncClient, settings
) -> None:
    settings.EVENTSOURCE_POLICY = f"{__name__}.Unidentified"
    response = await send(client, "/events/ping/t", "x", headers={"Idempotency-Key": "k"})
    assert response.status_code == 503
    assert b"may not have been published" in response.content
    assert (await send(client, "/events/ping/t", "without a key")).status_code == 200
    assert published() == ["without a key"]


# Bad input


@pytest.mark.parametrize(
    ("url", "body", "status", "answer"),
    [
        ("/json/ping/t", "{", 400, "The value is not JSON"),
        ("/json/ping/t", "", 400, "The value is not JSON"),
        ("/json/ping/t", "NaN", 400, "The value is not JSON"),
        ("/events/retry/t", "-5", 400, "must be ASCII digits"),
        ("/events/ping/t", b"ab\xff", 400, "The body is not UTF-8: byte 0xff at 2."),
        ("/events/ping/", "x", 400, "The token is empty"),
        (f"/events/ping/{'x' * 256}", "x", 400, "256 characters long; at most 255"),
        ("/events/ping/a%00b", "x", 400, "contains NUL"),
        ("/events/pong/t", "x", 404, "'pong': StringIdEvent allows ping, retry, close."),
        ("/live/retry/t", "5", 404, "StringEvent allows ping, close."),
        ("/events/poll/t", "x", 405, "This URL supports GET, HEAD, OPTIONS."),
        ("/events/ping/t", "x" * 1001, 413, "at most 1000 bytes"),
        ("/events/ping/t", "x" * 1000, 413, "has 1020 bytes as it is sent; at most 1000"),
        ("/events/ping/t", "\n" * 900, 413, "has 6320 bytes as it is sent; at most 1000"),
    ],
)
async def test_a_post_that_is_not_valid_is_refused_in_one_line(
    client: AsyncClient, settings, url: str, body: bytes | str, status: int, answer: str
) -> None:
    """No event is published."""
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1000
    response = await send(client, url, body)
    assert response.status_code == status
    assert answer in response.content.decode()
    assert response.content.count(b"\n") == 1
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert not get_history().heads(["t"])["t"].has_epoch


@pytest.mark.parametrize(
    ("url", "status", "answer"),
    [
        ("/events/pong/t", 404, "'pong': StringIdEvent allows poll."),
        ("/events/ping/t", 405, "This URL supports POST, OPTIONS."),
        ("/events/poll/", 400, "The token is empty"),
        (f"/events/poll/{'x' * 256}", 400, "at most 255"),
        ("/never/poll/t", 401, "Authentication is required."),
    ],
)
async def test_a_get_that_is_not_valid_is_refused_in_one_line(
    client: AsyncClient, url: str, status: int, answer: str
) -> None:
    response = await client.get(url)
    assert response.status_code == status
    assert answer in response.content.decode()


async def test_a_token_that_was_not_utf8_is_responded_with_400() -> None:
    """Servers replace bytes that are not UTF-8 with U+FFFD."""
    view = EventSourceView.as_view()
    request = AsyncRequestFactory().get("/")
    response = await view(request, action="poll", token="a\ufffdb")
    assert (response.status_code, b"not valid UTF-8" in response.content) == (400, True)


@pytest.mark.parametrize("method", ["put", "patch", "delete", "trace"])
async def test_other_methods_are_responded_with_405(client: AsyncClient, method: str) -> None:
    """The Allow header does not depend on the action."""
    for action in ("ping", "poll", "unknown"):
        response = await getattr(client, method)(f"/events/{action}/t")
        assert (response.status_code, response["Allow"]) == (405, "GET, HEAD, POST, OPTIONS")


async def test_options_responds_with_the_methods_of_the_view(client: AsyncClient) -> None:
    """The methods do not depend on the action."""
    for url in ("/events/poll/t", "/events/close/t", "/events/pong/t", "/both/talk/t"):
        response = await client.options(url)
        assert (response.status_code, response.content) == (200, b"")
        assert response["Allow"] == "GET, HEAD, POST, OPTIONS"


async def test_one_action_can_listen_and_send(client: AsyncClient) -> None:
    assert await start(await client.get("/both/talk/t"))
    assert (await send(client, "/both/talk/t", "x")).status_code == 200


async def test_a_body_that_middleware_has_read_raises_an_error(settings) -> None:
    """No event is published."""
    request = AsyncRequestFactory().post("/", {"a": "1"})
    assert request.POST["a"] == "1"
    with pytest.raises(RawPostDataException):
        await EventSourceView.as_view()(request, action="ping", token="t")
    assert not get_history().heads(["t"])["t"].has_epoch


async def test_a_live_only_event_that_the_layer_lost_is_responded_with_503(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def fail(*args: Any) -> None:
        raise DeliveryFailed("down")

    monkeypatch.setattr("django_eventsource.views.apublish_posted", fail)
    response = await send(client, "/live/ping/t", "x")
    assert response.status_code == 503
    assert b"was not sent" in response.content


async def test_a_post_is_responded_with_503_if_the_history_fails(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The response states that the event may not have been published."""

    async def fail(*args: Any) -> None:
        raise OperationalError("disk full")

    monkeypatch.setattr("django_eventsource.views.apublish_posted", fail)
    response = await send(client, "/events/ping/t", "x")
    assert response.status_code == 503
    assert b"may not have been published" in response.content
    assert "disk full" in caplog.text


async def test_a_value_error_of_the_event_class_is_the_response(client: AsyncClient) -> None:
    """The status is 400."""

    class Picky(StringEvent):
        def set_value(self, value: Any) -> None:
            b"\xff".decode()

    view = EventSourceView.as_view(event_class=Picky)
    request = AsyncRequestFactory().post("/", b"x", content_type="text/plain")
    response = await view(request, action="ping", token="t")
    assert response.status_code == 400
    assert b"invalid start byte" in response.content


# WSGI


def test_a_stream_through_wsgi_is_responded_with_500() -> None:
    """The page names the servers that work."""
    response = Client(raise_request_exception=False).get("/events/poll/t")
    assert response.status_code == 500
    assert b"need an ASGI server" in response.content


def test_a_post_through_wsgi_publishes() -> None:
    response = Client().post("/events/ping/t", "x", content_type="text/plain")
    assert response.status_code == 200
    assert texts(get_history().read("t", int(response.json()["id"]) - 1).entries) == ["x"]


# Permission


async def test_a_request_without_credentials_is_refused_by_default(
    client: AsyncClient, settings
) -> None:
    del settings.EVENTSOURCE_POLICY
    for response in [
        await client.get("/events/poll/t"),
        await client.head("/events/poll/t"),
        await send(client, "/events/ping/t", "x"),
    ]:
        assert response.status_code == 401
        assert response["WWW-Authenticate"].startswith("Bearer ")
        assert not response.streaming


async def test_a_grant_allows_its_right_on_its_token_only(client: AsyncClient, settings) -> None:
    del settings.EVENTSOURCE_POLICY
    listen = {"Authorization": f"Bearer {make_grant('t', listen=True)}"}
    assert await start(await client.get("/events/poll/t", headers=listen))
    assert (await client.get("/events/poll/other", headers=listen)).status_code == 403
    assert (await send(client, "/events/ping/t", "x", headers=listen)).status_code == 403
    grant = make_grant("t", send=True)
    assert (await send(client, f"/events/ping/t?grant={grant}", "x")).status_code == 200


@pytest.mark.parametrize(
    ("method", "url", "status", "answer"),
    [
        ("post", "/reasoned/ping/t", 401, "who are you?\n"),
        ("get", "/reasoned/poll/t", 403, "not on Sundays\n"),
        ("post", "/never/ping/t", 403, "Permission denied.\n"),
    ],
)
async def test_the_reason_that_a_policy_raises_is_the_response(
    client: AsyncClient, method: str, url: str, status: int, answer: str
) -> None:
    response = await getattr(client, method)(url)
    assert (response.status_code, response.content.decode()) == (status, answer)


@pytest.mark.django_db(transaction=True)
def test_false_is_responded_with_403_for_a_logged_in_user() -> None:
    user = User.objects.create_user("ada")
    client = AsyncClient()
    client.force_login(user)
    response = async_to_sync(client.get)("/never/poll/t")
    assert response.status_code == 403


async def test_false_is_responded_with_401_without_authentication_middleware(
    settings, client: AsyncClient
) -> None:
    settings.MIDDLEWARE = []
    assert (await client.get("/never/poll/t")).status_code == 401


def user_client() -> AsyncClient:
    user = User.objects.create_user("ada")
    user.user_permissions.add(Permission.objects.get(codename="send_event"))
    client = AsyncClient(enforce_csrf_checks=True)
    client.force_login(user)
    return client


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain", b"hello"),
        ("application/x-www-form-urlencoded", b"a=1&b=2"),
        (
            "multipart/form-data; boundary=xx",
            b'--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--xx--\r\n',
        ),
    ],
    ids=["text", "form", "multipart"],
)
def test_a_session_can_post_any_content_type(settings, content_type: str, body: bytes) -> None:
    """The body is published unchanged although the CSRF check may parse it."""
    del settings.EVENTSOURCE_POLICY
    client = user_client()
    request = RequestFactory().get("/")
    csrf = get_token(request)
    client.cookies[django_settings.CSRF_COOKIE_NAME] = request.META["CSRF_COOKIE"]

    def post(**headers: str) -> Any:
        return async_to_sync(client.post)(
            "/events/ping/t", body, content_type=content_type, headers=headers
        )

    assert post().status_code == 403
    response = post(**{"X-CSRFToken": csrf})
    assert response.status_code == 200
    event_id = int(response.json()["id"])
    assert get_history().read("t", event_id - 1).entries[0].draft.data == body.replace(
        b"\r\n", b"\n"
    )


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_large_post_of_a_session_is_responded_with_413(settings, content_type: str) -> None:
    """Django's own limits do not change the status."""
    del settings.EVENTSOURCE_POLICY
    client = user_client()
    response = async_to_sync(client.post)(
        "/events/ping/t", b"x" * 3_000_000, content_type=content_type
    )
    assert response.status_code == 413


# Django's middleware


CSP = "django.middleware.csp.ContentSecurityPolicyMiddleware"

EVERY_MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.cache.UpdateCacheMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.auth.middleware.RemoteUserMiddleware",
    "django.contrib.auth.middleware.PersistentRemoteUserMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.contrib.sites.middleware.CurrentSiteMiddleware",
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware",
    "django.contrib.redirects.middleware.RedirectFallbackMiddleware",
    "django.contrib.admindocs.middleware.XViewMiddleware",
    "django.middleware.common.BrokenLinkEmailsMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django.middleware.cache.FetchFromCacheMiddleware",
    *([CSP] if django.VERSION >= (6, 0) else []),
]


def middleware_classes() -> set[str]:
    """Return the names of all middleware classes that Django defines."""
    root = Path(django.__file__).parent
    found = set()
    for file in [*root.glob("middleware/*.py"), *root.glob("contrib/*/middleware.py")]:
        module = ".".join(("django", *file.relative_to(root).with_suffix("").parts))
        found |= {
            f"{module}.{node.name}"
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Middleware")
        }
    return found


def test_the_list_of_middleware_is_complete() -> None:
    """The test fails if a new version of Django adds a middleware."""
    # CacheMiddleware combines two classes that are in the list.
    assert middleware_classes() - {"django.middleware.cache.CacheMiddleware"} == set(
        EVERY_MIDDLEWARE
    )


@pytest.mark.django_db(transaction=True)
async def test_a_stream_passes_every_middleware_of_django(settings) -> None:
    """It is not compressed or cached, and its first bytes are sent at once."""
    settings.MIDDLEWARE = EVERY_MIDDLEWARE
    (entry,) = add(get_history(), "a")
    response = await AsyncClient().get(
        "/events/poll/t", headers={"Accept-Encoding": "gzip", "Accept-Language": "de"}
    )
    assert not response.has_header("Content-Encoding")
    assert not response.has_header("Content-Length")
    assert not response.has_header("ETag")
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert await start(response) == f"id: {entry.seq}\n\n".encode()


async def test_gzip_middleware_compresses_other_streams(settings) -> None:
    """This shows that the test before it can fail."""

    async def body() -> Any:
        yield b"x" * 500

    async def view(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(body())

    settings.MIDDLEWARE = ["django.middleware.gzip.GZipMiddleware"]
    urls = type("urls", (), {"urlpatterns": [path("other", view)]})
    with override_settings(ROOT_URLCONF=urls):
        response = await AsyncClient().get("/other", headers={"Accept-Encoding": "gzip"})
        assert response["Content-Encoding"] == "gzip"
        assert gzip.decompress(b"".join([chunk async for chunk in response])) == b"x" * 500


def shouting(get_response: Any) -> Any:
    """A synchronous middleware that wraps the stream."""

    async def louder(chunks: Any) -> Any:
        async for chunk in chunks:
            yield chunk.upper()

    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response.streaming_content = louder(response.streaming_content)
        return response

    return middleware


async def test_a_stream_that_synchronous_middleware_wraps_is_sent(
    settings, client: AsyncClient
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.shouting"]
    add(get_history(), "a")
    body = await start(await client.get("/events/poll/t"))
    assert body.startswith(b"ID: ")


@pytest.mark.django_db(transaction=True, databases="__all__")
async def test_the_view_works_with_atomic_requests(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django refuses asynchronous views with ATOMIC_REQUESTS unless they are excluded."""
    for alias in connections:
        monkeypatch.setitem(connections[alias].settings_dict, "ATOMIC_REQUESTS", True)
        monkeypatch.setitem(connections.settings[alias], "ATOMIC_REQUESTS", True)
    assert await start(await AsyncClient().get("/events/poll/t"))


def test_the_default_event_class_is_the_one_of_the_setting() -> None:
    assert EventSourceView().get_event_class() is StringIdEvent


class OwnIdEvent(StringEvent):
    """Its id is its value."""

    id = property(lambda self: self.value[0])


@pytest.mark.parametrize("own_ids", [True, False])
async def test_no_sender_can_move_a_client_with_the_id_of_an_event(own_ids: bool) -> None:
    """The first block sets a cursor that is not looked up among the ids of events."""
    (first,) = add(get_history(), "before")
    event_class = OwnIdEvent if own_ids else StringIdEvent
    view = EventSourceView.as_view(event_class=event_class)

    async def events(cursor: str) -> Decoder:
        request = AsyncRequestFactory().get("/poll/t", headers={"Last-Event-ID": cursor})
        response = await view(request, action="poll", token="t")
        stream, decoder = aiter(response), Decoder()
        received.extend(event.data for event in decoder.feed(await anext(stream)))
        if cursor:
            received.extend(event.data for event in decoder.feed(await anext(stream)))
        await stream.aclose()
        return decoder

    received: list[str] = []
    opening = (await events("")).last_event_id
    assert (opening == str(first.seq)) is not own_ids
    for value in ("a", str(first.seq), "b"):
        await apublish("t", "ping", value, event_class)
    await events(opening)
    assert received == ["a", str(first.seq), "b"]
