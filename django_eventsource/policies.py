"""Policies: the classes that decide which requests may listen and send."""

import base64
import inspect
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.http import HttpRequest
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.crypto import constant_time_compare

from .access.addresses import address_of, network_of
from .access.basic_login import check_password
from .access.time_windows import Window
from .conf import conf
from .exceptions import InvalidGrant, InvalidParameter, NotAuthenticated, RateLimited
from .grants import Grant, hash_session_key, read_grant
from .protocol.field_rules import SHOWN

__all__ = [
    "LISTEN_PERMISSION",
    "SEND_PERMISSION",
    "AllowAny",
    "DefaultPolicy",
    "Policy",
    "basic_user",
    "check_csrf",
    "check_grant",
    "check_rate",
    "has_permission",
    "session_user",
]

LISTEN_PERMISSION = "django_eventsource.listen_event"
"""The model permission that lets a user listen to every token."""
SEND_PERMISSION = "django_eventsource.send_event"
"""The model permission that lets a user send to every token."""

AMBIENT_SCHEMES = {"", "basic", "digest", "negotiate", "ntlm"}
"""The schemes of ``Authorization`` that browsers send without a script, and an absent header."""
CREDENTIALS = "_eventsource_credentials"
"""The attribute of a request that contains its :class:`Credentials`."""


@dataclass(slots=True)
class Credentials:
    """The credentials of a request that the checks of this module have verified."""

    grant: Grant | None = None
    """The grant that covers the request."""
    user: Any = None
    """The user of HTTP Basic."""
    opened: float | None = None
    """The time at which the request's stream was opened, in seconds since 1970; ``None``
    before."""


def credentials_of(request: HttpRequest) -> Credentials:
    """Return the verified credentials of a request; empty before a check has verified any."""
    found: Credentials = vars(request).setdefault(CREDENTIALS, Credentials())
    return found


def set_credentials(request: HttpRequest, credentials: Credentials) -> None:
    """Set what the checks of an earlier request have verified, for its recheck."""
    setattr(request, CREDENTIALS, credentials)


class Policy:
    """Base class of all policies. It refuses every request.

    ``EVENTSOURCE_POLICY`` and ``as_view(policy=...)`` name a subclass. The view makes an instance
    for each request, without arguments. Override any of the three methods.

    :meth:`can_listen` and :meth:`can_send` return whether the request is allowed. The view
    responds to ``False`` with 403 for a logged-in user, and with 401 otherwise. Both may raise
    ``PermissionDenied`` (403), :class:`~django_eventsource.exceptions.NotAuthenticated` (401) or
    :class:`~django_eventsource.exceptions.RateLimited` (429), with the reason as text, or
    ``Http404`` (404).
    """

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        """Return whether a request may open a stream of a token. The default is ``False``.

        The view calls it once for each token of a stream. While the stream is open, it is called
        again every ``EVENTSOURCE_RECHECK_SECONDS``, with the current session and user.

        :param request: the GET or HEAD request.
        :param token: a valid token.
        """
        return False

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        """Return whether a request may publish to a token. The default is ``False``.

        :param request: the POST request.
        :param token: a valid token.
        :param action: the action of the URL, which the Event class may not list.
        """
        return False

    async def identify(self, request: HttpRequest) -> str:
        """Return the id of the user of a request, for ``listeners()``, limits, closing and keys.

        The default is the primary key of the user of HTTP Basic or of the session, as text.

        :param request: a request that :meth:`can_listen` or :meth:`can_send` has allowed.
        :returns: the id, or ``""`` for a request without a user.
        """
        return await _user_key(request)


class AllowAny(Policy):
    """Allows every request to listen and to send.

    ``EVENTSOURCE_SEND_RATE`` applies.
    """

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        return True

    async def can_send(self, request: HttpRequest, token: str, action: str) -> bool:
        await check_rate(request)
        return True


