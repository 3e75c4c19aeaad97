"""Who listens, over all processes."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured

from .conf import conf
from .history import get_history
from .tokens import check_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """The listeners of a token, as of at most a few seconds ago."""

    count: int
    """How many streams are open."""
    users: tuple[str, ...]
    """The ids of the users among them, each once, sorted."""


def process_name() -> str:
    """Return a name that no other event loop has, or had, with the host and the process id."""
    return f"{socket.gethostname()[:200]}:{os.getpid()}:{uuid.uuid4().hex}"


def host_and_pid(name: str) -> tuple[str, str]:
    """Return what a process name contains; the host is the whole name if it is of another form."""
    host, *rest = name.rsplit(":", 2)
    return (host, rest[0]) if len(rest) == 2 else (name, "")


def listeners(token: str) -> Listeners:
    """Tell who listens to a token, in all processes that share the history.

    What changed in the last ``EVENTSOURCE_PRESENCE_SECONDS`` may be missing. The listeners
    of a process that died disappear after three times as long.

    :raises ValueError: when the token is none.
    :raises ImproperlyConfigured: when ``EVENTSOURCE_PRESENCE_SECONDS`` is ``None``.
    """
    check_token(token)
    if conf.presence_seconds is None:
        raise ImproperlyConfigured(
            "EVENTSOURCE_PRESENCE_SECONDS is None: nobody keeps the list of listeners. "
            "Set it to a number of seconds."
        )
    users = get_history().present(token)
    return Listeners(count=len(users), users=tuple(sorted(set(users) - {""})))


async def is_listened(token: str, *, elsewhere: str) -> bool:
    """Tell whether anybody listens to a token in another process, as far as is known.

    :param elsewhere: this process's name.
    """
    if conf.presence_seconds is None:
        return False
    return bool(await get_history().apresent(token, elsewhere=elsewhere))


async def alisteners(token: str) -> Listeners:
    """Await :func:`listeners`."""
    return await sync_to_async(listeners)(token)
