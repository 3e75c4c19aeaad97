"""Data, then events: the view gets the cursor before it reads the data."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import get_cursor, publish
from django_eventsource.events import JSONIdEvent
from testproject.models import Task

TOKEN = "demo:tasks"


class TaskEvent(JSONIdEvent):
    """A task that was added. Its value is the id and the text."""

    ACTIONS = ["task"]


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        with transaction.atomic():
            task = Task.objects.create(text=request.POST["text"][:200])
            publish(TOKEN, "task", {"id": task.pk, "text": task.text}, TaskEvent)
        return HttpResponse(status=204)
    cursor = get_cursor(TOKEN)  # first the cursor,
    tasks = reversed(Task.objects.order_by("-pk")[:6])  # then the data
    context = {"token": TOKEN, "cursor": cursor, "tasks": tasks}
    return render(request, "testproject/cursor.html", context)
