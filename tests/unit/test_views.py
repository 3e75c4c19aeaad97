"""The view: what each request is answered, and what middleware does to a stream."""

from __future__ import annotations

import ast
import asyncio
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
from django_eventsource.frames import Decoder
from django_eventsource.grants import make_grant
from django_eventsource.history import Kind, get_history
from django_eventsource.listeners import Listener, registry
from django_eventsource.policies import AllowAny
from django_eventsource.responses import Slot
from django_eventsource.shutdown import shutdown
from django_eventsource.signals import stream_opened
from django_eventsource.streams import Reason
from django_eventsource.views import EventSourceView
from django_eventsource.watch import Watch, get_watch
from tests.histories import add, draft, texts

pytestmark = pytest.mark.usefixtures("memory_history", "allow_any")

SECONDS = 10


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
    """Its state is what the token says."""

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
    """A policy whose database is away."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        raise OperationalError("away")

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        raise OperationalError("away")


class Unidentified(AllowAny):
    async def identify(self, request: HttpRequest) -> str:
        raise OperationalError("away")


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
    path("fickle/<action>/<token>", EventSourceView.as_view(policy=lambda: Fickle())),
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
def nobody_listens() -> None:
    """Streams that a failed test has left open do not count in the next one."""
    for stream, _ in registry.streams():
        stream.abort(Reason.CLOSED)


@pytest.fixture
def client() -> AsyncClient:
    return AsyncClient()


async def start(response: Any, count: int = 1) -> bytes:
    """Read the first chunks of a stream, then leave."""
    assert response.status_code == 200, response.content
    stream = aiter(response)
    chunks = b""
    async with asyncio.timeout(SECONDS):
        for _ in range(count):
            chunks += await anext(stream)
    await stream.aclose()
    return chunks


def send(client: AsyncClient, url: str, body: bytes | str = b"", **extra: Any) -> Any:
    return client.post(url, body, content_type=extra.pop("content_type", "text/plain"), **extra)


# Listening


async def test_get_opens_a_stream(client: AsyncClient) -> None:
    """GET of the LISTEN action streams, with its first bytes at once."""
    (entry,) = add(get_history(), "a", token="42:42")
    response = await client.get("/events/poll/42:42")
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert await start(response) == f"id: {entry.seq}\n\n".encode()


async def test_get_resumes_after_the_last_event_id(client: AsyncClient) -> None:
    """The header brings what was missed; it wins over the query."""
    entries = add(get_history(), *"abc")
    for url, headers in [
        ("/events/poll/t", {"Last-Event-ID": str(entries[1].seq)}),
        (f"/events/poll/t?last_event_id={entries[1].seq}", {}),
        ("/events/poll/t?last_event_id=1", {"Last-Event-ID": str(entries[1].seq)}),
    ]:
        body = await start(await client.get(url, headers=headers), 2)
        assert [event.data for event in Decoder().feed(body)] == ["c"]


async def test_the_opening_cursor_is_an_event_where_the_view_says_so(client: AsyncClient) -> None:
    """The data is the id."""
    (entry,) = add(get_history(), "a")
    expected = f"id: {entry.seq}\nevent: cursor\ndata: {entry.seq}\n\n"
    assert await start(await client.get("/cursor/poll/t")) == expected.encode()
    resumed = await client.get("/cursor/poll/t", headers={"Last-Event-ID": str(entry.seq)})
    assert await start(resumed) == expected.encode()


@pytest.mark.parametrize("url", ["/cursor/poll/t", "/cursor/poll/t?token=u", "/begun/poll/t"])
async def test_a_client_that_ignores_an_id_without_data_loses_nothing_with_a_cursor_event(
    client: AsyncClient, url: str
) -> None:
    """It was cut off before its first event."""
    add(get_history(), "before")
    opening = Decoder().feed(await start(await client.get(url)))
    assert opening[-1].event == "cursor"
    add(get_history(), "missed")
    response = await client.get(url, headers={"Last-Event-ID": opening[-1].id})
    events = Decoder().feed(await start(response, 2))
    assert [(event.event, event.data) for event in events if event.event != "cursor"] == [
        ("ping", "missed")
    ]


async def test_a_reset_with_a_cursor_takes_the_place_of_the_cursor_event(
    client: AsyncClient,
) -> None:
    """It is an event that commits the cursor already."""
    add(get_history(), "a")
    (event,) = Decoder().feed(await start(await client.get("/cursor/poll/t?last_event_id=1")))
    assert event.event == "reset"
    assert event.id == json.loads(event.data)["resume"]


async def test_a_live_only_url_has_no_cursor_event(client: AsyncClient) -> None:
    """Its listeners do not come back with an id."""
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
async def test_an_absurd_last_event_id_gets_reset(client: AsyncClient, cursor: str) -> None:
    """200, reset first, then live."""
    (entry,) = add(get_history(), "old")
    response = await client.get("/events/poll/t", headers={"Last-Event-ID": cursor})
    stream = aiter(response)
    (event,) = Decoder().feed(await anext(stream))
    assert (event.event, event.id) == ("reset", str(entry.seq))
    add(get_history(), "new")
    (event,) = Decoder().feed(await anext(stream))
    assert event.data == "new"
    await stream.aclose()


async def test_a_closed_token_stops_who_has_seen_it(client: AsyncClient) -> None:
    """204 at the close; a fresh listener opens the token anew and resumes there."""
    history = get_history()
    (start_entry,) = add(history, "a")
    (close,) = history.append("t", [draft("bye", kind=Kind.FINISH)])
    response = await client.get("/events/poll/t", headers={"Last-Event-ID": str(close.seq)})
    assert (response.status_code, response.content) == (204, b"")
    before = await client.get("/events/poll/t", headers={"Last-Event-ID": str(start_entry.seq)})
    chunks = [chunk async for chunk in before]
    assert [event.data for event in Decoder().feed(b"".join(chunks))] == ["bye"]
    fresh = await start(await client.get("/events/poll/t"))
    assert fresh == f"id: {close.seq}+\n\n".encode()
    again = await client.get("/events/poll/t", headers={"Last-Event-ID": f"{close.seq}+"})
    assert await start(again) == fresh


async def test_a_history_that_cannot_be_read(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The listener is asked to come back: any other status would make it give up."""
    monkeypatch.setattr(get_history(), "locate", lambda *args: 1 / 0)
    response = await client.get("/events/poll/t")
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    decoder = Decoder()
    assert decoder.feed(response.content) == []
    assert decoder.retry_ms is not None
    assert 2_000 <= decoder.retry_ms <= 10_000
    assert "cannot be read" in caplog.text


