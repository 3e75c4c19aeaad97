"""Count the bytecode instructions of a piece of work: a cost that noise does not change.

Only Python's own instructions are counted, in every function that runs. C code is not counted.
So compare the number with other work of the same kind, in the same interpreter.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

TOOL = 4
"""Our number among the tools that monitor an interpreter: none of those that have a meaning."""


class Count:
    """The number of instructions."""

    def __init__(self) -> None:
        self.instructions = 0
        self.thread = threading.get_ident()

    def monitor(self, code: CodeType, offset: int) -> None:
        """Receive the events of newer interpreters, for all threads."""
        if threading.get_ident() == self.thread:
            self.instructions += 1

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Receive the trace events of the interpreter."""
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.instructions += 1
        return self.trace


@contextmanager
def counted() -> Iterator[Count]:
    """Count what this thread executes in functions that are called during the block.

    Coroutines that were suspended before are counted when they are resumed.
    """
    count = Count()
    if sys.version_info >= (3, 12):
        monitoring = sys.monitoring
        event = monitoring.events.INSTRUCTION
        monitoring.use_tool_id(TOOL, "benchmarks")
        monitoring.register_callback(TOOL, event, count.monitor)
        monitoring.set_events(TOOL, event)
        try:
            yield count
        finally:
            monitoring.set_events(TOOL, 0)
            monitoring.register_callback(TOOL, event, None)
            monitoring.free_tool_id(TOOL)
        return
    before = sys.gettrace()
    sys.settrace(count.trace)
    try:
        yield count
    finally:
        sys.settrace(before)
