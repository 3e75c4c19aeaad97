"""Policies: who may listen, and who may send."""

from __future__ import annotations

import base64
from typing import Any, Protocol

from asgiref.sync import sync_to_async
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.middleware.csrf import CsrfViewMiddleware

from .addresses import address_of, network_of
from .conf import conf
from .exceptions import InvalidGrant, NotAuthenticated, RateLimited
from .grants import Grant, read_grant
from .logins import check_password
from .rates import Window

LISTEN_PERMISSION = "django_eventsource.listen_event"
SEND_PERMISSION = "django_eventsource.send_event"

USER = "_eventsource_user"
"""The request's attribute that holds the user who came by HTTP Basic."""
OPENED = "_eventsource_opened"
"""The one that holds when its stream began, where an open stream is checked again."""


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
        grant = find_grant(request)
        if grant is not None:
            return check_grant(grant, token, grant.listen, "listen to")
        user = await basic_user(request) or await session_user(request)
        return await has_permission(user, LISTEN_PERMISSION)

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        grant = find_grant(request)
        if grant is not None:
            check_grant(grant, token, grant.send, "send to")
        else:
            user = await basic_user(request)
            if user is None:
                user = await session_user(request)
                if user is not None:
                    await check_csrf(request)
            await has_permission(user, SEND_PERMISSION)
        await check_rate(request)
        return True


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
        return read_grant(text.strip(), getattr(request, OPENED, None))
    except InvalidGrant as error:
        raise NotAuthenticated(str(error)) from error


def check_grant(grant: Grant, token: str, right: bool, verb: str) -> bool:
    """Check that a grant covers the token and the right.

    :raises PermissionDenied: when it does not.
    """
    if token not in grant.tokens:
        raise PermissionDenied("The grant is for another token.")
    if not right:
        raise PermissionDenied(f"The grant does not allow to {verb} this token.")
    return True


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
    known = getattr(request, USER, None)
    if known is not None:
        return await _same_user(known) if hasattr(request, OPENED) else known
    user = await check_password(request, name, password)
    if user is None:
        raise NotAuthenticated("Wrong user name or password.")
    setattr(request, USER, user)
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
    user = getattr(request, USER, None) or await session_user(request)
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


class _CsrfCheck(CsrfViewMiddleware):
    def _reject(self, request: HttpRequest, reason: str) -> Any:
        return reason


def _csrf_reason(request: HttpRequest) -> Any:
    check = _CsrfCheck(lambda request: None)  # type: ignore[arg-type]
    check.process_request(request)
    return check.process_view(request, None, (), {})  # type: ignore[arg-type]
