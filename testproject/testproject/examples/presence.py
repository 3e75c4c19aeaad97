"""Presence: the number of listeners of a token."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import listeners

TOKEN = "demo:presence"


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    return render(request, "testproject/presence.html", {"token": TOKEN})


@never_cache
def count(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"count": listeners(TOKEN).count})
