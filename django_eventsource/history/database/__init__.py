"""The default history: durable events in Django models."""

from .backend import DatabaseHistory

__all__ = ["DatabaseHistory"]
