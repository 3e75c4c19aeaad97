"""The page, which also publishes, and the URLs."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import include, path

from django_eventsource import publish


def news(request: HttpRequest) -> HttpResponse:
    """Show the page, and publish the text of its form."""
    if request.method == "POST":
        publish("news", "ping", request.POST["text"])
        return HttpResponse(status=204)
    return render(request, "plain/page.html")


urlpatterns = [
    path("", news),
    path("events/", include("django_eventsource.urls")),
]
