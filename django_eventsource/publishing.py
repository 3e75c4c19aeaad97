"""Publish events, from any code, if and only if the transaction around it commits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async
from channels.layers import BaseChannelLayer
from django.db import transaction
from django.utils.asyncio import async_unsafe

from . import _runtime
from ._statistics import Distribution, Histogram
from .conf import check_event_class, conf
from .delivery.hub import hubs
from .delivery.layer import (
    MESSAGE_BYTES,
    background,
    get_shared_layer,
    group_name,
    is_process_local,
    send_batches,
)
from .delivery.notifier import notifier
from .delivery.wake_ups import waker
from .events import Event, action_error, is_durable
from .exceptions import DeliveryFailed, InvalidEvent
from .history import Draft, Entry, Kind, get_history
from .protocol.batches import Batch, merge
from .protocol.tokens import check_key, check_token, key_digest
from .signals import event_published

__all__ = ["apublish", "apublish_many", "publish", "publish_many"]

logger = logging.getLogger("django_eventsource.publishing")

SHOWN = 5
"""The tokens that an error note names."""
BATCH_EVENTS = 500
BATCH_BYTES = 256 * 1024
"""The events and bytes that are appended together, all or none."""

LOOP_BYTES = 16 * 1024
"""The length of the largest value or page that the views encode on the event loop."""

Item = tuple[str, str, Any]
Prepared = tuple[Event, Draft]


@async_unsafe("publish() blocks: in async code call `await apublish(...)` instead.")
def publish(
    token: str,
    action: str,
    value: Any = "",
    event_class: type[Event] | None = None,
    *,
    key: str | None = None,
) -> Event:
    """Publish an event to the listeners of a token.

    Inside ``transaction.atomic`` the event is published when the transaction commits, and not
    at all if it rolls back. Until the commit, the ``id`` of an ``EventId`` class is ``None``.

    With a key, the event is published only if the history has no event of the token with the same
    key. So a task that is repeated publishes once. The call returns an event with the id of the
    first one, inside of a transaction after the commit.

    :param token: the token, 1 to 255 characters.
    :param action: one of the ``ACTIONS`` of the class.
    :param value: a value that the class accepts.
    :param event_class: the class of the event; ``EVENTSOURCE_EVENT_CLASS`` by default.
    :param key: a text of 1 to 255 characters, for a durable class; ``None`` publishes always.
    :returns: the event; outside of a transaction with its id.
    :raises ValueError: if the token, the action, the value or the key is not valid. Nothing was
        published.
    :raises DeliveryFailed: if a live-only event did not reach the channel layer.
    """
    event_class = conf.event_class if event_class is None else check_event_class(event_class)
    event, draft = prepare(token, action, value, event_class, key)
    _publish([event], [draft], LayerSender())
    return event


async def apublish(
    token: str,
    action: str,
    value: Any = "",
    event_class: type[Event] | None = None,
    *,
    key: str | None = None,
) -> Event:
    """Call :func:`publish` in Django's thread for synchronous work."""
    return await sync_to_async(publish)(token, action, value, event_class, key=key)


@async_unsafe("publish_many() blocks: in async code call `await apublish_many(...)` instead.")
def publish_many(items: Iterable[Item], event_class: type[Event] | None = None) -> list[Event]:
    """Publish many events, which is much faster than one by one.

    All items are checked before the first event is published. The events of one token stay in
    their order and are stored in batches, each all or none. Inside ``transaction.atomic`` all
    events are published when the transaction commits, or none of them. A history outside of the
    database can fail to store some batches after the commit; this is logged.

    :param items: the token, the action and the value of each event.
    :param event_class: the class of the events; ``EVENTSOURCE_EVENT_CLASS`` by default.
    :returns: the events, in the order of the items; outside of a transaction with their ids.
    :raises ValueError: if an item is not valid. Nothing was published, and a note on the error
        contains the index of the item.
    :raises DeliveryFailed: if live-only events did not reach the channel layer. A note on this
        error, and on an error of the history, contains the number of events that had been
        published before. Inside a transaction no event is published.
    """
    event_class = conf.event_class if event_class is None else check_event_class(event_class)
    pairs = []
    for n, (token, action, value) in enumerate(items):
        try:
            pairs.append(prepare(token, action, value, event_class))
        except ValueError as error:
            error.add_note(f"It is item {n}, counted from 0; nothing was published.")
            raise
    events = [event for event, _ in pairs]
    using = get_history().using
    if _in_transaction(using):
        # All or none, also if the caller handles an error and continues.
        with transaction.atomic(using):
            for _ in publish_in_batches(pairs):
                pass
        return events
    published: Counter[str] = Counter()
    try:
        for batch in publish_in_batches(pairs):
            published[batch[0].token] += len(batch)
    except Exception as error:
        error.add_note(_published_before(published, events))
        raise
    return events


