"""The start page."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from .examples import EXAMPLES


@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """Show a card for each example."""
    return render(request, "testproject/index.html", {"examples": EXAMPLES})
