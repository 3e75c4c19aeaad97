"""The history, to look at."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from .history import get_history
from .models import (
    FLOOR_KEY,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
)
from .tokens import CONTROL_TOKEN, token_key

CONTROL_KEY = token_key(CONTROL_TOKEN)


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Nobody writes history by hand."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Look where the history is, whatever a database router says."""
        return super().get_queryset(request).using(get_history().using)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(TokenHead)
class TokenHeadAdmin(ReadOnlyAdmin):
    """The tokens with a history."""

    list_display = ["token", "last", "kept", "closed", "updated"]
    search_fields = ["token"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what is the project's own: the floor, and what processes tell each other."""
        return super().get_queryset(request).exclude(key__in=[FLOOR_KEY, CONTROL_KEY])


@admin.register(StoredEvent)
class StoredEventAdmin(ReadOnlyAdmin):
    """The events."""

    list_display = ["head", "seq", "event_id", "action", "excerpt", "created"]
    list_filter = ["action", "kind"]
    search_fields = ["head__token"]
    fields = ["head", "seq", "event_id", "action", "kind", "text", "size", "created"]
    readonly_fields = ["text"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what processes tell each other."""
        return super().get_queryset(request).exclude(head__key=CONTROL_KEY)


@admin.register(PendingEvent)
class PendingEventAdmin(ReadOnlyAdmin):
    """Events between their commit and their sequence number."""

    list_display = ["token", "action", "created"]
    fields = ["token", "event_id", "action", "kind", "text", "created"]
    readonly_fields = ["text"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what processes tell each other."""
        return super().get_queryset(request).exclude(key=CONTROL_KEY)


@admin.register(ProcessLease)
class ProcessLeaseAdmin(ReadOnlyAdmin):
    """The processes that say who listens in them."""

    list_display = ["process", "until"]


@admin.register(TokenPresence)
class TokenPresenceAdmin(ReadOnlyAdmin):
    """The listeners of each token in each process."""

    list_display = ["token", "lease", "listeners"]
    list_select_related = ["lease"]
    search_fields = ["token"]