class DefaultPolicy(Policy):
    """Allows requests with a grant for the token, and users with the model permission.

    A grant is sent in ``Authorization: Bearer`` or ``?grant=``. A user logs in with HTTP Basic,
    which is checked with ``authenticate()``, or with a session. A session that sends must pass
    Django's CSRF check. ``EVENTSOURCE_SEND_RATE`` applies.
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


def make_policy(policy_class: Any = None) -> Policy:
    """Return an instance of a policy class.

    :param policy_class: the class; the one of ``EVENTSOURCE_POLICY`` if not passed.
    :raises ImproperlyConfigured: if it is not a usable subclass of :class:`Policy`.
    """
    name = "EVENTSOURCE_POLICY" if policy_class is None else "policy"
    policy_class = policy_class or conf.policy
    check_policy_class(name, policy_class)
    try:
        policy: Policy = policy_class()
    except TypeError as error:
        raise ImproperlyConfigured(
            f"{name} must be a class that needs no arguments ({error})."
        ) from error
    return policy


def check_policy_class(name: str, policy_class: Any) -> None:
    """Check that a class is a policy whose methods are asynchronous.

    :param name: the setting or argument that the class comes from, for the error.
    :raises ImproperlyConfigured: if it is not.
    """
    if not (isinstance(policy_class, type) and issubclass(policy_class, Policy)):
        raise ImproperlyConfigured(
            f"{name} must be a subclass of django_eventsource.policies.Policy, "
            f"not {policy_class!r}."
        )
    for method in ("can_listen", "can_send", "identify"):
        if not inspect.iscoroutinefunction(getattr(policy_class, method)):
            raise ImproperlyConfigured(
                f"{name} is {policy_class!r}, whose method {method}() is not asynchronous: "
                f"define it with `async def`."
            )


async def check_grant(request: HttpRequest, token: str, action: str | None = None) -> bool:
    """Return whether a request has a grant that covers it.

    A grant to send without a list of actions covers all actions except the ``FINISH`` and
    ``RETRY`` of the Event class. The view checks these two afterwards.

    :param token: the token that the request names.
    :param action: the action to send; ``None`` for a request that listens.
    :returns: ``False`` for a request without a grant.
    :raises NotAuthenticated: if the grant is not valid, has expired, or is bound to another
        session or user.
    :raises PermissionDenied: if the grant is for another token, right or action.
    """
    grant = _find_grant(request)
    if grant is None:
        return False
    if token not in grant.tokens:
        raise PermissionDenied("The grant is for another token.")
    if not (grant.listen if action is None else grant.send):
        verb = "listen to" if action is None else "send to"
        raise PermissionDenied(f"The grant does not allow to {verb} this token.")
    if action is not None and grant.actions is not None and action not in grant.actions:
        raise PermissionDenied(f"The grant does not allow the action {action[:SHOWN]!r}.")
    if grant.session:
        await _check_session(request, grant.session)
    if grant.user:
        user = await basic_user(request) or await session_user(request)
        if user is None or str(user.pk) != grant.user:
            raise NotAuthenticated("The grant is bound to a user who is not logged in here.")
    credentials_of(request).grant = grant
    return True


async def _check_session(request: HttpRequest, digest: str) -> None:
    key: Any = getattr(getattr(request, "session", None), "session_key", None)
    # The cookie contains the key. Reading the user shows whether the session exists.
    found = bool(key) and constant_time_compare(digest, hash_session_key(key))
    if not found or await session_user(request) is None:
        raise NotAuthenticated("The grant is bound to another session, or to one that has ended.")


def _find_grant(request: HttpRequest) -> Grant | None:
    """Return the grant of a request, from its header or its query; ``None`` without a grant.

    :raises NotAuthenticated: if the grant is forged, damaged or expired.
    """
    text = _grant_text(request)
    if not text:
        return None
    try:
        return read_grant(text, credentials_of(request).opened)
    except InvalidGrant as error:
        raise NotAuthenticated(str(error)) from error


def _grant_text(request: HttpRequest) -> str:
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        text = request.GET.get("grant", "")
    return text.strip()


async def sender_of(policy: Policy, request: HttpRequest) -> str:
    """Return a text that differs between the senders of POSTs, as the scope of their keys.

    It contains the user that the policy identifies, or the grant of a request without a user. An
    address is not enough: clients behind one proxy could suppress each other's events.

    :param request: a POST request that the policy has allowed.
    :raises InvalidParameter: if the request has neither.
    """
    user: Any = await policy.identify(request)
    if user is not None and str(user):
        return f"user {user}"
    if credentials_of(request).grant is not None:
        return f"grant {_grant_text(request)}"
    raise InvalidParameter(
        "Idempotency-Key needs a user or a grant, so that the keys of clients stay separate: log "
        "in, or send a grant."
    )


async def basic_user(request: HttpRequest) -> Any:
    """Return the user of the HTTP Basic credentials (RFC 7617) of a request.

    The password is hashed once for each request, however often this function is called.

    :returns: the user, or ``None`` for a request without such credentials.
    :raises NotAuthenticated: if the credentials are damaged or wrong.
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
        raise NotAuthenticated("The HTTP Basic credentials contain NUL.")
    name, _, password = credentials.partition(":")
    verified = credentials_of(request)
    if verified.user is not None:
        return verified.user if verified.opened is None else await _reload_user(verified.user)
    user = await check_password(request, name, password)
    if user is None:
        raise NotAuthenticated("Wrong user name or password.")
    verified.user = user
    return user


