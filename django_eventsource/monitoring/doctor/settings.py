"""Findings about the settings and about this process."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ...conf import conf
from ...delivery.layer import background, close_layer, is_process_local, make_hub_layer
from ...history import History
from .finding import DEPLOY, ERROR, INFO, MACHINES, NGINX, WARNING, Finding

PROXY_SECONDS = 60
"""Seconds of silence after which nginx and most load balancers close a connection by default."""
ECHO_SECONDS = 10.0
"""Seconds that the channel layer may take to return a message."""
FEW_FILES = 1024
"""The number of open files below which the limit of a process is low for a server."""


def silent_channel_layer(history: History) -> Iterator[Finding]:
    """Report a channel layer that processes share and that does not return a message."""
    if is_process_local():
        return
    try:
        background.start(None, _echo()).result()
    except Exception as error:  # noqa: BLE001
        reason = str(error) or f"no message arrived within {ECHO_SECONDS:g} s"
        yield Finding(
            ERROR,
            f"The channel layer {conf.channel_layer!r} does not return a message: {reason}.",
            "Check its server, and its CONFIG in CHANNEL_LAYERS.",
            number=3,
            page=MACHINES,
        )


async def _echo() -> None:
    # Not the instance of the publishers, because one that receives starts a task.
    layer = make_hub_layer()
    try:
        async with asyncio.timeout(ECHO_SECONDS):
            channel = await layer.new_channel()
            group = f"eventsource.doctor.{uuid.uuid4().hex}"
            await layer.group_add(group, channel)
            await layer.group_send(group, {"type": "eventsource.doctor"})
            await layer.receive(channel)
            await layer.group_discard(group, channel)
    finally:
        await close_layer(layer)


def long_silence(history: History) -> Iterator[Finding]:
    """Report keepalives that are disabled, or rarer than the time-outs of proxies allow."""
    seconds = conf.keepalive_seconds
    if seconds is not None and seconds < PROXY_SECONDS:
        return
    yield Finding(
        WARNING,
        f"EVENTSOURCE_KEEPALIVE_SECONDS is {seconds and f'{seconds:g}'}: many proxies close a "
        f"connection after {PROXY_SECONDS} s without data.",
        f"Set it to less than {PROXY_SECONDS}.",
        number=4,
        page=NGINX,
    )


def late_events(history: History) -> Iterator[Finding]:
    """Report that only the history checks find the events of other processes."""
    if history.shared and history.wake_ups is None and is_process_local():
        yield Finding(
            INFO,
            "Nothing wakes a process when another one publishes: the event arrives at the next "
            "history check.",
            "If several processes publish, set CHANNEL_LAYERS to a layer that processes share.",
            number=5,
            page=MACHINES,
        )


def few_open_files(history: History) -> Iterator[Finding]:
    """Report a limit of open files that is too low for the streams."""
    files = open_files_limit()
    streams = conf.max_streams
    if files is None or files >= max(FEW_FILES, streams or 0):
        return
    yield Finding(
        WARNING,
        f"A process that starts from here may open {files} files, and each stream is one"
        + (f"; EVENTSOURCE_MAX_STREAMS is {streams}." if streams else "."),
        "Raise the limit: `ulimit -n`, or LimitNOFILE= of systemd.",
        number=6,
        page=DEPLOY,
    )


def open_files_limit() -> int | None:
    """Return the number of files that this process may open; ``None`` if it has no limit."""
    # Windows has neither the limit nor the name.
    names: dict[str, Any] = getattr(os, "sysconf_names", {})
    limit = os.sysconf("SC_OPEN_MAX") if "SC_OPEN_MAX" in names else -1
    return limit if limit > 0 else None


FINDINGS: list[Callable[[History], Iterator[Finding]]] = [
    silent_channel_layer,
    long_silence,
    late_events,
    few_open_files,
]
"""The functions, in the order in which the doctor calls them."""
