"""Shared reads: what many listeners need is read once."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from dataclasses import replace

import pytest

from django_eventsource import reads as module
from django_eventsource.feeds import Feed
from django_eventsource.history import Draft, Entry, Slice
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.reads import Reads
from tests.histories import add, texts


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
def reads(store: Store) -> Reads:
    return Reads(store.read)


@pytest.fixture
def feed() -> Feed:
    return Feed("t", "g", lambda: None)


async def replay(reads: Reads, feed: Feed, store: Store, place: int) -> list[bytes]:
    """What a listener gets that comes back after so many events, up to the end."""
    place += store.start
    got = []
    while place < store.end:
        slice_ = await reads.read(feed, place)
        assert slice_.complete
        got += [batch.data for batch in slice_.batches]
        place = slice_.entries[-1].seq
    return got


async def test_listeners_that_come_back_at_once(reads: Reads, feed: Feed, store: Store) -> None:
    """A thousand of them cost the reads of one, and share its bytes."""
    all_got = await asyncio.gather(*(replay(reads, feed, store, 0) for _ in range(1000)))
    assert [after for after, _ in store.asked] == list(range(0, 1000, 100))
    assert len(all_got[0]) == 10
    for got in all_got:
        assert all(one is other for one, other in zip(got, all_got[0], strict=True))


async def test_listeners_from_different_places(reads: Reads, feed: Feed, store: Store) -> None:
    """Their common tail is read once; each gets all that follows its place."""
    whole = b"".join(entry.frame() for entry in store.entries)
    places = [0, 950, 17, 100, 512, 0, 999, 998, 350]
    all_got = await asyncio.gather(*(replay(reads, feed, store, place) for place in places))
    for place, got in zip(places, all_got, strict=True):
        frames = b"".join(entry.frame() for entry in store.entries[place:])
        assert b"".join(got) == frames
        assert whole.endswith(frames)
    read = [n for after, most in store.asked for n in range(after, after + min(most, 100))]
    assert len([n for n in read if n < 1000]) == len({n for n in read if n < 1000})


async def test_a_read_stops_where_the_next_begins(reads: Reads, feed: Feed, store: Store) -> None:
    """Who missed more than the others reads only what they did not need."""
    await replay(reads, feed, store, 500)
    store.asked.clear()
    await replay(reads, feed, store, 430)
    assert store.asked == [(430, 70)]


async def test_a_place_that_never_was_is_asked_of_the_history(
    reads: Reads, feed: Feed, store: Store
) -> None:
    """What is kept vouches only for what follows its own events."""
    slice_ = await reads.read(feed, store.start)
    gap = Slice(
        entries=(*slice_.entries[:10], *slice_.entries[20:]), complete=True, last=store.end
    )
    kept = reads._kept[feed, store.start]
    reads._kept[feed, store.start] = kept._replace(slice_=gap)
    store.asked.clear()
    await reads.read(feed, store.start + 10)
    assert store.asked == []
    await reads.read(feed, store.start + 15)
    assert [after for after, _ in store.asked] == [15]


async def test_what_was_read_before_a_reset(reads: Reads, feed: Feed, store: Store) -> None:
    """A history that was replaced by an older one has other events under these numbers."""
    place = store.start + 90
    feed.last = store.end
    await reads.read(feed, place)
    assert await reads.read(feed, place)
    assert len(store.asked) == 1
    feed.compare(store.end, store.end - 5)
    await reads.read(feed, place)
    assert len(store.asked) == 2
    await reads.read(feed, place + 10)
    assert len(store.asked) == 2, "what was read since is shared"


async def test_what_was_read_across_a_reset(reads: Reads, feed: Feed, store: Store) -> None:
    """Nobody can tell from which of the two histories it is."""
    reading = asyncio.ensure_future(reads.read(feed, store.start))
    await asyncio.sleep(0)
    feed.restart(store.end)
    await reading
    await reads.read(feed, store.start)
    assert len(store.asked) == 2


async def test_the_end_is_not_kept(reads: Reads, feed: Feed, store: Store) -> None:
    """Who stands at the end asks again: something may have come."""
    await reads.read(feed, store.end)
    add(store.history, "new")
    assert texts((await reads.read(feed, store.end)).entries) == ["new"]


async def test_who_waited_while_the_feed_came_up_to_it(
    reads: Reads, feed: Feed, store: Store
) -> None:
    """It needs no read: the feed passes on what is newer."""

    async def first() -> None:
        await reads.read(feed, store.end)
        feed.last = store.end

    _, second = await asyncio.gather(first(), reads.read(feed, store.end))
    assert len(store.asked) == 1
    assert (second.complete, second.entries, second.last) == (True, (), store.end)


async def test_a_gap_is_told_to_each(reads: Reads, feed: Feed, store: Store) -> None:
    """What the history cannot vouch for is not kept."""
    for _ in range(2):
        assert not (await reads.read(feed, 5)).complete
    assert len(store.asked) == 2


async def test_a_failure_is_told_to_one(reads: Reads, feed: Feed, store: Store) -> None:
    """The next one tries by itself."""
    store.failing = True
    with pytest.raises(ConnectionError):
        await reads.read(feed, store.start)
    store.failing = False
    assert (await reads.read(feed, store.start)).complete


async def test_one_that_leaves_while_it_reads(reads: Reads, feed: Feed, store: Store) -> None:
    """The others go on."""
    first = asyncio.ensure_future(reads.read(feed, store.start))
    second = asyncio.ensure_future(reads.read(feed, store.start))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).complete


async def test_it_is_forgotten_after_a_while(
    reads: Reads, feed: Feed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is given, and then nothing is held, that was read long ago."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    await reads.read(feed, store.start)
    now[0] += module.KEPT_SECONDS - 1
    await reads.read(feed, store.start)
    assert len(store.asked) == 1
    await reads.read(feed, store.start + 100)
    now[0] += 2
    await reads.read(feed, store.start)
    assert len(store.asked) == 3
    assert reads._places[feed] == [store.start, store.start + 100]
    now[0] += module.KEPT_SECONDS + 1
    reads.forget(older_than=module.KEPT_SECONDS)
    assert (len(reads._kept), reads._places, reads._size) == (0, {}, 0)


async def test_what_is_kept_is_bounded(
    reads: Reads, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all tokens; the oldest goes first."""
    feeds = [Feed("t", str(n), lambda: None) for n in range(5)]
    await reads.read(feeds[0], store.start)
    monkeypatch.setattr(module, "KEPT_BYTES", int(reads._size * 3.5))
    for feed in feeds[1:]:
        await reads.read(feed, store.start)
    assert list(reads._places) == feeds[2:]
    assert reads._size <= module.KEPT_BYTES