def _published_before(published: Counter[str], events: Sequence[Event]) -> str:
    text = f"{published.total()} of {len(events)} events had been published before"
    if len({event.token for event in events}) > 1 and published:
        shown = [f"the first {n} of {token!r}" for token, n in published.items()]
        more = f" and {len(shown) - SHOWN} other tokens" if len(shown) > SHOWN else ""
        text += f": {', '.join(shown[:SHOWN])}{more}"
    return f"{text}."


async def apublish_many(
    items: Iterable[Item], event_class: type[Event] | None = None
) -> list[Event]:
    """Call :func:`publish_many` in Django's thread for synchronous work."""
    return await sync_to_async(publish_many)(items, event_class)


async def apublish_posted(
    token: str,
    action: str,
    value: Any,
    event_class: type[Event],
    key: str | None = None,
    scope: str = "",
) -> Event:
    """Publish an event that a request has posted. No transaction is around it.

    The event is published on the event loop if nothing blocks, because a thread is a large part
    of the cost. To check and encode a large value blocks.

    :param key: the key of the event, or ``None``.
    :param scope: the sender, whose keys are compared with each other only.
    :raises ValueError: if the token, the action, the value or the key is not valid; for example a
        reconnection time outside of ``EVENTSOURCE_RETRY_RANGE_MS``.
    """
    if len(value) > LOOP_BYTES:
        return await sync_to_async(publish_posted)(token, action, value, event_class, key, scope)
    event, draft = _prepare_posted(token, action, value, event_class, key, scope)
    history = get_history()
    if history.blocks or not is_process_local() or event_published.has_listeners(event_class):
        await sync_to_async(_publish)([event], [draft], LayerSender())
    elif is_durable(event_class):
        _append([event], partial(history.append, token, [draft]))
    else:
        _send_live([event], [draft.batch()], LayerSender())
    return event


def publish_posted(
    token: str,
    action: str,
    value: Any,
    event_class: type[Event],
    key: str | None = None,
    scope: str = "",
) -> Event:
    """Do the same as :func:`apublish_posted` in synchronous code, also inside a transaction."""
    event, draft = _prepare_posted(token, action, value, event_class, key, scope)
    _publish([event], [draft], LayerSender())
    return event


def _prepare_posted(
    token: str, action: str, value: Any, event_class: type[Event], key: str | None, scope: str
) -> Prepared:
    event, draft = prepare(token, action, value, event_class, key, scope)
    if draft.kind == Kind.RETRY:
        _check_retry(int(draft.data))
    return event, draft


def _check_retry(retry_ms: int) -> None:
    least, most = conf.retry_range_ms
    if not least <= retry_ms <= most:
        raise InvalidEvent(
            f"A posted reconnection time must be from {least} to {most} milliseconds "
            f"(EVENTSOURCE_RETRY_RANGE_MS), not {retry_ms}."
        )


def publish_event(event: Event, key: str | None = None, kind: Kind | None = None) -> Event:
    """Publish an event whose token and action have been checked.

    :param key: the key of a durable event, or ``None``.
    :param kind: the kind of a durable event; ``None`` for that of its action.
    """
    draft = Draft.of(event, None if key is None else key_digest("", check_key(key)))
    _publish([event], [draft if kind is None else replace(draft, kind=kind)], LayerSender())
    return event


