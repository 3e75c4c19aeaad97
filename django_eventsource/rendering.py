"""Publish the text of templates, for pages that replace a part of themselves with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest
from django.template.loader import render_to_string
from django.utils.asyncio import async_unsafe

from .events import Event
from .publishing import publish

__all__ = ["apublish_template", "publish_template"]


@async_unsafe(
    "publish_template() blocks: in async code call `await apublish_template(...)` instead."
)
def publish_template(
    token: str,
    action: str,
    template_name: str | Sequence[str],
    context: Mapping[str, Any] | None = None,
    *,
    request: HttpRequest | None = None,
    using: str | None = None,
    event_class: type[Event] | None = None,
    key: str | None = None,
) -> Event:
    """Render a template, and publish its text to the listeners of a token.

    The template is rendered at the call. Its text is published as by
    :func:`~django_eventsource.publish`: inside of a transaction at the commit. Every listener
    receives the same text, also if it was rendered with a request.

    :param token: the token, 1 to 255 characters.
    :param action: an action that the class allows.
    :param template_name: the name of the template, or a list of names, of which the first that
        exists is used.
    :param context: the variables of the template.
    :param request: a request for the context processors; ``None`` calls none.
    :param using: the ``NAME`` of a template engine; ``None`` tries all engines.
    :param event_class: the class of the event; ``EVENTSOURCE_EVENT_CLASS`` by default. A JSON
        class accepts only a text that is JSON.
    :param key: the key that :func:`~django_eventsource.publish` accepts.
    :returns: the event; outside of a transaction with its id.
    :raises ValueError: if the token, the action, the text or the key is not valid. Nothing was
        published.
    :raises DeliveryFailed: if a live-only event did not reach the channel layer.
    :raises TemplateDoesNotExist: if no template has the name.
    """
    text = render_to_string(template_name, context, request, using)
    return publish(token, action, text, event_class, key=key)


async def apublish_template(
    token: str,
    action: str,
    template_name: str | Sequence[str],
    context: Mapping[str, Any] | None = None,
    *,
    request: HttpRequest | None = None,
    using: str | None = None,
    event_class: type[Event] | None = None,
    key: str | None = None,
) -> Event:
    """Call :func:`publish_template` in Django's thread for synchronous work."""
    return await sync_to_async(publish_template)(
        token,
        action,
        template_name,
        context,
        request=request,
        using=using,
        event_class=event_class,
        key=key,
    )
