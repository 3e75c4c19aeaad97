"""Chat with rewind: the stream starts with stored messages."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import publish
from django_eventsource.events import JSONIdEvent

TOKEN = "demo:chat"
REWINDS = {"0": "none", "5": "5 messages", "10m": "10 minutes", "all": "all"}


class MessageEvent(JSONIdEvent):
    """A message. Its value is a name and a text."""

    ACTIONS = ["message"]


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        message = {"name": request.POST["name"], "text": request.POST["text"]}
        publish(TOKEN, "message", message, MessageEvent)
        return HttpResponse(status=204)
    rewind = request.GET.get("rewind")
    if rewind not in REWINDS:
        rewind = "5"
    context = {"token": TOKEN, "rewind": rewind, "rewinds": REWINDS}
    return render(request, "testproject/chat.html", context)
