"""Tests of the counters of time windows."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache
from django.test import AsyncRequestFactory

from django_eventsource.access import time_windows as rates
from django_eventsource.exceptions import RateLimited
from django_eventsource.policies import check_rate


async def post() -> bool:
    """Count one POST and return whether it was within the rate."""
    try:
        await check_rate(AsyncRequestFactory().post("/"))
    except RateLimited:
        return False
    return True


async def test_a_count_lasts_for_its_whole_window(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is longer than the default timeout of the cache, 300 seconds."""
    settings.EVENTSOURCE_SEND_RATE = (2, 1000)
    cache.clear()
    now = 1_800_000_000.0
    monkeypatch.setattr(rates.time, "time", lambda: now)
    assert [await post() for _ in range(3)] == [True, True, False]
    now += 900
    assert not await post()
    now += 100
    assert await post()
    cache.clear()
