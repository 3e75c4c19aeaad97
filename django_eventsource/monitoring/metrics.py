"""The statistics as metrics of Prometheus, with ``prometheus-client`` (the extra ``prometheus``).

In one process, :class:`Collector` reads the statistics whenever Prometheus scrapes.

Several processes behind one port use the multi-process mode of ``prometheus-client``, which reads
files in the directory ``PROMETHEUS_MULTIPROC_DIR`` and calls no collector. Therefore each process
copies its statistics into such files, at most a second after they have changed.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

from .. import _runtime, _statistics
from .._logging import ThrottledLogger
from .._statistics import BOUNDS, Distribution
from ..signals import Reason
from .statistics import Statistics, statistics

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Collector", "render"]

logger = logging.getLogger("django_eventsource.monitoring")

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that enables the multi-process mode of ``prometheus-client``."""
PREFIX = "eventsource_"
RESETS = ("unknown", "expired", "overflow")
MODES = {"eventsource_streams_open": "livesum", "eventsource_layer_silence_seconds": "livemax"}
"""How the values of the processes that run are combined, for each gauge."""


class Collector:
    """A custom collector of ``prometheus-client`` for a single process.

    Register it if the project has a metrics view already: ``REGISTRY.register(Collector())``. In
    the multi-process mode do not register it, because the metrics are in the files already.
    """

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of this process.

        :raises ImproperlyConfigured: if ``prometheus-client`` is not installed.
        """
        return metrics_of(statistics())


def metrics_of(found: Statistics) -> Iterator[Metric]:
    """Yield statistics as metrics. No label is ever a token, a user or an address."""
    prometheus = import_prometheus()
    streams, delivery, publishing = found.streams, found.delivery, found.publishing

    def counter(name: str, text: str, value: int) -> Any:
        return prometheus.CounterMetricFamily(PREFIX + name, text, value)

    def by_reason(name: str, text: str, values: Mapping[Any, int], reasons: Any) -> Any:
        family = prometheus.CounterMetricFamily(PREFIX + name, text, labels=["reason"])
        for reason in reasons:
            family.add_metric([str(reason)], values.get(reason, 0))
        return family

    def gauge(name: str, text: str, value: float) -> Any:
        return prometheus.GaugeMetricFamily(PREFIX + name, text, value)

    def histogram(name: str, text: str, value: Distribution) -> Any:
        total = 0
        buckets = []
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], value.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return prometheus.HistogramMetricFamily(
            PREFIX + name, text, buckets=buckets, sum_value=value.seconds
        )

    yield gauge("streams_open", "Streams that are open now.", streams.open)
    yield counter("streams_opened", "Streams that were opened.", streams.opened)
    yield by_reason("streams_closed", "Streams that have ended.", streams.closed, Reason)
    yield counter(
        "delivered_events", "Live events, counted for each stream they went to.", delivery.events
    )
    yield counter("delivered_bytes", "Bytes of the delivered live events.", delivery.bytes)
    yield counter("replays", "Replays of stored events to one stream.", delivery.replays)
    yield counter("replayed_events", "Stored events that were replayed.", delivery.replayed_events)
    yield counter("replayed_bytes", "Bytes of the replayed events.", delivery.replayed_bytes)
    yield by_reason("resets", "Resets that were sent to a stream.", delivery.resets, RESETS)
    yield counter("overflows", "Buffers of slow clients that were dropped.", delivery.overflows)
    yield counter("repairs", "Gaps that were read from the history.", delivery.repairs)
    yield histogram(
        "delivery_seconds", "Time from the publication to the streams.", delivery.latency
    )
    yield counter("published_events", "Events that were published.", publishing.events)
    yield histogram("publish_seconds", "Time to store or send events.", publishing.latency)
    yield gauge(
        "layer_silence_seconds",
        "Time since the shared channel layer has last delivered a message.",
        delivery.layer_silence_seconds,
    )
    yield histogram("event_loop_lag_seconds", "Delay of a timer of the loop.", found.loop_lag)


def import_prometheus() -> Any:
    """Return the module of ``prometheus-client`` with the classes for custom collectors.

    :raises ImproperlyConfigured: if it is not installed.
    """
    try:
        from prometheus_client import core
    except ImportError as error:
        raise ImproperlyConfigured(
            "Metrics need prometheus-client: install django-eventsource with the extra "
            '"prometheus".'
        ) from error
    return core


def render(accept: str = "") -> tuple[bytes, str]:
    """Return the metrics as a page for Prometheus, and the type of its content.

    In the multi-process mode, the page contains the metrics of all processes, also those that the
    project itself keeps with ``prometheus-client``.

    :param accept: the header ``Accept`` of the request, from which the format is chosen.
    :raises ImproperlyConfigured: if ``prometheus-client`` is not installed.
    """
    import_prometheus()
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    if DIRECTORY in os.environ:
        files.write()
        drop_dead_processes(Path(os.environ[DIRECTORY]))
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    else:
        registry.register(Collector())
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class MultiprocessFiles:
    """The copies of this process's statistics in the files of the multi-process mode."""

    INTERVAL_SECONDS = 1.0
    """Seconds after a change until it is copied."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with counts of zero. A forked process has files of its own, and no timer."""
        self._lock = threading.RLock()
        # Another one, because schedule() must not wait for files: event loops call it.
        self._timer_lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._values: dict[tuple[Any, ...], Any] = {}
        self._copied: dict[tuple[Any, ...], float] = {}

    def install(self) -> None:
        """Copy the statistics of this process from now on."""
        _statistics.observers.append(self.schedule)
        atexit.register(self.end)

    def schedule(self) -> None:
        """Copy the statistics soon. It does not wait while they are written."""
        with self._timer_lock:
            if self._timer is None:
                timer = threading.Timer(self.INTERVAL_SECONDS, self._on_timer)
                timer.name = "eventsource-metrics"
                timer.daemon = True
                self._timer = timer
                try:
                    timer.start()
                except RuntimeError:  # the interpreter ends
                    self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._try_to_write()

    def _try_to_write(self, *, ended: bool = False) -> None:
        try:
            self.write(ended=ended)
        except Exception as error:  # noqa: BLE001
            ThrottledLogger(logger).error(
                "The metrics cannot be written to PROMETHEUS_MULTIPROC_DIR.", error=error
            )

    def write(self, *, ended: bool = False) -> None:
        """Copy the statistics now.

        :param ended: whether the process ends, so that it has no open streams any more.
        :raises OSError: if the files cannot be written.
        """
        with self._lock:
            for metric in metrics_of(statistics()):
                below = 0.0
                for sample in metric.samples:
                    value = sample.value
                    if sample.name.endswith("_count"):
                        continue  # the sum of the buckets
                    if sample.name.endswith("_bucket"):
                        value, below = value - below, value
                    key = (sample.name, *sample.labels.items())
                    stored = self._values.get(key) or self._make_value(key, metric, sample)
                    if metric.type == "gauge":
                        stored.set(0.0 if ended else value)
                    else:
                        # The file may contain the counts of an earlier process with this id.
                        stored.inc(value - self._copied.get(key, 0.0))
                        self._copied[key] = value

    def _make_value(self, key: tuple[Any, ...], metric: Metric, sample: Any) -> Any:
        from prometheus_client import values

        stored = self._values[key] = values.ValueClass(
            metric.type,
            metric.name,
            sample.name,
            tuple(sample.labels),
            tuple(sample.labels.values()),
            metric.documentation,
            multiprocess_mode=MODES.get(metric.name, ""),
        )
        return stored

    def end(self) -> None:
        """Copy the last counts, if anything was copied or counted in this process."""
        if self._values or self._timer is not None:
            self._try_to_write(ended=True)


files = MultiprocessFiles()
_runtime.on_reset(files.reset)


def install() -> None:
    """Write the files of the multi-process mode, if it is enabled and its library is installed."""
    if DIRECTORY in os.environ:
        try:
            import_prometheus()
        except ImproperlyConfigured:
            return
        files.install()


def drop_dead_processes(directory: Path) -> None:
    """Drop the gauges of processes that were killed, which could not set them to 0."""
    from prometheus_client.multiprocess import mark_process_dead

    has_processes = Path("/proc/self").exists()  # on Linux
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if has_processes and not Path("/proc", pid).exists():
            mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
