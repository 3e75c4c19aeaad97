"""The view: GET opens a stream, POST publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, connections, transaction
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
)
from django.utils.decorators import classonlymethod
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from .addresses import address_of
from .conf import check_event_class, check_positive, conf
from .cursors import split_cursor
from .events import Event, is_durable
from .exceptions import (
    DeliveryFailed,
    EventTooLarge,
    InvalidToken,
    NotAuthenticated,
    RateLimited,
    UnknownAction,
)
from .history import Draft, get_history
from .listeners import Limit, Listener, registry
from .policies import Policy, check_origin, credentials_of, identify
from .publishing import apublish_posted, make_event
from .requests import keep_body, last_event_id, read_tokens, session_of
from .responses import HEADERS, PRIVATE, EventStreamResponse, Slot
from .shutdown import shutdown
from .signals import stream_opened
from .snapshots import Snapshot
from .streams import EventStream, come_back_later
from .tokens import check_token
from .troubles import Troubles
from .watch import get_watch

logger = logging.getLogger("django_eventsource.views")
troubles = Troubles(logger)

SETTING: Any = object()
"""Stands for the setting's value where ``None`` has a meaning of its own."""

METHODS = ["GET", "HEAD", "POST", "OPTIONS"]
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
    exclusive: bool = False
    """Answer 423 to a second listener of a token."""
    require_listener: bool = False
    """Answer 404 to a POST to a token that nobody listens to."""
    cursor_event: bool = False
    """Send cursors as events of the action ``cursor``, for clients that ignore an id without
    data."""

    http_method_names = [method.lower() for method in METHODS]

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
        """Check method, token, permission and action, in this order, then answer.

        Without permission a client cannot learn which actions there are.
        """
        if request.method == "OPTIONS":
            return HttpResponse(headers={"Allow": ", ".join(METHODS), "Content-Length": "0"})
        if request.method not in METHODS:
            return not_allowed(METHODS)
        try:
            check_token(token)
            tokens = read_tokens(request, token, conf.stream_max_tokens)
        except InvalidToken as error:
            return text_response(400, str(error))
        if request.method == "POST" and len(tokens) > 1:
            return text_response(
                400, "An event is published to the token of the path: ?token= is for GET."
            )
        return await self.answer(request, action, tokens)

    async def answer(
        self, request: HttpRequest, action: str, tokens: list[str]
    ) -> HttpResponseBase:
        """Answer a request that is well formed."""
        policy = (self.policy or conf.policy)()
        sends = request.method == "POST"
        if sends and not keep_body(request, conf.max_event_bytes):
            return text_response(
                413, f"An event's value may have at most {conf.max_event_bytes} bytes."
            )
        snapshot: Snapshot | None = None
        try:
            if sends:
                allowed = await policy.can_send(request, tokens[0], action)
            else:
                if isinstance(request, ASGIRequest):
                    snapshot = await Snapshot.of(request)
                allowed = await may_listen(policy, request, tokens)
            if not allowed:
                await refuse(request)
            if sends:
                check_origin(request)
        except NotAuthenticated as error:
            return unauthorized(str(error))
        except PermissionDenied as error:
            return text_response(403, str(error) or "Permission denied.")
        except RateLimited as error:
            return text_response(429, str(error), **{"Retry-After": str(error.retry_after)})
        except failures() as error:
            troubles.tell(
                "The rights of %r cannot be checked: the database failed.", tokens, error
            )
            if sends:
                return text_response(503, "The database failed; the event was not published.")
            return later()
        methods = self.methods(action)
        if not methods:
            return self.unknown_action(action, sends)
        if request.method not in methods:
            return not_allowed(methods)
        if sends:
            return await self.post(request, action, tokens[0])
        return await self.get(request, tokens, policy, snapshot)

    # Hooks

    def get_event_class(self) -> type[Event]:
        """Give the Event class of this URL."""
        return self.event_class or conf.event_class

    def get_keepalive_seconds(self) -> float | None:
        """Give the longest silence on a stream of this URL, in seconds."""
        if self.keepalive_seconds is SETTING:
            return conf.keepalive_seconds
        return self.keepalive_seconds

    async def initial_state(self, request: HttpRequest, token: str) -> Iterable[tuple[str, Any]]:
        """Give what a stream begins with: pairs of an action and a value. Override it.

        It is called when a listener is new, or has missed events: after the place was
        read from which the stream goes on. So an event that is published while the state
        is read comes twice at worst: in the state and after it. Nothing is missed.
        """
        return ()

    # Listening

    async def get(
        self,
        request: HttpRequest,
        tokens: list[str],
        policy: Policy,
        snapshot: Snapshot | None = None,
    ) -> HttpResponseBase:
        """Open a stream; for HEAD give its headers only."""
        if not isinstance(request, ASGIRequest) or snapshot is None:
            return text_response(500, WSGI_PAGE)
        if request.method == "HEAD":
            return HttpResponse(headers=HEADERS)
        watch = get_watch()
        try:
            listener = await self.listener(request, tokens, policy, snapshot)
        except failures() as error:
            troubles.tell("Who listens to %r cannot be told.", tokens, error)
            return later()
        if shutdown.begun or registry.limit(listener) not in (None, Limit.EXCLUSIVE):
            return later()
        asked = last_event_id(request, len(tokens))
        try:
            cursors = split_cursor(asked, tokens)
            history = get_history()
            positions = {token: await history.alocate(token, cursors[token]) for token in tokens}
            if self.exclusive and any([await watch.is_listened(token) for token in tokens]):
                return locked()
        except Exception as error:  # noqa: BLE001
            troubles.tell("The history of %r cannot be read; asking to come back.", tokens, error)
            return later()
        if all(position.closed for position in positions.values()):
            return HttpResponse(status=204, headers=PRIVATE)
        try:
            state = b"".join(
                [
                    await self.state(request, token)
                    for token, position in positions.items()
                    if not (cursors[token] and position.known)
                ]
            )
        except (PermissionDenied, Http404):
            raise
        except Exception:
            logger.exception("initial_state() of %s failed; asking to come back.", type(self))
            return later()
        stream = EventStream(
            tokens[0],
            positions.pop(tokens[0]),
            asked=asked,
            durable=is_durable(self.get_event_class()),
            keepalive_seconds=self.get_keepalive_seconds(),
            others=positions,
            state=state,
            cursor_event=self.cursor_event,
        )
        limit = watch.admit(stream, listener)
        if limit is not None:
            return locked() if limit == Limit.EXCLUSIVE else later()
        if stream_opened.has_listeners(type(self)):
            await stream_opened.asend_robust(type(self), listener=listener, request=request)
        # GZipMiddleware would compress every chunk by itself.
        request.META["HTTP_ACCEPT_ENCODING"] = "identity"
        return EventStreamResponse(stream, request.scope.get(Slot.KEY))

    async def listener(
        self, request: ASGIRequest, tokens: list[str], policy: Policy, snapshot: Snapshot
    ) -> Listener:
        """Say who is to listen."""
        listener = Listener(
            tokens=tuple(tokens),
            user=identity(await getattr(policy, "identify", identify)(request)),
            address=address_of(request),
            session=session_of(request),
            exclusive=self.exclusive,
            sender=type(self),
        )
        snapshot.remember(request)

        async def recheck() -> bool:
            try:
                request = await snapshot.restore(listener.opened)
                return await may_listen(policy, request, tokens)
            except (NotAuthenticated, PermissionDenied):
                return False

        listener.recheck = recheck
        return listener

    async def state(self, request: HttpRequest, token: str) -> bytes:
        """Encode the initial state. Without ids: who is cut off in it has not got it."""
        event_class = self.get_event_class()
        frames = []
        for action, value in await self.initial_state(request, token):
            if action == event_class.FINISH:
                raise ValueError("A stream cannot begin with its end.")
            draft = Draft.of(make_event(token, action, value, event_class))
            frames.append(replace(draft, event_id=None).frame())
        return b"".join(frames)

    # Sending

    async def post(self, request: HttpRequest, action: str, token: str) -> HttpResponseBase:
        """Publish the body."""
        event_class = self.get_event_class()
        grant = credentials_of(request).grant
        special = action in (event_class.FINISH, event_class.RETRY)
        if special and grant is not None and grant.actions is None:
            return text_response(
                403, f"The grant does not name the action {action!r}, and only then allows it."
            )
        if self.require_listener and not await get_watch().is_listened(token):
            return text_response(404, "Nobody listens to this token.")
        body = request.body
        try:
            value = body.decode()
        except UnicodeDecodeError as error:
            return text_response(
                400, f"The body is not UTF-8: byte {body[error.start]:#04x} at {error.start}."
            )
        try:
            event = await apublish_posted(token, action, value, event_class)
        except EventTooLarge as error:
            return text_response(413, str(error))
        except ValueError as error:
            return text_response(400, str(error))
        except get_history().failures as error:
            troubles.tell("The history of %r failed.", token, error)
            return text_response(
                503, "The history's store failed; the event may not have been published."
            )
        except DeliveryFailed:
            logger.exception("A live-only event was lost.")
            return text_response(503, "The channel layer failed; the event was not sent.")
        headers = {**PRIVATE, "Accept": event_class.content_type}
        return JsonResponse({"id": event.id}, headers=headers)

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

    def unknown_action(self, action: str, sends: bool) -> HttpResponse:
        """Answer 404, naming the actions that there are."""
        event_class = self.get_event_class()
        allowed = list(event_class.ACTIONS) if sends else [event_class.LISTEN]
        return text_response(404, str(UnknownAction(action, allowed, event_class.__name__)))


