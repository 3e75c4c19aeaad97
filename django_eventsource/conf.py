"""The settings, as typed attributes of one object.

``django.conf.settings`` is read at every access, so ``override_settings`` has its effect at once.
Each attribute raises ``ImproperlyConfigured`` with the name of the setting, its value and what is
expected. The system checks report the same text at start.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .events import Event
from .exceptions import InvalidEvent
from .protocol.field_rules import ANY_ACTION, check_action

T = TypeVar("T")

MAX_NUMBER = 10**12
"""The largest number that a setting may have."""
LEAST_SECRET = 16
"""The fewest characters of a secret in the settings."""
DEFAULT_HISTORY = "django_eventsource.history.database.DatabaseHistory"


# The names of each class that were checked last, because every publish() checks them.
_checked: WeakKeyDictionary[type[Event], tuple[Sequence[str], str]] = WeakKeyDictionary()


def check_event_class(event_class: type[Event]) -> type[Event]:
    """Return an Event class whose actions are valid names, or ``"*"`` for every valid name.

    :raises ImproperlyConfigured: if they are not.
    """
    actions = event_class.ACTIONS
    if _checked.get(event_class) == (actions, event_class.LISTEN):
        return event_class
    where = f"{event_class.__module__}.{event_class.__qualname__}"
    if not isinstance(actions, list | tuple):
        raise ImproperlyConfigured(
            f'{where}.ACTIONS must be a list of action names, or ["*"], not {actions!r}.'
        )
    for action in actions:
        if action != ANY_ACTION:
            _check_action(f"{where}.ACTIONS", action)
    _check_action(f"{where}.LISTEN", event_class.LISTEN)
    # A copy, because the list may be changed.
    _checked[event_class] = (actions[:], event_class.LISTEN)
    return event_class


def check_positive(name: str, value: Any, expected: str = "a positive number") -> float:
    """Return a positive number as a float.

    :param name: the setting or argument, for the error.
    :param expected: what is expected, for the error.
    :raises ImproperlyConfigured: if the value is not a positive number up to :data:`MAX_NUMBER`.
    """
    if not _is_positive(value, int | float):
        raise number_error(name, value, expected)
    return float(value)


def check_positive_or_none(name: str, value: Any) -> float | None:
    """Do the same as :func:`check_positive`, but return ``None`` for ``None``."""
    return None if value is None else check_positive(name, value, "a positive number or None")


def check_count(name: str, value: Any, expected: str = "a positive whole number") -> int:
    """Return a positive whole number.

    :param name: the setting or argument, for the error.
    :param expected: what is expected, for the error.
    :raises ImproperlyConfigured: if the value is not a positive whole number up to
        :data:`MAX_NUMBER`.
    """
    if not _is_positive(value, int):
        raise number_error(name, value, expected)
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a flag.

    :param name: the setting or argument, for the error.
    :raises ImproperlyConfigured: if the value is neither ``True`` nor ``False``.
    """
    if not isinstance(value, bool):
        raise ImproperlyConfigured(f"{name} must be True or False, not {value!r}.")
    return value


def number_error(name: str, value: object, expected: str) -> ImproperlyConfigured:
    """Return the error of a number that is not in its range."""
    return ImproperlyConfigured(f"{name} must be {expected}, not {value!r}.")


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER


def _check_action(where: str, action: object) -> None:
    try:
        check_action(action)
    except InvalidEvent as error:
        raise ImproperlyConfigured(f"{where} has an action that is not valid. {error}") from error


def _load(name: str, path: object) -> Any:
    if not isinstance(path, str):
        raise ImproperlyConfigured(f"{name} must be a dotted path, not {path!r}.")
    try:
        return import_string(path)
    except (ImportError, ValueError, TypeError) as error:
        raise ImproperlyConfigured(
            f"{name} cannot be imported: {path!r} ({error}); expected the dotted path of a class."
        ) from error


def _event_class(name: str, path: object) -> type[Event]:
    value = _load(name, path)
    if not (isinstance(value, type) and issubclass(value, Event)):
        raise ImproperlyConfigured(
            f"{name} must name a subclass of django_eventsource.events.Event, not {path!r}."
        )
    return check_event_class(value)


def _history(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, Mapping) or set(value) - {"BACKEND", "OPTIONS"}:
        raise ImproperlyConfigured(
            f'{name} must be a dictionary with "BACKEND" and "OPTIONS", not {value!r}.'
        )
    options = value.get("OPTIONS", {})
    if not isinstance(options, Mapping):
        raise ImproperlyConfigured(f"{name} OPTIONS must be a dictionary, not {options!r}.")
    return value.get("BACKEND", DEFAULT_HISTORY), dict(options)


def _layer_alias(name: str, value: Any) -> str:
    configured = getattr(settings, "CHANNEL_LAYERS", {})
    if not isinstance(value, str) or (value != "default" and value not in configured):
        raise ImproperlyConfigured(
            f"{name} must be an alias in CHANNEL_LAYERS "
            f"({', '.join(configured) or 'none there'}), not {value!r}."
        )
    return value


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value is None else check_count(name, value, "a positive whole number or None")


def _secret_or_none(name: str, value: Any) -> str | None:
    if value is None or (
        isinstance(value, str)
        and len(value) >= LEAST_SECRET
        and value.isascii()
        and value.isprintable()
        and " " not in value
    ):
        return value
    # The error does not contain a text, which may be a secret.
    given = f"a text of {len(value)}" if isinstance(value, str) else repr(value)
    raise ImproperlyConfigured(
        f"{name} must be None or a text of at least {LEAST_SECRET} ASCII characters without "
        f"spaces, not {given}."
    )


