"""Batches: what is passed on together."""

from __future__ import annotations

import pytest

from django_eventsource.batches import Batch, gather, merge


def durable(*seqs: int, finish: bool = False) -> Batch:
    return Batch([b"%d." % seq for seq in seqs], seqs, finish=finish)


def live(*texts: bytes, finish: bool = False) -> Batch:
    return Batch(texts, finish=finish)


def test_a_batch_is_one_write() -> None:
    """All its frames, joined; one alone is not copied."""
    assert durable(1, 2, 3).data == b"1.2.3."
    frame = b"a frame of its own"
    assert Batch([frame]).data is frame
    assert (durable(4, 5).first, durable(4, 5).last) == (4, 5)
    assert (live(b"x").first, live(b"x").last) == (None, None)


@pytest.mark.parametrize(
    ("place", "rest"), [(0, b"5.6.9."), (4, b"5.6.9."), (5, b"6.9."), (6, b"9."), (8, b"9.")]
)
def test_what_follows_a_place(place: int, rest: bytes) -> None:
    """The numbers need not be consecutive; the close stays the last."""
    batch = durable(5, 6, 9, finish=True).after(place)
    assert batch.data == rest
    assert (batch.last, batch.finish) == (9, True)


def test_what_follows_a_range() -> None:
    """A layer's message numbers its frames from the first on."""
    batch = Batch([b"a", b"b", b"c"], range(7, 10)).after(8)
    assert (batch.data, batch.first, batch.last) == (b"c", 9, 9)


def test_live_only_events_follow_every_place() -> None:
    """They have none."""
    batch = live(b"a")
    assert batch.after(5) is batch


def test_gathering() -> None:
    """A close ends a batch; live-only events have no numbers."""
    frames = [(5, b"a", False), (6, b"b", True), (9, b"c", False), (10, b"d", False)]
    batches = list(gather(frames))
    assert [batch.data for batch in batches] == [b"ab", b"cd"]
    assert [batch.seqs for batch in batches] == [[5, 6], [9, 10]]
    assert [batch.finish for batch in batches] == [True, False]
    live_only = list(gather((None, frame, finish) for _, frame, finish in frames[:3]))
    assert [(batch.data, batch.seqs) for batch in live_only] == [(b"ab", None), (b"c", None)]
    assert list(gather([])) == []


def test_gathering_what_a_message_may_say_by_its_first_number() -> None:
    """A number that does not follow begins a batch, if that is asked for."""
    frames = [(seq, b".", False) for seq in (5, 6, 8, 9)]
    assert [batch.seqs for batch in gather(frames)] == [[5, 6, 8, 9]]
    cut = gather(frames, consecutive=True)
    assert [batch.seqs for batch in cut] == [[5, 6], [8, 9]]


def test_gathering_up_to_a_size() -> None:
    """No batch is over it, unless one frame alone is."""
    sizes = [4, 6, 1, 11, 3]
    frames = [(n, b"x" * size, False) for n, size in enumerate(sizes)]
    batches = list(gather(frames, max_bytes=10))
    assert [[*map(len, batch.frames)] for batch in batches] == [[4, 6], [1], [11], [3]]


def test_merging() -> None:
    """Durable with durable, live only with live only, in their order, up to a close."""
    merged = merge(
        [durable(1), durable(2, 3), live(b"a"), live(b"b"), durable(4, finish=True), durable(5)]
    )
    assert [batch.data for batch in merged] == [b"1.2.3.", b"ab", b"4.", b"5."]
    assert [list(batch.seqs or ()) for batch in merged] == [[1, 2, 3], [], [4], [5]]
    assert [batch.finish for batch in merged] == [False, False, True, False]
    assert merge([]) == []


def test_merging_leaves_one_as_it_is() -> None:
    """The bytes of a single batch are not copied."""
    batch = durable(1)
    assert merge([batch]) == [batch]
    assert merge([durable(1), durable(2, finish=True)])[0].finish
