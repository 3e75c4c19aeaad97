"""Batches: events that are sent in one write."""

from __future__ import annotations

import pytest

from django_eventsource.protocol.batches import Batch, merge


def durable(*seqs: int, closes: bool = False) -> Batch:
    return Batch([b"%d." % seq for seq in seqs], seqs, closes=closes)


def live(*texts: bytes, closes: bool = False) -> Batch:
    return Batch(texts, closes=closes)


def test_the_frames_of_a_batch_are_one_write() -> None:
    """A single frame is not copied."""
    assert durable(1, 2, 3).data == b"1.2.3."
    frame = b"a single frame"
    assert Batch([frame]).data is frame
    assert (durable(4, 5).first, durable(4, 5).last) == (4, 5)
    assert (live(b"x").first, live(b"x").last) == (None, None)


@pytest.mark.parametrize(
    ("seq", "rest"), [(0, b"5.6.9."), (4, b"5.6.9."), (5, b"6.9."), (6, b"9."), (8, b"9.")]
)
def test_after_returns_the_events_with_a_higher_sequence_number(seq: int, rest: bytes) -> None:
    """The numbers need not be consecutive, and the close stays the last event."""
    batch = Batch([b"5.", b"6.", b"9."], [5, 6, 9], closes=True, published=1.5).after(seq)
    assert (batch.data, batch.published) == (rest, 1.5)
    assert (batch.last, batch.closes) == (9, True)


def test_after_accepts_a_range_of_sequence_numbers() -> None:
    """A decoded message has one."""
    batch = Batch([b"a", b"b", b"c"], range(7, 10)).after(8)
    assert (batch.data, batch.first, batch.last) == (b"c", 9, 9)


def test_after_returns_a_live_only_batch_unchanged() -> None:
    """Live-only events have no sequence number."""
    batch = live(b"a")
    assert batch.after(5) is batch


def test_a_batch_of_data_is_the_same_as_one_of_its_frames() -> None:
    """Only the frames are not kept."""
    frames = [b"id: 5\ndata: a\ndata: \n\n", b"id: 6\ndata: \n\n", b"id: 9\ndata: c\n\n"]
    batch = Batch.of_data(b"".join(frames), [5, 6, 9], closes=True)
    other = Batch(frames, [5, 6, 9], closes=True)
    batch.published = other.published = 1.5
    for seq in (4, 5, 6, 8):
        rest, expected = batch.after(seq), other.after(seq)
        assert (rest.data, rest.frames, rest.seqs) == (
            expected.data,
            expected.frames,
            expected.seqs,
        )
        assert (rest.count, rest.closes, rest.published) == (expected.count, True, 1.5)
    (merged,) = merge([durable(1), batch])
    assert (merged.data, merged.frames) == (b"1." + batch.data, [b"1.", *frames])
    assert (merged.count, merged.closes) == (4, True)
    size = len(batch.data)
    assert (batch.memory, other.memory, durable(1).memory) == (size, 2 * size, 2)


def test_merge_joins_up_to_a_close_and_keeps_durable_and_live_only_events_apart() -> None:
    """The order is kept."""
    merged = merge(
        [durable(1), durable(2, 3), live(b"a"), live(b"b"), durable(4, closes=True), durable(5)]
    )
    assert [batch.data for batch in merged] == [b"1.2.3.", b"ab", b"4.", b"5."]
    assert [list(batch.seqs or ()) for batch in merged] == [[1, 2, 3], [], [4], [5]]
    assert [batch.closes for batch in merged] == [False, False, True, False]
    assert merge([]) == []


def test_merge_keeps_the_time_of_the_first_event() -> None:
    first, second = Batch([b"a"], published=1.5), Batch([b"b"], published=2.5)
    assert [batch.published for batch in merge([first, second])] == [1.5]


def test_merge_begins_a_batch_at_a_missing_sequence_number_if_asked() -> None:
    """A channel-layer message contains only its first sequence number."""
    batches = [durable(5), durable(6), durable(8), durable(9)]
    assert [batch.seqs for batch in merge(batches)] == [[5, 6, 8, 9]]
    assert [batch.seqs for batch in merge(batches, consecutive=True)] == [[5, 6], [8, 9]]
    assert len(merge([live(b"a"), live(b"b")], consecutive=True)) == 1


def test_merge_exceeds_the_size_only_for_a_single_batch() -> None:
    """No joined batch is larger."""
    sizes = [4, 6, 1, 11, 3]
    merged = merge([live(b"x" * size) for size in sizes], max_bytes=10)
    assert [[*map(len, batch.frames)] for batch in merged] == [[4, 6], [1], [11], [3]]


def test_merge_returns_a_single_batch_unchanged() -> None:
    """Its bytes are not copied."""
    batch = durable(1)
    assert merge([batch]) == [batch]
    assert merge([durable(1), durable(2, closes=True)])[0].closes
