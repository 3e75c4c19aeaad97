"""Tests of the reset of process-wide state."""

from __future__ import annotations

import pytest

from django_eventsource import _runtime


@pytest.fixture(autouse=True)
def no_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without the registered functions of the package."""
    monkeypatch.setattr(_runtime, "_resets", [])
    monkeypatch.setattr(_runtime, "_kept", [])


def test_reset_all_calls_the_functions_in_the_order_of_their_registration() -> None:
    calls: list[int] = []
    _runtime.on_reset(lambda: calls.append(1))

    @_runtime.on_reset
    def second() -> None:
        calls.append(2)

    _runtime.reset_all()
    assert calls == [1, 2]


def test_state_is_kept_in_a_fork_only() -> None:
    """The parent still uses it; in one process it may be closed."""
    state = object()
    kept: list[bool] = []
    _runtime.on_reset(lambda: kept.append(_runtime.keep_in_fork(state)))
    _runtime.reset_all()
    assert (kept, _runtime._kept) == ([False], [])
    _runtime._after_fork()
    assert (kept, _runtime._kept) == ([False, True], [state])
    _runtime.reset_all()
    assert (kept, _runtime._kept) == ([False, True, False], [state])
