"""Tests of rewinds: the stored events with which a listener without a cursor starts."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource.exceptions import InvalidParameter
from django_eventsource.history import Kind, get_history
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.protocol.frames import Decoder
from django_eventsource.protocol.rewind import Rewind, parse_rewind
from django_eventsource.streaming.stream import EventStream
from django_eventsource.testing import listen
from django_eventsource.views import EventSourceView
from tests.support.events import add, draft
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("memory_history", "allow_any")


class WithState(EventSourceView):
    async def initial_state(self, request: HttpRequest, token: str) -> list[tuple[str, Any]]:
        return [("ping", "state")]


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("last/<action>/<token>", EventSourceView.as_view(rewind=2)),
    path("state/<action>/<token>", WithState.as_view()),
]


@pytest.fixture
def allow_any(settings) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


async def received(url: str, count: int, last_event_id: str = "") -> list[str]:
    """Return the data of the first events of a stream, and end it."""
    async with listen("t", url=url, last_event_id=last_event_id) as stream:
        return [(await stream.next()).data for _ in range(count)]


# The text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", Rewind()),
        ("10", Rewind(max_events=10)),
        (10, Rewind(max_events=10)),
        ("0", Rewind(max_events=0)),
        ("30s", Rewind(max_seconds=30)),
        ("5m", Rewind(max_seconds=300)),
        ("2h", Rewind(max_seconds=7200)),
    ],
)
def test_a_rewind_is_a_number_an_age_or_all(value: str | int, expected: Rewind) -> None:
    assert parse_rewind(value) == expected


WRONG = ["", "-1", "1.5", "5d", "s", "30 s", "ALL", "1" * 10, "٣", "x" * 1000]


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["large", "negative"])
def test_a_number_that_python_does_not_show_is_refused(value: int) -> None:
    with pytest.raises(InvalidParameter, match=r"rewind must be .*, not a large int\."):
        parse_rewind(value)


@pytest.mark.parametrize("value", [*WRONG, -1, 10**9, 1.5, True, None, ["5"], b"all"])
def test_another_value_is_refused_with_what_is_allowed(value: Any) -> None:
    shown = value[:40] if isinstance(value, str) else value
    with pytest.raises(InvalidParameter) as caught:
        parse_rewind(value)
    assert str(caught.value) == (
        "rewind must be a number of events (10), an age in seconds, minutes or hours (30s, 5m, "
        f"2h), or all, not {shown!r}."
    )


# The view


async def test_a_listener_without_a_cursor_receives_stored_events_then_live_ones() -> None:
    add(get_history(), *"abc")
    assert await received("/events/poll/t?rewind=2", 2) == ["b", "c"]
    assert await received("/events/poll/t?rewind=all", 3) == ["a", "b", "c"]
    assert await received("/events/poll/t?rewind=1h", 3) == ["a", "b", "c"]
    async with listen("t", url="/events/poll/t?rewind=1") as stream:
        assert (await stream.next()).data == "c"
        add(get_history(), "d")
        assert (await stream.next()).data == "d"


async def test_a_cursor_of_the_header_or_the_query_takes_precedence() -> None:
    entries = add(get_history(), *"abc")
    cursor = str(entries[1].seq)
    assert await received("/events/poll/t?rewind=all", 1, cursor) == ["c"]
    assert await received(f"/events/poll/t?rewind=all&last_event_id={cursor}", 1) == ["c"]


async def test_the_request_takes_precedence_over_the_attribute_of_the_view() -> None:
    entries = add(get_history(), *"abc")
    assert await received("/last/poll/t", 2) == ["b", "c"]
    assert await received("/last/poll/t?rewind=3", 3) == ["a", "b", "c"]
    async with listen("t", url="/last/poll/t?rewind=0") as stream:
        assert stream.body == f"id: {entries[-1].seq}\n\n".encode()


async def test_a_rewind_applies_to_each_token_of_a_stream() -> None:
    add(get_history(), *"abc", token="t")
    add(get_history(), *"def", token="u")
    assert sorted(await received("/events/poll/t?token=u&rewind=2", 4)) == list("bcef")


async def test_a_token_that_is_new_to_a_stream_is_rewound() -> None:
    """The cursor of the stream names the other token only."""
    (first,) = add(get_history(), "a", token="t")
    add(get_history(), "b", token="u")
    add(get_history(), "c", token="t")
    url = "/events/poll/t?token=u&rewind=all"
    assert sorted(await received(url, 2, str(first.seq))) == ["b", "c"]


async def test_a_client_cut_before_its_first_event_resumes_from_the_opening_cursor() -> None:
    """The position before the first event may be a close, which the client has not received."""
    add(get_history(), "a")
    get_history().append("t", [draft(kind=Kind.CLOSE)])
    add(get_history(), "b")
    response = await AsyncClient().get("/events/poll/t?rewind=all")
    stream = aiter(response)
    decoder = Decoder()
    decoder.feed(await anext(stream))
    await stream.aclose()
    assert await received("/events/poll/t", 1, decoder.last_event_id) == ["b"]


async def test_a_stream_of_a_closed_token_ends_with_the_close() -> None:
    add(get_history(), "a")
    get_history().append("t", [draft("bye", kind=Kind.CLOSE)])
    async with listen("t", url="/events/poll/t?rewind=all") as stream:
        assert [(await stream.next()).data for _ in range(2)] == ["a", "bye"]
        await until(lambda: not stream.is_open)


@pytest.mark.parametrize("text", ["", "-5", "tomorrow", "5d"])
async def test_a_request_with_a_wrong_rewind_is_responded_with_400(text: str) -> None:
    for method in ("get", "head"):
        client = AsyncClient()
        response = await getattr(client, method)(f"/events/poll/t?rewind={text}")
        assert response.status_code == 400
    response = await AsyncClient().get(f"/events/poll/t?rewind={text}")
    assert response.content.decode().startswith("rewind must be a number of events (10)")
    assert repr(text) in response.content.decode()


async def test_a_rewind_of_a_view_with_an_initial_state_is_responded_with_400() -> None:
    response = await AsyncClient().get("/state/poll/t?rewind=5")
    assert response.status_code == 400
    assert "initial state cannot rewind" in response.content.decode()
    assert await received("/state/poll/t", 1) == ["state"]


def test_as_view_refuses_a_rewind_that_is_wrong_or_combined_with_an_initial_state() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"EventSourceView: rewind must be .*'5d'"):
        EventSourceView.as_view(rewind="5d")
    with pytest.raises(ImproperlyConfigured, match=r"WithState\.rewind: .*initial state"):
        WithState.as_view(rewind=5)
    subclass = type("Rewound", (EventSourceView,), {"rewind": "soon"})
    with pytest.raises(ImproperlyConfigured, match=r"Rewound: rewind must be .*'soon'"):
        subclass.as_view()


# Events that are dropped meanwhile


async def test_events_dropped_between_opening_and_first_read_are_not_missing() -> None:
    """A token at its bound drops an event with each new one."""
    history = get_history()
    history.max_events = 3
    add(history, *"abc")
    position = history.locate("t", None, parse_rewind("all"))
    stream = EventStream("t", position)
    decoder = Decoder()
    decoder.feed(await anext(stream))
    add(history, *"de")
    assert [event.data for event in decoder.feed(await anext(stream))] == ["c", "d", "e"]
    await stream.aclose()


async def test_events_dropped_after_the_first_read_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = get_history()
    assert isinstance(history, MemoryHistory)
    history.max_events = 3
    add(history, *"abc")
    real = history.read
    # Each read returns one event, so that the stream reads again.
    monkeypatch.setattr(history, "read", lambda *args, **options: real(*args, max_events=1))
    stream = EventStream("t", history.locate("t", None, parse_rewind("all")))
    decoder = Decoder()
    decoder.feed(await anext(stream))
    assert [event.data for event in decoder.feed(await anext(stream))] == ["a"]
    add(history, *"def")
    assert [event.event for event in decoder.feed(await anext(stream))] == ["reset"]
    await stream.aclose()