def publish_in_batches(pairs: Iterable[Prepared]) -> Iterator[list[Event]]:
    """Publish prepared events of one class, and yield each batch after it was published.

    The events of one token stay in their order.
    """
    by_token: dict[str, list[Prepared]] = defaultdict(list)
    sender = LayerSender()
    for event, draft in pairs:
        by_token[event.token].append((event, draft))
    for of_token in by_token.values():
        for batch in _split(of_token):
            events = [event for event, _ in batch]
            _publish(events, [draft for _, draft in batch], sender)
            yield events


def _split(pairs: Sequence[Prepared]) -> Iterator[Sequence[Prepared]]:
    start = size = 0
    for n, (_, draft) in enumerate(pairs):
        if n > start and (n - start == BATCH_EVENTS or size + len(draft.data) > BATCH_BYTES):
            yield pairs[start:n]
            start, size = n, 0
        size += len(draft.data)
    yield pairs[start:]


def prepare(
    token: str,
    action: str,
    value: Any,
    event_class: type[Event],
    key: str | None = None,
    scope: str = "",
) -> Prepared:
    """Return a checked event and its draft.

    :param key: the key of the event, or ``None``. An event with a key is published alone.
    :param scope: the sender, whose keys are compared with each other only; ``""`` for the
        project's own code.
    :raises ValueError: if the token, the action, the value or the key is not valid.
    """
    event = make_event(token, action, value, event_class)
    if key is None:
        return event, Draft.of(event)
    if not is_durable(event_class):
        raise InvalidEvent(
            f"A key needs a durable event class, because the history finds the first event with "
            f"it. Events of {event_class.__name__} are live only and never stored."
        )
    return event, Draft.of(event, key_digest(scope, check_key(key)))


def make_event(token: str, action: str, value: Any, event_class: type[Event]) -> Event:
    """Return an event whose token and action are checked.

    :raises ValueError: if the token, the action or the value is not valid.
    """
    check_token(token)
    error = action_error(event_class, action)
    if error is not None:
        raise error
    return event_class(token, action, value)


class LayerSender:
    """Sends the live-only events of a publisher over the channel layer, up to the first failure.

    So a publisher of many events waits only once for a layer that hangs.
    """

    send_seconds = 2.0
    """Seconds for which a publisher waits for the layer with each message."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        """The error of the first failure."""

    def send(self, layer: BaseChannelLayer, group: str, batches: Sequence[Batch]) -> None:
        """Send batches of one group.

        :raises Exception: the error of the layer, also if it failed in an earlier call.
        """
        if self.failure is not None:
            raise self.failure
        try:
            background.run(layer, send_batches(layer, group, batches, self.send_seconds))
        except BaseException as error:
            self.failure = error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishingStatistics:
    """What this process has published since it started."""

    events: int
    """The events that were stored, or sent if they are live only."""
    latency: Distribution
    """The seconds that storing or sending took, once for each call or batch of ``publish_many()``.
    In a transaction it begins after the commit."""


class Counters:
    """Counts what is published. Callable in any thread."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all counts. In a fork, another thread of the parent may have held the lock."""
        # Reentrant, because the garbage collector may run code that publishes at any time.
        self._lock = threading.RLock()
        self._events = 0
        self._latency = Histogram()

    def count(self, events: int, began: float) -> None:
        """Count events that were published together.

        :param began: when storing or sending them began, on the monotonic clock.
        """
        with self._lock:
            self._events += events
        self._latency.observe(time.monotonic() - began)

    def statistics(self) -> PublishingStatistics:
        """Return the counts."""
        return PublishingStatistics(events=self._events, latency=self._latency.distribution())


counters = Counters()
_runtime.on_reset(counters.reset)


def _publish(events: Sequence[Event], drafts: Sequence[Draft], sender: LayerSender) -> None:
    """Publish events of one class and token."""
    if is_durable(type(events[0])):
        _publish_durable(events, drafts)
    else:
        _publish_live(events, drafts, sender)


def _publish_durable(events: Sequence[Event], drafts: Sequence[Draft]) -> None:
    history = get_history()
    token = events[0].token
    if _in_transaction(history.using):
        append = history.stage(token, drafts)
        _on_commit(partial(_append, events, append), history.using)
    else:
        _append(events, partial(history.append, token, drafts))


