"""The part of a stream's request that is stored, so that the policy can be asked again."""

from collections.abc import Container, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Self

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

from ..policies import Credentials, set_credentials
from .response import Slot

PARSED = ("GET", "COOKIES")
"""The attributes that Django parses from the ASGI scope at the first access."""
DERIVED = frozenset(
    {"scope", "META", "POST", "FILES", "headers", "accepted_types", "session", *PARSED}
    | {"user", "auser", "_cached_user", "_acached_user"}
    | {"resolver_match", "_stream", "_body", "_post", "_files", "_messages", "_read_started"}
    | {"csrf_processing_done", "csrf_cookie_needs_update"}
)
"""The attributes that :meth:`Snapshot.restore` makes again, or that no policy needs."""


@dataclass(slots=True)
class _MiddlewareUser:
    """A user that other middleware than Django's set on the request."""

    model: Any
    """The user's model; ``None`` if the user is not stored in a table."""
    user: Any
    """The primary key; without a model the user itself."""

    async def load(self) -> Any:
        """Return the user as it is stored now; anonymous if it was deleted or is inactive."""
        if self.model is None:
            return self.user
        user = await self.model._default_manager.filter(pk=self.user).afirst()
        return user if user is not None and getattr(user, "is_active", True) else AnonymousUser()


class Snapshot:
    """The state of a request after all middleware, taken before the policy sees it.

    A request takes many times as much memory. Most of it is made again from its ASGI scope, which
    the server keeps anyway. The snapshot contains the changes that middleware made, but not the
    session and the users, which are read from their stores again.
    """

    __slots__ = (
        "_attributes",
        "_auser",
        "_has_auth",
        "_kind",
        "_meta",
        "_removed",
        "_scope",
        "_session",
        "_user",
    )

    def __init__(
        self,
        request: ASGIRequest,
        user: _MiddlewareUser | None = None,
        auser: _MiddlewareUser | None = None,
    ) -> None:
        slot = request.scope.get(Slot.KEY)
        self._scope: Mapping[str, Any] = request.scope if slot is None else slot.scope
        self._kind = type(request)
        fresh = self._kind(self._scope, BytesIO())
        attributes = vars(request)
        kept = _changed(vars(fresh), attributes, DERIVED)
        for name in PARSED:
            if name in attributes and attributes[name] != getattr(fresh, name):
                kept[name] = attributes[name]
        self._session = _session_of(request)
        if self._session is None and "session" in attributes:
            kept["session"] = attributes["session"]
        self._has_auth = hasattr(request, "auser")
        self._user, self._auser = user, auser
        self._attributes = kept or None
        # The cookie of the CSRF check is a secret that no policy needs.
        self._meta = _changed(fresh.META, request.META, {"CSRF_COOKIE"}) or None
        self._removed = tuple(fresh.META.keys() - request.META.keys())

    @classmethod
    async def of(cls, request: ASGIRequest) -> Self:
        """Return a snapshot of a request."""
        user = auser = None
        # Django's AuthenticationMiddleware sets a lazy object, which is not evaluated here.
        if "user" in vars(request) and not issubclass(type(vars(request)["user"]), LazyObject):
            user = _middleware_user(request, vars(request)["user"])
        get_user: Any = getattr(request, "auser", None)
        if get_user is not None and getattr(get_user, "func", None) is not middleware_auser:
            auser = _middleware_user(request, await get_user())
        return cls(request, user, auser)

    async def restore(self, opened: float, basic_user: Any = None) -> HttpRequest:
        """Return the request with the session and the users as they are now.

        :param opened: the time at which its stream was opened, in seconds since 1970. A grant that
            was valid then remains valid for the stream.
        :param basic_user: the user of HTTP Basic, whose password is not checked again; ``None``
            without one.
        """
        request: Any = self._kind(dict(self._scope), BytesIO())
        vars(request).update(self._attributes or {})
        request.META.update(self._meta or {})
        for name in self._removed:
            request.META.pop(name, None)
        set_credentials(request, Credentials(user=basic_user, opened=opened))
        language = getattr(request, "LANGUAGE_CODE", None)
        with suppress(Resolver404), translation.override(language) if language else nullcontext():
            urlconf = getattr(request, "urlconf", None)
            request.resolver_match = resolve(request.path_info, urlconf)
        if self._session is not None:
            kind, key = self._session
            # A session that began in this request has received its key since.
            request.session = kind(key.session_key if isinstance(key, kind) else key)
        if self._has_auth:
            AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
        if self._user is not None:
            request.user = await self._user.load()
        if self._auser is not None:
            request.auser = self._auser.load
        return request  # type: ignore[no-any-return]


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], ignored: Container[str]
) -> dict[str, Any]:
    return {
        name: value
        for name, value in after.items()
        if name not in ignored and (name not in before or before[name] != value)
    }


def _session_of(request: HttpRequest) -> tuple[Any, Any] | None:
    """Return the class and the key of a session; the session itself if it has no key yet."""
    session: Any = getattr(request, "session", None)
    if not hasattr(session, "session_key"):
        return None
    key = session.session_key
    begun = key is None and getattr(session, "modified", False)
    return session.__class__, session if begun else key


def _middleware_user(request: HttpRequest, user: Any) -> _MiddlewareUser | None:
    """Return the part of a user that is stored; ``None`` if it is the user of the session."""
    session = getattr(getattr(request, "session", None), "_session_cache", {})
    if not isinstance(user, Model) or user.pk is None:
        return _MiddlewareUser(None, user)
    if session.get(SESSION_KEY) == str(user.pk):
        return None
    return _MiddlewareUser(user.__class__, user.pk)
