"""The views: of streams, the history and POSTs, and the one that renews grants."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, connections, transaction
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
)
from django.utils.cache import get_conditional_response, set_response_etag
from django.utils.decorators import classonlymethod
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from ._logging import ThrottledLogger
from .access.addresses import address_of
from .conf import check_event_class, check_positive_or_none, conf
from .events import Event, action_error, has_own_ids, is_durable, must_be_named
from .exceptions import (
    DeliveryFailed,
    EventTooLarge,
    InvalidParameter,
    InvalidToken,
    NotAuthenticated,
    RateLimited,
    UnknownAction,
)
from .grants import lasting_session_key, make_grant
from .history import Draft, get_history
from .operations.shutdown import shutdown
from .operations.supervisor import get_supervisor
from .policies import (
    Policy,
    check_origin,
    check_policy_class,
    credentials_of,
    make_policy,
    sender_of,
    session_user,
)
from .protocol.cursors import parse_cursors
from .protocol.rewind import Rewind, parse_rewind
from .publishing import LOOP_BYTES, apublish_posted, make_event
from .reading import DEFAULT_LIMIT, HistoryPage, aread_history
from .signals import Listener, stream_opened
from .streaming.open_stream import OpenStream
from .streaming.registry import Limit, registry
from .streaming.request import (
    keep_body,
    last_event_id,
    number_of,
    prefers_json,
    read_tokens,
    refuse_parameter,
    session_of,
)
from .streaming.request_snapshot import Snapshot
from .streaming.response import HEADERS, PRIVATE, EventStreamResponse, Slot
from .streaming.stream import retry_body

__all__ = ["EventSourceView", "RenewGrantView"]

logger = logging.getLogger("django_eventsource.views")
throttled = ThrottledLogger(logger)

SETTING: Any = object()
"""The default of a class attribute for which ``None`` is a value."""

JSON_EVENT_BYTES = 80
"""About the bytes of an event in a page of the history, without its value."""
METHODS = ["GET", "HEAD", "POST", "OPTIONS"]
RENEW_METHODS = ["GET", "OPTIONS"]
REWIND_AND_STATE = (
    "A view that sends an initial state cannot rewind, because the state contains the stored "
    "events already."
)
NOT_OF_A_STREAM = (
    "it is for stored events as JSON (Accept: application/json). A stream starts after the cursor "
    "in ?last_event_id=."
)
NOT_OF_A_PAGE = "it is for a stream. Stored events as JSON begin after the cursor in ?after=."
WSGI_PAGE = (
    "Server-sent events need an ASGI server, and this request came through WSGI.\n"
    "Serve the project's ASGI application with daphne, uvicorn, hypercorn or granian;\n"
    'for `manage.py runserver` put "daphne" first in INSTALLED_APPS and set\n'
    "ASGI_APPLICATION. In tests use django.test.AsyncClient.\n"
)


class EventSourceView(View):
    """``GET /<LISTEN>/<token>`` opens a stream, ``POST /<action>/<token>`` publishes.

    A GET with ``Accept: application/json`` responds with stored events instead of a stream.

    Set the attributes in a subclass, or pass them to :meth:`as_view`.
    """

    event_class: type[Event] | None = None
    """The Event class that lists the actions; ``None`` uses ``EVENTSOURCE_EVENT_CLASS``."""
    keepalive_seconds: float | None = SETTING
    """Seconds without data after which a stream sends a keepalive comment; ``None`` disables it.
    The default is ``EVENTSOURCE_KEEPALIVE_SECONDS``."""
    policy: type[Policy] | None = None
    """The policy class; ``None`` uses ``EVENTSOURCE_POLICY``."""
    exclusive: bool = False
    """Whether a second listener of a token is refused with 423."""
    require_listener: bool = False
    """Whether a POST to a token without a listener is refused with 404."""
    cursor_event: bool = False
    """Whether cursors are sent as events of the action ``cursor``, for clients that ignore an id
    without data."""
    rewind: str | int | None = None
    """The stored events with which a listener without a cursor starts: a number (``10``), an age
    (``"30s"``, ``"5m"``, ``"2h"``) or ``"all"``; ``None`` for none. The request's ``?rewind=``
    takes precedence."""

    http_method_names = [method.lower() for method in METHODS]
    view_is_async = True

    @classonlymethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:  # noqa: N805
        """Return the view function.

        :param initkwargs: values of the class attributes.
        :raises ImproperlyConfigured: if the Event class, the policy, the number of seconds or the
            rewind is not valid.
        """
        if initkwargs.get("event_class") is not None:
            check_event_class(initkwargs["event_class"])
        if initkwargs.get("policy") is not None:
            check_policy_class("policy", initkwargs["policy"])
        if "keepalive_seconds" in initkwargs:
            check_positive_or_none("keepalive_seconds", initkwargs["keepalive_seconds"])
        rewind = initkwargs.get("rewind", cls.rewind)
        if rewind is not None:
            try:
                parse_rewind(rewind)
            except InvalidParameter as error:
                raise ImproperlyConfigured(f"{cls.__name__}: {error}") from error
            if cls._has_initial_state():
                raise ImproperlyConfigured(f"{cls.__name__}.rewind: {REWIND_AND_STATE}")
        # The policy decides on access, and checks CSRF where a session authorizes the request.
        return csrf_exempt(_with_policy(super().as_view(**initkwargs)))

    # Hooks

    def get_event_class(self) -> type[Event]:
        """Return the Event class of this URL."""
        return self.event_class or conf.event_class

    def get_keepalive_seconds(self) -> float | None:
        """Return the seconds without data after which a stream sends a keepalive, or ``None``."""
        if self.keepalive_seconds is SETTING:
            return conf.keepalive_seconds
        return self.keepalive_seconds

    async def initial_state(self, request: HttpRequest, token: str) -> Iterable[tuple[str, Any]]:
        """Return the events that a stream of a token starts with; the default returns none.

        It is called for a new listener, and for one that has missed events. The stream's position
        in the history is read before the call. So an event that is published during the call is
        received twice at worst, in the state and after it, and is never missed.

        :param token: one of the stream's tokens; the method is called for each.
        :returns: pairs of an action and a value. The action may not be ``FINISH``.
        :raises PermissionDenied: to respond with 403.
        :raises Http404: to respond with 404.
        """
        return ()

    # Both methods

    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, action: str = "", token: str = "", **kwargs: Any
    ) -> HttpResponseBase:
        """Check the method, the tokens, the permission and the action, in this order.

        A client without permission cannot find out which actions exist.
        """
        if request.method == "OPTIONS":
            return _options(METHODS)
        if request.method not in METHODS:
            return _not_allowed(METHODS)
        sends = request.method == "POST"
        try:
            tokens = read_tokens(request, token, conf.stream_max_tokens)
        except InvalidToken as error:
            return _text_response(400, str(error))
        if sends and len(tokens) > 1:
            return _text_response(
                400, "An event is published to the token of the path: ?token= is for GET."
            )
        if sends and not keep_body(request, conf.max_event_bytes):
            return _text_response(
                413, f"An event's value may have at most {conf.max_event_bytes} bytes."
            )
        policy = make_policy(self.policy)
        try:
            snapshot = await _authorize(policy, request, action, tokens)
        except (NotAuthenticated, PermissionDenied, RateLimited, Http404) as error:
            return _refused(error)
        except _storage_errors() as error:
            throttled.error(
                "The permission for %r cannot be checked: the database failed.",
                tokens,
                error=error,
            )
            if sends:
                return _text_response(503, "The database failed; the event was not published.")
            return _retry_later()
        methods = self._methods(action)
        if not methods:
            return self._unknown_action(action, sends)
        if request.method not in methods:
            return _not_allowed(methods)
        if sends:
            return await self._publish(request, policy, action, tokens[0])
        if prefers_json(request):
            return await self._read_history(request, tokens)
        return await self._open(request, tokens, policy, snapshot)

    def _methods(self, action: str) -> list[str]:
        event_class = self.get_event_class()
        methods = []
        if action == event_class.LISTEN:
            methods += ["GET", "HEAD"]
        if action_error(event_class, action) is None:
            methods += ["POST"]
        return [*methods, "OPTIONS"] if methods else []

    def _unknown_action(self, action: str, sends: bool) -> HttpResponse:
        event_class = self.get_event_class()
        error = (
            action_error(event_class, action)
            if sends
            else UnknownAction(action, [event_class.LISTEN], event_class.__name__)
        )
        return _text_response(404, str(error))

    # Listening

    async def _open(
        self, request: HttpRequest, tokens: list[str], policy: Policy, snapshot: Snapshot | None
    ) -> HttpResponseBase:
        """Respond to GET with a stream, and to HEAD with its headers."""
        if not isinstance(request, ASGIRequest) or snapshot is None:
            return _text_response(500, WSGI_PAGE)
        try:
            refuse_parameter(request, "after", NOT_OF_A_STREAM)
            rewind = self._rewind(request)
        except InvalidParameter as error:
            return _text_response(400, str(error))
        if request.method == "HEAD":
            return HttpResponse(headers=HEADERS)
        try:
            listener = await self._make_listener(request, tokens, policy)
        except _storage_errors() as error:
            throttled.error("A listener of %r cannot be identified.", tokens, error=error)
            return _retry_later()
        if (
            shutdown.begun
            or shutdown.draining
            or registry.limit(listener) not in (None, Limit.EXCLUSIVE)
        ):
            return _retry_later()
        asked = last_event_id(request)
        cursors = parse_cursors(asked, tokens, conf.stream_max_tokens)
        try:
            history = get_history()
            positions = {
                token: await history.alocate(token, cursors[token], rewind) for token in tokens
            }
            taken = self.exclusive and any(
                [await get_supervisor().lease.has_listener(token) for token in tokens]
            )
        except Exception as error:  # noqa: BLE001
            throttled.error(
                "The history of %r cannot be read; the client is asked to reconnect.",
                tokens,
                error=error,
            )
            return _retry_later()
        if taken:
            return _locked()
        if all(position.closed for position in positions.values()):
            return HttpResponse(status=204, headers=PRIVATE)
        new = [token for token in tokens if not (cursors[token] and positions[token].known)]
        try:
            state = b"".join([await self._encode_state(request, token) for token in new])
        except (PermissionDenied, Http404) as error:
            return _refused(error)
        except Exception:
            logger.exception(
                "initial_state() of %s failed; the client is asked to reconnect.", type(self)
            )
            return _retry_later()
        event_class = self.get_event_class()
        stream = OpenStream(
            tokens[0],
            positions.pop(tokens[0]),
            listener=listener,
            recheck=partial(
                _may_continue, listener, policy, snapshot, credentials_of(request).user
            ),
            sender=type(self),
            asked=asked,
            durable=is_durable(event_class),
            own_ids=has_own_ids(event_class),
            keepalive_seconds=self.get_keepalive_seconds(),
            others=positions,
            state=state,
            cursor_event=self.cursor_event,
        )
        return await self._admit(request, stream)

    def _rewind(self, request: HttpRequest) -> Rewind | None:
        """Return the rewind of the request, or that of the view.

        :raises InvalidParameter: if it is not valid, or the view sends an initial state.
        """
        value = request.GET.get("rewind", self.rewind)
        if value is None:
            return None
        if self._has_initial_state():
            raise InvalidParameter(REWIND_AND_STATE)
        return parse_rewind(value)

    @classmethod
    def _has_initial_state(cls) -> bool:
        return cls.initial_state is not EventSourceView.initial_state

    async def _encode_state(self, request: HttpRequest, token: str) -> bytes:
        # The frames have no ids, so a client that is disconnected before their end receives all of
        # them again.
        event_class = self.get_event_class()
        frames = []
        for action, value in await self.initial_state(request, token):
            if action == event_class.FINISH:
                raise ValueError(
                    f"initial_state() returned the action {action!r}, which closes the stream."
                )
            draft = Draft.of(make_event(token, action, value, event_class))
            frames.append(replace(draft, event_id=None).frame())
        return b"".join(frames)

    async def _make_listener(
        self, request: ASGIRequest, tokens: list[str], policy: Policy
    ) -> Listener:
        user: Any = await policy.identify(request)
        return Listener(
            tokens=tuple(tokens),
            user="" if user is None else str(user),
            address=address_of(request),
            session=session_of(request),
            exclusive=self.exclusive,
        )

    async def _admit(self, request: ASGIRequest, stream: OpenStream) -> HttpResponseBase:
        limit = get_supervisor().admit(stream)
        if limit is not None:
            return _locked() if limit == Limit.EXCLUSIVE else _retry_later()
        if stream_opened.has_listeners(type(self)):
            await stream_opened.asend_robust(type(self), listener=stream.listener, request=request)
        # GZipMiddleware would compress every chunk separately.
        request.META["HTTP_ACCEPT_ENCODING"] = "identity"
        return EventStreamResponse(stream, request.scope.get(Slot.KEY))

    # History

    async def _read_history(self, request: HttpRequest, tokens: list[str]) -> HttpResponseBase:
        """Respond with stored events as JSON."""
        if len(tokens) > 1:
            return _text_response(
                400, "The history of one token is read at a time: ?token= is for streams."
            )
        try:
            refuse_parameter(request, "rewind", NOT_OF_A_PAGE)
            page = await aread_history(
                tokens[0],
                after=request.GET.get("after", ""),
                limit=number_of(request, "limit", DEFAULT_LIMIT),
                action=request.GET.get("action"),
            )
        except ValueError as error:
            return _text_response(400, str(error))
        except get_history().storage_errors as error:
            throttled.error("The history of %r cannot be read.", tokens[0], error=error)
            return _text_response(503, "The history's store failed; try again later.")
        if _bytes_of(page) > LOOP_BYTES:
            response = await sync_to_async(_page_response)(page)
        else:
            response = _page_response(page)
        # The only precondition of a page is If-None-Match. Django would respond to these with 412
        # and without Cache-Control.
        for name in ("HTTP_IF_MATCH", "HTTP_IF_UNMODIFIED_SINCE"):
            request.META.pop(name, None)
        found = get_conditional_response(request, response["ETag"], response=response) or response
        # Django's 304 has a part of the headers only.
        found["X-Content-Type-Options"] = PRIVATE["X-Content-Type-Options"]
        return found

    # Sending

    async def _publish(
        self, request: HttpRequest, policy: Policy, action: str, token: str
    ) -> HttpResponseBase:
        event_class = self.get_event_class()
        grant = credentials_of(request).grant
        unnamed = grant is not None and grant.actions is None
        if unnamed and must_be_named(event_class, action):
            return _text_response(
                403,
                f"The grant does not name the action {action!r}. To allow it, make a grant that "
                f"names it: make_grant(..., actions=[{action!r}]) or create_grant --action.",
            )
        if self.require_listener and not await get_supervisor().lease.has_listener(token):
            return _text_response(404, "This token has no listener.")
        try:
            value = request.body.decode()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return _text_response(
                400, f"The body is not UTF-8: byte {byte:#04x} at {error.start}."
            )
        key = request.headers.get("Idempotency-Key")
        try:
            scope = "" if key is None else await sender_of(policy, request)
            event = await apublish_posted(token, action, value, event_class, key, scope)
        except EventTooLarge as error:
            return _text_response(413, str(error))
        except ValueError as error:
            return _text_response(400, str(error))
        except get_history().storage_errors as error:
            throttled.error("The history of %r failed.", token, error=error)
            return _text_response(
                503, "The history's store failed; the event may not have been published."
            )
        except DeliveryFailed:
            logger.exception("A live-only event was lost.")
            return _text_response(503, "The channel layer failed; the event was not sent.")
        return JsonResponse(
            {"id": event.id}, headers={**PRIVATE, "Accept": event_class.content_type}
        )


class RenewGrantView(View):
    """``GET`` returns a new grant to listen to a token, as JSON: ``{"grant": "..."}``.

    The policy decides which clients receive one. A grant is not accepted, because it would then
    have no end. ``?token=`` adds further tokens of the stream. The new grant is bound to the
    session in which a user is logged in, so it ends at the logout. With HTTP Basic, and with
    ``signed_cookies`` sessions, it is bound to the user and ends at its expiry.

    A user who loses the permission keeps the grant until it expires: pass a short ``seconds``.

    Set the attributes in a subclass, or pass them to ``as_view()``.
    """

    policy: type[Policy] | None = None
    """The policy class; ``None`` uses ``EVENTSOURCE_POLICY``."""
    seconds: float | None = None
    """The lifetime of the grant in seconds; ``None`` uses ``EVENTSOURCE_GRANT_SECONDS``."""

    http_method_names = [method.lower() for method in RENEW_METHODS]
    view_is_async = True

    @classonlymethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:  # noqa: N805
        """Return the view function.

        :param initkwargs: values of the class attributes.
        :raises ImproperlyConfigured: if the policy or the number of seconds is not valid.
        """
        if initkwargs.get("policy") is not None:
            check_policy_class("policy", initkwargs["policy"])
        check_positive_or_none("seconds", initkwargs.get("seconds", cls.seconds))
        return _with_policy(super().as_view(**initkwargs))

    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        """Check the method."""
        # The responses of Django's View are neither private nor nosniff.
        if request.method == "OPTIONS":
            return _options(RENEW_METHODS)
        if request.method not in RENEW_METHODS:
            return _not_allowed(RENEW_METHODS)
        return await self.get(request, *args, **kwargs)

    async def get(self, request: HttpRequest, token: str) -> HttpResponseBase:
        """Return a new grant if the policy allows the client to listen without one.

        :param token: the token, or the first one of the stream.
        """
        try:
            tokens = read_tokens(request, token, conf.stream_max_tokens)
            if not await _may_listen(make_policy(self.policy), request, tokens):
                await _refuse(request)
            if credentials_of(request).grant is not None:
                raise PermissionDenied(
                    "A grant is not renewed with a grant: send the request without it."
                )
            basic_user = credentials_of(request).user
            user = basic_user or await session_user(request)
            session = getattr(request, "session", None) if user and not basic_user else None
        except InvalidToken as error:
            return _text_response(400, str(error))
        except (NotAuthenticated, PermissionDenied, RateLimited, Http404) as error:
            return _refused(error)
        except _storage_errors() as error:
            throttled.error(
                "The permission for %r cannot be checked: the database failed.",
                tokens,
                error=error,
            )
            return _text_response(503, "The database failed; try again later.")
        grant = make_grant(
            tokens,
            listen=True,
            seconds=self.seconds,
            session_key=lasting_session_key(session),
            user=user,
        )
        return JsonResponse({"grant": grant}, headers=PRIVATE)


def _with_policy(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Prepare an asynchronous view on whose access a policy decides."""
    # An asynchronous view cannot run in the transaction of ATOMIC_REQUESTS.
    for alias in connections:
        view = transaction.non_atomic_requests(alias)(view)
    return login_not_required(view)


