"""System checks: a wrong setting is told at start, not at the first request."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.core.exceptions import ImproperlyConfigured
from django.core.management import get_commands
from django.utils.module_loading import import_string

from .asgi import Handover
from .conf import PROPERTIES, conf
from .history import make_history
from .layers import get_layer, is_process_local

SETTING_IDS = {
    "event_class": "eventsource.E001",
    "history": "eventsource.E002",
    "policy": "eventsource.E003",
    "channel_layer": "eventsource.E004",
    "keepalive_seconds": "eventsource.E005",
    "retry_ms": "eventsource.E006",
    "poll_seconds": "eventsource.E007",
    "prune_seconds": "eventsource.E008",
    "grant_seconds": "eventsource.E009",
    "max_event_bytes": "eventsource.E010",
    "stream_buffer_bytes": "eventsource.E011",
    "stream_stall_seconds": "eventsource.E012",
    "stream_max_age_seconds": "eventsource.E013",
    "stream_max_tokens": "eventsource.E014",
    "recheck_seconds": "eventsource.E015",
    "presence_seconds": "eventsource.E016",
    "max_streams": "eventsource.E017",
    "max_streams_per_token": "eventsource.E018",
    "max_streams_per_user": "eventsource.E019",
    "max_streams_per_address": "eventsource.E020",
    "send_rate": "eventsource.E021",
    "coalesce_seconds": "eventsource.E022",
    "login_rate": "eventsource.E023",
    "retry_range_ms": "eventsource.E024",
}
"""The check id of each setting. Projects list ids in ``SILENCED_SYSTEM_CHECKS``, so an id never
changes: a new setting takes the next free number."""
WSGI_RUNSERVERS = ("django.core", "django.contrib.staticfiles")


def check_settings(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Report every setting with a bad value or class path."""
    messages: list[CheckMessage] = []
    for name in PROPERTIES:
        try:
            value = getattr(conf, name)
            if name == "history":
                make_history()
            elif name == "channel_layer":
                get_layer()
            elif name == "policy":
                make_policy(value)
        except ImproperlyConfigured as error:
            messages.append(Error(str(error), id=SETTING_IDS[name]))
    return messages


def make_policy(policy: type[Any]) -> Any:
    """Make a policy as the view does.

    :raises ImproperlyConfigured: when it wants arguments.
    """
    try:
        return policy()
    except TypeError as error:
        raise ImproperlyConfigured(
            f"EVENTSOURCE_POLICY must name a class that is made without arguments ({error})."
        ) from error


def check_processes(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn when the layer spans processes and the history does not."""
    try:
        lonely = not make_history().shared and not is_process_local()
    except ImproperlyConfigured:
        return []  # reported by check_settings
    if not lonely:
        return []
    return [
        Warning(
            "The channel layer is shared by several processes, but each has a history of its "
            "own: a listener would miss the events of other processes, or get them twice.",
            hint="Use DatabaseHistory in EVENTSOURCE_HISTORY, or an in-memory channel layer.",
            id="eventsource.W002",
        )
    ]


def check_broker(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn when the messages on a Redis server are not authenticated."""
    try:
        layer = get_layer()
    except ImproperlyConfigured:
        return []  # reported by check_settings
    bases = type(layer).__mro__
    if not any(base.__module__.startswith("channels_redis.") for base in bases):
        return []
    alias = conf.channel_layer
    if (
        getattr(settings, "CHANNEL_LAYERS", {})[alias]
        .get("CONFIG", {})
        .get("symmetric_encryption_keys")
    ):
        return []
    return [
        Warning(
            f"CHANNEL_LAYERS[{alias!r}] has no symmetric_encryption_keys: a client that can "
            "publish on the Redis server can forge events.",
            hint=(
                'Add "symmetric_encryption_keys": [SECRET_KEY] to its CONFIG and install '
                "channels_redis[cryptography]. Silence this warning if only this project can "
                "connect to the server."
            ),
            id="eventsource.W005",
        )
    ]


def check_server(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn when the project does not look as if it were served by ASGI, or is not."""
    if sys.argv[1:2] == ["runserver"] and get_commands()["runserver"] in WSGI_RUNSERVERS:
        return [
            Warning(
                "`manage.py runserver` is Django's own here, which serves WSGI: streams are "
                "answered 500.",
                hint='Put "daphne" first in INSTALLED_APPS.',
                id="eventsource.W003",
            )
        ]
    if getattr(settings, "ASGI_APPLICATION", None):
        return []
    return [
        Warning(
            "ASGI_APPLICATION is not set: streams need an ASGI server, and a request that "
            "comes through WSGI is answered 500.",
            hint=(
                'Set ASGI_APPLICATION = "<project>.asgi.application", and put "daphne" first '
                "in INSTALLED_APPS so that `manage.py runserver` serves it."
            ),
            id="eventsource.W001",
        )
    ]


def check_handover(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn when the project's ASGI application serves streams inside of Django."""
    path = getattr(settings, "ASGI_APPLICATION", None)
    if not path:
        return []  # reported by check_server
    try:
        import_string(path)
    except Exception:  # noqa: BLE001
        return []  # whoever serves it will say why
    if Handover.made:
        return []
    return [
        Warning(
            "The ASGI application does not hand streams over: each costs more memory "
            "and CPU, and daphne buffers without bound for a listener that does not read.",
            hint=(
                "In asgi.py: from django_eventsource.asgi import Handover; "
                "application = Handover(get_asgi_application())"
            ),
            id="eventsource.W004",
        )
    ]
