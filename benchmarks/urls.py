"""The URLs of the Django project that is measured: ours, and the views it is compared with."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt


@csrf_exempt
async def bare_view(request: HttpRequest) -> HttpResponse:
    """Answer what a stream begins with: the least that an async Django view does."""
    return HttpResponse(b": open\n", headers={"Content-Type": "text/event-stream"})


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("bare", bare_view),
]
