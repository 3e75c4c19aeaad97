"""The loop on which synchronous code sends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from django_eventsource import background as module
from django_eventsource.background import Background, in_forks
from tests.processes import run_python


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


def test_one_loop_for_all(background: Background) -> None:
    """Whichever thread asks; it is started when first needed."""
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


def test_a_fork_while_the_lock_is_held(background: Background) -> None:
    """The thread that would let go of it is not there in the child."""
    background._lock.acquire()
    background.forked()
    assert background.run(Layer(), where())  # type: ignore[arg-type]


def test_where_processes_do_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to be called then."""
    monkeypatch.delattr(os, "register_at_fork")
    in_forks(lambda: None)


def test_errors_are_the_callers(background: Background) -> None:
    """And the loop goes on."""

    async def fail() -> None:
        raise ConnectionError("away")

    layer: Any = Layer()
    with pytest.raises(ConnectionError, match="away"):
        background.run(layer, fail())
    assert background.run(layer, where())[0] is background._loop


def test_the_end_closes_what_is_open(background: Background) -> None:
    """On the loop that has it open, each layer once, whatever one of them says."""
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


def test_the_end_of_what_never_began() -> None:
    """There is nothing to do."""
    Background().end()


def test_a_fork_has_its_own(background: Background) -> None:
    """The thread of the parent does not live on in it."""
    layer: Any = Layer()
    loop = background.run(layer, where())[0]
    thread = background._thread
    background._pid = os.getpid() + 1
    background.end()
    assert layer.closed == [], "the connections are the parent's"
    assert background.run(layer, where())[0] is not loop
    assert not loop.is_closed()
    loop.call_soon_threadsafe(loop.stop)
    assert thread is not None
    thread.join(10)
    loop.close()


def test_a_loop_that_hangs_does_not_hold_up_the_end(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left as it is."""
    monkeypatch.setattr(module, "END_SECONDS", 0.01)
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


def test_a_process_ends_in_silence(valkey_server: Any) -> None:
    """One connection for many events, and none is left to complain of."""
    program = (
        "from django_eventsource import publish\n"
        "for n in range(20): publish('t', 'ping', str(n))\n"
        "print('done')"
    )
    layers = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [valkey_server.url]},
        }
    }
    connections = "total_connections_received"
    with valkey_server.client() as client:
        before = int(client.info("stats")[connections])
        out = run_python(
            "from django.conf import settings\n"
            f"settings.CHANNEL_LAYERS = {layers!r}\n"
            "settings.EVENTSOURCE_HISTORY = "
            "{'BACKEND': 'django_eventsource.history.memory.MemoryHistory'}\n" + program
        )
        assert out == "done\n"
        assert int(client.info("stats")[connections]) - before <= 3
