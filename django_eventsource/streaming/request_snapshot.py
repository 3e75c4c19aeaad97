"""Snapshots: what is kept of an open stream's request, to look at it with the rights of later."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from django.contrib.auth import SESSION_KEY
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.middleware import auser as middleware_auser
from django.contrib.auth.models import AnonymousUser
from django.core.handlers.asgi import ASGIRequest
from django.db.models import Model
from django.http import HttpRequest
from django.urls import Resolver404, resolve
from django.utils import translation
from django.utils.functional import LazyObject

from .policies import CREDENTIALS, Credentials, credentials_of
from .responses import Slot

PARSED = ("GET", "COOKIES")
"""What is read from the server's scope when it is first asked for."""
DERIVED = frozenset(
    {"scope", "META", "POST", "FILES", "headers", "accepted_types", "session", *PARSED}
    | {"user", "auser", "_cached_user", "_acached_user"}
    | {"resolver_match", "_stream", "_body", "_post", "_files", "_messages", "_read_started"}
    | {"csrf_processing_done", "csrf_cookie_needs_update", CREDENTIALS}
)
"""What a request has that is made again from the rest, or is of no use to a policy."""
LEFT_OUT = frozenset({"CSRF_COOKIE"})
"""Of ``META``: a secret that nobody needs twice."""

UNKNOWN = object()


class Snapshot:
    """What is kept of a request, as middleware has left it: taken before a policy sees it.

    A request is many times as large: most of it is made again from its ASGI scope, which the
    server holds anyway. What middleware has changed in it is kept, but for the session and
    the users, who are looked up anew.
    """

    __slots__ = (
        "_attributes",
        "_auser",
        "_basic",
        "_djangos",
        "_kind",
        "_meta",
        "_removed",
        "_scope",
        "_session",
        "_user",
    )

    def __init__(
        self, request: ASGIRequest, user: Brought | None = None, auser: Brought | None = None
    ) -> None:
        slot = request.scope.get(Slot.KEY)
        self._scope: Mapping[str, Any] = request.scope if slot is None else slot.scope
        self._kind = type(request)
        self._basic: Any = None
        fresh = self._kind(self._scope, BytesIO())
        attributes, meta = vars(request), fresh.META
        kept = _changed(vars(fresh), attributes, DERIVED)
        for name in PARSED:
            if name in attributes and attributes[name] != getattr(fresh, name):
                kept[name] = attributes[name]
        self._session = _session_of(request)
        if self._session is None and "session" in attributes:
            kept["session"] = attributes["session"]
        self._djangos = hasattr(request, "auser")
        self._user, self._auser = user, auser
        self._attributes = kept or None
        self._meta = _changed(meta, request.META, LEFT_OUT) or None
        self._removed = tuple(name for name in meta if name not in request.META)

    @classmethod
    async def of(cls, request: ASGIRequest) -> Snapshot:
        """Take one."""
        user = auser = None
        known = vars(request).get("user", UNKNOWN)
        # Django's own is a lazy object, which must not be asked here what it is.
        if known is not UNKNOWN and not issubclass(type(known), LazyObject):
            user = _brought(request, known)
        asked: Any = getattr(request, "auser", None)
        if asked is not None and getattr(asked, "func", None) is not middleware_auser:
            auser = _brought(request, await asked())
        return cls(request, user, auser)

    def remember(self, request: HttpRequest) -> None:
        """Keep who has given a password, which is not asked for again."""
        self._basic = credentials_of(request).user

    async def restore(self, opened: float) -> HttpRequest:
        """Make the request again.

        :param opened: when its stream began, in seconds since the epoch. A grant was checked
            then, and is good for the stream: only the session and the users are new.
        """
        request: Any = self._kind(dict(self._scope), BytesIO())
        vars(request).update(self._attributes or {})
        request.META.update(self._meta or {})
        for name in self._removed:
            request.META.pop(name, None)
        setattr(request, CREDENTIALS, Credentials(user=self._basic, opened=opened))
        language = getattr(request, "LANGUAGE_CODE", None)
        with suppress(Resolver404), translation.override(language) if language else nullcontext():
            urlconf = getattr(request, "urlconf", None)
            request.resolver_match = resolve(request.path_info, urlconf)
        if self._session is not None:
            kind, key = self._session
            # One that was begun in this request has got its key meanwhile.
            request.session = kind(key.session_key if isinstance(key, kind) else key)
        if self._djangos:
            AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
        if self._user is not None:
            request.user = await self._user.again()
        if self._auser is not None:
            user = await self._auser.again()

            async def auser() -> Any:
                return user

            request.auser = auser
        return request  # type: ignore[no-any-return]


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], left_out: Container[str]
) -> dict[str, Any]:
    return {
        name: value
        for name, value in after.items()
        if name not in left_out and (name not in before or before[name] != value)
    }


def _session_of(request: HttpRequest) -> tuple[Any, Any] | None:
    """Give the class and the key of a session; itself where it is to get a key yet."""
    session: Any = getattr(request, "session", None)
    if not hasattr(session, "session_key"):
        return None
    key = session.session_key
    begun = key is None and getattr(session, "modified", False)
    return session.__class__, session if begun else key


@dataclass(slots=True)
class Brought:
    """A user whom other middleware than Django's has brought."""

    kind: Any
    """The model of one that is in a table."""
    user: Any
    """Its primary key there; else itself."""

    async def again(self) -> Any:
        """Give it as it is now."""
        if self.kind is None:
            return self.user
        user = await self.kind._default_manager.filter(pk=self.user).afirst()
        return user if user is not None and getattr(user, "is_active", True) else AnonymousUser()


def _brought(request: HttpRequest, user: Any) -> Brought | None:
    """Take note of a user, unless it has logged in during this request: the session has it."""
    session = getattr(getattr(request, "session", None), "_session_cache", {})
    if not isinstance(user, Model) or user.pk is None:
        return Brought(None, user)
    return None if session.get(SESSION_KEY) == str(user.pk) else Brought(user.__class__, user.pk)
