"""Listeners: who is counted, for how long, and against which limits."""

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
from django_eventsource.listeners import Limit, Listener, Registry
from django_eventsource.responses import EventStreamResponse, Slot
from django_eventsource.streams import EventStream, Reason
from tests.lines import at_each_line

pytestmark = pytest.mark.usefixtures("memory_history")


@pytest.fixture
def registry() -> Registry:
    return Registry()


def make_stream() -> EventStream:
    return EventStream("a", Position(seq=1, cursor="1"))


def make_listener(*tokens: str, **options: Any) -> Listener:
    return Listener(tokens=tokens or ("a",), **options)


class Ends:
    """What a registry tells of ended streams."""

    def __init__(self) -> None:
        self.told: list[tuple[Listener, Reason | None]] = []

    def __call__(self, listener: Listener, stream: EventStream) -> None:
        self.told.append((listener, stream.reason))


def admit(registry: Registry, listener: Listener, ends: Ends | None = None) -> EventStream | Limit:
    stream = make_stream()
    return registry.admit(stream, listener, ends or Ends()) or stream


def is_empty(registry: Registry) -> bool:
    gc.collect()
    return not registry.count("a") and not registry._counts and not list(registry.streams())


# Counting


async def test_streams_are_counted_by_token(registry: Registry) -> None:
    """A stream of several tokens counts for each of them, and as one stream."""
    one = admit(registry, make_listener("a", "b"))
    two = admit(registry, make_listener("b"))
    assert [registry.count(token) for token in "abc"] == [1, 2, 0]
    assert {stream for stream, _ in registry.streams()} == {one, two}
    assert isinstance(one, EventStream)
    await one.aclose()
    assert [registry.count(token) for token in "abc"] == [0, 1, 0]
    assert [stream for stream, _ in registry.streams()] == [two]


async def test_a_stream_closed_twice_is_counted_out_once(registry: Registry) -> None:
    """Closing, aborting and dropping it tell of one end, with its first reason."""
    ends = Ends()
    other = admit(registry, make_listener())
    listener = make_listener()
    stream = admit(registry, listener, ends)
    assert isinstance(stream, EventStream)
    stream.abort(Reason.STALLED)
    await stream.aclose()
    stream.end(Reason.AGE)
    del stream
    gc.collect()
    assert ends.told == [(listener, Reason.STALLED)]
    assert registry.count("a") == 1
    assert isinstance(other, EventStream)


async def test_a_stream_that_was_never_iterated_over(registry: Registry) -> None:
    """One that is dropped leaves nothing behind, and its listener has left."""
    ends = Ends()
    listener = make_listener(user="7", address="::1")
    stream = admit(registry, listener, ends)
    del stream
    assert is_empty(registry)
    assert ends.told == [(listener, Reason.LEFT)]


async def test_a_stream_dropped_in_another_thread(registry: Registry) -> None:
    """Whoever lets go of it last, it is counted out."""
    ends = Ends()
    holder = [admit(registry, make_listener(), ends)]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert is_empty(registry)
    assert len(ends.told) == 1


async def test_a_stream_in_a_cycle(registry: Registry) -> None:
    """The garbage collector's streams are counted out as well."""
    ends = Ends()
    listener = make_listener()
    stream: Any = admit(registry, listener, ends)
    stream.on_abort = stream.aclose
    del stream
    assert is_empty(registry)
    assert len(ends.told) == 1


async def test_a_stream_left_in_its_slot_is_forgotten(registry: Registry) -> None:
    """What the listener knows of its request does not keep its stream alive."""
    admit_into_slot(registry)
    assert is_empty(registry)


def admit_into_slot(registry: Registry) -> None:
    """What the view and Django's handler do, up to where the stream is to be served."""
    request: Any = AsyncRequestFactory().get("/")
    slot = request.scope[Slot.KEY] = Slot({})

    async def recheck() -> bool:
        return request is not None

    stream: Any = admit(registry, make_listener(recheck=recheck))
    response: Any = EventStreamResponse(stream, slot)
    response._handler_class = object  # as Django's handler marks what it sends
    aiter(response)
    assert slot.stream is stream


