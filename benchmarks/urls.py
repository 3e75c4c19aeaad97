"""The URLs of the Django project that is measured: those of this app, and others to compare."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.conf import settings
from django.contrib.auth.models import Group
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt

from django_eventsource.policies import DefaultPolicy
from django_eventsource.views import EventSourceView

HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}


@csrf_exempt
async def bare_view(request: HttpRequest) -> HttpResponse:
    """Respond with the beginning of a stream: the minimum of an async Django view."""
    return HttpResponse(b": open\n", headers=HEADERS)


@csrf_exempt
async def read_body(request: HttpRequest) -> HttpResponse:
    """Read the body: the minimum of a view that receives a POST."""
    return HttpResponse(status=204 if request.body else 400)


@csrf_exempt
async def save_row(request: HttpRequest) -> HttpResponse:
    """Save one row of a small table."""
    await Group.objects.acreate(name=uuid4().hex)
    return HttpResponse(status=204 if request.body else 400)


@csrf_exempt
async def naive(request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
    """Stream from a channel for each connection, as the tutorials of Channels do; POST sends."""
    layer = get_channel_layer()
    if request.method == "POST":
        await layer.group_send("naive", {"type": "event", "text": request.body.decode()})
        return HttpResponse(status=204)

    async def stream() -> AsyncIterator[bytes]:
        channel = await layer.new_channel()
        await layer.group_add("naive", channel)
        yield b": open\n"
        while True:
            message = await layer.receive(channel)
            yield f"event: ping\ndata: {message['text']}\n\n".encode()

    return StreamingHttpResponse(stream(), headers=HEADERS)


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("closed/<action>/<token>", EventSourceView.as_view(policy=DefaultPolicy)),
    path("bare", bare_view),
    path("body", read_body),
    path("row", save_row),
    path("naive", naive),
]

if "django_eventstream" in settings.INSTALLED_APPS:
    from django_eventstream import send_event

    @csrf_exempt
    async def eventstream_send(request: HttpRequest) -> HttpResponse:
        """Send with django-eventstream."""
        await sync_to_async(send_event)("t", "ping", {"text": request.body.decode()})
        return HttpResponse(status=204)

    urlpatterns += [
        path("eventstream/send", eventstream_send),
        path("eventstream/", include("django_eventstream.urls"), {"channels": ["t"]}),
    ]
