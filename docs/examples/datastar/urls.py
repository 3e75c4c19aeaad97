"""The page, which also publishes, the stream, and the URLs."""

from collections.abc import Iterable

from datastar_py import ServerSentEventGenerator
from datastar_py.consts import ElementPatchMode, EventType
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path
from django.utils.html import format_html

from django_eventsource import aread_history
from django_eventsource.grants import make_grant
from django_eventsource.views import EventSourceView

from .events import publish_datastar

PATCH = EventType.PATCH_ELEMENTS.value


def news(request: HttpRequest) -> HttpResponse:
    """Show the page, and publish the text of its form as a new element of the list."""
    if request.method == "POST":
        item = format_html("<li>{}</li>", request.POST["text"])
        event = ServerSentEventGenerator.patch_elements(item, "#news", ElementPatchMode.APPEND)
        publish_datastar("news", event)
        return HttpResponse(status=204)
    grant = make_grant("news", listen=True)
    return render(request, "datastar/page.html", {"grant": grant})


class NewsView(EventSourceView):
    """A stream that begins with the whole list: empty it, and append each stored item."""

    async def initial_state(self, request: HttpRequest, token: str) -> Iterable[tuple[str, str]]:
        """Return the events that set the state of the page."""
        stored = await aread_history(token, action=PATCH)
        items = [(event.action, event.value) for event in stored.events]
        return [(PATCH, 'elements <ul id="news"></ul>'), *items]


urlpatterns = [
    path("", news),
    path("events/<action>/<path:token>", NewsView.as_view(), name="stream"),
]