def _append(events: Sequence[Event], append: Callable[[], Sequence[Entry | None]]) -> None:
    began = time.monotonic()
    entries = append()
    published = time.time()
    for event, entry in zip(events, entries, strict=True):
        if entry is not None:
            event._seq = entry.seq
            if entry.repeated:
                # This also replaces an id that the class has computed.
                vars(event)["id"] = entry.id
                return  # an event with a key is published alone
    try:
        group = group_name(events[0].token)
        listening = [hub for hub in hubs() if hub.listens_to(group)]
        layer = get_shared_layer()
        if listening or layer is not None:
            # An event that was trimmed already has no entry.
            stored = (entry.batch() for entry in entries if entry is not None)
            batches = merge(stored, max_bytes=MESSAGE_BYTES, consecutive=True)
            for batch in batches:
                batch.published = published
            # The own process first: the feed drops the copy of the layer by its sequence number.
            for hub in listening:
                hub.deliver(group, batches)
            if layer is not None:
                notifier.put(layer, group, batches)
        if layer is None:
            waker.put(group)
    except Exception:
        # Each hub finds the event at its next history check. The error is not raised, because
        # the transaction of the caller has committed.
        logger.exception(
            "Sending to the channel layer failed. Listeners receive the events at the next "
            "history check."
        )
    if not events[0].internal:
        counters.count(len(events), began)
    _send_published_signal(events)


def _publish_live(events: Sequence[Event], drafts: Sequence[Draft], sender: LayerSender) -> None:
    using = get_history().using
    token = events[0].token
    batches = merge((draft.batch() for draft in drafts), max_bytes=MESSAGE_BYTES)
    if _in_transaction(using):
        _on_commit(partial(_send_live_and_signal, events, batches, sender), using)
        return
    try:
        _send_live(events, batches, sender)
    except Exception as error:
        what = "The event" if len(events) == 1 else f"Some of {len(events)} events"
        raise DeliveryFailed(
            f"{what} for {token!r} did not reach the channel layer ({error!r}). "
            f"{'It is' if len(events) == 1 else 'They are'} live only and never stored."
        ) from error
    _send_published_signal(events)


def _send_live_and_signal(
    events: Sequence[Event], batches: Sequence[Batch], sender: LayerSender
) -> None:
    _send_live(events, batches, sender)
    _send_published_signal(events)


def _send_live(events: Sequence[Event], batches: Sequence[Batch], sender: LayerSender) -> None:
    began = time.monotonic()
    published = time.time()
    for batch in batches:
        batch.published = published
    group = group_name(events[0].token)
    layer = get_shared_layer()
    if layer is not None:
        # Over the layer alone: a second copy could not be dropped without a sequence number.
        sender.send(layer, group, batches)
    else:
        for hub in hubs():
            hub.deliver(group, batches)
    if not events[0].internal:
        counters.count(len(events), began)


def _send_published_signal(events: Sequence[Event]) -> None:
    """Send ``event_published``. The errors of its receivers are logged, not raised."""
    sender = type(events[0])
    if sender.internal or not event_published.has_listeners(sender):
        return
    for event in events:
        _off_the_loop(partial(event_published.send_robust, sender, event=event))


def _off_the_loop(work: Callable[[], object]) -> None:
    """Run work that needs a thread without a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        work()
    else:
        # With DJANGO_ALLOW_ASYNC_UNSAFE, as in a notebook: block this thread, run in another.
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(work).result()


def _in_transaction(using: str) -> bool:
    """Return whether the events must wait for a commit.

    :raises TransactionManagementError: if the commit cannot be detected.
    """
    connection = transaction.get_connection(using)
    if connection.in_atomic_block:
        return True
    autocommit = connection.settings_dict.get("AUTOCOMMIT", True)
    if connection.connection is not None:
        autocommit = connection.autocommit
    if not autocommit:
        raise transaction.TransactionManagementError(
            "publish() cannot detect the commit of a transaction that is managed by hand "
            "(autocommit is off): use transaction.atomic()."
        )
    return False


def _on_commit(work: Callable[[], object], using: str) -> None:
    def run() -> None:  # Django requires a function with a name
        work()

    # Robust: the caller's data is stored, so a failure after the commit must not reach the
    # caller, and must not prevent other hooks from running.
    transaction.on_commit(run, using=using, robust=True)
