"""Publishing: from any code, if and only if the transaction around it commits."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from asgiref.sync import sync_to_async
from channels.layers import BaseChannelLayer
from django.db import transaction
from django.utils.asyncio import async_unsafe

from .background import background
from .batches import Batch, gather
from .conf import check_event_class, conf
from .events import Event, is_durable
from .exceptions import DeliveryFailed, InvalidEvent, UnknownAction
from .history import Draft, Entry, Kind, get_history
from .hub import hubs
from .layers import MESSAGE_TYPE, get_layer, is_process_local
from .signals import event_published
from .tokens import CONTROL_TOKEN, check_token, group_name

logger = logging.getLogger("django_eventsource.publishing")

SEND_SECONDS = 2.0
"""How long a publisher waits for the channel layer, with each batch that it publishes; after
one that has failed, not any more."""
SHOWN = 5
"""Tokens that a message names."""
BATCH_EVENTS = 500
BATCH_BYTES = 256 * 1024
"""What is appended at once, all or none."""
MESSAGE_BYTES = 64 * 1024
"""What is sent in one message, unless a single event is larger."""

LOOP_BYTES = 16 * 1024
"""The length of the largest posted value that is checked and encoded on the event loop."""

Item = tuple[str, str, Any]
Prepared = tuple[Event, Draft]
Messages = list[dict[str, Any]]


@async_unsafe("publish() blocks: in async code call `await apublish(...)` instead.")
def publish(
    token: str, action: str, value: Any = "", event_class: type[Event] | None = None
) -> Event:
    """Publish an event to the listeners of a token.

    Inside ``transaction.atomic`` the event is published when the transaction commits,
    and never when it rolls back; until then the ``id`` of an ``EventId`` class is
    ``None``.

    :param token: 1 to 255 characters.
    :param action: one of the class's ``ACTIONS``.
    :param value: what the class accepts.
    :param event_class: ``EVENTSOURCE_EVENT_CLASS`` if not given.
    :returns: the event; outside of a transaction with its id.
    :raises ValueError: when the token, the action or the value is not acceptable; then
        nothing was published.
    :raises DeliveryFailed: when a live-only event did not reach the channel layer.
    """
    event_class = conf.event_class if event_class is None else check_event_class(event_class)
    return publish_event(make_event(token, action, value, event_class))


async def apublish(
    token: str, action: str, value: Any = "", event_class: type[Event] | None = None
) -> Event:
    """Await :func:`publish`, which runs in Django's thread for synchronous work."""
    return await sync_to_async(publish)(token, action, value, event_class)


@async_unsafe("publish_many() blocks: in async code call `await apublish_many(...)` instead.")
def publish_many(items: Iterable[Item], event_class: type[Event] | None = None) -> list[Event]:
    """Publish many events: faster than one by one, by far.

    All are checked before the first is published. The events of one token stay in their
    order and are stored in batches, each all or none. Inside ``transaction.atomic`` all
    are published when the transaction commits, or none of them; only with a history that
    is not in the database can the store fail for some batches after the commit, which is
    logged.

    :param items: a token, an action and a value of each event.
    :param event_class: ``EVENTSOURCE_EVENT_CLASS`` if not given.
    :returns: the events, in the order of the items; outside of a transaction with ids.
    :raises ValueError: when an item is not acceptable; then nothing was published, and a
        note on the error says which one it was.
    :raises DeliveryFailed: when live-only events did not reach the channel layer. As with
        an error of the history, a note says how many events had been published before;
        inside a transaction none are.
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
        # All or none, also where the caller goes on after an error.
        with transaction.atomic(using):
            for _ in publish_in_batches(pairs):
                pass
        return events
    published: Counter[str] = Counter()
    try:
        for batch in publish_in_batches(pairs):
            published[batch[0].token] += len(batch)
    except Exception as error:
        error.add_note(_how_many(published, events))
        raise
    return events


def _how_many(published: Counter[str], events: Sequence[Event]) -> str:
    """Say how far a publisher of many came."""
    text = f"{published.total()} of {len(events)} events had been published before"
    if len({event.token for event in events}) > 1 and published:
        shown = [f"the first {n} of {token!r}" for token, n in published.items()]
        more = f" and {len(shown) - SHOWN} other tokens" if len(shown) > SHOWN else ""
        text += f": {', '.join(shown[:SHOWN])}{more}"
    return f"{text}."


async def apublish_many(
    items: Iterable[Item], event_class: type[Event] | None = None
) -> list[Event]:
    """Await :func:`publish_many`, which runs in Django's thread for synchronous work."""
    return await sync_to_async(publish_many)(items, event_class)


