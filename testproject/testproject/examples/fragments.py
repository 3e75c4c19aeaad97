"""Fragments of HTML: the page and its events use the same template."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import get_cursor, publish_template
from testproject.models import Choice

TOKEN = "demo:poll"
NAMES = ["SQLite", "PostgreSQL", "MariaDB", "MySQL"]


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        if request.POST["choice"] not in NAMES:
            return HttpResponse(status=400)
        vote(request.POST["choice"])
        return HttpResponse(status=204)
    cursor = get_cursor(TOKEN)
    stored = Choice.objects.in_bulk(field_name="name")
    choices = [stored.get(name) or Choice(name=name) for name in NAMES]
    context = {"token": TOKEN, "cursor": cursor, "choices": choices}
    return render(request, "testproject/fragments.html", context)


@transaction.atomic
def vote(name: str) -> None:
    """Count a vote. The lock of the row keeps the events in the order of the votes."""
    choice, _ = Choice.objects.select_for_update().get_or_create(name=name)
    choice.votes += 1
    choice.save()
    publish_template(TOKEN, "ping", "testproject/bar.html", {"choice": choice})
