"""The choice of the channel layer, and the loop on which synchronous code sends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from channels.layers import InMemoryChannelLayer, get_channel_layer
from django.core.exceptions import ImproperlyConfigured

from django_eventsource import _runtime
from django_eventsource.delivery.layer import (
    Background,
    get_layer,
    is_process_local,
    make_hub_layer,
)

IN_MEMORY = {"BACKEND": "channels.layers.InMemoryChannelLayer", "CONFIG": {"capacity": 7}}
SHARED = {"BACKEND": "tests.unit.test_layer.SharedLayer"}


class SharedLayer(InMemoryChannelLayer.__mro__[1]):  # type: ignore[misc]
    """A layer that several processes share."""


def test_without_a_configured_layer_each_hub_has_an_in_memory_layer(settings) -> None:
    settings.CHANNEL_LAYERS = {}
    assert get_layer() is None
    assert is_process_local()
    one, two = make_hub_layer(), make_hub_layer()
    assert isinstance(one, InMemoryChannelLayer)
    assert one is not two


def test_each_hub_has_its_own_instance_of_an_in_memory_layer(settings) -> None:
    """Its configuration is kept."""
    settings.CHANNEL_LAYERS = {"default": IN_MEMORY}
    assert is_process_local()
    layer = make_hub_layer()
    assert layer is not get_channel_layer()
    assert layer.capacity == 7


def test_each_hub_has_its_own_instance_of_a_shared_layer(settings) -> None:
    settings.CHANNEL_LAYERS = {"default": IN_MEMORY, "events": SHARED}
    settings.EVENTSOURCE_CHANNEL_LAYER = "events"
    assert not is_process_local()
    layer = make_hub_layer()
    assert isinstance(layer, SharedLayer)
    assert layer is not get_channel_layer("events")


def test_a_layer_whose_package_is_missing_is_an_error_with_its_alias(settings) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "nowhere.Layer"}}
    with pytest.raises(ImproperlyConfigured, match=r"CHANNEL_LAYERS\['default'\] cannot be used"):
        get_layer()


def test_an_unknown_alias_is_an_error_with_the_setting(settings) -> None:
    settings.EVENTSOURCE_CHANNEL_LAYER = "nowhere"
    with pytest.raises(ImproperlyConfigured, match=r"EVENTSOURCE_CHANNEL_LAYER.*'nowhere'"):
        get_layer()


# The loop on which synchronous code sends


class Layer:
    """A layer that notes on which loop it is closed, and may not let itself be."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed: list[asyncio.AbstractEventLoop] = []
        self.error = error

    async def close_pools(self) -> None:
        self.closed.append(asyncio.get_running_loop())
        if self.error is not None:
            raise self.error


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.end()


async def where() -> tuple[asyncio.AbstractEventLoop, str]:
    return asyncio.get_running_loop(), threading.current_thread().name


def test_all_threads_send_on_one_loop(background: Background) -> None:
    """The first send starts it."""
    layer: Any = Layer()
    assert background._loop is None
    found = [background.run(layer, where())]
    threads = [
        threading.Thread(target=lambda: found.append(background.run(layer, where())))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert set(found) == {(background._loop, "eventsource-background")}


def test_a_reset_replaces_a_lock_that_is_held(background: Background) -> None:
    """In a fork, the thread that would release the lock does not exist."""
    background._lock.acquire()
    background.reset()
    assert background.run(Layer(), where())  # type: ignore[arg-type]


def test_an_error_is_raised_in_the_calling_thread(background: Background) -> None:
    """The loop continues to run."""

    async def fail() -> None:
        raise ConnectionError("away")

    layer: Any = Layer()
    with pytest.raises(ConnectionError, match="away"):
        background.run(layer, fail())
    assert background.run(layer, where())[0] is background._loop


def test_end_closes_each_layer_once_on_its_loop(background: Background) -> None:
    """An error of one layer does not affect the others."""
    bad: Any = Layer(ConnectionError("away"))
    good: Any = Layer()
    for layer in (bad, good, good):
        background.run(layer, where())
    loop = background._loop
    background.end()
    assert bad.closed == good.closed == [loop]
    background.end()
    assert len(good.closed) == 1
    assert background.run(good, where())[0] is not loop


def test_end_without_a_loop_does_nothing() -> None:
    Background().end()


def test_a_reset_ends_the_loop(background: Background) -> None:
    layer: Any = Layer()
    loop = background.run(layer, where())[0]
    background.reset()
    assert layer.closed == [loop]
    assert loop.is_closed()
    assert background.run(layer, where())[0] is not loop


def test_a_reset_in_a_fork_drops_the_loop_and_closes_no_connection(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent still uses the connections."""
    layer: Any = Layer()
    loop = background.run(layer, where())[0]
    thread = background._thread
    with monkeypatch.context() as fork:
        fork.setattr(_runtime, "_in_fork", True)
        background.reset()
    background.end()
    assert layer.closed == []
    assert background.run(layer, where())[0] is not loop
    assert not loop.is_closed()
    loop.call_soon_threadsafe(loop.stop)
    assert thread is not None
    thread.join(10)
    loop.close()


def test_end_waits_only_a_limited_time_for_a_loop_that_hangs(
    background: Background,
) -> None:
    background._end_seconds = 0.01
    layer: Any = Layer()
    loop, _ = background.run(layer, where())
    thread = background._thread
    go_on = threading.Event()
    loop.call_soon_threadsafe(go_on.wait, 20)
    background.end()
    assert not loop.is_closed()
    go_on.set()
    assert thread is not None
    thread.join(10)

    async def finish() -> None:
        """End what had been begun when it was stopped: nothing is left to complain of."""
        await asyncio.sleep(0)
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    loop.run_until_complete(finish())
    assert layer.closed == [loop]
    loop.close()
