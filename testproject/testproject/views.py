"""The demo page."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from django_eventsource.conf import conf
from django_eventsource.exceptions import InvalidToken
from django_eventsource.history import get_history
from django_eventsource.tokens import check_token

from . import machine
from .hints import DEFAULT_TOKEN, commands

CHART_SECONDS = 120


@never_cache  # the page holds grants, which expire
@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """Show the chart and the box. Both streams go on from where the page was made.

    An event that is sent between the page and its streams is therefore shown as well; the
    chart goes on from a while before, and gets its recent past from its stream.
    """
    token = request.GET.get("token") or DEFAULT_TOKEN
    context = {
        "token": token,
        "default_token": DEFAULT_TOKEN,
        "machine_token": machine.TOKEN,
        "machine_cursor": recent(machine.TOKEN, CHART_SECONDS),
        "chart_seconds": CHART_SECONDS,
        "actions": conf.event_class.ACTIONS,
        "finish": conf.event_class.FINISH,
        "retry": conf.event_class.RETRY,
        "content_type": conf.event_class.content_type,
    }
    try:
        check_token(token)
    except InvalidToken as error:
        context["token_error"] = str(error)
        return render(request, "testproject/index.html", context, status=400)
    host = request.get_host().rsplit(":", 1)[0].strip("[]")
    context["cursor"] = get_history().locate(token, None).cursor
    context["commands"] = commands(token, host, int(request.get_port()))
    return render(request, "testproject/index.html", context)


def recent(token: str, events: int) -> int:
    """Give the last event id of a listener that has yet to see the newest few events.

    Where not so many are kept it is the place before the oldest: a listener of an id that
    is too old would be told ``reset``.
    """
    history = get_history()
    return max(history.newest(token)[0] - events, history.oldest(token))