async def test_head_gives_headers_only(client: AsyncClient) -> None:
    """HEAD never opens a stream."""
    response = await client.head("/events/poll/t")
    assert (response.status_code, response.content) == (200, b"")
    assert response["Content-Type"] == "text/event-stream"
    assert not response.streaming


def test_view_and_stream_on_different_loops(client: AsyncClient) -> None:
    """Sync tests run the view on one event loop and read its stream on another."""
    (entry,) = add(get_history(), "a")
    response = async_to_sync(client.get)("/events/poll/t")
    add(get_history(), "b")
    body = async_to_sync(start)(response, 2)
    assert body.startswith(f"id: {entry.seq}\n\n".encode())
    assert [event.data for event in Decoder().feed(body)] == ["b"]


async def test_url_options(client: AsyncClient) -> None:
    """A URL can have an Event class, a keepalive time and a policy of its own."""
    assert await start(await client.get("/live/poll/t")) == b": open\n"
    assert b": keepalive\n" in await start(await client.get("/quick/poll/t"), 2)
    response = await client.get("/reasoned/poll/t")
    assert (response.status_code, response.content) == (403, b"not on Sundays\n")


@pytest.mark.parametrize("seconds", [0, -1, "5"])
def test_a_bad_keepalive_is_told_when_the_view_is_made(seconds: object) -> None:
    """0 is an error, not a way to spin."""
    with pytest.raises(ImproperlyConfigured, match="keepalive_seconds must be a positive number"):
        EventSourceView.as_view(keepalive_seconds=seconds)


