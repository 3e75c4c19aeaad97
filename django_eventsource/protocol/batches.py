"""Batches: encoded events of one token that follow one another and are sent in one write."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter

BLANK_LINE = b"\n\n"
"""The end of an event. No event has another blank line."""


class Batch:
    """Encoded events of one token. Immutable, so that threads and streams share it.

    Only :attr:`published` may be set later, before the batch is shared.

    :param frames: the events as they are sent, at least one, each with the blank line at its end.
    :param seqs: their sequence numbers, ascending; ``None`` for live-only events.
    :param closes: whether the last event is a close.
    :param published: when the first event was published, in seconds since 1970; ``None`` if that
        is not known.
    """

    __slots__ = (
        "_chunk",
        "_frames",
        "closes",
        "count",
        "data",
        "first",
        "last",
        "published",
        "seqs",
    )

    def __init__(
        self,
        frames: Sequence[bytes],
        seqs: Sequence[int] | None = None,
        *,
        closes: bool = False,
        published: float | None = None,
    ) -> None:
        self._frames: Sequence[bytes] | None = frames
        self.count = len(frames)
        """The number of events."""
        self.seqs = seqs
        self.closes = closes
        self.published = published
        self.data = frames[0] if len(frames) == 1 else b"".join(frames)
        """The frames as one write."""
        self.first = seqs[0] if seqs else None
        self.last = seqs[-1] if seqs else None
        self._chunk: bytes | None = None

    @classmethod
    def of_data(cls, data: bytes, seqs: Sequence[int], *, closes: bool = False) -> Batch:
        """Return the batch of events that are encoded as one text.

        :param data: the events as they are sent, one after the other.
        :param seqs: the sequence number of each.
        :param closes: whether the last event is a close.
        """
        batch = cls((data,), seqs, closes=closes)
        batch._frames = None
        batch.count = len(seqs)
        return batch

    @property
    def frames(self) -> Sequence[bytes]:
        """The events as they are sent."""
        if self._frames is None:
            # The list is not kept, because few streams need it.
            frames = self.data.removesuffix(BLANK_LINE).split(BLANK_LINE)
            return [frame + BLANK_LINE for frame in frames]
        return self._frames

    @property
    def memory(self) -> int:
        """The bytes of the texts that the batch keeps."""
        return len(self.data) * (1 if self._frames is None or self.count == 1 else 2)

    @property
    def chunk(self) -> bytes:
        """The data as one HTTP chunk, encoded once for all streams."""
        if self._chunk is None:
            self._chunk = encode_chunk(self.data)
        return self._chunk

    def after(self, seq: int) -> Batch:
        """Return the events after a sequence number that is lower than the last one."""
        at = bisect_right(self.seqs or (), seq)
        if not self.seqs or not at:
            return self
        if self._frames is not None:
            rest = Batch(self._frames[at:], self.seqs[at:], closes=self.closes)
        else:
            data = self.data.split(BLANK_LINE, at)[at]
            rest = Batch.of_data(data, self.seqs[at:], closes=self.closes)
        rest.published = self.published
        return rest


def encode_chunk(data: bytes) -> bytes:
    """Return data, at least one byte, as one chunk of an HTTP/1.1 body (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def merge(
    batches: Iterable[Batch], *, max_bytes: float = float("inf"), consecutive: bool = False
) -> list[Batch]:
    """Join batches of one token, in their order. A close is the last event of its batch.

    Durable and live-only events are not joined.

    :param max_bytes: the largest size of a joined batch. A larger batch is returned as it is.
    :param consecutive: whether the sequence numbers of a joined batch must be consecutive.
    """
    runs: list[list[Batch]] = []
    run: list[Batch] = []
    size = 0
    last: Batch | None = None
    for batch in batches:
        size += len(batch.data)
        if (
            last is None
            or last.closes
            or size > max_bytes
            or (last.seqs is None) is not (batch.seqs is None)
            or (consecutive and last.last is not None and batch.first != last.last + 1)
        ):
            run = []
            runs.append(run)
            size = len(batch.data)
        run.append(batch)
        last = batch
    return [run[0] if len(run) == 1 else _join(run) for run in runs]


def _join(run: Sequence[Batch]) -> Batch:
    frames = [*chain.from_iterable(map(attrgetter("frames"), run))]
    live = run[0].seqs is None
    seqs = None if live else [*chain.from_iterable(map(attrgetter("seqs"), run))]
    return Batch(frames, seqs, closes=run[-1].closes, published=run[0].published)
