"""The page, which also publishes, and the URLs."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import include, path

from django_eventsource import publish_template


def news(request: HttpRequest) -> HttpResponse:
    """Show the page, and publish the text of its form as HTML."""
    if request.method == "POST":
        context = {"text": request.POST["text"]}
        publish_template("news", "message", "htmx/item.html", context)
        return HttpResponse(status=204)
    return render(request, "htmx/page.html")


urlpatterns = [
    path("", news),
    path("events/", include("django_eventsource.urls")),
]