async def apublish_posted(token: str, action: str, value: Any, event_class: type[Event]) -> Event:
    """Publish what came with a request of its own: no transaction is around it.

    It takes no thread where nothing blocks, which is a good part of what it costs. To check and
    encode a large value blocks.

    :raises ValueError: when something is not acceptable, such as a reconnection time out of
        ``EVENTSOURCE_RETRY_RANGE_MS``.
    """
    if len(value) > LOOP_BYTES:
        return await sync_to_async(_publish_posted)(token, action, value, event_class)
    event, draft = _prepare_posted(token, action, value, event_class)
    history = get_history()
    if history.blocks or not is_process_local() or event_published.has_listeners(event_class):
        await sync_to_async(_publish)([event], [draft], Way())
    elif is_durable(event_class):
        _append([event], partial(history.append, token, [draft]), Way())
    else:
        _send_live(_live_messages(token, [draft]), Way())
    return event


def _publish_posted(token: str, action: str, value: Any, event_class: type[Event]) -> Event:
    event, draft = _prepare_posted(token, action, value, event_class)
    _publish([event], [draft], Way())
    return event


def _prepare_posted(token: str, action: str, value: Any, event_class: type[Event]) -> Prepared:
    event, draft = prepare(token, action, value, event_class)
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


def publish_event(event: Event) -> Event:
    """Publish an event that is checked."""
    _publish([event], [Draft.of(event)], Way())
    return event


def publish_in_batches(pairs: Iterable[Prepared]) -> Iterator[list[Event]]:
    """Publish events that are prepared, and give each batch when it was.

    All are of one class. Those of one token stay in their order.
    """
    by_token: dict[str, list[Prepared]] = defaultdict(list)
    way = Way()
    for event, draft in pairs:
        by_token[event.token].append((event, draft))
    for of_token in by_token.values():
        for batch in _cut(of_token):
            events = [event for event, _ in batch]
            _publish(events, [draft for _, draft in batch], way)
            yield events


def _cut(pairs: Sequence[Prepared]) -> Iterator[Sequence[Prepared]]:
    """Cut into batches of up to a number and a size."""
    start = size = 0
    for n, (_, draft) in enumerate(pairs):
        if n > start and (n - start == BATCH_EVENTS or size + len(draft.data) > BATCH_BYTES):
            yield pairs[start:n]
            start, size = n, 0
        size += len(draft.data)
    yield pairs[start:]


def _publish(events: Sequence[Event], drafts: Sequence[Draft], way: Way) -> None:
    """Publish events of one class and token."""
    if is_durable(type(events[0])):
        _publish_durable(events, drafts, way)
    else:
        _publish_live(events, drafts, way)


def prepare(token: str, action: str, value: Any, event_class: type[Event]) -> Prepared:
    """Check an event, so that it can be published.

    :raises ValueError: when something about it is not acceptable.
    """
    event = make_event(token, action, value, event_class)
    return event, Draft.of(event)


def make_event(token: str, action: str, value: Any, event_class: type[Event]) -> Event:
    """Make an event whose token and action are checked.

    :raises ValueError: when one of them is not acceptable, or the value is not.
    """
    check_token(token)
    if action not in event_class.ACTIONS:
        raise UnknownAction(action, list(event_class.ACTIONS), event_class.__name__)
    return event_class(token, action, value)


def _publish_durable(events: Sequence[Event], drafts: Sequence[Draft], way: Way) -> None:
    history = get_history()
    token = events[0].token
    if _in_transaction(history.using):
        append = history.stage(token, drafts)
        _on_commit(partial(_append, events, append, way), history.using)
    else:
        _append(events, partial(history.append, token, drafts), way)


def _append(
    events: Sequence[Event], append: Callable[[], Sequence[Entry | None]], way: Way
) -> None:
    entries = append()
    for event, entry in zip(events, entries, strict=True):
        if entry is not None:
            event._seq = entry.seq
    try:
        # What was trimmed already has no entry.
        frames = (entry.numbered for entry in entries if entry is not None)
        batches = gather(frames, max_bytes=MESSAGE_BYTES, consecutive=True)
        messages = _messages(events[0].token, batches)
        # First, and whatever the layer does: the copy that it brings is dropped by its number.
        _deliver_here(messages)
        if way.failure is None and not is_process_local():
            way.send(messages)
    except (Exception, asyncio.CancelledError):
        # Not lost: every hub finds it in the history at its next head check. And not
        # the caller's: its transaction has committed, though it may be cancelled.
        logger.warning("The channel layer failed; listeners wait longer.", exc_info=True)
    _tell(events)


