"""Batches: frames that follow one another, encoded and joined once for all who get them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

Frame = tuple[int | None, bytes, bool]
"""Its sequence number, if it is durable; its bytes; and does it end the token's streams?"""


class Batch:
    """Frames of one token that are passed on together.

    :param frames: at least one.
    :param seqs: their sequence numbers, ascending; ``None`` for live-only events.
    :param finish: does the last of them end the token's streams?
    """

    __slots__ = ("data", "finish", "first", "frames", "last", "seqs")

    def __init__(
        self, frames: Sequence[bytes], seqs: Sequence[int] | None = None, *, finish: bool = False
    ) -> None:
        self.frames = frames
        self.seqs = seqs
        self.finish = finish
        self.data = frames[0] if len(frames) == 1 else b"".join(frames)
        """All of it, as one write."""
        self.first = seqs[0] if seqs else None
        self.last = seqs[-1] if seqs else None

    def after(self, place: int) -> Batch:
        """Give what follows a sequence number that is lower than the last one."""
        at = bisect_right(self.seqs or (), place)
        if not self.seqs or not at:
            return self
        return Batch(self.frames[at:], self.seqs[at:], finish=self.finish)


def gather(
    frames: Iterable[Frame], *, max_bytes: float = float("inf"), consecutive: bool = False
) -> Iterator[Batch]:
    """Put frames of one token into batches; a close ends a batch.

    :param frames: all durable, or none.
    :param max_bytes: of each batch, unless a single frame is larger.
    :param consecutive: are the sequence numbers of each batch to be?
    """
    held: list[bytes] = []
    seqs: list[int] = []
    size = 0
    for seq, frame, finish in frames:
        jumps = consecutive and seqs and seq != seqs[-1] + 1
        if held and (jumps or size + len(frame) > max_bytes):
            yield Batch(held, seqs or None)
            held, seqs, size = [], [], 0
        held.append(frame)
        size += len(frame)
        if seq is not None:
            seqs.append(seq)
        if finish:
            yield Batch(held, seqs or None, finish=True)
            held, seqs, size = [], [], 0
    if held:
        yield Batch(held, seqs or None)


def merge(batches: Sequence[Batch]) -> list[Batch]:
    """Join what can be passed on together: durable with durable, up to a close."""
    merged: list[list[Batch]] = []
    for batch in batches:
        last = merged[-1][-1] if merged else None
        if last and not last.finish and (last.seqs is None) == (batch.seqs is None):
            merged[-1].append(batch)
        else:
            merged.append([batch])
    return [run[0] if len(run) == 1 else _join(run) for run in merged]


def _join(run: Sequence[Batch]) -> Batch:
    frames = [frame for batch in run for frame in batch.frames]
    seqs = None
    if run[0].seqs is not None:
        seqs = [seq for batch in run for seq in batch.seqs or ()]
    return Batch(frames, seqs, finish=run[-1].finish)