async def _reload_user(known: Any) -> Any:
    user = await type(known)._default_manager.filter(pk=known.pk).afirst()
    if user is None or not user.is_active or user.password != known.password:
        raise NotAuthenticated("The user or the password has changed.")
    return user


async def _user_key(request: HttpRequest) -> str:
    user = credentials_of(request).user or await session_user(request)
    return "" if user is None else str(user.pk)


async def check_rate(request: HttpRequest) -> None:
    """Count a POST against ``EVENTSOURCE_SEND_RATE``: of its user, or of its address.

    The count is kept in Django's default cache.

    :raises RateLimited: if there were too many.
    """
    rate = conf.send_rate
    if rate is None:
        return
    most, seconds = rate
    sender = await _user_key(request) or f"@{network_of(address_of(request))}"
    window = Window("rate", sender, seconds)
    # Not cache.aincr(), which reads, adds and writes with every backend.
    if await sync_to_async(window.add)() > most:
        raise RateLimited(window.seconds_left)


async def session_user(request: HttpRequest) -> Any:
    """Return the user who is logged in with the session of a request, or ``None``."""
    auser = getattr(request, "auser", None)
    user = None if auser is None else await auser()
    return user if user is not None and user.is_authenticated else None


async def has_permission(user: Any, permission: str) -> bool:
    """Return ``True`` if a user has a model permission.

    :param user: the user, or ``None``.
    :param permission: the permission as ``"app_label.codename"``.
    :raises NotAuthenticated: if there is no user.
    :raises PermissionDenied: if the user lacks the permission.
    """
    if user is None:
        raise NotAuthenticated("A grant for this token, or a login, is required.")
    if not await user.ahas_perm(permission):
        raise PermissionDenied(f"The user lacks the permission {permission}.")
    return True


async def check_csrf(request: HttpRequest) -> None:
    """Run Django's CSRF check, which a request that a session authorizes must pass.

    :raises PermissionDenied: if it fails.
    """
    reason = await sync_to_async(_csrf_reason)(request)
    if reason is not None:
        raise PermissionDenied(f"CSRF check failed: {reason}")


def check_origin(request: HttpRequest) -> None:
    """Refuse a POST that a page of another site makes a browser send.

    A browser adds cookies and HTTP Basic to such a request without a script. It does not add a
    grant or another ``Authorization``, so a request with one of these may come from any site.
    ``CSRF_TRUSTED_ORIGINS`` names further sites.

    :raises PermissionDenied: if the page is of another site.
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
