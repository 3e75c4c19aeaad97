"""The page, the view that starts an answer, and the URLs."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from urllib.parse import quote

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import include, path

from django_eventsource import astart_production
from django_eventsource.events import StringIdEvent
from django_eventsource.grants import make_grant
from django_eventsource.views import EventSourceView


class AnswerEvent(StringIdEvent):
    """An event of an answer. Clients may stop it."""

    ACTIONS = ["stop"]


def page(request: HttpRequest) -> HttpResponse:
    """Show the page."""
    return render(request, "ai_sdk/page.html")


async def ask(request: HttpRequest) -> JsonResponse:
    """Start an answer, and return the URLs of its stream and of its end."""
    token = f"answer:{uuid.uuid4()}"
    await astart_production(token, answer(request.POST["question"]), event_class=AnswerEvent)
    grant = quote(make_grant(token, listen=True, send=True, actions=["stop"]))
    return JsonResponse(
        {
            "stream": f"/answers/poll/{token}?rewind=all&grant={grant}",
            "stop": f"/answers/stop/{token}?grant={grant}",
        }
    )


async def answer(question: str) -> AsyncIterator[str]:
    """Yield an answer word by word. Call your model here."""
    for word in f"You asked: {question}\nThis is the answer, word by word.".split(" "):
        await asyncio.sleep(0.2)
        yield f"{word} "


urlpatterns = [
    path("", page),
    path("ask/", ask),
    path("answers/<action>/<token>", EventSourceView.as_view(event_class=AnswerEvent)),
    path("events/", include("django_eventsource.urls")),
]
