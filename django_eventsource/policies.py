"""Policies: who may listen, and who may send."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Protocol

from asgiref.sync import sync_to_async
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.crypto import constant_time_compare

from .addresses import address_of, network_of
from .conf import conf
from .exceptions import InvalidGrant, NotAuthenticated, RateLimited
from .grants import Grant, hash_session_key, read_grant
from .logins import check_password
from .rates import Window

LISTEN_PERMISSION = "django_eventsource.listen_event"
SEND_PERMISSION = "django_eventsource.send_event"

AMBIENT_SCHEMES = {"", "basic", "digest", "negotiate", "ntlm"}
"""The schemes of ``Authorization`` that a browser may send by itself, and no header at all."""
CREDENTIALS = "_eventsource_credentials"
"""The name under which a request keeps its :class:`Credentials`."""


@dataclass(slots=True)
class Credentials:
    """What the checks of this module have verified of a request."""

    grant: Grant | None = None
    """The grant that covers what the request asks for."""
    user: Any = None
    """The user of HTTP Basic."""
    opened: float | None = None
    """When the request's stream began, in seconds since the epoch; ``None``: it has not begun."""


def credentials_of(request: HttpRequest) -> Credentials:
    """Return the request's credentials, which are empty until a check has verified some."""
    found: Credentials = vars(request).setdefault(CREDENTIALS, Credentials())
    return found


class Policy(Protocol):
    """What ``EVENTSOURCE_POLICY`` names: a class that is made without arguments.

    Both hooks may raise ``PermissionDenied`` (the answer is 403) or
    :class:`~django_eventsource.exceptions.NotAuthenticated` (401) with the reason as
    text. ``False`` means 403 for a logged-in user, else 401. Both may raise
    :class:`~django_eventsource.exceptions.RateLimited` (429).

    ``can_listen`` is asked again every ``EVENTSOURCE_RECHECK_SECONDS`` while the stream is
    open. A policy may have a third method, ``async def identify(self, request) -> str``,
    which gives the id of the user; without it :func:`identify` does.
    """

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        """May this request open a stream of the token?"""

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        """May this request publish the action to the token?"""