def test_a_bad_event_class_is_told_when_the_view_is_made() -> None:
    """The reserved action is refused."""

    class Bad(Event):
        ACTIONS = ["reset"]

    with pytest.raises(ImproperlyConfigured, match="reserved"):
        EventSourceView.as_view(event_class=Bad)


# Several tokens


async def test_several_tokens_on_one_stream(client: AsyncClient) -> None:
    """The query names the further ones; each is given once, and the cursor is of them all."""
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
    async with asyncio.timeout(SECONDS):
        while len(got) < 3:
            got += [event.data for event in decoder.feed(await anext(stream))]
    assert sorted(got) == ["a1", "b1", "c1"]
    await stream.aclose()
    # In a header and in the query, with its tokens in any order.
    for text in (f"/events/poll/c?token=a&token=b&last_event_id={first}", ""):
        headers = {} if text else {"Last-Event-ID": first}
        got = await read(await client.get(text or url, headers=headers), 3)
        assert sorted(got) == ["a1", "b1", "c1"]


async def read(response: Any, count: int) -> list[str]:
    """Read so many events and leave; give their data."""
    assert response.status_code == 200, response.content
    stream = aiter(response)
    decoder = Decoder()
    got: list[str] = []
    async with asyncio.timeout(SECONDS):
        while len(got) < count:
            got += [event.data for event in decoder.feed(await anext(stream))]
    await stream.aclose()
    return got


async def opened(response: Any) -> tuple[list[Any], str]:
    """Read the first bytes and leave; give the events and the cursor."""
    decoder = Decoder()
    events = decoder.feed(await start(response))
    return events, decoder.last_event_id


async def test_a_page_that_drops_tokens(client: AsyncClient) -> None:
    """Whatever it keeps goes on where it was: none of it starts afresh in silence."""
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
async def test_garbage_for_several_tokens(client: AsyncClient, cursor: str) -> None:
    """200, and a reset for each token."""
    for token in "ab":
        add(get_history(), "old", token=token)
    response = await client.get("/events/poll/a?token=b", headers={"Last-Event-ID": cursor})
    events, _ = await opened(response)
    assert sorted(json.loads(event.data)["token"] for event in events) == ["a", "b"]
    assert {json.loads(event.data)["reason"] for event in events} == {"unknown"}


async def test_all_of_several_tokens_closed(client: AsyncClient) -> None:
    """204 is for who has seen the close of each."""
    history = get_history()
    for token in "ab":
        add(history, "old", token=token)
    url = "/events/poll/a?token=b"
    _, cursor = await opened(await client.get(url))
    history.append("a", [draft("bye", kind=Kind.FINISH)])
    history.append("b", [draft("bye", kind=Kind.FINISH)])
    response = await client.get(url, headers={"Last-Event-ID": cursor})
    decoder = Decoder()
    async with asyncio.timeout(SECONDS):
        events = [event async for chunk in response for event in decoder.feed(chunk)]
    assert [event.event for event in events] == ["close", "close"]
    seen = [(await client.get(url, headers={"Last-Event-ID": event.id})) for event in events]
    assert [response.status_code for response in seen] == [200, 204]
    assert await start(seen[0])
    assert (await client.get(url)).status_code == 200, "a fresh listener opens them anew"


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("/events/poll/a?token=b&token=c", "3 tokens are asked for; one stream carries at most 2"),
        ("/events/poll/a?token=", "The token is empty"),
        ("/events/poll/a?token=%00", "holds NUL"),
        (f"/events/poll/a?token={'x' * 256}", "at most 255"),
    ],
)
async def test_bad_sets_of_tokens(client: AsyncClient, settings, url: str, answer: str) -> None:
    """One clear line, and no stream."""
    settings.EVENTSOURCE_STREAM_MAX_TOKENS = 2
    response = await client.get(url)
    assert response.status_code == 400
    assert answer in response.content.decode()


