"""Tests of the notifier, which sends durable events over the channel layer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from django_eventsource.delivery.layer import Background
from django_eventsource.delivery.notifier import Notifier, logger, throttled
from django_eventsource.protocol.batches import Batch
from tests.support.waiting import PATIENCE_SECONDS


class Layer:
    """A layer that sends when the test lets it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.sent: list[tuple[str, int, list[bytes]]] = []
        self.failures = 0
        self.entered = threading.Event()

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self.entered.set()
        await asyncio.to_thread(self.open.wait, PATIENCE_SECONDS)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("down")
        self.sent.append((group, message["seq"], message["frames"]))


class Soon(Notifier):
    """A notifier that does not wait long."""

    backoff_seconds = (0.01,)
    waiting_bytes = 100


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.end()


@pytest.fixture
def notifier(background: Background) -> Soon:
    return Soon(background)


@pytest.fixture
def layer() -> Layer:
    return Layer()


def batch(seq: int, size: int = 1) -> Batch:
    return Batch([b"x" * size], [seq])


def sent(notifier: Notifier, layer: Layer) -> list[tuple[str, int, int]]:
    """Return the group, the first number and the number of frames of each message."""
    assert notifier.flush(PATIENCE_SECONDS)
    return [(group, seq, len(frames)) for group, seq, frames in layer.sent]


def test_the_batches_of_a_group_are_sent_in_their_order(notifier: Soon, layer: Any) -> None:
    for seq in (1, 2, 4):
        notifier.put(layer, "a", [batch(seq)])
        assert notifier.flush(PATIENCE_SECONDS)
    assert sent(notifier, layer) == [("a", 1, 1), ("a", 2, 1), ("a", 4, 1)]


def test_what_waits_is_sent_in_one_message_for_each_group(notifier: Soon, layer: Any) -> None:
    """Events whose numbers are not consecutive are sent in several messages."""
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    for group, seq in (("a", 2), ("b", 7), ("a", 3), ("a", 5)):
        notifier.put(layer, group, [batch(seq)])
    layer.open.set()
    assert sorted(sent(notifier, layer)) == [("a", 1, 1), ("a", 2, 2), ("a", 5, 1), ("b", 7, 1)]


