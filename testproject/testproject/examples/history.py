"""History as JSON: the URL of a stream returns the stored events."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from testproject.hints import MACHINE_TOKEN


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    return render(request, "testproject/history.html", {"token": MACHINE_TOKEN})
