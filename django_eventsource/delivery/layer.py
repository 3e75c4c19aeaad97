"""The channel layer, as hubs and publishers use it.

A layer is *process-local* if only this process receives what it sends: Channels' in-memory
layer, which is also used if no layer is configured. A process-local layer is bound to one event
loop, so each hub has an instance of its own. Each hub has its own instance of any other layer
too, so that it can replace an instance that delivers nothing.

Publishers send from one event loop in a thread of its own. A loop for each send would open a
connection to the broker each time, which takes much longer than the send.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar, cast

from channels.exceptions import InvalidChannelLayerError
from channels.layers import (
    BaseChannelLayer,
    InMemoryChannelLayer,
    channel_layers,
    get_channel_layer,
)
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from .. import _runtime
from ..conf import conf
from ..protocol import messages
from ..protocol.batches import Batch

T = TypeVar("T")

LAYER_SECONDS = 10.0
"""Seconds that one call of the channel layer may take."""

WAIT_SECONDS = 2
"""Seconds for which the core layer of channels_redis may wait in the server for a message.

The wait must end before redis-py's time-out, which is 5 s by default and as long as the layer's
own wait. The layer loses a message that arrives at the moment of the time-out.
"""

MESSAGE_BYTES = 64 * 1024
"""The bytes of one message, unless a single event is larger."""

LOCAL_CAPACITY = 1000
"""The messages that the in-memory layer of a hub keeps. The history repairs a longer burst."""


def get_layer() -> BaseChannelLayer | None:
    """Return the configured layer (``EVENTSOURCE_CHANNEL_LAYER``), or ``None``.

    :raises ImproperlyConfigured: if the layer cannot be created.
    """
    alias = conf.channel_layer
    try:
        return get_channel_layer(alias)
    except InvalidChannelLayerError as error:
        raise ImproperlyConfigured(
            f"CHANNEL_LAYERS[{alias!r}] cannot be used: {error}. Is its package installed?"
        ) from error


def get_shared_layer() -> BaseChannelLayer | None:
    """Return the layer, or ``None`` if only this process receives what is sent on it.

    :raises ImproperlyConfigured: if the layer cannot be created.
    """
    layer = get_layer()
    return None if isinstance(layer, InMemoryChannelLayer) else layer


def is_process_local() -> bool:
    """Return whether only this process receives what is sent on the layer."""
    return get_shared_layer() is None


def make_hub_layer() -> BaseChannelLayer:
    """Return a new instance of the layer for a hub."""
    if get_layer() is None:
        return InMemoryChannelLayer(capacity=LOCAL_CAPACITY)
    layer: Any = channel_layers.make_backend(conf.channel_layer)
    if hasattr(layer, "brpop_timeout"):
        layer.brpop_timeout = min(layer.brpop_timeout, WAIT_SECONDS)
    return cast("BaseChannelLayer", layer)


def group_name(token: str) -> str:
    """Return the channel-layer group of a token.

    Layers accept only short ASCII names. The hash is keyed with ``SECRET_KEY``, so that the
    broker does not see tokens and two projects on one broker have different groups.
    """
    return _group_name(token, settings.SECRET_KEY)


@lru_cache(maxsize=4096)
def _group_name(token: str, secret_key: str | bytes) -> str:
    secret = secret_key.encode() if isinstance(secret_key, str) else secret_key
    key = hashlib.blake2b(secret, digest_size=32, person=b"dj-eventsource").digest()
    digest = hashlib.blake2b(token.encode(), digest_size=20, key=key).hexdigest()
    return f"eventsource.{digest}"


async def send_batches(
    layer: BaseChannelLayer, group: str, batches: Iterable[Batch], seconds: float
) -> None:
    """Send batches of one group, each in a message.

    :param seconds: the seconds that the layer may take for each message.
    :raises TimeoutError: if it takes longer.
    """
    for batch in batches:
        async with asyncio.timeout(seconds):
            await layer.group_send(group, messages.encode(group, batch))


async def close_layer(layer: Any) -> None:
    """Close the connections of a layer that is no longer used.

    The pub/sub layer of channels_redis closes them in ``flush()``. The method of the same name
    of the core layer empties the broker.
    """
    close = getattr(layer, "close_pools", None)
    if type(layer).__name__ == "RedisPubSubChannelLayer":
        close = layer.flush
    if close is not None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAYER_SECONDS):
                await close()


class Background:
    """An event loop in a thread, on which synchronous code sends. Started by the first send.

    :param end_seconds: seconds for which the end of the process waits for connections to close.
    """

    def __init__(self, end_seconds: float = 1.0) -> None:
        self._end_seconds = end_seconds
        self._clear()

    def reset(self) -> None:
        """End the loop. In a fork drop it, because the thread does not exist there."""
        if not _runtime.keep_in_fork(self.__dict__.copy()):
            self.end()
        self._clear()

    def _clear(self) -> None:
        # A thread of the parent may have held the lock.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._layers: list[BaseChannelLayer] = []

    @property
    def started(self) -> bool:
        """Whether the loop runs."""
        return self._loop is not None

    def run(self, layer: BaseChannelLayer, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return its result. Not to be called on the loop.

        :param layer: the layer that the coroutine uses. Its connections are closed when the
            process ends.
        """
        return self.start(layer, work).result()

    def start(self, layer: BaseChannelLayer | None, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop, and return its future. Callable in any thread.

        :param layer: the layer that the coroutine uses, as for :meth:`run`, or ``None``.
        """
        try:
            loop = self._running()
        except BaseException:
            work.close()
            raise
        if layer is not None and layer not in self._layers:
            self._layers.append(layer)
        return asyncio.run_coroutine_threadsafe(work, loop)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                # It resolves the names of brokers. Its only thread starts now, because Python 3.12
                # cannot start one when the interpreter ends.
                resolver = ThreadPoolExecutor(1, "eventsource-resolver")
                thread = threading.Thread(
                    target=loop.run_forever, name="eventsource-background", daemon=True
                )
                loop.set_default_executor(resolver)
                try:
                    resolver.submit(int)
                    thread.start()
                except BaseException:
                    loop.close()
                    raise
                self._loop, self._thread = loop, thread
            return self._loop

    def end(self) -> None:
        """Close the connections and stop the loop."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._loop = None
        layers, self._layers = self._layers, []
        loop.call_soon_threadsafe(_cancel_tasks, loop)
        ends = [asyncio.run_coroutine_threadsafe(close_layer(layer), loop) for layer in layers]
        for one in ends:
            with contextlib.suppress(Exception):
                one.result(self._end_seconds)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(self._end_seconds)
        if not thread.is_alive():
            _close(loop)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    # A layer of channels_redis runs the loop again when it is closed. That is not possible in a
    # thread in which another loop runs.
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop.close()
    else:
        closing = threading.Thread(target=loop.close)
        closing.start()
        closing.join()


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


background = Background()
_runtime.on_reset(background.reset)
atexit.register(background.end)
