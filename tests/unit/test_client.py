"""The listening clients without a connection."""

from __future__ import annotations

import pytest

from django_eventsource.client import AsyncEventSourceClient, EventSourceClient


def test_max_event_bytes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_event_bytes must be 1 or more, not 0"):
        EventSourceClient("http://h/", max_event_bytes=0)


def test_arguments_that_are_not_valid_raise() -> None:
    """The constructor checks the retry time and the last event id."""
    with pytest.raises(ValueError, match="not -1"):
        EventSourceClient("http://h/", retry_ms=-1)
    with pytest.raises(ValueError, match="cannot be sent"):
        EventSourceClient("http://h/", last_event_id="a\nb")
    with pytest.raises(ValueError, match=r"rewind must be a number of events .*, not '5d'"):
        EventSourceClient("http://h/", rewind="5d")


def test_an_unused_client_closes() -> None:
    """Its iteration is empty."""
    client = EventSourceClient("http://127.0.0.1:1/")
    client.close()
    assert list(client) == []


async def test_an_unused_async_client_closes() -> None:
    """Its iteration is empty."""
    client = AsyncEventSourceClient("http://127.0.0.1:1/")
    await client.aclose()
    assert [event async for event in client] == []
