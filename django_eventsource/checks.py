"""System checks, which report a wrong setting at start, before the first request."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.core.exceptions import ImproperlyConfigured
from django.core.management import get_commands
from django.db import connections
from django.utils.module_loading import import_string

from .asgi import Handover
from .conf import PROPERTIES, conf
from .delivery.layer import get_layer, is_process_local
from .history import make_history
from .policies import AllowAny, make_policy

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
    "write_to_transport": "eventsource.E025",
    "metrics_token": "eventsource.E026",
}
"""The check id of each setting. Projects list ids in ``SILENCED_SYSTEM_CHECKS``, so an id never
changes: a new setting takes the next free number."""
ASGI_LINES = """
    import os
    from django.core.asgi import get_asgi_application
    from django_eventsource.asgi import Handover
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "<project>.settings")
    application = Handover(get_asgi_application())"""
"""The content of an ``asgi.py``."""
MAX_GRANT_SECONDS = 86_400
"""Grants that are valid for longer are reported. A URL with a grant ends up in access logs."""
CONSTRUCTORS = {"history": make_history, "channel_layer": get_layer, "policy": make_policy}
"""The functions that check more of a setting than ``conf`` does."""


def check_settings(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Return an error for every setting whose value or class path is wrong."""
    messages: list[CheckMessage] = []
    for name in PROPERTIES:
        try:
            getattr(conf, name)
            if name in CONSTRUCTORS:
                CONSTRUCTORS[name]()
        except ImproperlyConfigured as error:
            messages.append(Error(str(error), id=SETTING_IDS[name]))
    return messages


