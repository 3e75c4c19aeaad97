"""Bytecode instructions that a piece of work executes: a cost that no noise can change.

Only Python's own instructions are counted, in every function that runs; what C code does is
not. So it is compared with other work of the same kind, in the same interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Count:
    """How many there were."""

    def __init__(self) -> None:
        self.instructions = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Receive what the interpreter does."""
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.instructions += 1
        return self.trace


@contextmanager
def counted() -> Iterator[Count]:
    """Count what this thread executes, in functions that are called from here on.

    Coroutines that were suspended before are counted when they are resumed.
    """
    count = Count()
    before = sys.gettrace()
    sys.settrace(count.trace)
    try:
        yield count
    finally:
        sys.settrace(before)
