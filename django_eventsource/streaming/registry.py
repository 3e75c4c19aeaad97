"""The open streams of this process, counted against their limits."""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from weakref import ref

from .. import _runtime
from .._timing import spread
from ..access.addresses import network_of
from ..conf import conf
from ..signals import Listener, Reason
from .open_stream import NEVER, OpenStream

SESSION = "session"
Key = tuple[str, str]
OnEnd = Callable[[OpenStream], None]


class Limit(StrEnum):
    """The limit that does not allow one more stream."""

    PROCESS = "EVENTSOURCE_MAX_STREAMS"
    TOKEN = "EVENTSOURCE_MAX_STREAMS_PER_TOKEN"  # noqa: S105
    USER = "EVENTSOURCE_MAX_STREAMS_PER_USER"
    ADDRESS = "EVENTSOURCE_MAX_STREAMS_PER_ADDRESS"
    EXCLUSIVE = "exclusive"


SETTINGS: dict[Limit, Callable[[], int | None]] = {
    Limit.PROCESS: lambda: conf.max_streams,
    Limit.TOKEN: lambda: conf.max_streams_per_token,
    Limit.USER: lambda: conf.max_streams_per_user,
    Limit.ADDRESS: lambda: conf.max_streams_per_address,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatistics:
    """The streams of this process since it started."""

    open: int
    """The streams that are open now."""
    opened: int
    """The streams that were opened."""
    closed: Mapping[Reason, int]
    """The streams that have ended, by their reason."""


class Registry:
    """The streams that were admitted and have not ended.

    The registry does not keep a stream alive. The garbage collector may delete a stream between
    any two lines, also in a thread that holds the lock, and a signal handler may call
    :meth:`streams` there. Therefore the end of a stream only appends its keys to a queue. The next
    call that needs the counts subtracts them. :meth:`streams` iterates over a copy, which it makes
    without the lock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all streams without ending them."""
        self._streams: dict[int, ref[OpenStream]] = {}
        self._counts: Counter[Key] = Counter()
        self._ended: deque[tuple[list[Key], Reason | None]] = deque()
        self._opened = 0
        self._closed: Counter[Reason] = Counter()
        self._lock = threading.RLock()

    def limit(self, listener: Listener) -> Limit | None:
        """Return the limit that one more stream would exceed, or ``None``."""
        with self._lock:
            self._subtract_ended()
            for limit, key in _limited(listener):
                most = SETTINGS[limit]()
                if most is not None and self._counts[limit, key] >= most:
                    return limit
            if listener.exclusive and any(map(self.count, listener.tokens)):
                return Limit.EXCLUSIVE
        return None

    def admit(
        self,
        stream: OpenStream,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_end: OnEnd = lambda stream: None,
    ) -> Limit | None:
        """Register a stream and set its deadlines, unless it would exceed a limit.

        :param loop: the event loop that serves it.
        :param on_end: called with the stream when it has ended, in any thread. It must not keep
            the stream, which may be in the middle of its deletion.
        :returns: the limit that it would exceed; ``None`` if it is registered.
        """
        listener = stream.listener
        with self._lock:
            limit = self.limit(listener)
            if limit is not None:
                return limit
            now = stream.admitted_at = time.monotonic()
            stream.ends_at = now + _spread_delay(conf.stream_max_age_seconds)
            stream.recheck_at = now + _spread_delay(conf.recheck_seconds)
            stream.loop = loop
            stream.on_end = partial(self._remove, on_end)
            self._counts.update(_keys(listener))
            self._opened += 1
            self._streams[id(stream)] = ref(stream)
        return None

    def _remove(self, on_end: OnEnd, stream: OpenStream) -> None:
        if self._streams.pop(id(stream), None) is not None:
            self._ended.append((_keys(stream.listener), stream.reason))
            on_end(stream)

    def _subtract_ended(self) -> None:
        while self._ended:
            keys, reason = self._ended.popleft()
            self._closed[reason or Reason.FAILED] += 1
            for key in keys:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    def streams(self, loop: asyncio.AbstractEventLoop | None = None) -> Iterator[OpenStream]:
        """Return an iterator over the streams.

        :param loop: only the streams that this event loop serves; ``None`` for all.
        """
        # Nothing interrupts the copy of a dictionary's values; weakref relies on this too.
        streams = [stream for found in list(self._streams.values()) if (stream := found())]
        return (stream for stream in streams if loop is None or stream.loop is loop)

    def count(self, token: str) -> int:
        """Return the number of streams of a token in this process."""
        with self._lock:
            self._subtract_ended()
            return self._counts[Limit.TOKEN, token]

    def has(self, user: str | None, session: str | None) -> bool:
        """Return whether there may be a stream of a user and a session.

        :param user: the user's id; ``None`` for any.
        :param session: the hash of the session's key; ``None`` for any.
        """
        with self._lock:
            self._subtract_ended()
            return (user is None or self._counts[Limit.USER, user] > 0) and (
                session is None or self._counts[SESSION, session] > 0
            )

    def statistics(self) -> StreamStatistics:
        """Return the statistics of the streams."""
        with self._lock:
            self._subtract_ended()
            return StreamStatistics(
                open=self._opened - self._closed.total(),
                opened=self._opened,
                closed=MappingProxyType(dict(self._closed)),
            )


registry = Registry()
_runtime.on_reset(registry.reset)


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


def _spread_delay(seconds: float | None) -> float:
    return NEVER if seconds is None else seconds * spread(0.75, 1)
