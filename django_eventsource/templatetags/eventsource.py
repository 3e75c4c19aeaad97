"""Template tags: URLs with a grant in them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from django import template
from django.urls import reverse

from ..conf import conf
from ..grants import make_grant

register = template.Library()


@register.simple_tag
def eventsource_url(
    token: str | Sequence[str], action: str | None = None, seconds: float | None = None
) -> str:
    """Give the URL on which the page that it stands in may listen to a token.

    ``{% eventsource_url token %}`` is for ``new EventSource(...)``;
    ``{% eventsource_url token "ping" %}`` is for a POST of that action. Whoever is shown
    the page holds the grant: show it to nobody else.

    :param token: the token, or a list of tokens that one stream is to carry.
    :param action: an action to send; the Event class's ``LISTEN`` if not given.
    :param seconds: the grant's lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    :raises ValueError: for something that is no token, or several to send to.
    """
    first, *others = [token] if isinstance(token, str) else list(token) or [""]
    listens = action is None or action == conf.event_class.LISTEN
    if others and not listens:
        raise ValueError(f"An event is sent to one token, not to {len(others) + 1}.")
    grant = make_grant([first, *others], listen=listens, send=not listens, seconds=seconds)
    path = reverse(
        "eventsource:event",
        kwargs={"action": action or conf.event_class.LISTEN, "token": first},
    )
    query = [*(("token", other) for other in others), ("grant", grant)]
    return f"{path}?{urlencode(query)}"
