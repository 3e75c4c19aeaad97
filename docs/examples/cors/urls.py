"""The page, which also publishes, and the URLs."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import include, path

from django_eventsource import publish
from django_eventsource.grants import make_grant


def news(request: HttpRequest) -> HttpResponse:
    """Show the page, and publish the text of its form.

    Open the page as ``localhost``: it listens to ``127.0.0.1``, which is another origin.
    """
    if request.method == "POST":
        publish("news", "ping", request.POST["text"])
        return HttpResponse(status=204)
    context = {
        "api": f"http://127.0.0.1:{request.get_port()}",
        "grant": make_grant("news", listen=True),
    }
    return render(request, "cors/page.html", context)


urlpatterns = [
    path("", news),
    path("events/", include("django_eventsource.urls")),
]