async def test_every_token_needs_permission(client: AsyncClient, settings) -> None:
    """A grant for one of them opens no stream of two."""
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
async def test_limits(client: AsyncClient, settings, name: str, url: str) -> None:
    """A listener too many is asked to come back, and takes nobody's place."""
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
async def test_the_limit_of_a_user(settings) -> None:
    """Each user has a limit, in whatever session; who has no user has none."""
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


async def test_a_limit_that_is_reached_meanwhile(
    client: AsyncClient, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the stream another may have come."""
    settings.EVENTSOURCE_MAX_STREAMS = 1
    first = await client.get("/events/poll/t")
    monkeypatch.setattr(registry, "limit", looks(registry.limit, None))
    response = await client.get("/events/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert await start(first)


def looks(real: Any, *answers: Any) -> Any:
    """Give these answers first."""
    given = list(answers)
    return lambda listener: given.pop(0) if given else real(listener)


async def test_no_stream_is_opened_at_the_end(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while the server ends is asked to come back."""
    monkeypatch.setattr(shutdown, "begun", True)
    response = await client.get("/events/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert registry.count("t") == 0


# Exclusive


async def test_a_second_listener_is_locked_out(client: AsyncClient) -> None:
    """423 while the first is there, on any of the tokens; a place is free when it leaves."""
    first = await client.get("/alone/poll/t?token=u")
    for url in ("/alone/poll/t", "/alone/poll/u", "/alone/poll/x?token=u"):
        response = await client.get(url)
        assert response.status_code == 423
        assert response.content == b"Somebody listens to this token already, and only one may.\n"
    assert await start(first)
    await first._stream.aclose()
    assert await start(await client.get("/alone/poll/u"))


async def test_a_listener_in_another_process_locks_out(client: AsyncClient) -> None:
    """As long as its process says that it is there."""
    history = get_history()
    history.announce("elsewhere", {"t": ["7"]}, 60)
    assert (await client.get("/alone/poll/t")).status_code == 423
    assert (await client.get("/alone/poll/x?token=t")).status_code == 423
    history.announce("elsewhere", {"t": []}, 60)
    assert await start(await client.get("/alone/poll/t"))


async def test_two_who_come_at_once(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them gets the stream, though both have asked before either had it."""
    asked = asyncio.Event()

    async def is_listened(self: Watch, token: str) -> bool:
        if waiting.done():
            asked.set()
        await asked.wait()
        return False

    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(Watch, "is_listened", is_listened)
    both = [asyncio.ensure_future(client.get("/alone/poll/t")) for _ in range(2)]
    waiting.set_result(None)
    async with asyncio.timeout(SECONDS):
        responses = await asyncio.gather(*both)
    assert sorted(response.status_code for response in responses) == [200, 423]
    for response in responses:
        if response.status_code == 200:
            await start(response)


async def test_sending_where_somebody_must_listen(client: AsyncClient) -> None:
    """404 and nothing published, unless there is a listener, here or in another process."""
    response = await send(client, "/heard/ping/t", "x")
    assert (response.status_code, response.content) == (404, b"Nobody listens to this token.\n")
    assert not get_history().heads(["t"])["t"].life
    listening = await client.get("/events/poll/t")
    assert (await send(client, "/heard/ping/t", "x")).status_code == 200
    await get_watch().beat()
    await start(listening)
    ((stream, _),) = registry.streams()
    stream.abort(Reason.LEFT)
    # What this process has told others a moment ago is not what it knows itself.
    assert get_history().present("t")
    assert (await send(client, "/heard/ping/t", "x")).status_code == 404
    get_history().announce("elsewhere", {"u": [""]}, 60)
    assert (await send(client, "/heard/ping/u", "x")).status_code == 200


# What a stream begins with


async def test_the_initial_state(client: AsyncClient) -> None:
    """A new listener gets it before its cursor, and the events have no ids."""
    (entry,) = add(get_history(), "old")
    body = await start(await client.get("/state/poll/t"))
    assert body.endswith(f"\n\nid: {entry.seq}\n\n".encode())
    events = Decoder("before").feed(body)
    assert [(event.event, event.data, event.id) for event in events] == [
        ("ping", "state of t", "before"),
        ("ping", "two\nlines", "before"),
    ]


async def test_who_goes_on_needs_no_state(client: AsyncClient) -> None:
    """One that comes back with a good cursor gets what it missed; with a bad one, both."""
    entries = add(get_history(), "a", "b")
    url = "/state/poll/t"
    good = {"Last-Event-ID": str(entries[0].seq)}
    assert await read(await client.get(url, headers=good), 1) == ["b"]
    events, cursor = await opened(await client.get(url, headers={"Last-Event-ID": "1"}))
    assert [event.event for event in events] == ["reset", "ping", "ping"]
    assert cursor == str(entries[1].seq)


async def test_who_is_cut_off_in_the_state_gets_it_again(client: AsyncClient) -> None:
    """At whatever byte: a cursor is only given with the whole of it."""
    (old, _) = add(get_history(), "old", "older")
    for headers in ({}, {"Last-Event-ID": "1"}):
        body = await start(await client.get("/state/poll/t", headers=headers))
        before = headers.get("Last-Event-ID", "")
        for cut in range(len(body)):
            decoder = Decoder(before)
            decoder.feed(body[:cut])
            assert decoder.last_event_id == before
    assert old.seq


async def test_the_state_of_tokens_that_are_new(client: AsyncClient) -> None:
    """Of several tokens, those that go on need none."""
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


async def test_an_event_while_the_state_is_read(client: AsyncClient) -> None:
    """It comes after the state: twice at worst, never not at all."""
    add(get_history(), "old")
    got = await read(await client.get("/changing/poll/t"), 2)
    assert got == ["state with new", "new"]


async def test_a_state_that_fails(client: AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """The listener is asked to come back, and takes nobody's place."""
    response = await client.get("/broken/poll/t")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert "initial_state() of" in caplog.text
    assert "no state" in caplog.text
    assert registry.count("t") == 0


@pytest.mark.parametrize("token", ["close", "reset", "nonsense"])
async def test_a_state_that_cannot_be_sent(
    client: AsyncClient, caplog: pytest.LogCaptureFixture, token: str
) -> None:
    """Its actions are those that may be published, but for the end of the stream."""
    response = await client.get(f"/odd/poll/{token}")
    assert response.content.startswith(b"event: retry\nretry: ")
    assert "initial_state() of" in caplog.text


@pytest.mark.parametrize(("token", "status"), [("forbidden", 403), ("nowhere", 404)])
async def test_a_state_that_is_refused(client: AsyncClient, token: str, status: int) -> None:
    """A view may say no here as well."""
    assert (await client.get(f"/odd/poll/{token}")).status_code == status
    assert registry.count(token) == 0


async def test_a_policy_whose_database_is_away(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A browser that is told an error gives up; one that is asked to come back does not."""
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
    assert not get_history().heads(["t"])["t"].life


async def test_nobody_has_no_name(client: AsyncClient, settings) -> None:
    """A policy that says None means nobody: they are not one user together."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_USER = 1
    responses = [await client.get("/nameless/poll/t") for _ in range(2)]
    assert [listener.user for _, listener in registry.streams()] == ["", ""]
    for response in responses:
        await start(response)


# Telling


async def test_an_opened_stream_is_told(client: AsyncClient) -> None:
    """With who listens; a receiver that fails harms nobody."""
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


class Fickle(AllowAny):
    """Says what it is told to."""

    answer: Any = True

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [(True, True), (False, False), (PermissionDenied(), False), (NotAuthenticated("x"), False)],
    ids=["yes", "no", "denied", "unknown"],
)
async def test_a_listener_can_be_checked_again(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, answer: Any, allowed: bool
) -> None:
    """The policy is asked about the same request, whichever way it says no."""
    response = await client.get("/fickle/poll/t?token=u")
    ((_, listener),) = [pair for pair in registry.streams() if "u" in pair[1].tokens]
    monkeypatch.setattr(Fickle, "answer", answer)
    assert listener.recheck is not None
    assert await listener.recheck() is allowed
    assert await start(response)


async def test_the_stream_is_left_in_the_scopes_slot() -> None:
    """Where the ASGI wrapper has made one, Django's own body is empty."""
    request = AsyncRequestFactory().get("/")
    slot = request.scope[Slot.KEY] = Slot(request.scope)
    response: Any = await EventSourceView.as_view()(request, action="poll", token="t")
    response._handler_class = object  # as Django's handler marks what it sends
    assert [chunk async for chunk in response] == []
    assert slot.stream is not None
    assert slot.stream.tokens == ["t"]
    assert registry.count("t") == 1
    await slot.stream.aclose()
    assert registry.count("t") == 0


# Sending


async def test_too_many_posts(client: AsyncClient, settings) -> None:
    """429 says when to try again; nothing is published."""
    cache.clear()
    settings.EVENTSOURCE_SEND_RATE = (2, 10**9)
    answers = [await send(client, "/events/ping/t", str(n)) for n in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 0 < int(answers[2]["Retry-After"]) <= 10**9
    assert answers[2].content.startswith(b"Too many events")
    first = int(answers[0].json()["id"])
    assert texts(get_history().read("t", first - 1).entries) == ["0", "1"]
    cache.clear()


async def test_post_publishes(client: AsyncClient) -> None:
    """The body is the value; the answer is the id, and what the class expects."""
    response = await send(client, "/events/ping/a/b%20c", "grüße\nzwei")
    assert response.status_code == 200
    assert response["Accept"] == "text/plain"
    event_id = response.json()["id"]
    (entry,) = get_history().read("a/b c", int(event_id) - 1).entries
    assert entry.draft.data == "grüße\nzwei".encode()


async def test_post_of_a_live_only_class(client: AsyncClient) -> None:
    """There is no id to give."""
    response = await send(client, "/live/ping/t", "x")
    assert response.json() == {"id": None}


async def test_post_of_json(client: AsyncClient) -> None:
    """A JSON class announces its media type."""
    response = await send(client, "/json/ping/t", '{"a": [1]}')
    assert response["Accept"] == "application/json"
    assert (await send(client, "/json/close/t")).status_code == 200


async def test_a_published_event_reaches_a_listener(client: AsyncClient) -> None:
    """GET and POST meet on the token."""
    response = await client.get("/events/poll/t")
    stream = aiter(response)
    await anext(stream)
    posted = await send(client, "/events/ping/t", "hello")
    (event,) = Decoder().feed(await anext(stream))
    assert (event.event, event.data, event.id) == ("ping", "hello", posted.json()["id"])
    await stream.aclose()


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
        ("/events/ping/a%00b", "x", 400, "holds NUL"),
        ("/events/pong/t", "x", 404, "'pong': StringIdEvent allows ping, retry, close."),
        ("/live/retry/t", "5", 404, "StringEvent allows ping, close."),
        ("/events/poll/t", "x", 405, "This URL answers GET, HEAD, OPTIONS."),
        ("/events/ping/t", "x" * 1001, 413, "at most 1000 bytes"),
        ("/events/ping/t", "x" * 1000, 413, "has 1020 bytes as it is sent; at most 1000"),
        ("/events/ping/t", "\n" * 900, 413, "has 6320 bytes as it is sent; at most 1000"),
    ],
)
async def test_bad_posts(
    client: AsyncClient, settings, url: str, body: bytes | str, status: int, answer: str
) -> None:
    """Each is answered with one clear line, and nothing is published."""
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1000
    response = await send(client, url, body)
    assert response.status_code == status
    assert answer in response.content.decode()
    assert response.content.count(b"\n") == 1
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert not get_history().heads(["t"])["t"].life


@pytest.mark.parametrize(
    ("url", "status", "answer"),
    [
        ("/events/pong/t", 404, "'pong': StringIdEvent allows poll."),
        ("/events/ping/t", 405, "This URL answers POST, OPTIONS."),
        ("/events/poll/", 400, "The token is empty"),
        (f"/events/poll/{'x' * 256}", 400, "at most 255"),
        ("/never/poll/t", 401, "Authentication is required."),
    ],
)
async def test_bad_gets(client: AsyncClient, url: str, status: int, answer: str) -> None:
    """The same for listening."""
    response = await client.get(url)
    assert response.status_code == status
    assert answer in response.content.decode()


async def test_token_that_is_no_utf8() -> None:
    """Servers decode paths leniently; what they leave of bad bytes is refused."""
    view = EventSourceView.as_view()
    request = AsyncRequestFactory().get("/")
    response = await view(request, action="poll", token="a\ufffdb")
    assert (response.status_code, b"not valid UTF-8" in response.content) == (400, True)


@pytest.mark.parametrize("method", ["put", "patch", "delete", "trace"])
async def test_wrong_methods(client: AsyncClient, method: str) -> None:
    """405 with Allow, which does not depend on the action."""
    for action in ("ping", "poll", "unknown"):
        response = await getattr(client, method)(f"/events/{action}/t")
        assert (response.status_code, response["Allow"]) == (405, "GET, HEAD, POST, OPTIONS")


async def test_options_opens_nothing(client: AsyncClient) -> None:
    """OPTIONS names the methods of the view, whatever the action."""
    for url in ("/events/poll/t", "/events/close/t", "/events/pong/t", "/both/talk/t"):
        response = await client.options(url)
        assert (response.status_code, response.content) == (200, b"")
        assert response["Allow"] == "GET, HEAD, POST, OPTIONS"


async def test_an_action_may_be_for_both_methods(client: AsyncClient) -> None:
    """The same URL listens and sends where the class says so."""
    assert await start(await client.get("/both/talk/t"))
    assert (await send(client, "/both/talk/t", "x")).status_code == 200


async def test_a_body_that_middleware_consumed(settings) -> None:
    """Nothing is published in its place."""
    request = AsyncRequestFactory().post("/", {"a": "1"})
    assert request.POST["a"] == "1"
    with pytest.raises(RawPostDataException):
        await EventSourceView.as_view()(request, action="ping", token="t")
    assert not get_history().heads(["t"])["t"].life


async def test_a_failing_layer_for_a_live_only_event(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender is told that nobody got it."""

    async def fail(*args: Any) -> None:
        raise DeliveryFailed("down")

    monkeypatch.setattr("django_eventsource.views.apublish_posted", fail)
    response = await send(client, "/live/ping/t", "x")
    assert response.status_code == 503
    assert b"was not sent" in response.content


async def test_a_history_that_fails_for_a_sender(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, and nothing that was not found out."""

    async def fail(*args: Any) -> None:
        raise OperationalError("disk full")

    monkeypatch.setattr("django_eventsource.views.apublish_posted", fail)
    response = await send(client, "/events/ping/t", "x")
    assert response.status_code == 503
    assert b"may not have been published" in response.content
    assert "disk full" in caplog.text


async def test_a_value_error_of_the_event_class_is_shown(client: AsyncClient) -> None:
    """What a class refuses is told in its own words."""

    class Picky(StringEvent):
        def set_value(self, value: Any) -> None:
            b"\xff".decode()

    view = EventSourceView.as_view(event_class=Picky)
    request = AsyncRequestFactory().post("/", b"x", content_type="text/plain")
    response = await view(request, action="ping", token="t")
    assert response.status_code == 400
    assert b"invalid start byte" in response.content


# WSGI


def test_wsgi_is_told_clearly() -> None:
    """Under WSGI a stream is a clear 500 page, not a hanging request."""
    response = Client(raise_request_exception=False).get("/events/poll/t")
    assert response.status_code == 500
    assert b"need an ASGI server" in response.content


def test_wsgi_can_send() -> None:
    """Publishing needs no stream."""
    response = Client().post("/events/ping/t", "x", content_type="text/plain")
    assert response.status_code == 200
    assert texts(get_history().read("t", int(response.json()["id"]) - 1).entries) == ["x"]


# Permission


async def test_closed_by_default(client: AsyncClient, settings) -> None:
    """Without credentials nobody listens or sends."""
    del settings.EVENTSOURCE_POLICY
    for response in [
        await client.get("/events/poll/t"),
        await client.head("/events/poll/t"),
        await send(client, "/events/ping/t", "x"),
    ]:
        assert response.status_code == 401
        assert response["WWW-Authenticate"].startswith("Bearer ")
        assert not response.streaming


async def test_a_grant_opens(client: AsyncClient, settings) -> None:
    """A grant gives its right on its token, and no other."""
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
async def test_a_policys_reasons_are_told(
    client: AsyncClient, method: str, url: str, status: int, answer: str
) -> None:
    """What the policy raises is the answer."""
    response = await getattr(client, method)(url)
    assert (response.status_code, response.content.decode()) == (status, answer)


@pytest.mark.django_db(transaction=True)
def test_a_refused_user_gets_403() -> None:
    """A policy's False is 403 for somebody who is logged in."""
    user = User.objects.create_user("ada")
    client = AsyncClient()
    client.force_login(user)
    response = async_to_sync(client.get)("/never/poll/t")
    assert response.status_code == 403


async def test_a_refused_request_without_users(settings, client: AsyncClient) -> None:
    """Without AuthenticationMiddleware a refusal is 401."""
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
def test_a_session_sends_whatever_its_type(settings, content_type: str, body: bytes) -> None:
    """The CSRF check may parse the body; what is published is the body still."""
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
def test_a_large_session_post_is_413(settings, content_type: str) -> None:
    """Whatever Django's own limits say, ours is told as 413."""
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
    """Every middleware class that Django's own modules define."""
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


def test_the_list_of_middleware_is_whole() -> None:
    """A middleware that Django adds is noticed."""
    # CacheMiddleware is the two halves of it that are in the list.
    assert middleware_classes() - {"django.middleware.cache.CacheMiddleware"} == set(
        EVERY_MIDDLEWARE
    )


@pytest.mark.django_db(transaction=True)
async def test_every_middleware_in_djangos_box(settings) -> None:
    """A stream passes them all as it is: not compressed, not cached, first bytes at once."""
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


async def test_gzip_would_compress_other_streams(settings) -> None:
    """The test above can fail: GZipMiddleware does compress what does not say no."""

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
    """A middleware of the old kind: sync only, and it wraps the stream."""

    async def louder(chunks: Any) -> Any:
        async for chunk in chunks:
            yield chunk.upper()

    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response.streaming_content = louder(response.streaming_content)
        return response

    return middleware


async def test_sync_middleware_that_wraps_the_stream(settings, client: AsyncClient) -> None:
    """A wrapped stream still streams."""
    settings.MIDDLEWARE = [f"{__name__}.shouting"]
    add(get_history(), "a")
    body = await start(await client.get("/events/poll/t"))
    assert body.startswith(b"ID: ")


@pytest.mark.django_db(transaction=True, databases=["default", "postgres"])
async def test_atomic_requests(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATOMIC_REQUESTS refuses async views; ours asks to be left out, on every database."""
    for alias in connections:
        monkeypatch.setitem(connections[alias].settings_dict, "ATOMIC_REQUESTS", True)
        monkeypatch.setitem(connections.settings[alias], "ATOMIC_REQUESTS", True)
    assert await start(await AsyncClient().get("/events/poll/t"))


def test_default_class_is_the_settings() -> None:
    """A URL without a class of its own uses the setting's."""
    assert EventSourceView().get_event_class() is StringIdEvent
