"""What the Redis history stores, read back: the scripts pack it, here it is unpacked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from .base import Draft, Entry, Kind

KINDS = {kind.value.encode(): kind for kind in Kind}


def milliseconds(seconds: float) -> int:
    """Give a time span that can be added to any date of today."""
    return max(int(min(seconds, 10**10) * 1000), 1)


def seq_of(entry_id: bytes) -> int:
    """Give the sequence number that is an entry's id."""
    return int(entry_id.partition(b"-")[0])


def follows(entry_id: bytes, fields: Mapping[bytes, bytes]) -> int:
    """Give the place that an entry follows."""
    before = fields.get(b"p")
    return seq_of(entry_id) - 1 if before is None else int(before)


def unpack(lengths: Sequence[bytes], texts: bytes) -> Iterator[Entry]:
    """Read what the scripts packed."""
    at = 0
    numbers = map(int, lengths)
    for seq, _, action, data, kind, own_id in zip(*[numbers] * 6, strict=True):
        data_at = at + action
        kind_at = data_at + data
        own_at = kind_at + kind
        end = own_at + own_id
        draft = Draft(
            action=texts[at:data_at].decode(),
            data=texts[data_at:kind_at],
            event_id=texts[own_at:end].decode() if own_id else None,
            kind=KINDS[texts[kind_at:own_at]],
        )
        yield Entry(seq=seq, draft=draft)
        at = end


def identities_of(value: bytes) -> list[str]:
    """Read who listens in a process, behind the generation of its lease."""
    identities: list[str] = json.loads(value[32:])
    return identities