def _live_messages(token: str, drafts: Iterable[Draft]) -> Messages:
    frames = ((None, draft.frame(), draft.kind == Kind.FINISH) for draft in drafts)
    return _messages(token, gather(frames, max_bytes=MESSAGE_BYTES))


def _send_and_tell(events: Sequence[Event], send: Callable[[], None]) -> None:
    send()
    _tell(events)


def _tell(events: Sequence[Event]) -> None:
    """Send the signal. Its receivers are not the publisher's: what they raise is logged."""
    sender = type(events[0])
    if events[0].token == CONTROL_TOKEN or not event_published.has_listeners(sender):
        return
    for event in events:
        _off_the_loop(partial(event_published.send_robust, sender, event=event))


def _publish_live(events: Sequence[Event], drafts: Sequence[Draft], way: Way) -> None:
    using = get_history().using
    token = events[0].token
    send = partial(_send_live, _live_messages(token, drafts), way)
    if _in_transaction(using):
        _on_commit(partial(_send_and_tell, events, send), using)
        return
    try:
        send()
    except Exception as error:
        what = "The event" if len(events) == 1 else f"Some of {len(events)} events"
        raise DeliveryFailed(
            f"{what} for {token!r} did not reach the channel layer ({error!r}). "
            f"{'It is' if len(events) == 1 else 'They are'} live only and never stored."
        ) from error
    _tell(events)


def _in_transaction(using: str) -> bool:
    """Tell whether there is a commit to wait for.

    :raises TransactionManagementError: when nobody can tell when it comes.
    """
    connection = transaction.get_connection(using)
    if connection.in_atomic_block:
        return True
    autocommit = connection.settings_dict.get("AUTOCOMMIT", True)
    if connection.connection is not None:
        autocommit = connection.autocommit
    if not autocommit:
        raise transaction.TransactionManagementError(
            "publish() cannot tell when a transaction commits that is managed by hand "
            "(autocommit is off): use transaction.atomic()."
        )
    return False


def _on_commit(work: Callable[[], object], using: str) -> None:
    def run() -> None:  # Django wants a function with a name
        work()

    # Robust: a failure after the commit must neither reach the caller, whose data is
    # safe, nor keep other hooks from running.
    transaction.on_commit(run, using=using, robust=True)


async def _group_send(layer: BaseChannelLayer, messages: Messages) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        for message in messages:
            await layer.group_send(message["group"], message)


class Way:
    """The way of a publisher's events over the layer: it waits for a layer that hangs once."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def send(self, messages: Messages) -> None:
        """Send messages of one group over the layer, unless that has failed before.

        :raises Exception: whatever kept it from that.
        """
        if self.failure is not None:
            raise self.failure
        if not messages:
            return
        try:
            layer = cast("BaseChannelLayer", get_layer())
            background.run(layer, _group_send(layer, messages))
        except BaseException as error:
            self.failure = error
            raise


def _messages(token: str, batches: Iterable[Batch]) -> Messages:
    """Return the messages to the hubs of a token's listeners."""
    group = group_name(token)
    return [
        {
            "type": MESSAGE_TYPE,
            "group": group,
            "seq": batch.first,
            "finish": batch.finish,
            "frames": list(batch.frames),
        }
        for batch in batches
    ]


def _deliver_here(messages: Messages) -> None:
    """Hand durable events to the hubs of this process that have listeners for them."""
    for hub in hubs():
        if messages and hub.listens_to(messages[0]["group"]):
            hub.deliver(messages)


def _send_live(messages: Messages, way: Way) -> None:
    """Send live-only events to the hubs: over the layer alone, if processes share it.

    They have no number by which a second copy could be dropped.
    """
    if not is_process_local():
        way.send(messages)
        return
    for hub in hubs():
        hub.deliver(messages)


def _off_the_loop(work: Callable[[], object]) -> None:
    """Do what needs that no event loop runs in the thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        work()
    else:
        # DJANGO_ALLOW_ASYNC_UNSAFE, as in a notebook: block here, work elsewhere.
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(work).result()
