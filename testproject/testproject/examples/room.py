"""A chat room: its messages, and the names of the people in it."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache

from django_eventsource import listeners, publish
from django_eventsource.events import JSONIdEvent
from django_eventsource.policies import Policy
from django_eventsource.views import EventSourceView

TOKEN = "demo:room"


class RoomEvent(JSONIdEvent):
    """A message. Its value is a name and a text."""

    ACTIONS = ["message"]


class RoomPolicy(Policy):
    """Clients that have entered a name may listen to the room, and only to it."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        return token == TOKEN and bool(await self.identify(request))

    async def identify(self, request: HttpRequest) -> str:
        return str(await request.session.aget("name", ""))


stream = EventSourceView.as_view(policy=RoomPolicy)


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    name = request.session.get("name")
    if request.method != "POST":
        return render(request, "testproject/room.html", {"token": TOKEN, "name": name})
    match request.POST["do"]:
        case "enter":
            request.session["name"] = request.POST["name"].strip()[:30]
        case "leave":
            request.session.flush()  # the stream ends at the next recheck, or with the page
        case "say" if name:
            publish(TOKEN, "message", {"name": name, "text": request.POST["text"]}, RoomEvent)
            return HttpResponse(status=204)
    return redirect("room")


@never_cache
def people(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"people": listeners(TOKEN).users})
