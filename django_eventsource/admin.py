"""The history, to look at."""

from __future__ import annotations

import re
from typing import Any, cast

from django.contrib import admin
from django.db.models import BooleanField, ExpressionWrapper, F, Q, QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.utils.html import format_html_join
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext_lazy as _

from .history import get_history
from .history.presence import DatabaseNow
from .models import (
    FLOOR_KEY,
    EventFields,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
    shorten,
)
from .presence import host_and_pid
from .tokens import CONTROL_TOKEN, token_key

CONTROL_KEY = token_key(CONTROL_TOKEN)
PIECES = re.compile(r"\S{12}(?=\S)|.+?(?=\S{13})|.+", re.DOTALL)
"""Pieces of a text, with an end after each 12 characters of a longer word."""


def cell(text: str) -> SafeString:
    """Return text for a column: its beginning, with places to break the line in long words."""
    pieces = PIECES.findall(shorten(text, 60))
    return format_html_join(mark_safe("<wbr>"), "{}", ([piece] for piece in pieces))


def alive(until: str) -> Any:
    """Return the expression whether a lease is valid, by the clock of the database.

    :param until: the field with the end of the lease.
    """
    return ExpressionWrapper(Q(**{f"{until}__gt": DatabaseNow()}), output_field=BooleanField())


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

    list_display = ["name", "last", "events", "bytes_kept", "is_closed", "updated"]
    search_fields = ["token"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what is the project's own: the floor, and what processes tell each other."""
        return super().get_queryset(request).exclude(key__in=[FLOOR_KEY, CONTROL_KEY])

    @admin.display(description=_("token"), ordering="token")
    def name(self, head: TokenHead) -> SafeString:
        return cell(head.token)

    @admin.display(description=_("events kept"), ordering=F("last") - F("kept"))
    def events(self, head: TokenHead) -> int:
        return head.last - head.kept + 1

    @admin.display(description=_("size"), ordering="size")
    def bytes_kept(self, head: TokenHead) -> str:
        return filesizeformat(head.size)

    @admin.display(description=_("closed"), boolean=True)
    def is_closed(self, head: TokenHead) -> bool:
        return head.closed == head.last


class EventAdmin(ReadOnlyAdmin):
    """Events, stored or pending."""

    readonly_fields = ["text"]

    @admin.display(description=_("action"), ordering="action")
    def short_action(self, event: EventFields) -> SafeString:
        return cell(event.action)

    @admin.display(description=_("data"))
    def excerpt(self, event: EventFields) -> SafeString:
        return cell(event.excerpt())


@admin.register(StoredEvent)
class StoredEventAdmin(EventAdmin):
    """The events."""

    list_display = ["seq", "token", "short_action", "excerpt", "created"]
    list_select_related = ["head"]
    search_fields = ["head__token", "=action"]
    search_help_text = _("Part of a token, or a whole action")
    fields = ["head", "seq", "event_id", "action", "kind", "text", "size", "created"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what processes tell each other."""
        return super().get_queryset(request).exclude(head__key=CONTROL_KEY)

    @admin.display(description=_("token"), ordering="head__token")
    def token(self, event: StoredEvent) -> SafeString:
        return cell(event.head.token)


@admin.register(PendingEvent)
class PendingEventAdmin(EventAdmin):
    """Events between their commit and their sequence number."""

    list_display = ["name", "short_action", "excerpt", "created"]
    fields = ["token", "event_id", "action", "kind", "text", "created"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Leave out what processes tell each other."""
        return super().get_queryset(request).exclude(key=CONTROL_KEY)

    @admin.display(description=_("token"), ordering="token")
    def name(self, event: PendingEvent) -> SafeString:
        return cell(event.token)


class ProcessAdmin(ReadOnlyAdmin):
    """What belongs to one server process. A process that is not alive has ended, or hangs."""

    @admin.display(description=_("host"))
    def host(self, row: Any) -> SafeString:
        return cell(host_and_pid(row.process)[0])

    @admin.display(description=_("process id"))
    def pid(self, row: Any) -> str:
        return host_and_pid(row.process)[1]

    @admin.display(description=_("alive"), boolean=True, ordering="alive")
    def is_alive(self, row: Any) -> bool:
        return bool(row.alive)


@admin.register(ProcessLease)
class ProcessLeaseAdmin(ProcessAdmin):
    """The processes that have listeners."""

    list_display = ["host", "pid", "is_alive", "until"]
    fields = ["host", "pid", "process", "is_alive", "until"]
    readonly_fields = ["host", "pid", "is_alive"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Add whether the process is alive."""
        rows = super().get_queryset(request).annotate(alive=alive("until"))
        return cast("QuerySet[Any]", rows)


@admin.register(TokenPresence)
class TokenPresenceAdmin(ProcessAdmin):
    """The listeners of each token in each process."""

    list_display = ["name", "host", "pid", "is_alive", "counted"]
    search_fields = ["token"]
    fields = ["token", "host", "pid", "is_alive", "counted", "identities"]
    readonly_fields = ["host", "pid", "is_alive", "counted"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Add the name of the process, and whether it is alive."""
        rows = super().get_queryset(request)
        rows = rows.annotate(process=F("lease__process"), alive=alive("lease__until"))
        return cast("QuerySet[Any]", rows)

    @admin.display(description=_("token"), ordering="token")
    def name(self, row: TokenPresence) -> SafeString:
        return cell(row.token)

    @admin.display(description=_("listeners"), ordering="listeners")
    def counted(self, row: Any) -> int:
        """Return the number of listeners; those of a process that is not alive do not count."""
        return row.listeners if row.alive else 0