def _rate(counted: str, name: str, value: Any) -> tuple[int, float] | None:
    match value:
        case None:
            return None
        case count, seconds if _is_positive(count, int) and _is_positive(seconds, int | float):
            return count, float(seconds)
    expected = f"None or a pair of positive numbers, ({counted}, seconds)"
    raise number_error(name, value, expected)


def _retry_range(name: str, value: Any) -> tuple[int, int]:
    match value:
        case least, most if _is_positive(least, int) and _is_positive(most, int) and least <= most:
            return least, most
    raise number_error(name, value, "a pair of positive whole numbers, (least, greatest)")


class Setting(Generic[T]):
    """An attribute that reads, checks and returns an ``EVENTSOURCE_*`` setting.

    :param check: receives the name of the setting and its value, and returns the checked value.
    :param default: the value if the project does not define the setting.
    """

    def __init__(self, check: Callable[[str, Any], T], default: Any) -> None:
        self._check = check
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"EVENTSOURCE_{name.upper()}"

    def __get__(self, instance: object, owner: type) -> T:
        return self._check(self._name, getattr(settings, self._name, self._default))

    def define_default(self) -> None:
        """Define the setting with its default, unless the project defines it."""
        if not hasattr(settings, self._name):
            setattr(settings, self._name, self._default)


class Conf:
    """Every ``EVENTSOURCE_*`` setting, with its default."""

    event_class = Setting(_event_class, "django_eventsource.events.StringIdEvent")
    """The Event class for URLs, ``publish()`` and commands that name no other one."""
    history = Setting(_history, {})
    """The dotted path of the history's class, and a copy of its options."""
    policy = Setting(_load, "django_eventsource.policies.DefaultPolicy")
    """The policy class. ``policies.make_policy()`` checks it."""
    channel_layer = Setting(_layer_alias, "default")
    """The alias of the channel layer in ``CHANNEL_LAYERS``."""
    keepalive_seconds = Setting(check_positive_or_none, 15.0)
    """Seconds without data after which a stream sends a keepalive; ``None`` disables it."""
    retry_ms = Setting(_count_or_none, None)
    """The reconnection time in milliseconds that a stream sends first; ``None`` sends none."""
    poll_seconds = Setting(check_positive_or_none, None)
    """Seconds between two history checks; ``None`` chooses them by the channel layer."""
    prune_seconds = Setting(check_positive_or_none, 60.0)
    """Seconds between two prunes of a server process; ``None`` disables them."""
    grant_seconds = Setting(check_positive, 86_400.0)
    """Seconds for which a grant is valid if ``make_grant()`` receives no ``seconds``."""
    max_event_bytes = Setting(check_count, 1024 * 1024)
    """The largest encoded event and the largest body of a POST, in bytes."""
    stream_buffer_bytes = Setting(check_count, 256 * 1024)
    """The most bytes that one stream buffers for a slow client."""
    stream_stall_seconds = Setting(check_positive_or_none, 30.0)
    """Seconds without progress after which a stream is disconnected; ``None``: no limit."""
    stream_max_age_seconds = Setting(check_positive_or_none, 3600.0)
    """Seconds after which a stream ends and its client reconnects; ``None``: no limit."""
    stream_max_tokens = Setting(check_count, 16)
    """The most tokens of one stream."""
    recheck_seconds = Setting(check_positive_or_none, 60.0)
    """Seconds between two permission checks of an open stream; ``None`` disables them."""
    presence_seconds = Setting(check_positive_or_none, 5.0)
    """The greatest age of ``listeners()`` in seconds; ``None`` disables the list."""
    max_streams = Setting(_count_or_none, None)
    """The most streams of one process; ``None``: no limit."""
    max_streams_per_token = Setting(_count_or_none, None)
    """The most streams of one token in one process; ``None``: no limit."""
    max_streams_per_user = Setting(_count_or_none, None)
    """The most streams of one user in one process; ``None``: no limit."""
    max_streams_per_address = Setting(_count_or_none, None)
    """The most streams of one client address in one process; ``None``: no limit."""
    send_rate = Setting(partial(_rate, "events"), None)
    """The most events that one user may post, and in how many seconds; ``None``: no limit."""
    coalesce_seconds = Setting(check_positive_or_none, 0.005)
    """The fewest seconds between two batches of a busy token; ``None`` disables batches."""
    login_rate = Setting(partial(_rate, "failures"), (10, 60.0))
    """The most failed logins of a user at an address, and in how many seconds; ``None``: no
    limit."""
    retry_range_ms = Setting(_retry_range, (100, 3_600_000))
    """The least and the greatest reconnection time that may be posted, in milliseconds."""
    write_to_transport = Setting(check_flag, True)
    """Whether events are written to the server's transport where that is possible."""
    metrics_token = Setting(_secret_or_none, None)
    """The bearer token with which the metrics may be read; ``None`` closes them."""


conf = Conf()

PROPERTIES = [name for name, value in vars(Conf).items() if isinstance(value, Setting)]


def define_defaults() -> None:
    """Define the settings that the project does not define, as Django does with its own settings.

    Django finds a setting that is defined much faster, because it raises two exceptions for one
    that is not. Each ``publish()`` reads several.
    """
    for name in PROPERTIES:
        vars(Conf)[name].define_default()