def test_a_burst_is_sent_in_one_message_after_the_first_one(
    notifier: Soon, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first event is sent at once, and the others after a pause."""
    pausing, over = threading.Event(), threading.Event()

    async def sleep(seconds: float) -> None:
        assert notifier.pause_seconds <= seconds <= notifier.most_pause_seconds
        pausing.set()
        await asyncio.to_thread(over.wait, PATIENCE_SECONDS)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    notifier.put(layer, "a", [batch(1)])
    assert pausing.wait(PATIENCE_SECONDS)
    assert [seq for _, seq, _ in layer.sent] == [1]
    for seq in (2, 3, 4):
        notifier.put(layer, "a", [batch(seq)])
    over.set()
    assert sent(notifier, layer) == [("a", 1, 1), ("a", 2, 3)]


@pytest.mark.parametrize(
    ("seconds", "pause"), [(0.0, 0.005), (0.0005, 0.005), (0.002, 0.016), (1.0, 0.05)]
)
def test_the_pause_is_in_proportion_to_the_time_of_sending(
    notifier: Soon, seconds: float, pause: float
) -> None:
    """So publishers get most of the time, and no event waits for long."""
    assert notifier.pause_after(seconds) == pause


def test_the_pause_is_that_of_the_messages_sent_before(
    notifier: Soon, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[float] = []
    monkeypatch.setattr(notifier, "pause_after", lambda seconds: rounds.append(seconds) or 0.0)
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    began = time.monotonic()
    time.sleep(0.02)
    waited = time.monotonic() - began
    layer.open.set()
    assert sent(notifier, layer) == [("a", 1, 1)]
    notifier.put(layer, "a", [batch(2)])
    assert sent(notifier, layer) == [("a", 1, 1), ("a", 2, 1)]
    assert rounds[0] >= waited


def test_put_does_not_wait_for_the_layer(notifier: Soon, layer: Any) -> None:
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert not notifier.flush(0)
    layer.open.set()
    assert sent(notifier, layer) == [("a", 1, 1)]


def test_what_does_not_fit_is_dropped_and_logged(
    notifier: Soon, layer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that is larger than the bound is sent if nothing else waits."""
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    notifier.put(layer, "a", [batch(2, size=101)])
    notifier.put(layer, "b", [batch(3)])
    layer.open.set()
    assert sent(notifier, layer) == [("a", 1, 1), ("a", 2, 1)]
    assert "The channel layer is slower than the publishers" in caplog.text
    notifier.put(layer, "b", [batch(4)])
    assert sent(notifier, layer)[2:] == [("b", 4, 1)]


def test_a_failure_is_logged_and_what_is_put_later_is_sent(
    notifier: Soon, layer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What was about to be sent is dropped: the history check finds it."""
    layer.failures = 1
    notifier.put(layer, "a", [batch(1)])
    assert notifier.flush(PATIENCE_SECONDS)
    notifier.put(layer, "a", [batch(2)])
    assert sent(notifier, layer) == [("a", 2, 1)]
    assert "Sending to the channel layer failed" in caplog.text


def test_a_failure_of_one_group_does_not_affect_the_others(notifier: Soon, layer: Any) -> None:
    send = layer.group_send

    async def fail(group: str, message: dict[str, Any]) -> None:
        if group == "bad":
            raise ValueError(group)
        await send(group, message)

    layer.group_send = fail
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    for group in ("bad", "b"):
        notifier.put(layer, group, [batch(2)])
    layer.open.set()
    assert sent(notifier, layer) == [("a", 1, 1), ("b", 2, 1)]


def test_what_waited_too_long_is_dropped(
    notifier: Soon, layer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The history checks have found the events."""
    notifier.late_seconds = -1
    notifier.put(layer, "a", [batch(1)])
    assert sent(notifier, layer) == []
    assert "The channel layer is slower than the publishers" in caplog.text
    notifier.late_seconds = 5
    notifier.put(layer, "a", [batch(2)])
    assert sent(notifier, layer) == [("a", 2, 1)]


def test_a_log_handler_may_publish_while_events_are_dropped(notifier: Soon, layer: Any) -> None:
    """Dropped events are reported once in ten seconds."""
    records: list[logging.LogRecord] = []

    class Publishing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)
            notifier.put(layer, "log", [batch(9, size=90)])

    handler = Publishing()
    logger.addHandler(handler)
    try:
        layer.open.clear()
        notifier.put(layer, "a", [batch(1)])
        assert layer.entered.wait(PATIENCE_SECONDS)
        for seq in range(2, 10):
            notifier.put(layer, "a", [batch(seq, size=90)])
    finally:
        logger.removeHandler(handler)
        layer.open.set()
    assert len(records) == 1
    assert sent(notifier, layer) == [("a", 1, 1), ("a", 2, 1)]


def test_a_thread_that_cannot_be_started_does_not_disable_the_notifier(
    notifier: Soon, background: Background, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised. The next event starts another thread."""

    async def nothing() -> int:
        return 1

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            notifier.put(layer, "a", [batch(1)])
        with pytest.raises(RuntimeError, match="new thread"):
            background.run(layer, nothing())
    assert notifier.flush(0)
    notifier.put(layer, "a", [batch(2)])
    assert sent(notifier, layer) == [("a", 2, 1)]
    assert background.run(layer, nothing()) == 1


def test_a_broken_layer_is_tried_again_after_a_growing_wait(
    background: Background, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) < 4:
            notifier.put(layer, "a", [batch(len(waits))])

    notifier = Notifier(background)
    layer.failures = 4
    monkeypatch.setattr("django_eventsource.delivery.notifier.asyncio.sleep", sleep)
    notifier.put(layer, "a", [batch(0)])
    assert notifier.flush(PATIENCE_SECONDS)
    assert waits == list(Notifier.backoff_seconds)


def test_a_cancelled_send_drops_what_waits(
    background: Background, notifier: Soon, layer: Any
) -> None:
    """The thread ends with the process. After that, another thread is started."""
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    notifier.put(layer, "a", [batch(2)])
    layer.open.set()
    background.end()
    assert notifier.flush(PATIENCE_SECONDS)
    notifier.put(layer, "a", [batch(3)])
    assert sent(notifier, layer)[-1] == ("a", 3, 1)


def test_a_reset_drops_what_waits_and_its_lock(notifier: Soon, layer: Any) -> None:
    """A forked process resets it. A thread of its parent may have held the lock."""
    layer.open.clear()
    notifier.put(layer, "a", [batch(1)])
    assert layer.entered.wait(PATIENCE_SECONDS)
    notifier.put(layer, "a", [batch(2)])
    with notifier._lock:
        notifier.reset()
        assert notifier.flush(0)
    layer.open.set()


def test_failures_are_logged_by_the_logger_of_the_room(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "django_eventsource.delivery"):
        throttled.error("text", error=ValueError("x"))
    assert caplog.records[0].name == "django_eventsource.delivery"
