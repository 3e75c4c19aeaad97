"""The registry: counts, limits and deadlines of open streams."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncRequestFactory
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_eventsource.history import Position
from django_eventsource.protocol.cursors import Cursor
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.registry import Limit, Registry
from django_eventsource.streaming.response import EventStreamResponse, Slot
from tests.support.lines import at_each_line

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture
def registry() -> Registry:
    return Registry()


def make_stream(listener: Listener, recheck: Any = None) -> OpenStream:
    position = Position(seq=1, cursor=Cursor.at(1))
    return OpenStream("a", position, listener=listener, recheck=recheck)


def make_listener(*tokens: str, **options: Any) -> Listener:
    return Listener(tokens=tokens or ("a",), **options)


class Ends:
    """The ended streams that a registry reports."""

    def __init__(self) -> None:
        self.reported: list[tuple[Listener, Reason | None]] = []

    def __call__(self, stream: OpenStream) -> None:
        self.reported.append((stream.listener, stream.reason))


def admit(
    registry: Registry,
    listener: Listener,
    ends: Ends | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> OpenStream | Limit:
    stream = make_stream(listener)
    return registry.admit(stream, loop=loop, on_end=ends or Ends()) or stream


def is_empty(registry: Registry) -> bool:
    gc.collect()
    return not registry.count("a") and not registry._counts and not list(registry.streams())


# Counting


async def test_a_stream_counts_for_each_of_its_tokens(registry: Registry) -> None:
    one = admit(registry, make_listener("a", "b"))
    two = admit(registry, make_listener("b"))
    assert [registry.count(token) for token in "abc"] == [1, 2, 0]
    assert set(registry.streams()) == {one, two}
    assert isinstance(one, OpenStream)
    await one.aclose()
    assert [registry.count(token) for token in "abc"] == [0, 1, 0]
    assert list(registry.streams()) == [two]


async def test_a_stream_that_ends_twice_is_subtracted_once(registry: Registry) -> None:
    """Its first reason is reported."""
    ends = Ends()
    other = admit(registry, make_listener())
    listener = make_listener()
    stream = admit(registry, listener, ends)
    assert isinstance(stream, OpenStream)
    stream.abort(Reason.STALLED)
    await stream.aclose()
    stream.end(Reason.MAX_AGE)
    del stream
    gc.collect()
    assert ends.reported == [(listener, Reason.STALLED)]
    assert registry.count("a") == 1
    assert isinstance(other, OpenStream)


async def test_a_dropped_stream_is_subtracted_and_its_client_disconnected(
    registry: Registry,
) -> None:
    ends = Ends()
    listener = make_listener(user="7", address="::1")
    stream = admit(registry, listener, ends)
    del stream
    assert is_empty(registry)
    assert ends.reported == [(listener, Reason.CLIENT_DISCONNECTED)]


async def test_a_stream_dropped_in_another_thread_is_subtracted(registry: Registry) -> None:
    ends = Ends()
    holder = [admit(registry, make_listener(), ends)]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert is_empty(registry)
    assert len(ends.reported) == 1


async def test_a_stream_in_a_reference_cycle_is_subtracted(registry: Registry) -> None:
    ends = Ends()
    listener = make_listener()
    stream: Any = admit(registry, listener, ends)
    stream.recheck = stream.aclose
    del stream
    assert is_empty(registry)
    assert len(ends.reported) == 1


async def test_the_recheck_of_a_stream_does_not_keep_it_alive(registry: Registry) -> None:
    """The recheck refers to the request, whose slot refers to the stream."""
    admit_into_slot(registry)
    assert is_empty(registry)


def admit_into_slot(registry: Registry) -> None:
    """Do what the view and Django's handler do before the stream is sent."""
    request: Any = AsyncRequestFactory().get("/")
    slot = request.scope[Slot.KEY] = Slot({})

    async def recheck() -> bool:
        return request is not None

    stream: Any = make_stream(make_listener(), recheck)
    assert registry.admit(stream) is None
    response: Any = EventStreamResponse(stream, slot)
    response._handler_class = object  # Django's handler sets it on the response that it sends
    aiter(response)
    assert slot.stream is stream


async def test_streams_may_end_while_the_registry_is_iterated_over(registry: Registry) -> None:
    streams = [admit(registry, make_listener()) for _ in range(5)]
    for stream in registry.streams():
        stream.abort(Reason.CLOSE_REQUESTED)
    assert is_empty(registry)
    assert all(stream.reason is Reason.CLOSE_REQUESTED for stream in streams)


