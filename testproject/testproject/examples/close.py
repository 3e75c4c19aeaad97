"""Close and reopen: the server ends the streams of a token."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.cache import never_cache

from django_eventsource import close_streams, publish

TOKEN = "demo:close"


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        match request.POST["do"]:
            case "publish":
                publish(TOKEN, "ping", f"Published at {timezone.now():%H:%M:%S}")
            case "end":
                close_streams(token=TOKEN)  # the browsers reconnect
            case "close":
                publish(TOKEN, "close", "Closed")  # the browsers stop
        return HttpResponse(status=204)
    return render(request, "testproject/close.html", {"token": TOKEN})