@pytest.mark.parametrize("size", [1, 1_000, 20_000])
async def test_what_is_kept_is_counted(feed: Feed, size: int) -> None:
    """With all the copies that there are of an event: nothing is held that is not."""
    history = MemoryHistory()
    drafts = [Draft(action="ping", data=b"%0*d" % (size, n)) for n in range(100)]
    start = history.append("t", drafts)[0].seq - 1

    async def read(token: str, after: int, max_events: int) -> Slice:
        slice_ = history.read(token, after, max_bytes=10**9)
        fresh = [
            Entry(seq=one.seq, draft=replace(one.draft, data=bytes(bytearray(one.draft.data))))
            for one in slice_.entries
        ]
        return replace(slice_, entries=tuple(fresh))

    reads = Reads(read)
    gc.collect()
    tracemalloc.start()
    try:
        await reads.read(feed, start)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < reads._size * 1.1


async def test_what_belongs_to_a_feed_goes_with_it(reads: Reads, store: Store) -> None:
    """And nothing else does."""
    one, other = Feed("t", "g", lambda: None), Feed("t", "g", lambda: None)
    for feed in (one, other):
        await replay(reads, feed, store, 0)
    size = reads._size
    reads.forget_feed(one)
    reads.forget_feed(one)
    assert list(reads._places) == [other]
    assert reads._size == size // 2


async def test_a_long_replay_lets_others_have_their_turn(
    reads: Reads, feed: Feed, store: Store
) -> None:
    """Also where nothing needs to be read any more."""
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