@pytest.mark.parametrize("method", ["streams", "limit", "admit", "count", "has"])
async def test_streams_that_the_garbage_collector_deletes_during_a_call_are_subtracted(
    settings, registry: Registry, method: str
) -> None:
    """It runs between any two lines, also in a thread that holds the lock."""
    settings.EVENTSOURCE_MAX_STREAMS = 1000
    kept = [admit(registry, make_listener(user="7")) for _ in range(20)]
    dropped = [admit(registry, make_listener(user="7")) for _ in range(20)]
    calls: dict[str, Callable[[], object]] = {
        "streams": lambda: list(registry.streams()),
        "limit": lambda: registry.limit(make_listener("b")),
        "admit": lambda: kept.append(admit(registry, make_listener(user="7"))),
        "count": lambda: registry.count("a"),
        "has": lambda: registry.has("7", None),
    }
    while dropped:
        with at_each_line(lambda: dropped and dropped.pop()):
            calls[method]()
    assert registry.count("a") == len(kept)
    assert set(registry.streams()) == set(kept)
    kept.clear()
    assert is_empty(registry)


async def test_a_signal_handler_can_iterate_over_the_streams_between_any_two_lines(
    registry: Registry,
) -> None:
    """It interrupts the thread that holds the lock and must not wait for it."""
    walks: list[int] = []
    previous = signal.signal(
        signal.SIGUSR1, lambda number, frame: walks.append(len(list(registry.streams())))
    )
    streams: list[Any] = []
    try:
        with at_each_line(lambda: signal.raise_signal(signal.SIGUSR1)):
            streams += [admit(registry, make_listener()) for _ in range(3)]
            streams.pop().abort(Reason.CLOSE_REQUESTED)
            assert registry.count("a") == 2
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert {*walks} == {0, 1, 2, 3}
    streams.clear()
    assert is_empty(registry)


async def test_streams_can_be_limited_to_one_event_loop(registry: Registry) -> None:
    loop = asyncio.get_running_loop()
    mine = admit(registry, make_listener(), loop=loop)
    other = admit(registry, make_listener())
    assert list(registry.streams(loop)) == [mine]
    assert set(registry.streams()) == {mine, other}


def test_the_limit_holds_with_many_threads(registry: Registry) -> None:
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(200):
            stream = admit(registry, make_listener("a", "b", user="7"))
            most = max(most, registry.count("a"))
            if isinstance(stream, OpenStream):
                stream.abort(Reason.CLOSE_REQUESTED)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 4
    assert is_empty(registry)


@hypothesis_settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from("abc"), min_size=1),
            st.sampled_from(["", "7", "8"]),
            st.sampled_from(["", "::1"]),
            st.booleans(),
            st.sampled_from(["stay", "drop", "close", "abort"]),
        ),
        max_size=12,
    )
)
def test_the_counts_equal_the_open_streams_whatever_happens(comers: list[Any]) -> None:
    registry = Registry()
    open_ones: list[Any] = []
    for tokens, user, address, exclusive, what in comers:
        listener = make_listener(*sorted(tokens), user=user, address=address, exclusive=exclusive)
        stream: Any = admit(registry, listener)
        taken = any(tokens & set(other.tokens) for _, other in open_ones)
        assert (stream is Limit.EXCLUSIVE) == (exclusive and taken)
        if stream is Limit.EXCLUSIVE:
            continue
        if what == "stay":
            open_ones.append((stream, listener))
        elif what == "close":
            asyncio.run(stream.aclose())
        elif what == "abort":
            stream.abort(Reason.CLOSE_REQUESTED)
        del stream
        for token in "abc":
            expected = sum(token in other.tokens for _, other in open_ones)
            assert registry.count(token) == expected
    open_ones.clear()
    assert is_empty(registry)


async def test_has_returns_false_if_no_stream_matches(registry: Registry) -> None:
    stream = admit(registry, make_listener(user="7", session="s"))
    other = admit(registry, make_listener())
    assert registry.has(None, None)
    assert registry.has("7", None)
    assert registry.has(None, "s")
    assert registry.has("7", "s")
    assert not registry.has("8", None)
    assert not registry.has("7", "r")
    assert isinstance(stream, OpenStream)
    await stream.aclose()
    assert not registry.has("7", None)
    assert not registry.has(None, "s")
    assert isinstance(other, OpenStream)


async def test_a_stream_that_ends_after_a_reset_is_not_subtracted(registry: Registry) -> None:
    """A forked process deletes the streams of its parent, which it does not count."""
    ends = Ends()
    stream = admit(registry, make_listener(), ends)
    assert isinstance(stream, OpenStream)
    registry.reset()
    assert registry.count("a") == 0
    await stream.aclose()
    assert ends.reported == []
    other = admit(registry, make_listener())
    assert registry.count("a") == 1
    assert isinstance(other, OpenStream)


