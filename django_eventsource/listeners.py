"""The open streams of this process: who listens to what, and how many may."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from weakref import ref

from .addresses import network_of
from .conf import conf
from .streams import EventStream

SESSION = "session"
Key = tuple[str, str]
Recheck = Callable[[], Awaitable[bool]]
OnClose = Callable[["Listener", EventStream], None]


@dataclass(slots=True, kw_only=True, eq=False)
class Listener:
    """A client with an open stream."""

    tokens: tuple[str, ...]
    """What it listens to."""
    user: str = ""
    """Who it is, as the policy says: the user's primary key, as text; empty for nobody."""
    address: str = ""
    """Its network address, or that of the proxy before the server."""
    session: str = ""
    """A hash of its session's key; empty without a session."""
    opened: float = field(default_factory=time.time)
    """When its stream began, in seconds since the epoch."""
    exclusive: bool = False
    """Must it be the only listener of its tokens?"""
    recheck: Recheck | None = None
    """Asks the policy again."""
    sender: type | None = None
    """The class of the view that serves it."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop that serves it."""
    admitted: float = float("inf")
    """When its stream was admitted, on the monotonic clock."""
    ends_at: float = float("inf")
    """When its stream is to end, on the monotonic clock."""
    recheck_at: float = float("inf")
    """When to ask the policy again, on the monotonic clock."""


class Limit(StrEnum):
    """Why a stream may not begin."""

    PROCESS = "EVENTSOURCE_MAX_STREAMS"
    TOKEN = "EVENTSOURCE_MAX_STREAMS_PER_TOKEN"  # noqa: S105
    USER = "EVENTSOURCE_MAX_STREAMS_PER_USER"
    ADDRESS = "EVENTSOURCE_MAX_STREAMS_PER_ADDRESS"
    EXCLUSIVE = "exclusive"


class Registry:
    """The streams that were admitted and have not ended.

    The registry keeps no stream alive. The garbage collector may end a stream between any two
    lines, also in a thread that holds the lock, and a signal handler may walk over the streams
    there. So the end of a stream only queues its keys, which the next caller that needs the
    counts takes off them, and :meth:`streams` walks over a copy, made without the lock.
    """

    def __init__(self) -> None:
        self._streams: dict[int, ref[EventStream]] = {}
        self._counts: Counter[Key] = Counter()
        self._ended: deque[list[Key]] = deque()
        self._lock = threading.RLock()

    def limit(self, listener: Listener) -> Limit | None:
        """Return the limit that one more stream would pass, or ``None``."""
        with self._lock:
            self._count_out()
            for limit, key in _limited(listener):
                most = _most(limit)
                if most is not None and self._counts[limit, key] >= most:
                    return limit
            if listener.exclusive and any(map(self.count, listener.tokens)):
                return Limit.EXCLUSIVE
        return None

    def admit(self, stream: EventStream, listener: Listener, on_close: OnClose) -> Limit | None:
        """Count a stream in, unless that would pass a limit, which is returned then.

        :param on_close: called when it has ended, in whatever thread that happens.
        """
        with self._lock:
            limit = self.limit(listener)
            if limit is not None:
                return limit
            now = listener.admitted = time.monotonic()
            listener.ends_at = now + _jittered(conf.stream_max_age_seconds)
            listener.recheck_at = now + _jittered(conf.recheck_seconds)
            self._counts.update(_keys(listener))
            # Not kept here: it leads back to the stream, by way of the request.
            stream.listener = listener
            self._streams[id(stream)] = ref(stream)
        stream.on_close = partial(self._release, listener, on_close)
        return None

    def _release(self, listener: Listener, on_close: OnClose, stream: EventStream) -> None:
        self._streams.pop(id(stream), None)
        self._ended.append(_keys(listener))
        on_close(listener, stream)

    def _count_out(self) -> None:
        while self._ended:
            for key in self._ended.popleft():
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    def streams(
        self, loop: asyncio.AbstractEventLoop | None = None
    ) -> Iterator[tuple[EventStream, Listener]]:
        """Return an iterator over the streams, of one event loop if it is named."""
        # Copying a dictionary's values is one step, as weakref.WeakValueDictionary relies on.
        streams = [stream for found in list(self._streams.values()) if (stream := found())]
        found = [(stream, stream.listener) for stream in streams]
        return ((one, who) for one, who in found if loop is None or who.loop is loop)

    def count(self, token: str) -> int:
        """Return the number of streams of a token in this process."""
        with self._lock:
            self._count_out()
            return self._counts[Limit.TOKEN, token]

    def has(self, user: str | None, session: str | None) -> bool:
        """Return whether there may be a stream of a user and a session, where they are named."""
        with self._lock:
            self._count_out()
            return (user is None or self._counts[Limit.USER, user] > 0) and (
                session is None or self._counts[SESSION, session] > 0
            )


registry = Registry()


def _keys(listener: Listener) -> list[Key]:
    return [*_limited(listener), (SESSION, listener.session)]


def _limited(listener: Listener) -> Iterator[tuple[Limit, str]]:
    yield Limit.PROCESS, ""
    for token in listener.tokens:
        yield Limit.TOKEN, token
    if listener.user:
        yield Limit.USER, listener.user
    if listener.address:
        yield Limit.ADDRESS, network_of(listener.address)


def _most(limit: Limit) -> int | None:
    most: int | None = getattr(conf, limit.removeprefix("EVENTSOURCE_").lower())
    return most


def _jittered(seconds: float | None) -> float:
    """Give a time of up to so many seconds, so that not all streams are due at once."""
    return float("inf") if seconds is None else seconds * random.uniform(0.75, 1)  # noqa: S311
