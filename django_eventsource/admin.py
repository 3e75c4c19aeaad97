"""The pages of the admin: the console, and read-only pages of the history and the listeners."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import quote, unquote, urlencode

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError
from django.db.models import BooleanField, ExpressionWrapper, F, Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html_join
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_POST

from .conf import conf
from .console import (
    CloseForm,
    PublishForm,
    SearchForm,
    TailView,
    TokenForm,
    find_events,
    newest_page,
    policy_of,
    store_error,
)
from .delivery.layer import get_layer, is_process_local
from .history import get_history
from .history.database.presence import DatabaseNow
from .models import (
    FLOOR_KEY,
    Console,
    EventFields,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
    shorten,
)
from .operations.close_requests import close_streams
from .operations.details import read_details, request_details
from .operations.presence import host_and_pid
from .policies import SEND_PERMISSION
from .protocol.tokens import RESERVED_PREFIX, RESERVED_TOKENS, token_key

HIDDEN_KEYS = (FLOOR_KEY, *map(token_key, RESERVED_TOKENS))
"""The keys of rows that are not a token of a user: the floor, and the reserved tokens."""
PIECES = re.compile(r"\S{12}(?=\S)|.+?(?=\S{13})|.+", re.DOTALL)
"""Pieces of a text: words, and pieces of 12 characters of longer words."""


def cell(text: str) -> SafeString:
    """Return the beginning of a text for a column, in which long words may be broken."""
    pieces = PIECES.findall(shorten(text, 60))
    return format_html_join(mark_safe("<wbr>"), "{}", ([piece] for piece in pieces))


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Base of all pages: rows cannot be added, changed or deleted."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Console)
class ConsoleAdmin(ReadOnlyAdmin):
    """The console: the processes with their streams, and a page for each token."""

    def get_urls(self) -> list[URLPattern]:
        def named(name: str, view: Callable[..., Any]) -> URLPattern:
            route = "" if name == "changelist" else f"{name}/"
            return path(route, view, name=f"{self.opts.app_label}_{self.opts.model_name}_{name}")

        wrap = self.admin_site.admin_view
        return [
            named("changelist", wrap(self.changelist_view)),
            named("details", wrap(self.details_view)),
            named("token", wrap(self.token_view)),
            named("close", wrap(require_POST(self.close_view))),
            # Its policy checks the permission, because admin_view() wraps synchronous views only.
            named("tail", TailView.as_view(policy=policy_of(self.admin_site))),
        ]

    def url_of(self, name: str, **query: str) -> str:
        """Return the URL of a page of the console."""
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{name}"
        url = reverse(name, current_app=self.admin_site.name)
        return f"{url}?{urlencode(query)}" if query else url

    # The pages

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the processes and their streams."""
        self.require(request)
        return self.render(
            request, "console", {"token_form": TokenForm(), **(extra_context or {})}
        )

    def token_view(self, request: HttpRequest) -> HttpResponse:
        """Show the listeners and the events of a token, and publish an event to it."""
        self.require(request)
        # The search sends the token in this form, because browsers change line ends in fields.
        quoted = request.GET.get("quoted_token", "")
        form = TokenForm({"token": unquote(quoted)} if quoted else request.GET)
        if not form.is_valid():
            return self.render(request, "console", {"token_form": form})
        token = form.cleaned_data["token"]
        publish_form = PublishForm(conf.event_class)
        if request.method == "POST":
            self.require(request, SEND_PERMISSION)
            publish_form = PublishForm(conf.event_class, request.POST)
            if publish_form.is_valid():
                where, action = f"token {token!r}", publish_form.cleaned_data["action"]
                entry = self.record(request, where, f"Published {action} to {where}.")
                if publish_form.publish(token):
                    messages.success(request, entry.change_message)
                    return HttpResponseRedirect(self.url_of("token", token=token))
                self.drop_record(entry)
        context = {
            "token": token,
            "subtitle": token,
            "quoted_token": quote(token),
            "publish_form": publish_form,
            "newest_url": self.url_of("token", token=token),
            "close_url": self.url_of("close", token=token),
        }
        return self.render(
            request, "console_token", {**context, **self.history_of(request, token)}
        )

    def history_of(self, request: HttpRequest, token: str) -> dict[str, Any]:
        """Return the context of a page of the history, and of the live tail that follows it."""
        if not request.user.has_perm("django_eventsource.view_storedevent"):
            return {}
        form = SearchForm(request.GET)
        context: dict[str, Any] = {"search_form": form}
        if not form.is_valid():
            return context
        search = form.cleaned_data
        context["oldest_url"] = self.url_of("token", token=token, after="", **search)
        try:
            after = request.GET.get("after")
            newest = after is None and not any(search.values())
            if newest:
                after = newest_page(token)
            found = context["found"] = find_events(token, after=after or "", **search)
            if newest or not found.more:
                context["tail_cursor"] = found.cursor
            context["next_url"] = self.url_of("token", token=token, after=found.cursor, **search)
        except ValueError as error:
            form.add_error(None, str(error))
        except get_history().storage_errors as error:
            form.add_error(None, store_error(error))
        return context

    def close_view(self, request: HttpRequest) -> HttpResponse:
        """Close the streams of a token, of a user, or of a user's streams of a token."""
        self.require(request, "django_eventsource.close_streams")
        # A token in the URL is that of the page. Browsers change line ends in fields.
        form = CloseForm({**request.POST.dict(), **request.GET.dict()})
        if form.is_valid():
            token, user = form.cleaned_data["token"], form.cleaned_data["user"]
            named = [f"token {token!r}"] * bool(token) + [f"user {user!r}"] * bool(user)
            chosen = " and ".join(named)
            entry = self.record(request, chosen, f"Requested to close the streams of {chosen}.")
            try:
                close_streams(token=token or None, user=user or None)
            except get_history().storage_errors as error:
                self.drop_record(entry)
                messages.error(request, store_error(error))
            else:
                messages.success(request, entry.change_message)
        else:
            messages.error(
                request, " ".join(str(text) for one in form.errors.values() for text in one)
            )
        token = request.GET.get("token")
        page = self.url_of("changelist") if token is None else self.url_of("token", token=token)
        return HttpResponseRedirect(page)

    def details_view(self, request: HttpRequest) -> HttpResponse:
        """Return the details of the processes as JSON, and request newer ones if asked for."""
        self.require(request)
        token = request.GET.get("token")
        try:
            if "request" in request.GET:
                request_details(token)
            began = time.perf_counter()
            processes = read_details()
            state = {"seconds": time.perf_counter() - began}
        except ValueError as error:
            return JsonResponse({"error": str(error)}, status=400)
        except get_history().storage_errors as error:
            return JsonResponse({"error": store_error(error)}, status=503)
        shown = request.user.has_perm("django_eventsource.view_tokenpresence")
        for one in processes:
            one["tokens"] = {name: of for name, of in one["tokens"].items() if name == token}
            if not shown:
                one.update(slow=[], busiest=[], tokens={})
        return JsonResponse({"processes": processes, "time": time.time(), "history": state})

    # Helpers

    def require(self, request: HttpRequest, permission: str | None = None) -> None:
        """Check that the user may see the console and has a further permission.

        :raises PermissionDenied: if not.
        """
        if not self.has_view_permission(request) or (
            permission is not None and not request.user.has_perm(permission)
        ):
            raise PermissionDenied

    def render(
        self, request: HttpRequest, template: str, context: dict[str, Any]
    ) -> TemplateResponse:
        """Return a page of the console."""
        request.current_app = self.admin_site.name
        history, layer = get_history(), get_layer()
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": "Console",
            "close_form": CloseForm(auto_id="close_%s"),
            "close_url": self.url_of("close"),
            "is_live": isinstance(request, ASGIRequest),
            "history": type(history).__name__,
            "is_shared": history.shared,
            "layer": "none" if layer is None else type(layer).__name__,
            "is_process_local": is_process_local(),
            **context,
        }
        return TemplateResponse(request, f"eventsource/{template}.html", context)

    def record(self, request: HttpRequest, what: str, done: str) -> LogEntry:
        """Write an action to the log of the admin.

        This comes before the action, so that the log contains every action. The caller drops the
        entry if the action fails.
        """
        entry: LogEntry = LogEntry.objects.create(
            user_id=cast("int", request.user.pk),
            content_type=ContentType.objects.get_for_model(Console, for_concrete_model=False),
            object_repr=what[:200],
            action_flag=CHANGE,
            change_message=done,
        )
        return entry

    def drop_record(self, entry: LogEntry) -> None:
        """Delete the entry of an action that has failed."""
        # Inside a transaction that the failure has broken, the rollback does it.
        with suppress(DatabaseError):
            entry.delete()


