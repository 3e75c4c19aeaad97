"""The views for Prometheus, and for the probes of Kubernetes and of load balancers.

They change nothing, so each is exempt from the CSRF check: a POST is refused with 405, not 403.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from django.contrib.auth.decorators import login_not_required
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils.crypto import constant_time_compare
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe

from ..conf import conf
from ..operations.shutdown import shutdown
from ..operations.supervisor import get_supervisor
from ..streaming.response import PRIVATE
from .history_check import HistoryCheck, history_check
from .metrics import render

__all__ = ["live", "metrics", "ready"]


@csrf_exempt
@login_not_required
@require_safe
async def ready(request: HttpRequest, *, check_layer: bool = True) -> HttpResponse:
    """Respond with 200 if this process is ready for streams, otherwise with 503.

    It is ready if the history can be read, the channel layer delivers, and the process neither
    drains nor shuts down. The response is JSON, with one flag for each. The history is read at
    most once a second, however many requests arrive.

    :param check_layer: whether the process is not ready while the channel layer does not deliver.
        Durable events then arrive at the history checks, so you may want to keep the process.
    """
    deadline = asyncio.get_running_loop().time() + HistoryCheck.TIMEOUT_SECONDS
    # It also starts to receive the requests to drain. WSGI servers open no streams.
    supervisor = get_supervisor() if isinstance(request, ASGIRequest) else None
    history = await history_check.is_readable()
    layer = True
    if supervisor is not None:
        if history:
            # An earlier request to drain may be there.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await supervisor.control.has_read.wait()
        layer = supervisor.hub.layer_delivers or not check_layer
    draining = shutdown.draining or shutdown.begun
    found = {"history": history, "layer": layer, "draining": draining}
    is_ready = history and layer and not draining
    return JsonResponse(
        {"ready": is_ready, **found}, status=200 if is_ready else 503, headers=PRIVATE
    )


@csrf_exempt
@login_not_required
@require_safe
async def live(request: HttpRequest) -> HttpResponse:
    """Respond with 200, so that a probe detects a process whose event loop is blocked."""
    return JsonResponse({"live": True}, headers=PRIVATE)


@csrf_exempt
@login_not_required
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Respond with the metrics of this process, or of all processes in the multi-process mode.

    The request needs ``Authorization: Bearer`` with ``EVENTSOURCE_METRICS_TOKEN``.

    :raises ImproperlyConfigured: if ``prometheus-client`` is not installed.
    """
    token = conf.metrics_token
    if token is None:
        return _text(403, "The metrics are closed: EVENTSOURCE_METRICS_TOKEN is not set.")
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not constant_time_compare(sent.strip(), token):
        return _text(
            401,
            "The metrics need the header Authorization: Bearer, with the token of the settings.",
            **{"WWW-Authenticate": 'Bearer realm="eventsource metrics"'},
        )
    page, content_type = render(request.headers.get("Accept", ""))
    return HttpResponse(page, content_type=content_type, headers=PRIVATE)


def _text(status: int, text: str, **headers: str) -> HttpResponse:
    return HttpResponse(
        f"{text}\n",
        status=status,
        content_type="text/plain; charset=utf-8",
        headers={**PRIVATE, **headers},
    )
