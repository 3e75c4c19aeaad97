"""Counters of what one sender does in one window of time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext
from django.core.cache import cache
from django.test import AsyncRequestFactory

from django_eventsource import rates
from django_eventsource.exceptions import RateLimited
from django_eventsource.policies import check_rate
from tests.valkey import ValkeyServer

LIMIT = 3
POSTS = 60


@pytest.fixture(params=["locmem", "redis"])
def shared_cache(request: pytest.FixtureRequest, settings: Any) -> None:
    """Use an empty cache that counts exactly."""
    if request.param == "redis":
        server: ValkeyServer = request.getfixturevalue("valkey_server")
        settings.CACHES = {
            "default": {
                "BACKEND": "django.core.cache.backends.redis.RedisCache",
                "LOCATION": server.url,
            }
        }
    cache.clear()


async def post() -> bool:
    """Count one post, in a thread of its own as Django's handler does; whether it passed."""
    async with ThreadSensitiveContext():
        try:
            await check_rate(AsyncRequestFactory().post("/"))
        except RateLimited:
            return False
        return True


@pytest.mark.usefixtures("shared_cache")
async def test_simultaneous_posts_are_counted_exactly(settings: Any) -> None:
    """Of 60 posts at once, exactly as many pass as the rate allows."""
    settings.EVENTSOURCE_SEND_RATE = (LIMIT, 10**6)
    passed = await asyncio.gather(*(post() for _ in range(POSTS)))
    assert passed.count(True) == LIMIT
    cache.clear()


async def test_a_count_lasts_for_its_whole_window(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count outlives the cache's default time to live of 300 seconds."""
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


async def test_a_redis_key_expires_after_its_window(
    settings: Any, valkey_server: ValkeyServer
) -> None:
    """Counting again does not move the end of the key's life."""
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": valkey_server.url,
        }
    }
    settings.EVENTSOURCE_SEND_RATE = (10, 1000)
    for _ in range(3):
        assert await post()
    (key,) = valkey_server.run("KEYS", "*rate*")
    assert 1000 < valkey_server.run("TTL", key) <= 2001
