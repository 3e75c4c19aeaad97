"""The parts of the admin's console: the search in the history, the forms, and the live tail."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async
from django import forms
from django.contrib.admin import AdminSite
from django.http import HttpRequest, HttpResponseBase

from .events import Event
from .exceptions import DeliveryFailed, InvalidToken
from .history import get_history
from .history.records import Missing
from .policies import LISTEN_PERMISSION, Policy
from .protocol.cursors import join_cursor, short_key
from .protocol.field_rules import ANY_ACTION, MAX_ACTION_LENGTH
from .protocol.rewind import Rewind
from .protocol.tokens import MAX_TOKEN_LENGTH, check_token
from .publishing import publish_posted
from .reading import HistoryEvent, read_history
from .views import EventSourceView

CONSOLE_PERMISSION = "django_eventsource.view_console"
"""The model permission that lets staff see the console."""

PAGE_EVENTS = 50
"""The events of a page. A search may find some more."""
SEARCH_READS = 20
"""The reads of a search in one request at most. A search continues with the next request."""


# The history


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Some stored events of a token, the oldest first."""

    events: Sequence[HistoryEvent]
    cursor: str
    """The position after the events that were searched."""
    more: bool
    """Whether the history has events after the cursor."""
    missing: Missing | None
    """Why events after the position where the search began are missing, as in a page."""


def newest_page(token: str) -> str:
    """Return the cursor before the newest events of a token."""
    position = get_history().locate(token, None, Rewind(max_events=PAGE_EVENTS))
    return join_cursor([(short_key(token), position.seq, position.cursor.reopened)])


def find_events(token: str, *, after: str = "", action: str = "", text: str = "") -> Found:
    """Return stored events of a token, at least a page of them if the history has as many.

    :param token: the token.
    :param after: the cursor after which to begin; ``""`` begins with the oldest event.
    :param action: the only action to return; ``""`` for all.
    :param text: a text that the id or the value contains, in any case; ``""`` for any.
    :raises ValueError: if an argument is not valid.
    :raises storage_errors: if the history's store fails.
    """
    found: list[HistoryEvent] = []
    missing: Missing | None = None
    wanted = text.casefold()
    # Without a search, each read finds at least one event, so the newest page ends at the newest.
    for _n in range(SEARCH_READS if text or action else PAGE_EVENTS):
        page = read_history(token, after=after, limit=PAGE_EVENTS, action=action or None)
        found += (
            one
            for one in page.events
            if wanted in one.id.casefold() or wanted in one.value.casefold()
        )
        missing = missing or page.missing
        after = page.cursor
        if not page.more or len(found) >= PAGE_EVENTS:
            break
    return Found(events=found, cursor=after, more=page.more, missing=missing)


# The forms


class TokenField(forms.CharField):
    """The field of a token."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=MAX_TOKEN_LENGTH, strip=False, label="Token", **options)

    def validate(self, value: str) -> None:
        """Check the token, unless the field is empty and may be."""
        super().validate(value)
        if value:
            try:
                check_token(value)
            except InvalidToken as error:
                raise forms.ValidationError(str(error)) from error


class TokenForm(forms.Form):
    """The choice of a token."""

    token = TokenField()


class CloseForm(forms.Form):
    """The choice of the streams to close."""

    token = TokenField(required=False)
    user = forms.CharField(
        max_length=255,
        required=False,
        label="User id",
        help_text="The user id is the primary key, not the name.",
    )

    def clean(self) -> dict[str, Any]:
        """Check that a token or a user was passed."""
        cleaned = super().clean() or {}
        if not self.errors and not any(cleaned.values()):
            raise forms.ValidationError("Enter a token, a user id, or both.")
        return cleaned


class SearchForm(forms.Form):
    """The search in the history of a token."""

    text = forms.CharField(required=False, strip=False, label="Text in the id or the data")
    action = forms.CharField(max_length=MAX_ACTION_LENGTH, required=False, label="Action")


class PublishForm(forms.Form):
    """An event to publish.

    :param event_class: the class of the event.
    """

    action = forms.CharField(max_length=MAX_ACTION_LENGTH, label="Action")
    value = forms.CharField(
        required=False, strip=False, widget=forms.Textarea(attrs={"rows": 3}), label="Data"
    )

    def __init__(self, event_class: type[Event], data: Any = None) -> None:
        super().__init__(data, auto_id="publish_%s")
        self.event_class = event_class
        self.class_name = event_class.__name__
        if ANY_ACTION not in event_class.ACTIONS:
            choices = [(action, action) for action in event_class.ACTIONS]
            self.fields["action"] = forms.ChoiceField(choices=choices, label="Action")

    def publish(self, token: str) -> Event | None:
        """Publish the event of a valid form, with the checks of a POST to the view.

        :returns: the event; ``None`` if that is not possible. Then the form has an error.
        """
        action, value = self.cleaned_data["action"], self.cleaned_data["value"]
        try:
            return publish_posted(token, action, value, self.event_class)
        except (ValueError, DeliveryFailed) as error:
            self.add_error(None, str(error))
        except get_history().storage_errors as error:
            self.add_error(None, store_error(error))
        return None


def store_error(error: Exception) -> str:
    """Return the text for an error of the history's store."""
    return f"The history's store failed: {error!r}"


# The live tail


class SitePolicy(Policy):
    """Allows users of an admin site with the permissions to see the console and to listen.

    :func:`policy_of` returns the class for a site.
    """

    admin_site: AdminSite

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        """Return whether the user may use the site, and may listen to every token."""
        return await sync_to_async(self._may_listen)(request)

    def _may_listen(self, request: HttpRequest) -> bool:
        may_use = self.admin_site.has_permission(request)
        return may_use and request.user.has_perms([CONSOLE_PERMISSION, LISTEN_PERMISSION])


def policy_of(site: AdminSite) -> type[SitePolicy]:
    """Return the policy of the live tails of an admin site."""
    return type("SitePolicy", (SitePolicy,), {"admin_site": site})


class TailView(EventSourceView):
    """The stream of ``?token=`` for the console, whatever the URLs and policies of the project."""

    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, **kwargs: Any
    ) -> HttpResponseBase:
        """Open a stream of the token in the query."""
        action, token = self.get_event_class().LISTEN, request.GET.get("token", "")
        return await super().dispatch(request, action, token)
