"""Template tags for URLs with a grant, and for the browser module."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from django import template
from django.contrib.auth import SESSION_KEY, get_user_model
from django.core.exceptions import SynchronousOnlyOperation
from django.template import Context
from django.templatetags.static import static
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.safestring import mark_safe

from ..conf import conf
from ..events import action_error
from ..exceptions import InvalidToken
from ..grants import lasting_session_key, make_grant
from ..protocol.cursors import UNKNOWN, parse_cursors
from ..protocol.field_rules import DOT_SEGMENTS, shown
from ..protocol.rewind import parse_rewind

register = template.Library()

CONTEXT_HINT = "Does the context of the template contain it?"
"""A variable that is not in the context is an empty text for the tag."""


@register.simple_tag(takes_context=True)
def eventsource_url(
    context: Context,
    token: str | Sequence[str],
    action: str | None = None,
    seconds: float | None = None,
    bind: bool = True,
    after: str | None = None,
    rewind: str | int | None = None,
) -> str:
    """Return a URL with a grant, for a page that listens or sends to a token.

    ``{% eventsource_url token %}`` is for ``new EventSource(...)``.
    ``{% eventsource_url token "ping" %}`` is for a POST of this action, and of no other one. Every
    client that receives the page has the grant.

    :param token: the token, or a list of tokens of one stream.
    :param action: an action to send; the Event class's ``LISTEN`` if not passed.
    :param seconds: the lifetime of the grant; ``EVENTSOURCE_GRANT_SECONDS`` if not passed.
    :param bind: bind the grant to the session and the user of the page, so that it ends at the
        logout. It is not bound without a user who is logged in, or with ``signed_cookies``
        sessions.
    :param after: the cursor after which the stream starts, which
        :func:`~django_eventsource.get_cursor` returned. A client that reconnects starts after its
        last event.
    :param rewind: the stored events with which a stream without a cursor starts: a number, an age
        (``"30s"``, ``"5m"``, ``"2h"``) or ``"all"``.
    :returns: text that is safe in a script, in an HTML attribute and in text, without escaping.
    :raises ValueError: for an argument that is not valid, for an action that the project's Event
        class does not allow, and for several tokens to send to.
    :raises NoReverseMatch: if the project's URLs do not include ``django_eventsource.urls``.
    """
    first, *others = [token] if isinstance(token, str) else list(token) or [""]
    if action is None:
        action = conf.event_class.LISTEN
    listens = action == conf.event_class.LISTEN
    if others and not listens:
        raise ValueError(
            f"An event is sent to one token, not to {len(others) + 1}: pass one token."
        )
    if not all((first, *others)):
        raise InvalidToken(f"A token is empty. {CONTEXT_HINT}")
    if not listens and (error := action_error(conf.event_class, action)):
        raise error
    start = _start_of_stream([first, *others], after, rewind)
    if start and not listens:
        raise ValueError(f"after and rewind are for a stream, not for the action {action!r}.")
    grant = make_grant(
        [first, *others],
        listen=listens,
        actions=None if listens else action,
        seconds=seconds,
        **(_login(context) if bind else {}),
    )
    path = _path_of(action, first)
    query = [*(("token", other) for other in others), ("grant", grant), *start]
    # Autoescaping would turn & into &amp;, which a script does not decode. The text has no
    # character that ends a string or an attribute: urlencode() and reverse() percent-encode
    # < > " \ and {, and _path_of() encodes '.
    return mark_safe(f"{path}?{urlencode(query)}")  # noqa: S308


@register.simple_tag
def eventsource_script(nonce: object = None) -> str:
    """Return the script element of the browser module, with the id ``eventsource``.

    The ``src`` of the element is the URL of the module, also with ``ManifestStaticFilesStorage``.
    A script imports it from there: ``await import(document.querySelector("#eventsource").src)``.

    :param nonce: the nonce of the page's Content-Security-Policy. It is ``csp_nonce`` with
        Django's context processor ``csp`` (Django 6.0 and newer), and ``request.csp_nonce`` with
        django-csp.
    :returns: HTML without an inline script, which a strict Content-Security-Policy accepts.
    :raises ValueError: for an empty nonce.
    """
    src = static("eventsource/eventsource.js")
    if nonce is None:
        return format_html('<script type="module" id="eventsource" src="{}"></script>', src)
    # Do not test `nonce` itself: as a condition, it is false before its first use as a text.
    text = str(nonce)
    if not text:
        raise ValueError(f"nonce is empty. {CONTEXT_HINT}")
    html = '<script type="module" id="eventsource" src="{}" nonce="{}"></script>'
    return format_html(html, src, text)


def _start_of_stream(
    tokens: Sequence[str], after: str | None, rewind: str | int | None
) -> list[tuple[str, str]]:
    """Return the part of the query that says where a stream starts."""
    if not isinstance(after, str | None):
        raise ValueError(f"after must be a cursor that get_cursor() returned, not {shown(after)}.")
    query = []
    if after is not None:
        if not after:
            raise ValueError(f"after is empty. {CONTEXT_HINT}")
        if UNKNOWN in parse_cursors(after, tokens).values():
            raise ValueError(
                f"after must be a cursor that get_cursor() returned, not {after[:40]!r}."
            )
        if None in parse_cursors(after, tokens).values():
            raise ValueError(
                "after is a cursor of other tokens: pass the tokens of the tag to get_cursor()."
            )
        query.append(("last_event_id", after))
    if rewind is not None:
        parse_rewind(rewind)
        query.append(("rewind", str(rewind)))
    return query


def _path_of(action: str, token: str) -> str:
    """Return the path of an action and a token, with ``&`` and ``'`` percent-encoded.

    :raises InvalidToken: for the token ``.`` or ``..``.
    """
    if token in DOT_SEGMENTS:
        raise InvalidToken(
            f"The token {token!r} cannot be in the path of a URL, because browsers remove it. "
            "Choose another name."
        )
    climbs = not DOT_SEGMENTS.isdisjoint(token.split("/"))
    kwargs = {"action": action, "token": "-" if climbs else token}
    try:
        path = reverse("eventsource:event", kwargs=kwargs)
    except NoReverseMatch as error:
        raise NoReverseMatch(
            f'There is no URL for the action {action!r}. Add path("events/", '
            'include("django_eventsource.urls")) to the project\'s URLs.'
        ) from error
    if climbs:
        # With its slashes, a browser would request another URL of the site.
        path = path.removesuffix("-") + quote(token, safe="")
    return path.replace("&", "%26").replace("'", "%27")


def _login(context: Context) -> dict[str, Any]:
    """Return the session and the user of the page as arguments of ``make_grant()``.

    The session ends with the login of another user. The user is for the browser module, which
    compares it with the user of a new grant.

    :returns: ``{}`` without a user who is logged in.
    :raises SynchronousOnlyOperation: if an asynchronous view has not read the session.
    """
    request = getattr(context, "request", None) or context.get("request")
    session = getattr(request, "session", None)
    key = lasting_session_key(session)
    if session is None or key is None:
        return {}
    try:
        user = session.get(SESSION_KEY)
    except SynchronousOnlyOperation as error:
        raise SynchronousOnlyOperation(
            "eventsource_url needs the session: in an asynchronous view call `await "
            "request.auser()` before you render the page, or pass bind=False to the tag."
        ) from error
    if user is None:
        return {}
    return {"session_key": key, "user": str(get_user_model()._meta.pk.to_python(user))}
