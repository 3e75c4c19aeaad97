"""Shared reads: what many listeners need is read once."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from dataclasses import replace

import pytest

from django_eventsource.delivery import replay_cache as module
from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.replay_cache import ReplayCache
from django_eventsource.history import Draft, Entry, Head, Slice
from django_eventsource.history.memory import MemoryHistory
from tests.support.events import add, texts


class Store:
    """A history that counts what is asked of it."""

    def __init__(self, count: int = 1000, most: int = 100) -> None:
        self.history = MemoryHistory()
        self.entries = add(self.history, *map(str, range(count)))
        self.start = self.entries[0].seq - 1
        self.end = self.entries[-1].seq
        self.most = most
        self.asked: list[tuple[int, int]] = []
        self.failing = False

    async def read(self, token: str, after: int, max_events: int) -> Slice:
        self.asked.append((after - self.start, max_events))
        await asyncio.sleep(0)
        if self.failing:
            raise ConnectionError
        return self.history.read(token, after, max_events=min(max_events, self.most))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def reads(store: Store) -> ReplayCache:
    return ReplayCache(store.read)


@pytest.fixture
def feed() -> Feed:
    return Feed("t", lambda: None)


async def replay(reads: ReplayCache, feed: Feed, store: Store, position: int) -> list[bytes]:
    """Return what a listener receives that reconnects after some events, up to the end."""
    position += store.start
    got = []
    while position < store.end:
        slice_ = await reads.read(feed, position)
        assert slice_.complete
        got += [batch.data for batch in slice_.batches]
        position = slice_.entries[-1].seq
    return got


async def test_a_thousand_listeners_cost_the_reads_of_one_and_share_its_bytes(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    all_got = await asyncio.gather(*(replay(reads, feed, store, 0) for _ in range(1000)))
    assert [after for after, _ in store.asked] == list(range(0, 1000, 100))
    assert len(all_got[0]) == 10
    for got in all_got:
        assert all(one is other for one, other in zip(got, all_got[0], strict=True))


async def test_the_common_events_of_listeners_at_different_positions_are_read_once(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    whole = b"".join(entry.frame() for entry in store.entries)
    positions = [0, 950, 17, 100, 512, 0, 999, 998, 350]
    all_got = await asyncio.gather(
        *(replay(reads, feed, store, position) for position in positions)
    )
    for position, got in zip(positions, all_got, strict=True):
        frames = b"".join(entry.frame() for entry in store.entries[position:])
        assert b"".join(got) == frames
        assert whole.endswith(frames)
    read = [n for after, most in store.asked for n in range(after, after + min(most, 100))]
    assert len([n for n in read if n < 1000]) == len({n for n in read if n < 1000})


async def test_a_read_stops_at_the_start_of_the_next_cached_slice(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    await replay(reads, feed, store, 500)
    store.asked.clear()
    await replay(reads, feed, store, 430)
    assert store.asked == [(430, 70)]


async def test_a_position_that_is_not_an_event_of_the_slice_is_read_from_the_history(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    slice_ = await reads.read(feed, store.start)
    gap = Slice(
        entries=(*slice_.entries[:10], *slice_.entries[20:]), complete=True, last=store.end
    )
    kept = reads._cached[feed, store.start]
    reads._cached[feed, store.start] = kept._replace(slice_=gap)
    store.asked.clear()
    await reads.read(feed, store.start + 10)
    assert store.asked == []
    await reads.read(feed, store.start + 15)
    assert [after for after, _ in store.asked] == [15]


async def test_a_slice_read_before_a_reset_is_not_used_after_it(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    """Other events have its sequence numbers now."""
    position = store.start + 90
    feed.last = store.end
    await reads.read(feed, position)
    assert await reads.read(feed, position)
    assert len(store.asked) == 1
    feed.check(store.end, Head(seq=store.end - 5, has_epoch=True), recent=True)
    await reads.read(feed, position)
    assert len(store.asked) == 2
    await reads.read(feed, position + 10)
    assert len(store.asked) == 2, "what was read since is shared"


async def test_a_slice_read_during_a_reset_is_not_kept_for_others(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    """It may be from either history."""
    reading = asyncio.ensure_future(reads.read(feed, store.start))
    await asyncio.sleep(0)
    feed.check(store.end + 1, Head(seq=store.end, has_epoch=True), recent=True)
    await reading
    await reads.read(feed, store.start)
    assert len(store.asked) == 2


async def test_an_empty_slice_is_not_kept(reads: ReplayCache, feed: Feed, store: Store) -> None:
    """An event may have been stored since."""
    await reads.read(feed, store.end)
    add(store.history, "new")
    assert texts((await reads.read(feed, store.end)).entries) == ["new"]


async def test_a_listener_at_the_position_of_the_feed_needs_no_read(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    """The feed passes on newer events."""

    async def first() -> None:
        await reads.read(feed, store.end)
        feed.last = store.end

    _, second = await asyncio.gather(first(), reads.read(feed, store.end))
    assert len(store.asked) == 1
    assert (second.complete, second.entries, second.last) == (True, (), store.end)


async def test_an_incomplete_slice_is_not_kept(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    for _ in range(2):
        assert not (await reads.read(feed, 5)).complete
    assert len(store.asked) == 2


async def test_a_failed_read_raises_for_one_listener_and_the_next_one_reads_again(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    store.failing = True
    with pytest.raises(ConnectionError):
        await reads.read(feed, store.start)
    store.failing = False
    assert (await reads.read(feed, store.start)).complete


async def test_a_cancelled_read_does_not_affect_other_listeners(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    first = asyncio.ensure_future(reads.read(feed, store.start))
    second = asyncio.ensure_future(reads.read(feed, store.start))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).complete


async def test_a_slice_is_dropped_after_some_seconds(
    reads: ReplayCache, feed: Feed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    await reads.read(feed, store.start)
    now[0] += reads.kept_seconds - 1
    await reads.read(feed, store.start)
    assert len(store.asked) == 1
    await reads.read(feed, store.start + 100)
    now[0] += 2
    await reads.read(feed, store.start)
    assert len(store.asked) == 3
    assert reads._starts[feed] == [store.start, store.start + 100]
    now[0] += reads.kept_seconds + 1
    reads.discard(older_than=reads.kept_seconds)
    assert (len(reads._cached), reads._starts, reads._size) == (0, {}, 0)


async def test_the_kept_bytes_are_bounded_over_all_tokens(
    reads: ReplayCache, store: Store
) -> None:
    """The oldest slice is dropped first."""
    feeds = [Feed("t", lambda: None) for n in range(5)]
    await reads.read(feeds[0], store.start)
    reads.kept_bytes = int(reads._size * 3.5)
    for feed in feeds[1:]:
        await reads.read(feed, store.start)
    assert list(reads._starts) == feeds[2:]
    assert reads._size <= reads.kept_bytes


@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("size", [1, 1_000, 20_000])
async def test_the_counted_size_is_the_memory_of_a_slice(
    feed: Feed, size: int, *, own_ids: bool
) -> None:
    """Events with own ids are kept one by one too."""
    history = MemoryHistory()
    drafts = [
        Draft(action="ping", data=b"%0*d" % (size, n), event_id=str(n) if own_ids else None)
        for n in range(100)
    ]
    start = history.append("t", drafts)[0].seq - 1

    async def read(token: str, after: int, max_events: int) -> Slice:
        slice_ = history.read(token, after, max_bytes=10**9)
        fresh = [
            Entry(seq=one.seq, draft=replace(one.draft, data=bytes(bytearray(one.draft.data))))
            for one in slice_.entries
        ]
        return replace(slice_, entries=tuple(fresh))

    reads = ReplayCache(read)
    gc.collect()
    tracemalloc.start()
    try:
        await reads.read(feed, start)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < reads._size * 1.1
    assert size == 1 or reads._size * 0.7 < taken


async def test_discard_feed_drops_the_slices_of_one_feed(reads: ReplayCache, store: Store) -> None:
    one, other = Feed("t", lambda: None), Feed("t", lambda: None)
    for feed in (one, other):
        await replay(reads, feed, store, 0)
    size = reads._size
    reads.discard_feed(one)
    reads.discard_feed(one)
    assert list(reads._starts) == [other]
    assert reads._size == size // 2


async def test_other_tasks_run_during_a_long_replay_from_the_cache(
    reads: ReplayCache, feed: Feed, store: Store
) -> None:
    await replay(reads, feed, store, 0)
    turns = 0

    async def live() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.ensure_future(live())
    await replay(reads, feed, store, 0)
    other.cancel()
    assert turns >= 10
