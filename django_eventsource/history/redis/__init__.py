"""Durable events in Redis or Valkey streams."""

from .backend import RedisHistory

__all__ = ["RedisHistory"]