class AllowAny:
    """Everybody may listen and send."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        return True

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        await check_rate(request)
        return True


class DefaultPolicy:
    """Closed: a grant for the token, or a user with the model permission.

    A grant comes in ``Authorization: Bearer`` or ``?grant=``. A user comes by HTTP Basic,
    checked with ``authenticate()``, or by session, then with Django's CSRF check when
    sending.
    """

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        if await check_grant(request, token):
            return True
        user = await basic_user(request) or await session_user(request)
        return await has_permission(user, LISTEN_PERMISSION)

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        if not await check_grant(request, token, action):
            user = await basic_user(request)
            if user is None:
                user = await session_user(request)
                if user is not None:
                    await check_csrf(request)
            await has_permission(user, SEND_PERMISSION)
        await check_rate(request)
        return True


async def check_grant(request: HttpRequest, token: str, action: str | None = None) -> bool:
    """Check that the request's grant covers what it asks for; return ``False`` without a grant.

    A grant to send that names no actions covers all but the ``FINISH`` and ``RETRY`` of the
    Event class. The view, which knows the class, checks that afterwards.

    :param action: the action to send; ``None``: to listen.
    :raises NotAuthenticated: when the grant is forged, damaged, expired, or bound to a session
        or a user that are not the request's.
    :raises PermissionDenied: when it is for another token, right or action.
    """
    grant = find_grant(request)
    if grant is None:
        return False
    if token not in grant.tokens:
        raise PermissionDenied("The grant is for another token.")
    if not (grant.listen if action is None else grant.send):
        verb = "listen to" if action is None else "send to"
        raise PermissionDenied(f"The grant does not allow to {verb} this token.")
    if action is not None and grant.actions is not None and action not in grant.actions:
        raise PermissionDenied(f"The grant does not allow the action {action!r}.")
    if grant.session:
        await _check_session(request, grant.session)
    if grant.user:
        user = await basic_user(request) or await session_user(request)
        if user is None or str(user.pk) != grant.user:
            raise NotAuthenticated("The grant is bound to a user who is not logged in here.")
    credentials_of(request).grant = grant
    return True


async def _check_session(request: HttpRequest, digest: str) -> None:
    """Check that the request comes from a session, and that its user is still logged in.

    :raises NotAuthenticated: when it does not, or is not.
    """
    key: Any = getattr(getattr(request, "session", None), "session_key", None)
    # The key is the cookie's: whether there is such a session shows when it is read.
    found = bool(key) and constant_time_compare(digest, hash_session_key(key))
    if not found or await session_user(request) is None:
        raise NotAuthenticated("The grant is bound to another session, or to one that has ended.")


def find_grant(request: HttpRequest) -> Grant | None:
    """Read the request's grant, from the header or the query.

    :raises NotAuthenticated: when there is one and it is forged, damaged or expired.
    """
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        text = request.GET.get("grant", "")
    if not text:
        return None
    try:
        return read_grant(text.strip(), credentials_of(request).opened)
    except InvalidGrant as error:
        raise NotAuthenticated(str(error)) from error


async def basic_user(request: HttpRequest) -> Any:
    """Give the user of HTTP Basic credentials (RFC 7617), or ``None`` without them.

    :raises NotAuthenticated: when they are damaged or wrong.
    :raises RateLimited: after too many failures, or while too many logins wait.
    """
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        credentials = base64.b64decode(text, validate=True).decode()
    except ValueError as error:
        raise NotAuthenticated("The HTTP Basic credentials cannot be decoded.") from error
    if "\0" in credentials:
        raise NotAuthenticated("The HTTP Basic credentials hold NUL.")
    name, _, password = credentials.partition(":")
    known = credentials_of(request)
    if known.user is not None:
        return known.user if known.opened is None else await _same_user(known.user)
    user = await check_password(request, name, password)
    if user is None:
        raise NotAuthenticated("Wrong user name or password.")
    known.user = user
    return user


async def _same_user(known: Any) -> Any:
    """Look at a user again who gave a password when the stream began.

    :raises NotAuthenticated: when there is no such user any more, or the password is new.
    """
    user = await type(known)._default_manager.filter(pk=known.pk).afirst()
    if user is None or not user.is_active or user.password != known.password:
        raise NotAuthenticated("The user or the password has changed.")
    return user


async def identify(request: HttpRequest) -> str:
    """Give the id of the user that a request comes from: the text of its primary key.

    Empty where there is none, as with a grant alone.
    """
    user = credentials_of(request).user or await session_user(request)
    return "" if user is None else str(user.pk)


async def check_rate(request: HttpRequest) -> None:
    """Count a post against ``EVENTSOURCE_SEND_RATE``: of the user, else of the address.

    The count is kept in Django's default cache.

    :raises RateLimited: when there were too many.
    """
    rate = conf.send_rate
    if rate is None:
        return
    most, seconds = rate
    sender = await identify(request) or f"@{network_of(address_of(request))}"
    window = Window("rate", sender, seconds)
    # Not cache.aincr(), which reads, adds and writes, whatever the backend.
    if await sync_to_async(window.add)() > most:
        raise RateLimited(window.seconds_left)


async def session_user(request: HttpRequest) -> Any:
    """Give the logged-in user, or ``None``."""
    auser = getattr(request, "auser", None)
    user = None if auser is None else await auser()
    return user if user is not None and user.is_authenticated else None


async def has_permission(user: Any, permission: str) -> bool:
    """Check a user's model permission.

    :raises NotAuthenticated: when there is no user.
    :raises PermissionDenied: when the user lacks it.
    """
    if user is None:
        raise NotAuthenticated("A grant for this token, or a login, is required.")
    if not await user.ahas_perm(permission):
        raise PermissionDenied(f"The user lacks the permission {permission}.")
    return True


async def check_csrf(request: HttpRequest) -> None:
    """Run Django's CSRF check, which a session's request must pass.

    :raises PermissionDenied: when it does not.
    """
    reason = await sync_to_async(_csrf_reason)(request)
    if reason is not None:
        raise PermissionDenied(f"CSRF check failed: {reason}")


def check_origin(request: HttpRequest) -> None:
    """Refuse a POST that a page of another site makes a browser send.

    A browser adds cookies and HTTP Basic to such a request by itself, but no grant and no
    other ``Authorization``: with one of these the request may come from any site.
    ``CSRF_TRUSTED_ORIGINS`` names further sites.

    :raises PermissionDenied: when the page is not of this site.
    """
    scheme, _, _ = request.headers.get("Authorization", "").partition(" ")
    if credentials_of(request).grant is not None or scheme.lower() not in AMBIENT_SCHEMES:
        return
    origin = request.headers.get("Origin")
    if origin is None:
        site = request.headers.get("Sec-Fetch-Site", "")
        foreign = site in ("cross-site", "same-site")
        shown = f"Sec-Fetch-Site is {site!r}"
    else:
        foreign = not _csrf_check()._origin_verified(request)
        shown = f"Origin is {origin[:200]!r}"
    if foreign:
        raise PermissionDenied(
            f"The request comes from a page of another site ({shown}): send a grant, or list the "
            "origin in CSRF_TRUSTED_ORIGINS."
        )


class _CsrfCheck(CsrfViewMiddleware):
    def _reject(self, request: HttpRequest, reason: str) -> Any:
        return reason


def _csrf_check() -> Any:
    return _CsrfCheck(lambda request: None)  # type: ignore[arg-type]


def _csrf_reason(request: HttpRequest) -> Any:
    check = _csrf_check()
    check.process_request(request)
    return check.process_view(request, None, (), {})