class HistoryAdmin(ReadOnlyAdmin):
    """Base of the pages that show rows of the history's database."""

    key_field = "key"
    """The lookup of the token's key."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows of users in the history's database, whatever a router returns."""
        rows = super().get_queryset(request).using(get_history().using)
        return rows.exclude(**{f"{self.key_field}__in": HIDDEN_KEYS})

    @admin.display(description=_("token"), ordering="token")
    def name(self, row: Any) -> SafeString:
        return cell(row.token)


@admin.register(TokenHead)
class TokenHeadAdmin(HistoryAdmin):
    """The tokens with an epoch."""

    list_display = ["name", "last", "events", "bytes_kept", "is_closed", "updated"]
    fields = ["token", "first", "kept", "last", "closed", "bytes_kept", "updated"]
    readonly_fields = ["bytes_kept"]
    search_fields = ["token"]

    @admin.display(description=_("events kept"), ordering=F("last") - F("kept"))
    def events(self, head: TokenHead) -> int:
        return head.last - head.kept + 1

    @admin.display(description=_("size"), ordering=F("end_offset") - F("start_offset"))
    def bytes_kept(self, head: TokenHead) -> str:
        return filesizeformat(head.size)

    @admin.display(description=_("closed"), boolean=True)
    def is_closed(self, head: TokenHead) -> bool:
        return head.closed == head.last


