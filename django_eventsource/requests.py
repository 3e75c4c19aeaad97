"""What the view reads of a request: tokens, last event id, body, and who it is from."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from io import BytesIO
from typing import Any

from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.middleware import auser as middleware_auser
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, RawPostDataException
from django.urls import Resolver404, resolve

from .conf import conf
from .cursors import max_length
from .events import CURSOR_MARK
from .exceptions import InvalidToken
from .history.base import MAX_CURSOR_LENGTH
from .listeners import hide_session
from .policies import OPENED
from .responses import Slot
from .tokens import check_token

NO_CURSOR = " "
"""Stands for a last event id that was never one: ids hold no space."""

USERS = frozenset({"user", "auser", "_cached_user", "_acached_user"})
DERIVED = frozenset(
    {"scope", "META", "GET", "POST", "COOKIES", "FILES", "headers", "accepted_types", "session"}
    | {"resolver_match", "_stream", "_body", "_post", "_files", "_messages", "_read_started"}
    | {"csrf_processing_done", "csrf_cookie_needs_update"}
)
"""What a request has that is made again from the rest, or is of no use to a policy."""
LEFT_OUT = frozenset({"HTTP_ACCEPT_ENCODING", "CSRF_COOKIE"})
"""Of ``META``: what the view itself changes, and a secret that nobody needs twice."""


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


def read_tokens(request: HttpRequest, token: str, most: int) -> list[str]:
    """Give the path's token and those of the query (``?token=b&token=c``), each once.

    :raises InvalidToken: when one is no token, or there are too many.
    """
    tokens = list(dict.fromkeys([token, *request.GET.getlist("token")]))
    if len(tokens) > most:
        raise InvalidToken(
            f"{len(tokens)} tokens are asked for; one stream carries at most {most}."
        )
    return [check_token(one) for one in tokens]


def last_event_id(request: HttpRequest, tokens: int = 1) -> str | None:
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
    # Of as many tokens as it may be: a page may come back with fewer.
    most = max_length(max(tokens, conf.stream_max_tokens)) if text.startswith(CURSOR_MARK) else 0
    visible = text.isascii() and text.isprintable() and " " not in text
    return text if visible and len(text) <= max(most, MAX_CURSOR_LENGTH) else NO_CURSOR


def address_of(request: HttpRequest) -> str:
    """Give the address that the request came from; empty where the server does not tell."""
    return str(request.META.get("REMOTE_ADDR") or "")


def session_of(request: HttpRequest) -> str:
    """Give the hash of the session's key; empty without a session."""
    key = getattr(getattr(request, "session", None), "session_key", None)
    return hide_session(key) if key else ""


class Snapshot:
    """What is kept of the request of an open stream, to be seen with the rights of later.

    A request is many times as large: most of it is made again from its ASGI scope, which the
    server holds anyway. What middleware has changed in it is kept, but for the session and
    the session's user, who are looked up anew.
    """

    __slots__ = ("_attributes", "_kind", "_meta", "_scope", "_session", "_user")

    def __init__(self, request: ASGIRequest) -> None:
        slot = request.scope.get(Slot.KEY)
        self._scope: Mapping[str, Any] = request.scope if slot is None else slot.scope
        self._kind = type(request)
        session = getattr(request, "session", None)
        self._session = None if session is None else (type(session), session.session_key)
        # A user that other middleware has set is not the session's.
        self._user = getattr(getattr(request, "auser", None), "func", None) is middleware_auser
        known = vars(self._kind(self._scope, BytesIO()))
        left_out = DERIVED | USERS if self._user else DERIVED
        self._attributes = _changed(known, vars(request), left_out) or None
        self._meta = _changed(known["META"], request.META, LEFT_OUT) or None

    def restore(self, opened: float) -> HttpRequest:
        """Make the request again.

        :param opened: when its stream began, in seconds since the epoch. A grant was checked
            then, and is good for the stream: only the session and the user are new.
        """
        request: Any = self._kind(dict(self._scope), BytesIO())
        vars(request).update(self._attributes or {})
        request.META.update(self._meta or {})
        setattr(request, OPENED, opened)
        with suppress(Resolver404):
            urlconf = getattr(request, "urlconf", None)
            request.resolver_match = resolve(request.path_info, urlconf)
        if self._session is not None:
            kind, key = self._session
            request.session = kind(key)
        if self._user:
            AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
        return request  # type: ignore[no-any-return]


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], left_out: Container[str]
) -> dict[str, Any]:
    return {
        name: value
        for name, value in after.items()
        if name not in left_out and (name not in before or before[name] != value)
    }
