"""Tests of cursors for pages, and of stored events in Python and as JSON."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.test import AsyncClient, Client

from django_eventsource import aget_cursor, aread_history, get_cursor, read_history, views
from django_eventsource.exceptions import InvalidEvent, InvalidParameter, InvalidToken
from django_eventsource.grants import make_grant
from django_eventsource.history import Kind, get_history
from django_eventsource.protocol.cursors import parse_cursors
from django_eventsource.reading import HistoryPage
from tests.support.cursors import cursor_texts
from tests.support.events import add, draft

pytestmark = pytest.mark.usefixtures("memory_history", "allow_any")

JSON = {"Accept": "application/json"}


@pytest.fixture
def allow_any(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.ROOT_URLCONF = "django_eventsource.urls"


def actions(page: HistoryPage) -> list[str]:
    return [event.action for event in page.events]


def values(page: HistoryPage) -> list[str]:
    return [event.value for event in page.events]


# Cursors


def test_get_cursor_returns_the_newest_position() -> None:
    entries = add(get_history(), *"ab")
    assert cursor_texts(get_cursor("t"), ["t"]) == {"t": str(entries[-1].seq)}
    assert get_history().locate("t", parse_cursors(get_cursor("t"), ["t"])["t"]).known


def test_the_cursor_of_a_token_without_events_precedes_its_first_event() -> None:
    cursor = get_cursor("t")
    add(get_history(), "a")
    assert values(read_history("t", after=cursor)) == ["a"]


def test_an_own_id_that_looks_like_a_position_does_not_move_the_cursor() -> None:
    history = get_history()
    (first, *_) = add(history, "a", "b")
    cursor, page = get_cursor("t"), read_history("t", limit=1)
    for seq in (first.seq, first.seq + 1):
        history.append("t", [draft("c", own_id=str(seq))])
    assert values(read_history("t", after=cursor)) == ["c", "c"]
    assert values(read_history("t", after=page.cursor)) == ["b", "c", "c"]
    assert values(read_history("t", after=str(first.seq))) == ["c"]


def test_a_stream_after_the_cursor_of_a_closed_token_is_open() -> None:
    get_history().append("t", [draft(kind=Kind.CLOSE)])
    cursor = parse_cursors(get_cursor("t"), ["t"])["t"]
    assert not get_history().locate("t", cursor).closed


@pytest.mark.parametrize("tokens", [["t", "u"], ("t", "u", "t")])
def test_get_cursor_of_several_tokens_covers_each_of_them(tokens: Sequence[str]) -> None:
    (first,) = add(get_history(), "a", token="t")
    get_history().append("u", [draft(kind=Kind.CLOSE)])
    cursors = parse_cursors(get_cursor(tokens), ["t", "u"])
    for token in ("t", "u"):
        position = get_history().locate(token, cursors[token])
        assert (position.known, position.closed) == (True, False)
    assert cursors["t"].seq == first.seq


def test_a_list_of_one_token_has_the_cursor_of_the_token() -> None:
    add(get_history(), "a")
    assert get_cursor(["t"]) == get_cursor("t")


async def test_aget_cursor_returns_the_same() -> None:
    add(get_history(), "a")
    assert await aget_cursor("t") == await sync_to_async(get_cursor)("t")
    assert await aget_cursor(["t", "u"]) == await sync_to_async(get_cursor)(["t", "u"])


@pytest.mark.parametrize(
    "token", ["", [], ["t", ""], "x" * 256, 5, None, [5], [["t"]], b"t"], ids=repr
)
@pytest.mark.parametrize("read", [get_cursor, read_history])
def test_a_token_that_is_not_valid_is_refused(read: Callable[..., object], token: Any) -> None:
    with pytest.raises(InvalidToken):
        read(token)


@pytest.mark.parametrize(
    ("read", "name"), [(get_cursor, "aget_cursor"), (read_history, "aread_history")]
)
async def test_a_blocking_function_in_async_code_names_the_awaitable_one(
    read: Callable[[str], object], name: str
) -> None:
    with pytest.raises(SynchronousOnlyOperation, match=name):
        read("t")


# Pages of events in Python


def test_read_history_returns_the_events_from_the_oldest() -> None:
    before = datetime.datetime.now(datetime.UTC)
    entries = get_history().append(
        "t", [draft("a\nb"), draft("own", own_id="x:1"), draft("5", kind=Kind.RETRY)]
    )
    page = read_history("t")
    assert values(page) == ["a\nb", "own", "5"]
    assert actions(page) == ["ping", "ping", "retry"]
    assert [event.id for event in page.events] == [str(entries[0].seq), "x:1", str(entries[2].seq)]
    assert all(
        before <= event.time <= datetime.datetime.now(datetime.UTC) for event in page.events
    )
    assert (page.more, page.missing, page.cursor) == (False, None, get_cursor("t"))


def test_a_token_without_events_has_an_empty_page() -> None:
    page = read_history("t")
    assert (page.events, page.more, page.missing, page.cursor) == (
        (),
        False,
        None,
        get_cursor("t"),
    )


def test_the_pages_of_a_history_contain_each_event_once() -> None:
    texts = [str(n) for n in range(25)]
    add(get_history(), *texts)
    page = read_history("t", limit=10)
    found = values(page)
    while page.more:
        page = read_history("t", after=page.cursor, limit=10)
        found += values(page)
    assert found == texts
    assert len(values(page)) == 5
    after = read_history("t", after=page.cursor)
    assert (after.events, after.more, after.cursor) == ((), False, page.cursor)


def test_an_event_id_is_a_cursor() -> None:
    entries = get_history().append("t", [draft("a", own_id="x:1"), draft("b"), draft("c")])
    assert values(read_history("t", after="x:1")) == ["b", "c"]
    assert values(read_history("t", after=str(entries[1].seq))) == ["c"]


def test_the_cursor_of_several_tokens_is_a_cursor_of_each() -> None:
    add(get_history(), "a", token="t")
    cursor = get_cursor(["t", "u"])
    add(get_history(), "b", token="t")
    assert values(read_history("t", after=cursor)) == ["b"]
    with pytest.raises(InvalidParameter, match="cursor of this token"):
        read_history("other", after=cursor)


def test_an_action_selects_events_and_the_cursor_moves_past_the_others() -> None:
    history = get_history()
    add(history, *"ab")
    history.append("t", [draft("1000", kind=Kind.RETRY), draft("2000", kind=Kind.RETRY)])
    add(history, "c")
    page = read_history("t", action="retry", limit=1)
    assert (values(page), page.more) == (["1000"], True)
    page = read_history("t", action="retry", limit=1, after=page.cursor)
    assert (values(page), page.more) == (["2000"], False)
    assert page.cursor == get_cursor("t")
    page = read_history("t", action="unused")
    assert (page.events, page.more, page.cursor) == ((), False, get_cursor("t"))


def test_a_page_that_an_action_leaves_empty_has_a_cursor_to_go_on_from() -> None:
    add(get_history(), *["x"] * 501)
    get_history().append("t", [draft(kind=Kind.CLOSE)])
    page = read_history("t", action="close")
    assert (page.events, page.more) == ((), True)
    assert actions(read_history("t", action="close", after=page.cursor)) == ["close"]


def test_a_stream_after_a_page_that_ends_with_a_close_is_open() -> None:
    get_history().append("t", [draft(kind=Kind.CLOSE)])
    cursor = parse_cursors(read_history("t").cursor, ["t"])["t"]
    assert not get_history().locate("t", cursor).closed


def test_a_cursor_whose_events_were_dropped_is_expired() -> None:
    history = get_history()
    history.max_events = 2
    (first, *_) = add(history, *"abcd")
    page = read_history("t", after=str(first.seq))
    assert (page.missing, values(page)) == ("expired", ["c", "d"])
    assert read_history("t").missing is None


def test_a_cursor_that_the_history_never_assigned_is_unknown() -> None:
    add(get_history(), "a")
    page = read_history("t", after="x:9")
    assert (page.missing, values(page)) == ("unknown", ["a"])


def test_events_dropped_between_the_two_reads_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    history = get_history()
    history.max_events = 2
    (first, _) = add(history, *"ab")
    locate = history.locate

    def trimmed(*args: Any) -> Any:
        position = locate(*args)
        add(history, *"cd")
        return position

    monkeypatch.setattr(history, "locate", trimmed)
    page = read_history("t", after=str(first.seq))
    assert (page.missing, values(page)) == ("expired", ["c", "d"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": 0}, InvalidParameter, "limit must be a number from 1 to 500, not 0"),
        ({"limit": 501}, InvalidParameter, "not 501"),
        ({"limit": "5"}, InvalidParameter, "not '5'"),
        ({"limit": True}, InvalidParameter, "not True"),
        ({"after": "a b"}, InvalidParameter, "after must be a cursor of this token .* not 'a b'"),
        ({"after": "~~"}, InvalidParameter, "not '~~'"),
        ({"after": 5}, InvalidParameter, "after must be a cursor of this token .* not 5"),
        ({"after": 0}, InvalidParameter, "not 0"),
        ({"after": b"5"}, InvalidParameter, "not b'5'"),
        ({"limit": 10**5000}, InvalidParameter, "limit must be .* not a large int"),
        ({"action": 5}, InvalidEvent, "The action must be a text, not 5"),
        ({"action": ""}, InvalidEvent, "The action is empty"),
        ({"action": "a\nb"}, InvalidEvent, "contains LF"),
    ],
)
async def test_an_argument_that_is_not_valid_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await sync_to_async(read_history)("t", **arguments)
    with pytest.raises(error, match=message):
        await aread_history("t", **arguments)


@pytest.mark.django_db
@pytest.mark.parametrize("use_tz", [True, False])
def test_times_are_in_utc_also_without_use_tz(settings, use_tz: bool) -> None:
    settings.EVENTSOURCE_HISTORY = {}
    settings.USE_TZ = use_tz
    settings.TIME_ZONE = "Asia/Tokyo"
    before = datetime.datetime.now(datetime.UTC)
    add(get_history(), "a")
    (event,) = read_history("t").events
    assert event.time.utcoffset() == datetime.timedelta(0)
    assert before <= event.time <= datetime.datetime.now(datetime.UTC)


async def test_aread_history_returns_the_same() -> None:
    entries = add(get_history(), *"abc")
    for arguments in ({}, {"limit": 2}, {"after": str(entries[0].seq)}, {"action": "ping"}):
        expected = await sync_to_async(read_history)("t", **arguments)
        assert await aread_history("t", **arguments) == expected


# Pages of events as JSON


async def get(url: str, **headers: str) -> Any:
    return await AsyncClient().get(url, headers={**JSON, **headers})


async def test_get_with_accept_json_responds_with_a_page() -> None:
    (entry, *_) = add(get_history(), "a", "ü\n</script>")
    response = await get("/poll/t")
    assert response.status_code == 200
    assert response["Content-Type"] == "application/json"
    assert response["Cache-Control"] == "private, no-store"
    assert response["Vary"] == "Accept"
    page = response.json()
    assert {**page, "events": []} == {
        "events": [],
        "cursor": await aget_cursor("t"),
        "more": False,
        "missing": None,
    }
    assert page["events"][0].keys() == {"id", "action", "value", "time"}
    assert page["events"][0]["id"] == str(entry.seq)
    assert [event["value"] for event in page["events"]] == ["a", "ü\n</script>"]
    assert datetime.datetime.fromisoformat(page["events"][0]["time"]).utcoffset() is not None


async def test_the_query_selects_the_page() -> None:
    add(get_history(), *"abc")
    first = (await get("/poll/t?limit=1")).json()
    assert ([event["value"] for event in first["events"]], first["more"]) == (["a"], True)
    rest = (await get(f"/poll/t?after={first['cursor']}&action=ping")).json()
    assert [event["value"] for event in rest["events"]] == ["b", "c"]
    assert (await get("/poll/t?action=close")).json()["events"] == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "limit must be a number from 1 to 500, not 0."),
        ("limit=501", "limit must be a number from 1 to 500, not 501."),
        ("limit=ten", "limit must be a whole number, not 'ten'."),
        ("limit=-1", "limit must be a whole number, not '-1'."),
        ("limit=", "limit must be a whole number, not ''."),
        ("after=a%20b", "not 'a b'."),
        ("action=", "The action is empty."),
        (
            "rewind=1",
            "?rewind= has no effect here: it is for a stream. Stored events as JSON begin after "
            "the cursor in ?after=.",
        ),
        ("token=u", "The history of one token is read at a time: ?token= is for streams."),
    ],
)
async def test_a_query_that_is_not_valid_is_responded_with_400(query: str, message: str) -> None:
    response = await get(f"/poll/t?{query}")
    assert response.status_code == 400
    assert response.content.decode().endswith(f"{message}\n")


async def test_a_page_that_has_not_changed_is_responded_with_304() -> None:
    add(get_history(), "a")
    etag = (await get("/poll/t"))["ETag"]
    response = await get("/poll/t", **{"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")
    assert response["Cache-Control"] == "private, no-store"
    assert (response["ETag"], response["Vary"]) == (etag, "Accept")
    add(get_history(), "b")
    assert (await get("/poll/t", **{"If-None-Match": etag})).status_code == 200


@pytest.mark.parametrize("middleware", [[], ["django.middleware.http.ConditionalGetMiddleware"]])
@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": '"x"'},
        {"If-Unmodified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"},
        {"If-Modified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"},
        {"If-None-Match": 'W/,,""'},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_a_page_has_no_precondition_but_if_none_match(
    settings, headers: dict[str, str], middleware: list[str]
) -> None:
    settings.MIDDLEWARE = middleware
    add(get_history(), "a")
    response = await get("/poll/t", **headers)
    assert (response.status_code, response["Cache-Control"]) == (200, "private, no-store")
    response = await get("/poll/t", **{**headers, "If-None-Match": response["ETag"]})
    assert (response.status_code, response["Cache-Control"]) == (304, "private, no-store")


@pytest.mark.parametrize(
    ("events", "in_a_thread"),
    [(["x" * 1000], False), (["x" * 20_000], True), (["x"] * 100, False), (["x"] * 500, True)],
    ids=["small", "large", "few", "many"],
)
async def test_a_large_page_is_encoded_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, events: list[str], in_a_thread: bool
) -> None:
    """Other streams do not wait for it."""
    threads = []

    class Watched(views.JsonResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            threads.append(threading.current_thread())
            super().__init__(*args, **options)

    monkeypatch.setattr(views, "JsonResponse", Watched)
    add(get_history(), *events)
    page = (await get("/poll/t?limit=500")).json()
    assert [event["value"] for event in page["events"]] == events
    assert [thread is not threading.current_thread() for thread in threads] == [in_a_thread]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/json", "application/json"),
        ("application/json, text/event-stream;q=0.5", "application/json"),
        ("text/event-stream", "text/event-stream"),
        ("text/event-stream, application/json;q=0.9", "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("text/html, */*;q=0.8", "text/event-stream"),
        ("image/png", "text/event-stream"),
        ("", "text/event-stream"),
    ],
)
async def test_a_client_that_does_not_prefer_json_receives_a_stream(
    accept: str, content_type: str
) -> None:
    response = await AsyncClient().get("/poll/t", headers={"Accept": accept})
    assert response["Content-Type"] == content_type
    if response.streaming:
        await anext(aiter(response))
        await aiter(response).aclose()


async def test_a_stream_with_the_cursor_parameter_of_a_page_is_responded_with_400() -> None:
    """The stream would ignore it, and start at the newest event."""
    for method in ("get", "head"):
        response = await getattr(AsyncClient(), method)("/poll/t?after=1")
        assert response.status_code == 400
    text = (await AsyncClient().get("/poll/t?after=1")).content.decode()
    assert text.startswith("?after= has no effect here: it is for stored events as JSON ")
    assert text.endswith("A stream starts after the cursor in ?last_event_id=.\n")


async def test_reading_the_history_needs_the_permission_to_listen(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.DefaultPolicy"
    add(get_history(), "secret")
    refused = await get("/poll/t")
    assert refused.status_code == 401
    assert b"secret" not in refused.content
    assert (await get(f"/poll/t?grant={make_grant('t', send=True)}")).status_code == 403
    allowed = await get(f"/poll/t?grant={make_grant('t', listen=True)}")
    assert [event["value"] for event in allowed.json()["events"]] == ["secret"]


async def test_a_page_is_responded_with_503_if_the_history_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise get_history().storage_errors[0]("down")

    monkeypatch.setattr(get_history(), "read", fail)
    response = await get("/poll/t")
    assert response.status_code == 503
    assert response.content == b"The history's store failed; try again later.\n"
    assert "The history of 't' cannot be read." in caplog.text


def test_the_history_can_be_read_through_wsgi() -> None:
    add(get_history(), "a")
    response = Client().get("/poll/t", headers=JSON)
    assert [event["value"] for event in json.loads(response.content)["events"]] == ["a"]