# Permission


async def _authorize(
    policy: Policy, request: HttpRequest, action: str, tokens: list[str]
) -> Snapshot | None:
    """Check the permission for a request.

    :returns: for a request that listens, its snapshot from before the policy read it; ``None``
        through WSGI.
    :raises NotAuthenticated: if the policy refuses a client that is not logged in, or raises it.
    :raises PermissionDenied: if the policy refuses a user, or raises it.
    """
    if request.method == "POST":
        if not await policy.can_send(request, tokens[0], action):
            await _refuse(request)
        check_origin(request)
        return None
    snapshot = await Snapshot.of(request) if isinstance(request, ASGIRequest) else None
    if not await _may_listen(policy, request, tokens):
        await _refuse(request)
    return snapshot


async def _may_listen(policy: Policy, request: HttpRequest, tokens: list[str]) -> bool:
    for token in tokens:
        if not await policy.can_listen(request, token):
            return False
    return True


async def _may_continue(
    listener: Listener, policy: Policy, snapshot: Snapshot, basic_user: Any
) -> bool:
    """Ask the policy again about a listener whose stream is open."""
    try:
        request = await snapshot.restore(listener.opened, basic_user)
        return await _may_listen(policy, request, list(listener.tokens))
    except (NotAuthenticated, PermissionDenied, Http404):
        return False


