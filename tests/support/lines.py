"""Code that runs between any two lines of other code, as a garbage collector or a signal does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def at_each_line(call: Callable[[], object]) -> Iterator[None]:
    """Call a function before each line that this thread executes in functions called inside."""
    previous = sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            call()
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
