"""The statistics of delivery: what the streams of this process were passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .._statistics import Distribution
from .counters import Missed, counters
from .hub import hubs


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryStatistics:
    """What the streams of this process were passed since it started."""

    events: int
    """The live events that were written or buffered, counted for each stream."""
    bytes: int
    """The bytes of these events."""
    replays: int
    """How often a stream has sent stored events, until it had caught up with the token."""
    replayed_events: int
    """The stored events that were sent."""
    replayed_bytes: int
    """The bytes of these events."""
    resets: Mapping[Missed, int]
    """The number of ``reset`` events by their reason."""
    overflows: int
    """How often the buffer of a stream was dropped, because its client reads too slowly. The
    stored events of the buffer are replayed."""
    repairs: int
    """How often an event arrived without the one before it, which was then read from the history.
    If no later event shows the gap, a history check finds the event: see ``latency``."""
    latency: Distribution
    """The seconds from the publication of an event until all its streams have written or buffered
    it, once for each batch and event loop."""
    layer_silence_seconds: float
    """The seconds since the channel layer has last delivered a message, of the event loop where it
    is longest. A hub sends itself a message at each history check, so it normally stays below
    ``EVENTSOURCE_POLL_SECONDS``. 0 if processes do not share the layer."""


def statistics() -> DeliveryStatistics:
    """Return the statistics of delivery."""
    silence_seconds = max((hub.layer_silence_seconds for hub in hubs()), default=0.0)
    with counters.lock:
        return DeliveryStatistics(
            events=counters.events,
            bytes=counters.bytes,
            replays=counters.replays,
            replayed_events=counters.replayed_events,
            replayed_bytes=counters.replayed_bytes,
            resets=MappingProxyType(dict(counters.resets)),
            overflows=counters.overflows,
            repairs=counters.repairs,
            latency=counters.latency.distribution(),
            layer_silence_seconds=silence_seconds,
        )