async def test_what_is_asked_while_a_stream_ends(registry: Registry) -> None:
    """Whoever goes through the streams may end them on the way."""
    streams = [admit(registry, make_listener()) for _ in range(5)]
    for stream, _ in registry.streams():
        stream.abort(Reason.CLOSED)
    assert is_empty(registry)
    assert all(stream.reason is Reason.CLOSED for stream in streams)


@pytest.mark.parametrize("method", ["streams", "limit", "admit", "count", "has"])
async def test_streams_that_the_garbage_collector_ends_during_a_call_are_counted_out(
    settings, registry: Registry, method: str
) -> None:
    """It runs in any thread, between any two lines: also in one that holds the lock."""
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
    assert {stream for stream, _ in registry.streams()} == set(kept)
    kept.clear()
    assert is_empty(registry)


async def test_a_signal_handler_walks_over_the_streams_between_any_two_lines(
    registry: Registry,
) -> None:
    """It interrupts the thread that holds the lock, and must not wait for it."""
    walks: list[int] = []
    previous = signal.signal(
        signal.SIGUSR1, lambda number, frame: walks.append(len(list(registry.streams())))
    )
    streams: list[Any] = []
    try:
        with at_each_line(lambda: signal.raise_signal(signal.SIGUSR1)):
            streams += [admit(registry, make_listener()) for _ in range(3)]
            streams.pop().abort(Reason.CLOSED)
            assert registry.count("a") == 2
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert {*walks} == {0, 1, 2, 3}
    streams.clear()
    assert is_empty(registry)


async def test_streams_of_one_loop(registry: Registry) -> None:
    """Each event loop looks after its own."""
    loop = asyncio.get_running_loop()
    mine = admit(registry, make_listener(loop=loop))
    other = admit(registry, make_listener())
    assert [stream for stream, _ in registry.streams(loop)] == [mine]
    assert {stream for stream, _ in registry.streams()} == {mine, other}


def test_many_threads(registry: Registry) -> None:
    """However many come and go at once, the limit holds and the count comes out at nothing."""
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(200):
            stream = admit(registry, make_listener("a", "b", user="7"))
            most = max(most, registry.count("a"))
            if isinstance(stream, EventStream):
                stream.abort(Reason.CLOSED)

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
def test_counts_are_those_of_the_open_streams(comers: list[Any]) -> None:
    """Whoever comes and goes, what is counted is what is open."""
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
            stream.abort(Reason.CLOSED)
        del stream
        for token in "abc":
            expected = sum(token in other.tokens for _, other in open_ones)
            assert registry.count(token) == expected
    open_ones.clear()
    assert is_empty(registry)


async def test_whose_streams_there_may_be(registry: Registry) -> None:
    """What no stream matches can be told without a look at each of them."""
    stream = admit(registry, make_listener(user="7", session="s"))
    other = admit(registry, make_listener())
    assert registry.has(None, None)
    assert registry.has("7", None)
    assert registry.has(None, "s")
    assert registry.has("7", "s")
    assert not registry.has("8", None)
    assert not registry.has("7", "r")
    assert isinstance(stream, EventStream)
    await stream.aclose()
    assert not registry.has("7", None)
    assert not registry.has(None, "s")
    assert isinstance(other, EventStream)


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
async def test_limits(
    settings,
    registry: Registry,
    setting: str,
    limit: Limit,
    same: dict[str, Any],
    other: dict[str, Any] | None,
) -> None:
    """One more than allowed is refused and counts for nothing; when one ends there is room."""
    setattr(settings, f"EVENTSOURCE_{setting}", 2)
    assert limit == f"EVENTSOURCE_{setting}"
    streams = [admit(registry, make_listener("a", "b", **same)) for _ in range(2)]
    late = make_listener("b", "c", **same)
    ends = Ends()
    for _ in range(3):
        assert registry.limit(late) is limit
        assert admit(registry, late, ends) is limit
    assert registry.count("c") == 0
    assert ends.told == []
    if other is not None:
        stranger = admit(registry, make_listener(*other.pop("tokens", ("a",)), **other))
        assert isinstance(stranger, EventStream)
        await stranger.aclose()
    assert isinstance(streams[0], EventStream)
    await streams[0].aclose()
    assert registry.limit(late) is None
    last = admit(registry, late, ends)
    assert isinstance(last, EventStream)
    assert registry.count("c") == 1


