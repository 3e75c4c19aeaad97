"""Template tags: URLs with a grant in them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from django import template
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.exceptions import SynchronousOnlyOperation
from django.template import Context
from django.urls import NoReverseMatch, reverse
from django.utils.safestring import mark_safe

from ..conf import conf
from ..grants import make_grant

register = template.Library()


@register.simple_tag(takes_context=True)
def eventsource_url(
    context: Context,
    token: str | Sequence[str],
    action: str | None = None,
    seconds: float | None = None,
    bind: bool = True,
) -> str:
    """Return the URL on which the page that it stands in may listen to a token.

    ``{% eventsource_url token %}`` is for ``new EventSource(...)``;
    ``{% eventsource_url token "ping" %}`` is for a POST of that action, and of no other. A
    client that receives the page has the grant: send it to no other client.

    :param token: the token, or a list of tokens that one stream is to carry.
    :param action: an action to send; the Event class's ``LISTEN`` if not given.
    :param seconds: the grant's lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    :param bind: bind the grant to the page's session, so that it ends at the logout. Without a
        user who is logged in, and with ``signed_cookies`` sessions, it is not bound.
    :returns: text that is safe in a script, in an HTML attribute and in text, without escaping.
    :raises ValueError: for something that is not a token, or several to send to.
    :raises NoReverseMatch: if the project's URLs do not include ``django_eventsource.urls``.
    """
    first, *others = [token] if isinstance(token, str) else list(token) or [""]
    listens = action is None or action == conf.event_class.LISTEN
    if others and not listens:
        raise ValueError(f"An event is sent to one token, not to {len(others) + 1}.")
    grant = make_grant(
        [first, *others],
        listen=listens,
        actions=None if listens else action,
        seconds=seconds,
        session_key=_login_session_key(context) if bind else None,
    )
    path = _path_of(action or conf.event_class.LISTEN, first)
    query = [*(("token", other) for other in others), ("grant", grant)]
    # Autoescaping would turn & into &amp;, which a script does not decode. Nothing in this text
    # can end a string or an attribute: < > " \ and { are percent-encoded anyway, ' here.
    return mark_safe(f"{path}?{urlencode(query)}")  # noqa: S308


def _path_of(action: str, token: str) -> str:
    """Return the path of an action and a token, without ``&`` and ``'``."""
    try:
        path = reverse("eventsource:event", kwargs={"action": action, "token": token})
    except NoReverseMatch as error:
        raise NoReverseMatch(
            f'There is no URL for the action {action!r}. Add path("events/", '
            'include("django_eventsource.urls")) to the project\'s URLs.'
        ) from error
    return path.replace("&", "%26").replace("'", "%27")


def _login_session_key(context: Context) -> str | None:
    """Return the key of the session that the page's user is logged in with, if there is one.

    :raises SynchronousOnlyOperation: when an asynchronous view has not read the session.
    """
    request = getattr(context, "request", None) or context.get("request")
    session = getattr(request, "session", None)
    key: str | None = getattr(session, "session_key", None)
    # The key of a session that is in the cookie changes with its data.
    if session is None or key is None or isinstance(session, SignedCookies):
        return None
    try:
        return key if session.get(SESSION_KEY) is not None else None
    except SynchronousOnlyOperation as error:
        raise SynchronousOnlyOperation(
            "eventsource_url needs the session: in an asynchronous view call `await "
            "request.auser()` before you render the page, or pass bind=False to the tag."
        ) from error
