"""The channel layer, as a hub and a publisher see it.

A layer is *process-local* when only this process receives what it sends: Channels'
in-memory layer, which also serves where none is configured. It is bound to one event
loop, so each hub has an instance of its own; of any other layer too, so that it can take a
new one when the old one is deaf.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from channels.exceptions import InvalidChannelLayerError
from channels.layers import (
    BaseChannelLayer,
    InMemoryChannelLayer,
    channel_layers,
    get_channel_layer,
)
from django.core.exceptions import ImproperlyConfigured

from .conf import conf

LAYER_SECONDS = 10.0
"""How long one call of the channel layer may take."""

WAIT_SECONDS = 2
"""How long the core layer of channels_redis may wait in the server for a message.

That must end before redis-py gives the wait up, by default after 5 s, as long as the layer's own:
what comes in that moment is lost.
"""

MESSAGE_TYPE = "eventsource.frame"

# The hub keeps receiving; the history repairs what a longer burst loses.
LOCAL_CAPACITY = 1000


def get_layer() -> BaseChannelLayer | None:
    """Give the configured layer (``EVENTSOURCE_CHANNEL_LAYER``), or ``None``.

    :raises ImproperlyConfigured: when it cannot be made.
    """
    alias = conf.channel_layer
    try:
        return get_channel_layer(alias)
    except InvalidChannelLayerError as error:
        raise ImproperlyConfigured(
            f"CHANNEL_LAYERS[{alias!r}] cannot be used: {error}. Is its package installed?"
        ) from error


def is_process_local() -> bool:
    """Tell whether only this process hears what is sent on the layer."""
    layer = get_layer()
    return layer is None or isinstance(layer, InMemoryChannelLayer)


def make_hub_layer() -> BaseChannelLayer:
    """Give a hub a layer of its own."""
    if get_layer() is None:
        return InMemoryChannelLayer(capacity=LOCAL_CAPACITY)
    layer: Any = channel_layers.make_backend(conf.channel_layer)
    if hasattr(layer, "brpop_timeout"):
        layer.brpop_timeout = min(layer.brpop_timeout, WAIT_SECONDS)
    return cast("BaseChannelLayer", layer)


async def let_go(layer: Any) -> None:
    """Close the connections of a layer that is not used any more.

    The pub/sub layer of channels_redis does that in ``flush()``; the same name of the core
    layer empties the broker.
    """
    close = getattr(layer, "close_pools", None)
    if type(layer).__name__ == "RedisPubSubChannelLayer":
        close = layer.flush
    if close is not None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAYER_SECONDS):
                await close()
