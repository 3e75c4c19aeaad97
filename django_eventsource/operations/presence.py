"""The listeners of a token, in all processes that share the history."""

import asyncio
import logging
import os
import socket
import uuid
from dataclasses import dataclass

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured

from .._logging import ThrottledLogger
from ..conf import conf
from ..history import get_history
from ..protocol.tokens import check_token
from ..signals import Listener
from ..streaming.registry import registry

logger = logging.getLogger("django_eventsource.operations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """The listeners of a token, as of at most a few seconds ago."""

    count: int
    """The number of open streams."""
    users: tuple[str, ...]
    """The sorted ids of their users, without duplicates."""


def listeners(token: str) -> Listeners:
    """Return the listeners of a token in all processes that share the history.

    Changes of the last ``EVENTSOURCE_PRESENCE_SECONDS`` may be missing. The listeners of a process
    that died are returned for three times as long.

    :param token: the token.
    :raises InvalidToken: (a ``ValueError``) if the token is not valid.
    :raises ImproperlyConfigured: if ``EVENTSOURCE_PRESENCE_SECONDS`` is ``None``.
    """
    check_token(token)
    if conf.presence_seconds is None:
        raise ImproperlyConfigured(
            "EVENTSOURCE_PRESENCE_SECONDS is None, so no process writes its list of listeners. "
            "Set it to a number of seconds."
        )
    users = get_history().present(token)
    return Listeners(count=len(users), users=tuple(sorted(set(users) - {""})))


async def alisteners(token: str) -> Listeners:
    """Return :func:`listeners` from asynchronous code; with the same arguments and errors."""
    return await sync_to_async(listeners)(token)


def process_name() -> str:
    """Return a unique name for an event loop, which contains the host and the process id."""
    return f"{socket.gethostname()[:200]}:{os.getpid()}:{uuid.uuid4().hex}"


def host_and_pid(name: str) -> tuple[str, str]:
    """Return the host and the process id of a process name.

    If the name has another form, return it as the host, with an empty process id.
    """
    host, *rest = name.rsplit(":", 2)
    return (host, rest[0]) if len(rest) == 2 else (name, "")


class Lease:
    """The entry of one event loop in the history's list of listeners.

    The loop renews the lease every ``EVENTSOURCE_PRESENCE_SECONDS`` and writes what has changed.
    If it does not, the history drops its listeners.
    """

    RENEWALS = 3
    """The number of renewals that may be missed before the listeners are dropped."""
    DISABLED_SECONDS = 1.0
    """Seconds between two checks of the setting while it is ``None`` or cannot be used."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.process = process_name()
        """The name of the lease."""
        self._loop = loop
        self._changed: set[str] = set()
        self._lock = asyncio.Lock()
        self._renew_now = asyncio.Event()

    def note_change(self, listener: Listener) -> None:
        """Record that a stream was opened or has ended. An exclusive one is written at once."""
        self._changed.update(listener.tokens)
        if listener.exclusive:
            self._renew_now.set()

    async def renew_forever(self) -> None:
        """Renew the lease periodically; log failures."""
        while True:
            seconds = self.DISABLED_SECONDS
            try:
                seconds = conf.presence_seconds or seconds
                await self.renew()
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "The list of listeners could not be written; retrying.", error=error
                )
            timer = self._loop.call_later(seconds, self._renew_now.set)
            await self._renew_now.wait()
            timer.cancel()
            self._renew_now.clear()

    async def renew(self) -> None:
        """Renew the lease, and write the listeners of the tokens that have changed."""
        seconds = conf.presence_seconds
        if seconds is None:
            self._changed.clear()
            return
        async with self._lock:
            if not await self._announce(self.RENEWALS * seconds):
                # The history had dropped the lease, so write all listeners.
                for stream in registry.streams(self._loop):
                    self._changed.update(stream.listener.tokens)
                await self._announce(self.RENEWALS * seconds)

    async def withdraw(self) -> None:
        """Remove the lease and its listeners from the history."""
        if conf.presence_seconds is not None:
            async with self._lock:
                self._changed.clear()
                await get_history().awithdraw(self.process)

    async def has_listener(self, token: str) -> bool:
        """Return whether a token has a listener in any process.

        The listeners of other processes may be some seconds old.
        """
        if registry.count(token):
            return True
        if conf.presence_seconds is None:
            return False
        return bool(await get_history().apresent(token, exclude_process=self.process))

    async def _announce(self, lease_seconds: float) -> bool:
        changed, self._changed = self._changed, set()
        try:
            lists = self._lists(changed)
            if not changed and not any(registry.streams(self._loop)):
                return True  # a process without listeners needs no lease
            return await get_history().aannounce(self.process, lists, lease_seconds)
        except BaseException:
            self._changed |= changed
            raise

    def _lists(self, tokens: set[str]) -> dict[str, list[str]]:
        lists: dict[str, list[str]] = {token: [] for token in tokens}
        for stream in registry.streams(self._loop):
            for token in tokens.intersection(stream.listener.tokens):
                lists[token].append(stream.listener.user)
        return lists