async def test_nobody_is_no_user(settings, registry: Registry) -> None:
    """Listeners without a user, or without an address, are not counted together."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_USER = 1
    settings.EVENTSOURCE_MAX_STREAMS_PER_ADDRESS = 1
    streams = [admit(registry, make_listener()) for _ in range(3)]
    assert registry.count("a") == len(set(streams)) == 3


async def test_a_lowered_limit(settings, registry: Registry) -> None:
    """Who is there stays; nobody more comes."""
    streams = [admit(registry, make_listener()) for _ in range(3)]
    settings.EVENTSOURCE_MAX_STREAMS_PER_TOKEN = 1
    assert admit(registry, make_listener()) is Limit.TOKEN
    assert registry.count("a") == len(streams)


async def test_exclusive(registry: Registry) -> None:
    """One that must be alone on its tokens is refused while anybody is on one of them."""
    other = admit(registry, make_listener("b"))
    alone = make_listener("a", "b", exclusive=True)
    assert registry.limit(alone) is Limit.EXCLUSIVE
    assert admit(registry, alone) is Limit.EXCLUSIVE
    assert registry.count("a") == 0
    assert isinstance(other, EventStream)
    await other.aclose()
    stream = admit(registry, alone)
    assert isinstance(stream, EventStream)
    assert admit(registry, make_listener("a", exclusive=True)) is Limit.EXCLUSIVE
    assert isinstance(admit(registry, make_listener("c", exclusive=True)), EventStream)


@pytest.mark.parametrize("name", ["STREAM_MAX_AGE_SECONDS", "RECHECK_SECONDS", "MAX_STREAMS"])
async def test_a_wrong_setting_counts_nobody(settings, registry: Registry, name: str) -> None:
    """An error while a stream is admitted leaves no count behind."""
    setattr(settings, f"EVENTSOURCE_{name}", 0)
    stream = make_stream()
    with pytest.raises(ImproperlyConfigured):
        registry.admit(stream, make_listener(), Ends())
    del stream
    assert is_empty(registry)


# When to look


async def test_when_a_stream_is_due(settings, registry: Registry) -> None:
    """Not all at once: each somewhere in the last quarter of its time."""
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = 1000
    settings.EVENTSOURCE_RECHECK_SECONDS = 100
    loop = asyncio.get_running_loop()
    now = loop.time()
    listeners = [make_listener() for _ in range(20)]
    streams = [admit(registry, listener) for listener in listeners]
    assert registry.count("a") == len(streams)
    for listener in listeners:
        assert 750 <= listener.ends_at - now <= 1010
        assert 75 <= listener.recheck_at - now <= 110
    assert len({listener.ends_at for listener in listeners}) == 20


async def test_never_due(settings, registry: Registry) -> None:
    """Without a time there is no end and no second look."""
    settings.EVENTSOURCE_STREAM_MAX_AGE_SECONDS = None
    settings.EVENTSOURCE_RECHECK_SECONDS = None
    listener = make_listener()
    stream = admit(registry, listener)
    assert isinstance(stream, EventStream)
    assert listener.ends_at == listener.recheck_at == float("inf")
