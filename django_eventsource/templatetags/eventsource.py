"""Template tags: URLs with a grant in them."""

from __future__ import annotations

from urllib.parse import urlencode

from django import template
from django.urls import reverse

from ..conf import conf
from ..grants import make_grant

register = template.Library()


@register.simple_tag
def eventsource_url(token: str, action: str | None = None, seconds: float | None = None) -> str:
    """Give the URL on which the page that it stands in may listen to a token.

    ``{% eventsource_url token %}`` is for ``new EventSource(...)``;
    ``{% eventsource_url token "ping" %}`` is for a POST of that action. Whoever is shown
    the page holds the grant: show it to nobody else.

    :param token: the token.
    :param action: an action to send; the Event class's ``LISTEN`` if not given.
    :param seconds: the grant's lifetime; ``EVENTSOURCE_GRANT_SECONDS`` if not given.
    """
    listens = action is None or action == conf.event_class.LISTEN
    grant = make_grant(token, listen=listens, send=not listens, seconds=seconds)
    path = reverse(
        "eventsource:event",
        kwargs={"action": action or conf.event_class.LISTEN, "token": token},
    )
    return f"{path}?{urlencode({'grant': grant})}"
