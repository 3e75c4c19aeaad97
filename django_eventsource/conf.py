"""The settings, read live: one typed property for each.

``django.conf.settings`` is asked at every access, so ``override_settings`` just works.
Each property raises ``ImproperlyConfigured`` naming the setting, its value and what is
expected; the system checks report the same sentences at start.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .events import MAX_ACTION_LENGTH, RESERVED, Event, check_field
from .exceptions import InvalidEvent

MAX_NUMBER = 10**12
RETRY_RANGE = "a pair of positive whole numbers, (least, greatest)"
DEFAULT_HISTORY = "django_eventsource.history.database.DatabaseHistory"


class Conf:
    """Every ``EVENTSOURCE_*`` setting as a property, with its default."""

    @property
    def event_class(self) -> type[Event]:
        """``EVENTSOURCE_EVENT_CLASS``: dotted path of an Event class."""
        name = "EVENTSOURCE_EVENT_CLASS"
        path = _get(name, "django_eventsource.events.StringIdEvent")
        value = _load(name, path)
        if not (isinstance(value, type) and issubclass(value, Event)):
            raise ImproperlyConfigured(
                f"{name} must name a subclass of django_eventsource.events.Event, not {path!r}."
            )
        return check_event_class(value)

    @property
    def history(self) -> tuple[str, dict[str, Any]]:
        """``EVENTSOURCE_HISTORY``: the backend's dotted path and its options."""
        name = "EVENTSOURCE_HISTORY"
        value = _get(name, {})
        if not isinstance(value, Mapping) or set(value) - {"BACKEND", "OPTIONS"}:
            raise ImproperlyConfigured(
                f'{name} must be a dictionary with "BACKEND" and "OPTIONS", not {value!r}.'
            )
        options = value.get("OPTIONS", {})
        if not isinstance(options, Mapping):
            raise ImproperlyConfigured(f"{name} OPTIONS must be a dictionary, not {options!r}.")
        return value.get("BACKEND", DEFAULT_HISTORY), dict(options)

    @property
    def policy(self) -> type[Any]:
        """``EVENTSOURCE_POLICY``: dotted path of a policy class."""
        name = "EVENTSOURCE_POLICY"
        path = _get(name, "django_eventsource.policies.DefaultPolicy")
        value = _load(name, path)
        hooks = (getattr(value, hook, None) for hook in ("can_listen", "can_send"))
        if not all(inspect.iscoroutinefunction(hook) for hook in hooks):
            raise ImproperlyConfigured(
                f"{name} must name a class with `async def can_listen()` and `async def "
                f"can_send()`, not {path!r}."
            )
        return value  # type: ignore[no-any-return]

    @property
    def channel_layer(self) -> str:
        """``EVENTSOURCE_CHANNEL_LAYER``: an alias in ``CHANNEL_LAYERS``."""
        name = "EVENTSOURCE_CHANNEL_LAYER"
        value = _get(name, "default")
        configured = getattr(settings, "CHANNEL_LAYERS", {})
        if not isinstance(value, str) or (value != "default" and value not in configured):
            raise ImproperlyConfigured(
                f"{name} must be an alias in CHANNEL_LAYERS "
                f"({', '.join(configured) or 'none there'}), not {value!r}."
            )
        return value

    @property
    def keepalive_seconds(self) -> float | None:
        """``EVENTSOURCE_KEEPALIVE_SECONDS``: longest silence on a stream, or ``None``."""
        return _positive("EVENTSOURCE_KEEPALIVE_SECONDS", 15.0)

    @property
    def retry_ms(self) -> int | None:
        """``EVENTSOURCE_RETRY_MS``: the reconnection time sent first, or ``None``."""
        return _positive_int("EVENTSOURCE_RETRY_MS", None, or_none=True)

    @property
    def poll_seconds(self) -> float | None:
        """``EVENTSOURCE_POLL_SECONDS``: time between head checks; ``None`` picks it."""
        return _positive("EVENTSOURCE_POLL_SECONDS", None)

    @property
    def prune_seconds(self) -> float | None:
        """``EVENTSOURCE_PRUNE_SECONDS``: time between a server's prunes, or ``None``."""
        return _positive("EVENTSOURCE_PRUNE_SECONDS", 60.0)

    @property
    def grant_seconds(self) -> float:
        """``EVENTSOURCE_GRANT_SECONDS``: lifetime of a grant that names none."""
        return _positive("EVENTSOURCE_GRANT_SECONDS", 86_400.0, or_none=False) or 0.0

    @property
    def max_event_bytes(self) -> int:
        """``EVENTSOURCE_MAX_EVENT_BYTES``: the largest event as it is sent, and POST body."""
        return _positive_int("EVENTSOURCE_MAX_EVENT_BYTES", 1024 * 1024) or 0

    @property
    def stream_buffer_bytes(self) -> int:
        """``EVENTSOURCE_STREAM_BUFFER_BYTES``: what one stream may hold back for its reader."""
        return _positive_int("EVENTSOURCE_STREAM_BUFFER_BYTES", 256 * 1024) or 0

    @property
    def stream_stall_seconds(self) -> float | None:
        """``EVENTSOURCE_STREAM_STALL_SECONDS``: how long a reader may take nothing."""
        return _positive("EVENTSOURCE_STREAM_STALL_SECONDS", 30.0)

    @property
    def stream_max_age_seconds(self) -> float | None:
        """``EVENTSOURCE_STREAM_MAX_AGE_SECONDS``: how long a stream may be open."""
        return _positive("EVENTSOURCE_STREAM_MAX_AGE_SECONDS", 3600.0)

    @property
    def stream_max_tokens(self) -> int:
        """``EVENTSOURCE_STREAM_MAX_TOKENS``: how many tokens one stream may carry."""
        return _positive_int("EVENTSOURCE_STREAM_MAX_TOKENS", 16) or 0

    @property
    def recheck_seconds(self) -> float | None:
        """``EVENTSOURCE_RECHECK_SECONDS``: time between two looks at a listener's rights."""
        return _positive("EVENTSOURCE_RECHECK_SECONDS", 60.0)

    @property
    def presence_seconds(self) -> float | None:
        """``EVENTSOURCE_PRESENCE_SECONDS``: how old a list of listeners may be, or ``None``."""
        return _positive("EVENTSOURCE_PRESENCE_SECONDS", 5.0)

    @property
    def max_streams(self) -> int | None:
        """``EVENTSOURCE_MAX_STREAMS``: streams of one process."""
        return _positive_int("EVENTSOURCE_MAX_STREAMS", None, or_none=True)

    @property
    def max_streams_per_token(self) -> int | None:
        """``EVENTSOURCE_MAX_STREAMS_PER_TOKEN``: the same for each token."""
        return _positive_int("EVENTSOURCE_MAX_STREAMS_PER_TOKEN", None, or_none=True)

    @property
    def max_streams_per_user(self) -> int | None:
        """``EVENTSOURCE_MAX_STREAMS_PER_USER``: the same for each user."""
        return _positive_int("EVENTSOURCE_MAX_STREAMS_PER_USER", None, or_none=True)

    @property
    def max_streams_per_address(self) -> int | None:
        """``EVENTSOURCE_MAX_STREAMS_PER_ADDRESS``: the same for each client address."""
        return _positive_int("EVENTSOURCE_MAX_STREAMS_PER_ADDRESS", None, or_none=True)

    @property
    def send_rate(self) -> tuple[int, float] | None:
        """``EVENTSOURCE_SEND_RATE``: events, and seconds in which one sender may post them."""
        return _rate("EVENTSOURCE_SEND_RATE", None, "events")

    @property
    def coalesce_seconds(self) -> float | None:
        """``EVENTSOURCE_COALESCE_SECONDS``: a busy token is passed on at most that often."""
        return _positive("EVENTSOURCE_COALESCE_SECONDS", 0.005)

    @property
    def login_rate(self) -> tuple[int, float] | None:
        """``EVENTSOURCE_LOGIN_RATE``: failed logins of a user at an address, and seconds."""
        return _rate("EVENTSOURCE_LOGIN_RATE", (10, 60.0), "failures")

    @property
    def retry_range_ms(self) -> tuple[int, int]:
        """``EVENTSOURCE_RETRY_RANGE_MS``: least and greatest reconnection time to be posted."""
        name = "EVENTSOURCE_RETRY_RANGE_MS"
        value = _get(name, (100, 3_600_000))
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(type(number) is int for number in value):
            raise number_error(name, value, RETRY_RANGE)
        least, most = value
        if not 0 < least <= most <= MAX_NUMBER:
            raise number_error(name, value, RETRY_RANGE)
        return least, most


