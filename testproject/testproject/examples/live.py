"""Live ping: the page listens to a token, and sends events to it."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from django_eventsource import get_cursor
from django_eventsource.conf import conf
from django_eventsource.exceptions import InvalidToken
from testproject.hints import DEFAULT_TOKEN, MACHINE_TOKEN, commands

CHART_SECONDS = 120


@never_cache  # the page contains grants, which expire
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    """Show the chart of this machine, and a box with the events of a token.

    The box starts after the cursor, so it receives an event that is published while the page
    loads. The chart receives its recent past from its stream, because of the rewind.
    """
    token = request.GET.get("token") or DEFAULT_TOKEN
    context = {
        "token": token,
        "default_token": DEFAULT_TOKEN,
        "machine_token": MACHINE_TOKEN,
        "chart_seconds": CHART_SECONDS,
        "actions": conf.event_class.ACTIONS,
        "finish": conf.event_class.FINISH,
        "retry": conf.event_class.RETRY,
        "content_type": conf.event_class.content_type,
    }
    try:
        context["cursor"] = get_cursor(token)
    except InvalidToken as error:
        context["token_error"] = str(error)
        return render(request, "testproject/live.html", context, status=400)
    host = request.get_host().rsplit(":", 1)[0].strip("[]")
    context["commands"] = commands(token, host, int(request.get_port()))
    return render(request, "testproject/live.html", context)
