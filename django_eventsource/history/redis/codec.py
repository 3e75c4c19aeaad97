"""The arguments of the scripts of the Redis history, and what the scripts return."""

import datetime
from collections.abc import Sequence
from functools import lru_cache

from ..records import Draft, Entry, Kind, Row, utc

KINDS = {kind.value.encode(): kind for kind in Kind}


def milliseconds(seconds: float) -> int:
    """Return a time span, limited so that it can be added to the current date."""
    return max(int(min(seconds, 10**10) * 1000), 1)


@lru_cache
def bounds_argument(max_events: int, max_bytes: int, max_age: float, token_max_age: float) -> str:
    """Return the bounds of a token, as the APPEND script expects them."""
    return f"{max_events} {max_bytes} {milliseconds(max_age)} {milliseconds(token_max_age)}"


def event_arguments(draft: Draft) -> tuple[bytes, bytes]:
    """Return the lengths of an event's texts and the texts, as the APPEND script expects them."""
    action, data, kind = draft.action.encode(), draft.data, draft.kind.encode()
    own_id = (draft.event_id or "").encode()
    lengths = b"%d %d %d %d" % (len(action), len(data), len(kind), len(own_id))
    return lengths, action + data + kind + own_id


def entry_of(draft: Draft, line: str) -> Entry:
    """Decode the line of an event with a key that the APPEND script returned.

    :param draft: the event.
    :param line: the sequence number. If the event was not stored because of another one with its
        key, a space and the own id of that one or ``""`` follow.
    """
    seq, repeated, own_id = line.partition(" ")
    if repeated:
        return Entry.of_stored(draft, int(seq), own_id or None)
    return Entry(seq=int(seq), draft=draft)


def unpack(lengths: Sequence[bytes], texts: bytes) -> list[Row]:
    """Decode the events that the READ script returned.

    :param lengths: six numbers for each event: its sequence number, its time, and the lengths of
        its action, data, kind and own id.
    :param texts: these four of all events, one after the other.
    """
    rows: list[Row] = []
    at = 0
    numbers = map(int, lengths)
    for seq, _, action, data, kind, own_id in zip(*[numbers] * 6, strict=True):
        data_at = at + action
        kind_at = data_at + data
        own_at = kind_at + kind
        end = own_at + own_id
        rows.append(
            (
                seq,
                texts[at:data_at].decode(),
                texts[data_at:kind_at],
                texts[own_at:end].decode() if own_id else None,
                KINDS[texts[kind_at:own_at]],
            )
        )
        at = end
    return rows


def times_of(lengths: Sequence[bytes]) -> list[datetime.datetime]:
    """Return the times of the events that :func:`unpack` decodes."""
    return [utc(int(time) / 1_000_000) for time in lengths[1::6]]
