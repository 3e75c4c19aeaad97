"""The details that processes write while a console requests them."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import AsyncClient
from django.urls import include, path

from django_eventsource import apublish
from django_eventsource.delivery.counters import counters
from django_eventsource.exceptions import InvalidToken
from django_eventsource.history import get_history
from django_eventsource.operations.details import DetailsWriter, read_details, request_details
from django_eventsource.operations.supervisor import get_supervisor
from django_eventsource.protocol.field_rules import WRITE_DETAILS
from django_eventsource.protocol.tokens import CONTROL_TOKEN, DETAILS_TOKEN
from django_eventsource.signals import Listener, Reason
from django_eventsource.streaming.open_stream import OpenStream
from tests.support import waiting

pytestmark = pytest.mark.usefixtures("memory_history", "open_to_all")

urlpatterns = [path("events/", include("django_eventsource.urls"))]

until = functools.partial(waiting.until, seconds=15, interval_seconds=0.01)


@pytest.fixture
def open_to_all(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.1
    settings.EVENTSOURCE_PRESENCE_SECONDS = 0.05
    settings.ROOT_URLCONF = __name__
    monkeypatch.setattr(DetailsWriter, "WRITE_SECONDS", 0.05)


async def receiver_is_ready() -> None:
    """Wait until the control token is read."""
    hub = get_supervisor().hub
    await until(lambda: (feed := hub._feeds.get(CONTROL_TOKEN)) and feed.last is not None)


def make_stream(listener: Listener) -> OpenStream:
    """Make a stream as the view does it."""
    token = listener.tokens[0]
    return OpenStream(token, get_history().locate(token, None), listener=listener)


async def open_stream(token: str) -> OpenStream:
    """Open a stream, and read its first bytes."""
    stream = (await AsyncClient().get(f"/events/poll/{token}"))._stream  # type: ignore[attr-defined]
    await anext(stream)
    return stream


def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the names of the leases that the process writes."""
    history = get_history()
    announce, found = history.announce, []

    def record(process: str, *args: Any) -> bool:
        found.append(process)
        return announce(process, *args)

    monkeypatch.setattr(history, "announce", record)
    return found


async def written() -> list[dict[str, Any]]:
    """Wait until details are written, and return them."""
    found: list[dict[str, Any]] = []

    def read() -> bool:
        found[:] = read_details()
        return bool(found)

    await until(read)
    return found


async def test_a_process_lists_its_streams_while_they_are_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It removes the details from the history before they expire."""
    monkeypatch.setattr(DetailsWriter, "LEASE_WRITES", 10**6)
    began = time.time()
    stream, other = await open_stream("a"), await open_stream("b")
    await receiver_is_ready()
    await asyncio.to_thread(request_details, "a")
    (found,) = await written()
    assert (found["host"], found["pid"]) == (socket.gethostname(), str(os.getpid()))
    assert began <= found["since"] <= found["time"] <= time.time()
    assert (found["streams"], found["slow_streams"], found["slow"]) == (2, 0, [])
    assert sorted(found["busiest"]) == [["a", 1], ["b", 1]]
    (listed,) = found["tokens"]["a"]["listeners"]
    since = listed.pop("since")
    assert began <= since <= time.time()
    assert listed == {
        "token": "a",
        "tokens": 1,
        "user": "",
        "address": "127.0.0.1",
        "state": "behind",  # the first bytes come before it has read the history
    }
    assert list(found["tokens"]) == ["a"]
    get_supervisor().details._requests.clear()
    await until(lambda: not read_details())
    await stream.aclose()
    await other.aclose()


async def test_the_counters_are_those_of_the_process() -> None:
    stream = await open_stream("a")
    details = get_supervisor().details
    assert details.details()["counters"] == {
        "delivered": 0,
        "published": 0,
        "resets": 0,
        "overflows": 0,
    }
    assert details.details()["layer_silence"] == 0
    await apublish("a", "ping", "replayed")
    await anext(stream)
    reading = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await until(lambda: not stream.is_behind)
    await apublish("a", "ping", "live")
    await reading
    counters.count_reset("expired")
    counters.count_overflow()
    assert details.details()["counters"] == {
        "delivered": 2,
        "published": 2,
        "resets": 1,
        "overflows": 1,
    }
    await stream.aclose()


async def test_a_process_writes_and_reads_nothing_more_without_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call of the history is one of the calls before the console existed."""
    stream = await open_stream("a")
    await receiver_is_ready()
    found = writes(monkeypatch)
    supervisor = get_supervisor()
    await until(lambda: len(found) >= 3)
    assert set(found) == {supervisor.lease.process}
    assert get_history().present(DETAILS_TOKEN) == []
    await asyncio.to_thread(request_details)
    await until(lambda: len(set(found)) == 2)
    await stream.aclose()


