"""The page, which also publishes, and the URLs."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import include, path

from django_eventsource import publish
from django_eventsource.grants import make_grant


def news(request: HttpRequest) -> HttpResponse:
    """Show the page with a grant, and publish the text of its form."""
    if request.method == "POST":
        publish("news", "ping", request.POST["text"])
        return HttpResponse(status=204)
    grant = make_grant("news", listen=True)
    return render(request, "fetch_event_source/page.html", {"grant": grant})


urlpatterns = [
    path("", news),
    path("events/", include("django_eventsource.urls")),
]
