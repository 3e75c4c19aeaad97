"""The statistics of this process: the counters of all rooms, read at one time."""

from __future__ import annotations

from dataclasses import dataclass

from .._statistics import Distribution
from ..delivery.statistics import DeliveryStatistics
from ..delivery.statistics import statistics as delivery_statistics
from ..operations.stream_timeouts import loop_lag
from ..publishing import PublishingStatistics
from ..publishing import counters as publishing_counters
from ..streaming.registry import StreamStatistics, registry

__all__ = ["Statistics", "statistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The statistics of this process since it started, over all its threads and event loops."""

    streams: StreamStatistics
    """The streams."""
    delivery: DeliveryStatistics
    """What the streams were passed."""
    publishing: PublishingStatistics
    """What was published."""
    loop_lag: Distribution
    """The seconds by which a timer of an event loop was late, once a second for each loop."""


def statistics() -> Statistics:
    """Return the statistics of this process. Callable in any thread.

    The numbers are read one after the other, so they may differ by what happens meanwhile.
    """
    return Statistics(
        streams=registry.statistics(),
        delivery=delivery_statistics(),
        publishing=publishing_counters.statistics(),
        loop_lag=loop_lag.distribution(),
    )
