"""The view: GET opens a stream, POST publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, connections, transaction
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
    RawPostDataException,
)
from django.utils.decorators import classonlymethod
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from .conf import check_event_class, check_positive, conf
from .events import Event, is_durable
from .exceptions import DeliveryFailed, InvalidToken, NotAuthenticated, UnknownAction
from .history import get_history
from .history.base import MAX_CURSOR_LENGTH
from .policies import Policy
from .publishing import apublish
from .streams import HEADERS, EventStream, EventStreamResponse, come_back_later
from .tokens import check_token

logger = logging.getLogger("django_eventsource.views")

NO_CURSOR = " "
"""Stands for a last event id that was never one: ids hold no space."""

SETTING: Any = object()
"""Stands for the setting's value where ``None`` has a meaning of its own."""

WSGI_PAGE = (
    "Server-sent events need an ASGI server, and this request came through WSGI.\n"
    "Serve the project's ASGI application with daphne, uvicorn, hypercorn or granian;\n"
    'for `manage.py runserver` put "daphne" first in INSTALLED_APPS and set\n'
    "ASGI_APPLICATION. In tests use django.test.AsyncClient.\n"
)


class EventSourceView(View):
    """``GET /<LISTEN>/<token>`` opens a stream, ``POST /<action>/<token>`` publishes.

    Every attribute can be given to :meth:`as_view`; without one the setting counts.
    """

    event_class: type[Event] | None = None
    """The Event class: what may be sent here, and what is announced."""
    keepalive_seconds: float | None = SETTING
    """Longest silence on a stream; ``None`` for no keepalives."""
    policy: type[Policy] | None = None
    """The policy class."""

    http_method_names = ["get", "head", "post", "options"]

    @classonlymethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:  # noqa: N805
        """Make the view function.

        :raises ImproperlyConfigured: when the Event class or the time is not usable.
        """
        if initkwargs.get("event_class") is not None:
            check_event_class(initkwargs["event_class"])
        if "keepalive_seconds" in initkwargs:
            check_positive("keepalive_seconds", initkwargs["keepalive_seconds"])
        view = super().as_view(**initkwargs)
        # An async view cannot run in ATOMIC_REQUESTS' transaction.
        for alias in connections:
            view = transaction.non_atomic_requests(alias)(view)
        # The policy decides who may, and checks CSRF where a session is what authorizes.
        return csrf_exempt(login_not_required(view))

    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, action: str = "", token: str = "", **kwargs: Any
    ) -> HttpResponseBase:
        """Check action, method, token and permission, in this order, then answer."""
        methods = self.methods(action)
        if not methods:
            event_class = self.get_event_class()
            sends = request.method == "POST"
            allowed = list(event_class.ACTIONS) if sends else [event_class.LISTEN]
            return text_response(404, str(UnknownAction(action, allowed, event_class.__name__)))
        if request.method not in methods:
            return self.not_allowed(methods)
        if request.method == "OPTIONS":
            return HttpResponse(headers={"Allow": ", ".join(methods), "Content-Length": "0"})
        try:
            check_token(token)
        except InvalidToken as error:
            return text_response(400, str(error))
        return await self.answer(request, action, token)

    async def answer(self, request: HttpRequest, action: str, token: str) -> HttpResponseBase:
        """Answer a request that is well formed."""
        policy = (self.policy or conf.policy)()
        sends = request.method == "POST"
        if sends and not keep_body(request, conf.max_event_bytes):
            return text_response(
                413, f"An event's value may have at most {conf.max_event_bytes} bytes."
            )
        try:
            if sends:
                allowed = await policy.can_send(request, token, action)
            else:
                allowed = await policy.can_listen(request, token)
            if not allowed:
                await refuse(request)
        except NotAuthenticated as error:
            return unauthorized(str(error))
        except PermissionDenied as error:
            return text_response(403, str(error) or "Permission denied.")
        if sends:
            return await self.post(request, action, token)
        return await self.get(request, action, token)

    # Hooks

    def get_event_class(self) -> type[Event]:
        """Give the Event class of this URL."""
        return self.event_class or conf.event_class

    def get_keepalive_seconds(self) -> float | None:
        """Give the longest silence on a stream of this URL, in seconds."""
        if self.keepalive_seconds is SETTING:
            return conf.keepalive_seconds
        return self.keepalive_seconds

    # Listening

    async def get(self, request: HttpRequest, action: str, token: str) -> HttpResponseBase:
        """Open a stream; for HEAD give its headers only."""
        if not isinstance(request, ASGIRequest):
            return text_response(500, WSGI_PAGE)
        if request.method == "HEAD":
            return HttpResponse(headers=HEADERS)
        asked = last_event_id(request)
        try:
            position = await get_history().alocate(token, asked)
        except Exception:
            logger.exception("The history of %r cannot be read; asking to come back.", token)
            return HttpResponse(come_back_later(), headers=HEADERS)
        if position.closed:
            return HttpResponse(status=204, headers={"Cache-Control": "no-store"})
        # GZipMiddleware would compress every chunk by itself.
        request.META["HTTP_ACCEPT_ENCODING"] = "identity"
        stream = EventStream(
            token,
            position,
            asked=asked,
            durable=is_durable(self.get_event_class()),
            keepalive_seconds=self.get_keepalive_seconds(),
        )
        return EventStreamResponse(stream)

    # Sending

    async def post(self, request: HttpRequest, action: str, token: str) -> HttpResponseBase:
        """Publish the body."""
        event_class = self.get_event_class()
        body = request.body
        try:
            value = body.decode()
        except UnicodeDecodeError as error:
            return text_response(
                400, f"The body is not UTF-8: byte {body[error.start]:#04x} at {error.start}."
            )
        try:
            event = await apublish(token, action, value, event_class)
        except ValueError as error:
            return text_response(400, str(error))
        except DatabaseError:
            logger.exception("The history of %r failed.", token)
            return text_response(
                503, "The history's database failed; the event may not have been published."
            )
        except DeliveryFailed:
            logger.exception("A live-only event was lost.")
            return text_response(503, "The channel layer failed; the event was not sent.")
        return JsonResponse({"id": event.id}, headers={"Accept": event_class.content_type})

    # Methods

    def methods(self, action: str) -> list[str]:
        """Give the methods of an action's URL; none for an unknown action."""
        event_class = self.get_event_class()
        methods = []
        if action == event_class.LISTEN:
            methods += ["GET", "HEAD"]
        if action in event_class.ACTIONS:
            methods += ["POST"]
        return [*methods, "OPTIONS"] if methods else []

    def not_allowed(self, methods: list[str]) -> HttpResponse:
        """Answer 405, naming the methods that are."""
        allowed = ", ".join(methods)
        response = text_response(405, f"This URL answers {allowed}.")
        response["Allow"] = allowed
        return response


