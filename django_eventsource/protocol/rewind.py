"""Rewinds: how many stored events a listener without a cursor receives first."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..exceptions import InvalidParameter
from .field_rules import shown

MAX_NUMBER = 10**9
"""The smallest number that is too large."""
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}

_REWIND = re.compile(r"([0-9]{1,9})([smh]?)")


@dataclass(frozen=True, slots=True)
class Rewind:
    """The newest stored events of a token, up to a number and an age."""

    max_events: int | None = None
    """The most events; ``None`` for all."""
    max_seconds: int | None = None
    """The age of the oldest event, in seconds; ``None`` for any."""


def parse_rewind(value: str | int) -> Rewind:
    """Return the rewind that a text names.

    :param value: a number of events (``"10"`` or ``10``), an age (``"30s"``, ``"5m"``, ``"2h"``),
        or ``"all"``.
    :raises InvalidParameter: if it is none of these.
    """
    if value == "all":
        return Rewind()
    is_number = isinstance(value, int) and not isinstance(value, bool)
    # Python refuses to write an integer of more than 4,300 digits as text.
    is_valid = isinstance(value, str) or (is_number and 0 <= value < MAX_NUMBER)
    match = _REWIND.fullmatch(str(value)) if is_valid else None
    if match is None:
        raise InvalidParameter(
            "rewind must be a number of events (10), an age in seconds, minutes or hours (30s, "
            f"5m, 2h), or all, not {shown(value)}."
        )
    number, unit = match.groups()
    if not unit:
        return Rewind(max_events=int(number))
    return Rewind(max_seconds=int(number) * UNIT_SECONDS[unit])