PROPERTIES = [name for name, value in vars(Conf).items() if isinstance(value, property)]

conf = Conf()


def check_event_class(event_class: type[Event]) -> type[Event]:
    """Check that the actions of a class are a list of names, none of them reserved.

    :raises ImproperlyConfigured: when it does not.
    """
    where = f"{event_class.__module__}.{event_class.__qualname__}"
    actions = event_class.ACTIONS
    if not isinstance(actions, list | tuple) or not all(map(_is_action, actions)):
        raise ImproperlyConfigured(
            f"{where}.ACTIONS must be a list of action names, without slashes or line ends, "
            f"not {actions!r}."
        )
    if not _is_action(event_class.LISTEN):
        raise ImproperlyConfigured(
            f"{where}.LISTEN must be an action name, not {event_class.LISTEN!r}."
        )
    for action in (*actions, event_class.LISTEN):
        if action in RESERVED:
            raise ImproperlyConfigured(
                f"{where} lists the action {action!r}, which is reserved for events that the "
                "streams themselves send. Choose another name."
            )
    return event_class


def _is_action(name: object) -> bool:
    if not isinstance(name, str) or "/" in name:
        return False
    try:
        check_field("action", name, MAX_ACTION_LENGTH)
    except InvalidEvent:
        return False
    return True