async def test_details_that_cannot_be_written_are_logged_and_written_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await open_stream("a")
    details = get_supervisor().details

    def fail(*args: Any) -> bool:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(get_history(), "announce", fail)
        details.request(None)
        await until(lambda: "details for the console could not be written" in caplog.text)
    assert await written()
    await stream.aclose()


async def test_a_request_during_the_writes_starts_no_second_task() -> None:
    details = get_supervisor().details
    details.request("a")
    tasks = len(asyncio.all_tasks())
    details.request("b")
    assert len(asyncio.all_tasks()) == tasks
    assert list(details.details()["tokens"]) == ["a", "b"]


async def test_the_size_of_the_details_is_bounded() -> None:
    """The newest requests, the first listeners and the first characters are kept."""
    supervisor = get_supervisor()
    details = supervisor.details
    streams = [
        make_stream(Listener(tokens=("t", f"t{n}"), user="u" * 300, address="1" * 300))
        for n in range(details.MAX_LISTENERS + 5)
    ]
    for stream in streams:
        assert supervisor.admit(stream) is None
        stream.sending_since = time.monotonic() - 60
    for n in range(details.MAX_TOKENS + 5):
        details.request(f"requested {n}")
    details.request("t")
    found = details.details()
    assert list(found["tokens"]) == [*(f"requested {n}" for n in range(6, 15)), "t"]
    assert found["tokens"]["t"]["streams"] == found["slow_streams"] == len(streams)
    assert len(found["tokens"]["t"]["listeners"]) == len(found["slow"]) == details.MAX_LISTENERS
    assert len(found["busiest"]) == details.MAX_TOKENS
    assert found["busiest"][0] == ("t", len(streams))
    one = found["slow"][0]
    assert (one["tokens"], one["user"], one["address"]) == (2, "u" * 100, "1" * 100)
    for stream in streams:
        await stream.aclose()


class CountedTokens(tuple[str, ...]):
    """Tokens that count how often they are searched or iterated over."""

    uses = 0

    def __contains__(self, token: object) -> bool:
        type(self).uses += 1
        return super().__contains__(token)

    def __iter__(self) -> Iterator[str]:
        type(self).uses += 1
        return super().__iter__()


async def test_the_streams_are_searched_once_for_all_requested_tokens() -> None:
    """The event loop does nothing else meanwhile."""
    supervisor = get_supervisor()
    stream = make_stream(Listener(tokens=CountedTokens(("t", "u"))))
    assert supervisor.admit(stream) is None
    for token in ("t", "u", "v"):
        supervisor.details.request(token)
    CountedTokens.uses = 0
    found = supervisor.details.details()["tokens"]
    assert CountedTokens.uses == 1
    assert [found[token]["streams"] for token in ("t", "u", "v")] == [1, 1, 0]
    assert [len(found[token]["listeners"]) for token in ("t", "u", "v")] == [1, 1, 0]
    await stream.aclose()


async def test_the_state_of_a_listener_is_that_of_its_stream() -> None:
    stream = await open_stream("a")
    details = get_supervisor().details
    details.request("a")

    def state() -> str:
        (one,) = details.details()["tokens"]["a"]["listeners"]
        return one["state"]

    assert state() == "behind"
    reading = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await until(lambda: state() == "live")
    stream.sending_since = time.monotonic() - 60
    assert state() == "slow"
    stream.sending_since = None
    stream.end(Reason.MAX_AGE)
    assert state() == "ending"
    await asyncio.wait([reading])
    assert isinstance(reading.exception(), StopAsyncIteration)


async def test_a_request_of_an_unknown_form_is_ignored() -> None:
    """A newer version may send it."""
    supervisor = get_supervisor()
    supervisor.control.apply(WRITE_DETAILS, '{"token": "a"}')
    assert not supervisor.details._requests
    supervisor.control.apply(WRITE_DETAILS, '"a"')
    assert list(supervisor.details._requests) == ["a"]


def test_the_details_of_an_invalid_token_are_not_requested() -> None:
    with pytest.raises(InvalidToken):
        request_details(CONTROL_TOKEN)


def test_details_are_sorted_by_host_and_process_id() -> None:
    for name, host in [("c", "web-2"), ("a", "web-2"), ("b", "web-1")]:
        text = f'{{"process": "{name}", "host": "{host}", "pid": "7"}}'
        get_history().announce(name, {DETAILS_TOKEN: [text]}, 60)
    assert [one["process"] for one in read_details()] == ["b", "a", "c"]