def keep_body(request: HttpRequest, limit: int) -> bool:
    """Read the body, and no more of it than allowed; ``False`` when there is more.

    It is kept as Django keeps it, so that a CSRF check that parses it leaves it intact.

    :raises RawPostDataException: when middleware has consumed it before.
    """
    if getattr(request, "_read_started", False) and not hasattr(request, "_body"):
        raise RawPostDataException(
            "Middleware has consumed the request's body: nothing is left to publish."
        )
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:18]) > limit:
        return False
    body = request.read(limit + 1)
    request._body = body
    return len(body) <= limit


def last_event_id(request: HttpRequest) -> str | None:
    """Give the listener's last event id: the header's, else the query's, else ``None``.

    It is untrusted: what never was an id comes back as one that no event has.
    """
    text = request.headers.get("Last-Event-ID", "")
    if text:
        # Servers hand headers on as Latin-1; the standard sends this one as UTF-8.
        text = text.encode("latin-1", "replace").decode("utf-8", "replace")
    else:
        text = request.GET.get("last_event_id", "")
    if not text:
        return None
    visible = text.isascii() and text.isprintable() and " " not in text
    return text if visible and len(text) <= MAX_CURSOR_LENGTH else NO_CURSOR


async def refuse(request: HttpRequest) -> None:
    """Refuse a request that the policy does not allow, for the reason that fits."""
    auser = getattr(request, "auser", None)
    if auser is not None and (await auser()).is_authenticated:
        raise PermissionDenied("Permission denied.")
    raise NotAuthenticated("Authentication is required.")


def text_response(status: int, text: str) -> HttpResponse:
    """Answer with one line of text."""
    return HttpResponse(
        text.rstrip("\n") + "\n",
        status=status,
        content_type="text/plain; charset=utf-8",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


def unauthorized(text: str) -> HttpResponse:
    """Answer 401.

    HTTP Basic is understood but not announced: browsers would ask for a password.
    """
    response = text_response(401, text)
    response["WWW-Authenticate"] = 'Bearer realm="eventsource"'
    return response