def number_error(name: str, value: object, expected: str) -> ImproperlyConfigured:
    """Give the error of a number out of its range."""
    return ImproperlyConfigured(f"{name} must be {expected}, not {value!r}.")


def _get(name: str, default: Any) -> Any:
    return getattr(settings, name, default)


def _load(name: str, path: object) -> Any:
    if not isinstance(path, str):
        raise ImproperlyConfigured(f"{name} must be a dotted path, not {path!r}.")
    try:
        return import_string(path)
    except (ImportError, ValueError, TypeError) as error:
        raise ImproperlyConfigured(
            f"{name} cannot be imported: {path!r} ({error}); expected the dotted path of a class."
        ) from error


def _positive(name: str, default: float | None, *, or_none: bool = True) -> float | None:
    return check_positive(name, _get(name, default), or_none=or_none)


def check_positive(name: str, value: Any, *, or_none: bool = True) -> float | None:
    """Give a positive number back, as a float.

    :raises ImproperlyConfigured: when it is none.
    """
    if value is None and or_none:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_NUMBER:
        suffix = " or None" if or_none else ""
        raise number_error(name, value, f"a positive number{suffix}")
    return float(value)


def _rate(name: str, default: tuple[int, float] | None, what: str) -> tuple[int, float] | None:
    value = _get(name, default)
    if value is None:
        return None
    error = number_error(name, value, f"None or a pair of positive numbers, ({what}, seconds)")
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise error
    number, seconds = value
    try:
        check_positive(name, number, or_none=False)
        check_positive(name, seconds, or_none=False)
    except ImproperlyConfigured:
        raise error from None
    if not isinstance(number, int):
        raise error
    return number, float(seconds)


def _positive_int(name: str, default: int | None, *, or_none: bool = False) -> int | None:
    value = _get(name, default)
    if value is None and or_none:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        suffix = " or None" if or_none else ""
        raise number_error(name, value, f"a positive whole number{suffix}")
    return value
