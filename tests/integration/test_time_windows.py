"""Tests of the counters of time windows, with the caches of Django."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext
from django.core.cache import cache
from django.test import AsyncRequestFactory
from redis import ConnectionPool

from django_eventsource.exceptions import RateLimited
from django_eventsource.policies import check_rate
from tests.support.valkey import ValkeyServer

LIMIT = 3
POSTS = 60


class OnePool(ConnectionPool):
    """A pool of Redis connections that all threads share, so that a test can close it."""

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
    """Use an empty local-memory cache, which is the default of Django."""
    cache.clear()


async def post() -> bool:
    """Count one POST in a separate thread, as Django does, and return whether it passed."""
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
    """Of 60 simultaneous posts, the rate allows exactly three."""
    request.getfixturevalue(kind)
    settings.EVENTSOURCE_SEND_RATE = (LIMIT, 10**6)
    passed = await asyncio.gather(*(post() for _ in range(POSTS)))
    assert passed.count(True) == LIMIT
    cache.clear()


async def test_a_redis_key_expires_after_its_window(
    settings: Any, redis_cache: ValkeyServer
) -> None:
    """A further count does not change the expiry of the key."""
    settings.EVENTSOURCE_SEND_RATE = (10, 1000)
    for _ in range(3):
        assert await post()
    (key,) = redis_cache.run("KEYS", "*rate*")
    assert 1000 < redis_cache.run("TTL", key) <= 2001