def check_processes(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if several processes share the channel layer, but not the history."""
    try:
        if make_history().shared or is_process_local():
            return []
    except ImproperlyConfigured:
        return []  # reported by check_settings
    return [
        Warning(
            "Several processes share the channel layer, but each process has its own history: a "
            "listener would miss events of other processes, or receive them twice.",
            hint="Use DatabaseHistory in EVENTSOURCE_HISTORY, or an in-memory channel layer.",
            id="eventsource.W002",
        )
    ]


def check_broker(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if the messages on a Redis server are not authenticated."""
    try:
        bases = type(get_layer()).__mro__
    except ImproperlyConfigured:
        return []  # reported by check_settings
    if not any(base.__module__.startswith("channels_redis.") for base in bases):
        return []
    alias = conf.channel_layer
    config = getattr(settings, "CHANNEL_LAYERS", {})[alias].get("CONFIG", {})
    if config.get("symmetric_encryption_keys"):
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


def check_outbox(
    app_configs: Any = None, databases: Sequence[str] | None = None, **kwargs: Any
) -> Sequence[CheckMessage]:
    """Warn if committed events wait in a database whose outbox the history does not read."""
    try:
        history = make_history()
    except ImproperlyConfigured:
        return []  # reported by check_settings
    model: Any = apps.get_model("django_eventsource", "PendingEvent")
    messages = []
    for alias in databases or ():
        if history.has_outbox and alias == history.using:
            continue
        if model._meta.db_table not in connections[alias].introspection.table_names():
            continue
        count = model._default_manager.using(alias).count()
        if count:
            messages.append(
                Warning(
                    f"The database {alias!r} has pending events ({count}), which the history does "
                    "not publish. Another history wrote them, or OUTBOX was turned off.",
                    hint=(
                        "Use the earlier EVENTSOURCE_HISTORY until they are published. To drop "
                        "them, delete the rows of django_eventsource.models.PendingEvent."
                    ),
                    id="eventsource.W010",
                )
            )
    return messages


def check_server(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if the project is not served by an ASGI server, as far as the settings show."""
    wsgi = ("django.core", "django.contrib.staticfiles")
    if sys.argv[1:2] == ["runserver"] and get_commands()["runserver"] in wsgi:
        return [
            Warning(
                "`manage.py runserver` is Django's own command here, which serves WSGI: requests "
                "for streams fail with status 500.",
                hint='Put "daphne" first in INSTALLED_APPS.',
                id="eventsource.W003",
            )
        ]
    if getattr(settings, "ASGI_APPLICATION", None):
        return []
    return [
        Warning(
            "ASGI_APPLICATION is not set: streams need an ASGI server. Through WSGI, requests for "
            "streams fail with status 500.",
            hint=(
                'Set ASGI_APPLICATION = "<project>.asgi.application", and put "daphne" first '
                "in INSTALLED_APPS so that `manage.py runserver` serves it."
            ),
            id="eventsource.W001",
        )
    ]


def check_handover(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if the ASGI application cannot be imported, or is not wrapped in ``Handover``."""
    path = getattr(settings, "ASGI_APPLICATION", None)
    if not path:
        return []  # reported by check_server
    try:
        import_string(path)
    except Exception as error:  # noqa: BLE001
        return [
            Warning(
                f"ASGI_APPLICATION {path!r} cannot be imported: {type(error).__name__}: {error}",
                hint=f"If the project has no asgi.py, create it with these lines:{ASGI_LINES}",
                id="eventsource.W006",
            )
        ]
    if Handover.made:
        return []
    return [
        Warning(
            "asgi.py does not wrap the application in Handover: each stream needs more memory and "
            "CPU, and daphne buffers without a bound for a client that does not read.",
            hint=(
                "In asgi.py: from django_eventsource.asgi import Handover; "
                "application = Handover(get_asgi_application())"
            ),
            id="eventsource.W004",
        )
    ]


def check_access(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if the settings let more clients listen or send than a deployment should."""
    messages = []
    if _has_value("policy", lambda policy: policy is AllowAny):
        messages.append(
            Warning(
                "EVENTSOURCE_POLICY is AllowAny: every client that reaches the server may listen "
                "to every token and send events to it.",
                hint="Remove the setting, or name a policy of your own in it.",
                id="eventsource.W007",
            )
        )
    if _has_value("grant_seconds", lambda seconds: seconds > MAX_GRANT_SECONDS):
        messages.append(
            Warning(
                f"EVENTSOURCE_GRANT_SECONDS is {conf.grant_seconds:.0f}: a grant that is found in "
                "an access log is valid for more than a day.",
                hint=(
                    "Let pages renew a grant that has expired, or pass `seconds` to the few "
                    "calls of make_grant() that need more."
                ),
                id="eventsource.W008",
            )
        )
    every_origin = any(
        getattr(settings, name, False)
        for name in ("CORS_ALLOW_ALL_ORIGINS", "CORS_ORIGIN_ALLOW_ALL")
    )
    if every_origin and getattr(settings, "CORS_ALLOW_CREDENTIALS", False):
        messages.append(
            Warning(
                "CORS_ALLOW_ALL_ORIGINS and CORS_ALLOW_CREDENTIALS are both set: the pages of "
                "every site can listen with the cookies of your users.",
                hint="List the sites in CORS_ALLOWED_ORIGINS.",
                id="eventsource.W009",
            )
        )
    return messages


def check_metrics(app_configs: Any = None, **kwargs: Any) -> Sequence[CheckMessage]:
    """Warn if the metrics lack their library or their directory."""
    messages = []
    has_library = find_spec("prometheus_client") is not None
    if not has_library and _has_value("metrics_token", lambda token: token is not None):
        messages.append(
            Warning(
                "EVENTSOURCE_METRICS_TOKEN is set, but prometheus-client is not installed: "
                "requests for the metrics fail with status 500.",
                hint='Install django-eventsource with the extra "prometheus".',
                id="eventsource.W011",
            )
        )
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if has_library and directory is not None and not os.path.isdir(directory):
        messages.append(
            Warning(
                f"PROMETHEUS_MULTIPROC_DIR is {directory!r}, which is not a directory: the "
                "metrics cannot be written.",
                hint="Make the directory before each start of the server, or unset the variable.",
                id="eventsource.W012",
            )
        )
    return messages


def _has_value(name: str, test: Callable[[Any], bool]) -> bool:
    """Return whether a setting is valid and passes a test."""
    try:
        return test(getattr(conf, name))
    except ImproperlyConfigured:
        return False  # reported by check_settings