# Limits


@pytest.mark.parametrize(
    ("setting", "limit", "same", "other"),
    [
        ("MAX_STREAMS", Limit.PROCESS, {}, None),
        ("MAX_STREAMS_PER_TOKEN", Limit.TOKEN, {}, {"tokens": ("z",)}),
        ("MAX_STREAMS_PER_USER", Limit.USER, {"user": "7"}, {"user": "8"}),
        ("MAX_STREAMS_PER_ADDRESS", Limit.ADDRESS, {"address": "::1"}, {"address": "1::1"}),
    ],
)
async def test_one_stream_more_than_the_limit_is_refused_and_not_counted(
    settings,
    registry: Registry,
    setting: str,
    limit: Limit,
    same: dict[str, Any],
    other: dict[str, Any] | None,
) -> None:
    setattr(settings, f"EVENTSOURCE_{setting}", 2)
    assert limit == f"EVENTSOURCE_{setting}"
    streams = [admit(registry, make_listener("a", "b", **same)) for _ in range(2)]
    late = make_listener("b", "c", **same)
    ends = Ends()
    for _ in range(3):
        assert registry.limit(late) is limit
        assert admit(registry, late, ends) is limit
    assert registry.count("c") == 0
    assert ends.reported == []
    if other is not None:
        stranger = admit(registry, make_listener(*other.pop("tokens", ("a",)), **other))
        assert isinstance(stranger, OpenStream)
        await stranger.aclose()
    assert isinstance(streams[0], OpenStream)
    await streams[0].aclose()
    assert registry.limit(late) is None
    last = admit(registry, late, ends)
    assert isinstance(last, OpenStream)
    assert registry.count("c") == 1


async def test_listeners_without_a_user_or_address_are_not_counted_together(
    settings, registry: Registry
) -> None:
    settings.EVENTSOURCE_MAX_STREAMS_PER_USER = 1
    settings.EVENTSOURCE_MAX_STREAMS_PER_ADDRESS = 1
    streams = [admit(registry, make_listener()) for _ in range(3)]
    assert registry.count("a") == len(set(streams)) == 3


async def test_a_lowered_limit_applies_to_new_streams_only(settings, registry: Registry) -> None:
    streams = [admit(registry, make_listener()) for _ in range(3)]
    settings.EVENTSOURCE_MAX_STREAMS_PER_TOKEN = 1
    assert admit(registry, make_listener()) is Limit.TOKEN
    assert registry.count("a") == len(streams)


async def test_an_exclusive_listener_is_refused_while_a_token_has_another(
    registry: Registry,
) -> None:
    other = admit(registry, make_listener("b"))
    alone = make_listener("a", "b", exclusive=True)
    assert registry.limit(alone) is Limit.EXCLUSIVE
    assert admit(registry, alone) is Limit.EXCLUSIVE
    assert registry.count("a") == 0
    assert isinstance(other, OpenStream)
    await other.aclose()
    stream = admit(registry, alone)
    assert isinstance(stream, OpenStream)
    assert admit(registry, make_listener("a", exclusive=True)) is Limit.EXCLUSIVE
    assert isinstance(admit(registry, make_listener("c", exclusive=True)), OpenStream)


@pytest.mark.parametrize("name", ["STREAM_MAX_AGE_SECONDS", "RECHECK_SECONDS", "MAX_STREAMS"])
async def test_an_invalid_setting_leaves_no_count(settings, registry: Registry, name: str) -> None:
    setattr(settings, f"EVENTSOURCE_{name}", 0)
    stream = make_stream(make_listener())
    with pytest.raises(ImproperlyConfigured):
        registry.admit(stream)
    del stream
    assert is_empty(registry)


# StreamTimeouts


async def test_deadlines_are_spread_over_the_last_quarter(settings, registry: Registry) -> None:
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 1000
    settings.EVENTSOURCE_RECHECK_SECONDS = 100
    loop = asyncio.get_running_loop()
    now = loop.time()
    streams: list[Any] = [admit(registry, make_listener()) for _ in range(20)]
    assert registry.count("a") == len(streams)
    for stream in streams:
        assert 750 <= stream.ends_at - now <= 1010
        assert 75 <= stream.recheck_at - now <= 110
    assert len({stream.ends_at for stream in streams}) == 20


async def test_a_setting_of_none_sets_no_deadline(settings, registry: Registry) -> None:
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = None
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    stream = admit(registry, make_listener())
    assert isinstance(stream, OpenStream)
    assert stream.ends_at == stream.recheck_at == float("inf")
