"""Counters of what one sender does in one window of time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext
from django.core.cache import cache
from django.test import AsyncRequestFactory
from redis import ConnectionPool

from django_eventsource import rates
from django_eventsource.exceptions import RateLimited
from django_eventsource.policies import check_rate
from tests.valkey import ValkeyServer

LIMIT = 3
POSTS = 60


class OnePool(ConnectionPool):
    """A pool of Redis connections that all threads share, so that the test can close it."""

    made: OnePool | None = None

    @classmethod
    def from_url(cls, url: str, **options: Any) -> OnePool:
        if cls.made is None:
            cls.made = super().from_url(url, **options)
        return cls.made


@pytest.fixture
def redis_cache(settings: Any, valkey_server: ValkeyServer) -> Iterator[ValkeyServer]:
    """Use an empty Redis cache."""
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": valkey_server.url,
            "OPTIONS": {"pool_class": OnePool},
        }
    }
    yield valkey_server
    if OnePool.made is not None:
        OnePool.made.disconnect()
        OnePool.made = None


@pytest.fixture
def locmem_cache() -> None:
    """Use an empty local-memory cache, Django's default."""
    cache.clear()


async def post() -> bool:
    """Count one post, in a thread of its own as Django's handler does; whether it passed."""
    async with ThreadSensitiveContext():
        try:
            await check_rate(AsyncRequestFactory().post("/"))
        except RateLimited:
            return False
        return True


@pytest.mark.parametrize("kind", ["locmem_cache", "redis_cache"])
async def test_simultaneous_posts_are_counted_exactly(
    settings: Any, request: pytest.FixtureRequest, kind: str
) -> None:
    """Of 60 posts at once, exactly as many pass as the rate allows."""
    request.getfixturevalue(kind)
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
    settings: Any, redis_cache: ValkeyServer
) -> None:
    """Counting again does not move the end of the key's life."""
    settings.EVENTSOURCE_SEND_RATE = (10, 1000)
    for _ in range(3):
        assert await post()
    (key,) = redis_cache.run("KEYS", "*rate*")
    assert 1000 < redis_cache.run("TTL", key) <= 2001
