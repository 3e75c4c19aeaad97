"""The checker: it compares what a listener received with what was published. Pure, without I/O."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 10
"""How many findings of a kind are printed for each listener."""


@dataclass(frozen=True, slots=True)
class Block:
    """The fields of one block of a stream; ``None`` for a field that it does not have."""

    id: str | None = None
    event: str | None = None
    data: str | None = None


_parsed: dict[bytes, Block] = {}


def parse(raw: bytes) -> Block:
    """Parse the lines before a blank one, with no code of the package."""
    block = _parsed.get(raw)
    if block is None:
        fields: dict[str, str] = {}
        for line in raw.decode().split("\n"):
            name, _, value = line.partition(":")
            if name in ("id", "event", "data"):
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name in fields else value
        block = _parsed[raw] = Block(**fields)
    return block


def place_of(cursor: str) -> int:
    """Return the number in a last event id."""
    return int(cursor.rstrip("+"))


class Truth:
    """What was published to one token.

    :param events: the events that a listener has to receive: number to text.
    :param perhaps: texts whose publishing failed with an unknown result; they may be received.
    """

    def __init__(self, events: Mapping[int, str], perhaps: Iterable[str] = ()) -> None:
        self.events = dict(events)
        self.perhaps = frozenset(perhaps)
        self.order = sorted(self.events)

    def between(self, after: int, until: int) -> list[int]:
        """Return the numbers after one place, up to and with another."""
        return self.order[bisect_right(self.order, after) : bisect_right(self.order, until)]


@dataclass(slots=True)
class Findings:
    """The problems in one listener's stream."""

    received: int = 0
    resets: int = 0
    covered: int = 0
    """Events that a ``reset`` said were missed."""
    missed: list[int] = field(default_factory=list)
    gaps: int = 0
    """Unreported gaps: places at which events are missing and no ``reset`` says so."""
    duplicated: list[tuple[int, str]] = field(default_factory=list)
    disordered: list[tuple[int, str]] = field(default_factory=list)
    strange: list[tuple[int, str]] = field(default_factory=list)
    """Events that were never published: rolled back, or with another text than published."""

    @property
    def clean(self) -> bool:
        """Whether there is no problem."""
        return not (self.missed or self.gaps or self.duplicated or self.disordered or self.strange)


def check(truth: Truth, blocks: Iterable[Block], until: int) -> Findings:
    """Compare a listener's stream with the truth.

    :param blocks: all of its blocks in the order received, over all of its connections.
    :param until: the number of the last event; events up to it that are missing were missed.
    """
    found = Findings()
    seen: dict[int, str] = {}
    lost: set[int] = set()
    place: int | None = None

    def miss(after: int, upto: int) -> None:
        missing = [seq for seq in truth.between(after, upto) if seq not in seen]
        if missing:
            found.gaps += 1
            lost.update(missing)

    for block in blocks:
        if block.event == "reset" and block.data is not None:
            found.resets += 1
            data = json.loads(block.data)
            resume = place if data["resume"] is None else place_of(data["resume"])
            if place is not None and resume is not None:
                # It names what is gone: what is missing before that it does not report.
                after = place if data["after"] is None else place_of(data["after"])
                miss(place, min(after, resume))
                covered = truth.between(max(place, after), resume)
                found.covered += sum(seq not in seen for seq in covered)
            place = resume
        elif block.data is not None:
            seq, text = place_of(block.id or "-1"), block.data
            if seq in seen:
                found.duplicated.append((seq, text))
                continue
            expected = truth.events.get(seq)
            if expected != text and not (expected is None and text in truth.perhaps):
                found.strange.append((seq, text))
            found.received += 1
            if place is not None and seq <= place:
                found.disordered.append((seq, text))
                lost.discard(seq)
            elif place is not None:
                miss(place, seq - 1)
            seen[seq] = text
            place = seq if place is None else max(place, seq)
        elif block.id is not None:
            cursor = place_of(block.id)
            if place is None:
                place = cursor
            elif cursor > place:
                # It moves the listener on: nothing may lie between.
                miss(place, cursor)
                place = cursor
    # A number that two events have shows as a repetition; so does a text under two numbers.
    texts: dict[str, int] = {}
    for seq, text in seen.items():
        if text in texts:
            found.duplicated.append((seq, text))
        texts[text] = seq
    miss(until if place is None else place, until)
    if place is None:
        found.gaps += 1  # it never got anything, not even a place
        lost.update(truth.order)
    found.missed = sorted(lost)
    if found.gaps and not found.missed:
        found.gaps = 0  # they were all closed later: out of order, not missing
    return found


def describe(name: str, token: str, truth: Truth, found: Findings) -> str:
    """Return a text with what one listener missed, and what it received by mistake."""
    lines = [f"{name} of {token!r}: {found.received} received, {found.resets} resets"]
    lost = [(seq, truth.events[seq]) for seq in found.missed]
    kinds: Sequence[tuple[str, list[tuple[int, str]]]] = [
        ("missed", lost),
        ("duplicated", found.duplicated),
        ("out of order", found.disordered),
        ("never published", found.strange),
    ]
    for kind, events in kinds:
        if events:
            shown = ", ".join(f"{seq} {text[:40]!r}" for seq, text in events[:SHOWN])
            more = f", and {len(events) - SHOWN} more" if len(events) > SHOWN else ""
            lines.append(f"    {kind} {len(events)}: {shown}{more}")
    return "\n".join(lines)
