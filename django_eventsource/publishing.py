"""Publishing: from any code, if and only if the transaction around it commits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import BaseChannelLayer
from django.db import transaction
from django.utils.asyncio import async_unsafe

from .conf import check_event_class, conf
from .events import Event, is_durable
from .exceptions import DeliveryFailed, UnknownAction
from .history import Draft, Entry, get_history
from .hub import hubs
from .layers import MESSAGE_TYPE, get_layer, is_process_local
from .signals import event_published
from .tokens import CONTROL_TOKEN, check_token, group_name

logger = logging.getLogger("django_eventsource.publishing")

SEND_SECONDS = 2.0
"""How long a publisher waits for the channel layer."""


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


def publish_event(event: Event) -> Event:
    """Publish an event that is checked."""
    draft = Draft.of(event)
    if is_durable(type(event)):
        _publish_durable(event, draft)
    else:
        _publish_live(event, draft)
    return event


def make_event(token: str, action: str, value: Any, event_class: type[Event]) -> Event:
    """Make an event whose token and action are checked.

    :raises ValueError: when one of them is not acceptable, or the value is not.
    """
    check_token(token)
    if action not in event_class.ACTIONS:
        raise UnknownAction(action, list(event_class.ACTIONS), event_class.__name__)
    return event_class(token, action, value)


def _publish_durable(event: Event, draft: Draft) -> None:
    history = get_history()
    if _in_transaction(history.using):
        append = history.stage(event.token, [draft])
        _on_commit(partial(_append, event, append), history.using)
    else:
        _append(event, partial(history.append, event.token, [draft]))


def _append(event: Event, append: Callable[[], list[Entry]]) -> None:
    for entry in append():
        event._seq = entry.seq
        try:
            _send(event.token, entry.seq, entry.frame(), entry.finishes)
        except (Exception, asyncio.CancelledError):
            # Not lost: every hub finds it in the history at its next head check. And not
            # the caller's: its transaction has committed, though it may be cancelled.
            logger.warning("The channel layer failed; listeners wait longer.", exc_info=True)
    _tell(event)


def _send_and_tell(event: Event, send: Callable[[], None]) -> None:
    send()
    _tell(event)


def _tell(event: Event) -> None:
    """Send the signal. Its receivers are not the publisher's: what they raise is logged."""
    if event.token == CONTROL_TOKEN:
        return
    _off_the_loop(partial(event_published.send_robust, type(event), event=event))


def _publish_live(event: Event, draft: Draft) -> None:
    using = get_history().using
    send = partial(_send, event.token, None, draft.frame(), event.action == event.FINISH)
    if _in_transaction(using):
        _on_commit(partial(_send_and_tell, event, send), using)
        return
    try:
        send()
    except Exception as error:
        raise DeliveryFailed(
            f"The event for {event.token!r} did not reach the channel layer ({error!r}). "
            "It is live only and was not stored."
        ) from error
    _tell(event)


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
    def run() -> None:
        try:
            work()
        except asyncio.CancelledError:
            logger.warning("An event was not sent: its publisher was cancelled.")

    # Robust: a failure after the commit must neither reach the caller, whose data is
    # safe, nor keep other hooks from running.
    transaction.on_commit(run, using=using, robust=True)


async def _group_send(layer: BaseChannelLayer, group: str, message: dict[str, Any]) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await layer.group_send(group, message)


def _send(token: str, seq: int | None, frame: bytes, finish: bool) -> None:
    """Send a frame to every process's hub."""
    group = group_name(token)
    message = {
        "type": MESSAGE_TYPE,
        "group": group,
        "seq": seq,
        "finish": finish,
        "frame": frame,
    }
    layer = get_layer()
    if layer is None or is_process_local():
        for hub in hubs():
            hub.deliver(group, message)
        return
    _off_the_loop(partial(async_to_sync(_group_send), layer, group, message))


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
