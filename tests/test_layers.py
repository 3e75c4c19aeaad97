"""The choice of the channel layer."""

from __future__ import annotations

from typing import Any

import pytest
from channels.layers import InMemoryChannelLayer, get_channel_layer
from channels_redis.core import RedisChannelLayer
from django.core.exceptions import ImproperlyConfigured

from django_eventsource.layers import get_layer, is_process_local, make_hub_layer

IN_MEMORY = {"BACKEND": "channels.layers.InMemoryChannelLayer", "CONFIG": {"capacity": 7}}
SHARED = {"BACKEND": "tests.test_layers.SharedLayer"}


class SharedLayer(InMemoryChannelLayer.__mro__[1]):  # type: ignore[misc]
    """Stands for any layer that other processes hear."""


def test_without_a_layer_each_hub_has_one_of_its_own(settings) -> None:
    """Nothing needs to be configured."""
    settings.CHANNEL_LAYERS = {}
    assert get_layer() is None
    assert is_process_local()
    one, two = make_hub_layer(), make_hub_layer()
    assert isinstance(one, InMemoryChannelLayer)
    assert one is not two


def test_an_in_memory_layer_is_made_anew_for_each_hub(settings) -> None:
    """It is bound to one event loop; its configuration is kept."""
    settings.CHANNEL_LAYERS = {"default": IN_MEMORY}
    assert is_process_local()
    layer = make_hub_layer()
    assert layer is not get_channel_layer()
    assert layer.capacity == 7


def test_a_shared_layer_is_made_anew_for_each_hub_too(settings) -> None:
    """A hub can replace its instance without harm to the project's."""
    settings.CHANNEL_LAYERS = {"default": IN_MEMORY, "events": SHARED}
    settings.EVENTSOURCE_CHANNEL_LAYER = "events"
    assert not is_process_local()
    layer = make_hub_layer()
    assert isinstance(layer, SharedLayer)
    assert layer is not get_channel_layer("events")


class Impatient(RedisChannelLayer):
    """A project's own, whose waits are short already."""

    brpop_timeout = 1


@pytest.mark.parametrize(
    ("backend", "seconds"),
    [("channels_redis.core.RedisChannelLayer", 2), ("tests.test_layers.Impatient", 1)],
)
def test_the_core_layer_waits_shortly(settings, backend: str, seconds: int) -> None:
    """For less than redis-py's time-out; the project's own instance is left alone."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": backend}}
    layer: Any = make_hub_layer()
    assert layer.brpop_timeout == seconds
    assert get_channel_layer().brpop_timeout == type(layer).brpop_timeout


def test_a_layer_that_cannot_be_made_is_named(settings) -> None:
    """A backend whose package is missing is an error that names the setting."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "nowhere.Layer"}}
    with pytest.raises(ImproperlyConfigured, match=r"CHANNEL_LAYERS\['default'\] cannot be used"):
        get_layer()


def test_an_unknown_layer_is_named(settings) -> None:
    """An alias that CHANNEL_LAYERS lacks is an error."""
    settings.EVENTSOURCE_CHANNEL_LAYER = "nowhere"
    with pytest.raises(ImproperlyConfigured, match=r"EVENTSOURCE_CHANNEL_LAYER.*'nowhere'"):
        get_layer()