async def may_listen(policy: Policy, request: HttpRequest, tokens: list[str]) -> bool:
    """Ask the policy about every token.

    :raises NotAuthenticated: when the policy does.
    :raises PermissionDenied: when the policy does.
    """
    for token in tokens:
        if not await policy.can_listen(request, token):
            return False
    return True


def failures() -> tuple[type[Exception], ...]:
    """Give what is the database's fault, or that of the history's store."""
    return DatabaseError, *get_history().failures


def identity(user: object) -> str:
    """Give what a policy says of who it is, as text; empty for nobody."""
    return "" if user is None else str(user)


def later() -> HttpResponse:
    """Answer a listener that is to come back later."""
    return HttpResponse(come_back_later(), headers=HEADERS)


def locked() -> HttpResponse:
    """Answer 423: somebody listens already."""
    return text_response(423, "Somebody listens to this token already, and only one may.")


async def refuse(request: HttpRequest) -> None:
    """Refuse a request that the policy does not allow, for the reason that fits."""
    auser = getattr(request, "auser", None)
    if auser is not None and (await auser()).is_authenticated:
        raise PermissionDenied("Permission denied.")
    raise NotAuthenticated("Authentication is required.")


def not_allowed(methods: list[str]) -> HttpResponse:
    """Answer 405, naming the methods that are allowed."""
    allowed = ", ".join(methods)
    return text_response(405, f"This URL answers {allowed}.", Allow=allowed)


def text_response(status: int, text: str, **headers: str) -> HttpResponse:
    """Answer with one line of text."""
    return HttpResponse(
        text.rstrip("\n") + "\n",
        status=status,
        content_type="text/plain; charset=utf-8",
        headers={**PRIVATE, **headers},
    )


def unauthorized(text: str) -> HttpResponse:
    """Answer 401.

    HTTP Basic is understood but not announced: browsers would ask for a password.
    """
    response = text_response(401, text)
    response["WWW-Authenticate"] = 'Bearer realm="eventsource"'
    return response