async def _refuse(request: HttpRequest) -> None:
    auser = getattr(request, "auser", None)
    if auser is not None and (await auser()).is_authenticated:
        raise PermissionDenied("Permission denied.")
    raise NotAuthenticated("Authentication is required.")


def _storage_errors() -> tuple[type[Exception], ...]:
    return DatabaseError, *get_history().storage_errors


# Responses


def _bytes_of(page: HistoryPage) -> int:
    """Return about how many bytes a page has as JSON."""
    return sum(JSON_EVENT_BYTES + len(event.value) for event in page.events)


def _page_response(page: HistoryPage) -> HttpResponse:
    # Not asdict(), which copies every value.
    events = [
        {"id": event.id, "action": event.action, "value": event.value, "time": event.time}
        for event in page.events
    ]
    response = JsonResponse(
        {"events": events, "cursor": page.cursor, "more": page.more, "missing": page.missing},
        json_dumps_params={"ensure_ascii": False, "separators": (",", ":")},
        headers={**PRIVATE, "Vary": "Accept"},
    )
    set_response_etag(response)
    return response


def _retry_later() -> HttpResponse:
    # A browser's EventSource does not reconnect after any other status.
    return HttpResponse(retry_body(), headers=HEADERS)


def _locked() -> HttpResponse:
    return _text_response(423, "This token has a listener already, and only one is allowed.")


def _refused(error: Exception) -> HttpResponse:
    if isinstance(error, RateLimited):
        return _text_response(429, str(error), **{"Retry-After": str(error.retry_after)})
    if isinstance(error, NotAuthenticated):
        # HTTP Basic is accepted but not announced: browsers would ask for a password.
        challenge = 'Bearer realm="eventsource"'
        return _text_response(401, str(error), **{"WWW-Authenticate": challenge})
    if isinstance(error, Http404):
        return _text_response(404, "Not found.")
    return _text_response(403, str(error) or "Permission denied.")


def _options(methods: list[str]) -> HttpResponse:
    allowed = ", ".join(methods)
    return HttpResponse(headers={**PRIVATE, "Allow": allowed, "Content-Length": "0"})


def _not_allowed(methods: list[str]) -> HttpResponse:
    allowed = ", ".join(methods)
    return _text_response(405, f"This URL supports {allowed}.", Allow=allowed)


def _text_response(status: int, text: str, **headers: str) -> HttpResponse:
    return HttpResponse(
        text.rstrip("\n") + "\n",
        status=status,
        content_type="text/plain; charset=utf-8",
        headers={**PRIVATE, **headers},
    )