class EventAdmin(HistoryAdmin):
    """Base of the pages of stored and pending events."""

    readonly_fields = ["text", "byte_count"]

    @admin.display(description=_("action"), ordering="action")
    def short_action(self, event: EventFields) -> SafeString:
        return cell(event.action)

    @admin.display(description=_("bytes"))
    def byte_count(self, event: EventFields) -> int:
        return event.size

    @admin.display(description=_("data"))
    def excerpt(self, event: EventFields) -> SafeString:
        return cell(event.excerpt())


@admin.register(StoredEvent)
class StoredEventAdmin(EventAdmin):
    """The events with a sequence number."""

    key_field = "head__key"
    list_display = ["seq", "token", "short_action", "excerpt", "created"]
    list_select_related = ["head"]
    search_fields = ["head__token", "=action"]
    search_help_text = _("Part of a token, or a whole action")
    fields = ["head", "seq", "event_id", "action", "kind", "text", "byte_count", "created"]

    @admin.display(description=_("token"), ordering="head__token")
    def token(self, event: StoredEvent) -> SafeString:
        return cell(event.head.token)


@admin.register(PendingEvent)
class PendingEventAdmin(EventAdmin):
    """The committed events without a sequence number."""

    list_display = ["name", "short_action", "excerpt", "created"]
    fields = ["token", "event_id", "action", "kind", "text", "created"]


class ProcessAdmin(HistoryAdmin):
    """Base of the pages of server processes.

    A process that is not alive has ended or does not respond.
    """

    lease_prefix = ""
    """The prefix of the lease's fields in a lookup."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows with the attributes ``lease_process`` and ``alive``."""
        valid = Q(**{f"{self.lease_prefix}until__gt": DatabaseNow()})
        rows = super().get_queryset(request)
        rows = rows.exclude(**{f"{self.lease_prefix}process__startswith": RESERVED_PREFIX})
        rows = rows.annotate(
            lease_process=F(f"{self.lease_prefix}process"),
            alive=ExpressionWrapper(valid, output_field=BooleanField()),
        )
        return cast("QuerySet[Any]", rows)

    @admin.display(description=_("host"))
    def host(self, row: Any) -> SafeString:
        return cell(host_and_pid(row.lease_process)[0])

    @admin.display(description=_("process id"))
    def pid(self, row: Any) -> str:
        return host_and_pid(row.lease_process)[1]

    @admin.display(description=_("alive"), boolean=True, ordering="alive")
    def is_alive(self, row: Any) -> bool:
        return bool(row.alive)


@admin.register(ProcessLease)
class ProcessLeaseAdmin(ProcessAdmin):
    """The processes that have listeners."""

    list_display = ["host", "pid", "is_alive", "until"]
    fields = ["host", "pid", "process", "is_alive", "until"]
    readonly_fields = ["host", "pid", "is_alive"]


@admin.register(TokenPresence)
class TokenPresenceAdmin(ProcessAdmin):
    """The listeners of each token in each process."""

    lease_prefix = "lease__"
    list_display = ["name", "host", "pid", "is_alive", "counted"]
    search_fields = ["token"]
    fields = ["token", "host", "pid", "is_alive", "counted", "identities"]
    readonly_fields = ["host", "pid", "is_alive", "counted"]

    @admin.display(description=_("listeners"), ordering="listeners")
    def counted(self, row: Any) -> int:
        """Return the number of listeners, which is 0 if the process is not alive."""
        return row.listeners if row.alive else 0
