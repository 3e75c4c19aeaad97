"""Check the passwords of HTTP Basic: off the event loop, few at once, failures throttled.

A password hash takes a large part of a second of CPU. It runs in threads of its own, so
that the event loop goes on; few, so that clients with invented users cannot take all CPU;
and with a bounded queue, so that a login does not wait without end.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import authenticate
from django.db import connections
from django.http import HttpRequest

from .addresses import address_of, network_of
from .conf import conf
from .exceptions import RateLimited
from .rates import Window

THREADS = 2
"""Passwords that one process hashes at once."""
MAX_WAITING = 32
"""Logins of one process that may wait for a thread; the next one is refused."""
BUSY_SECONDS = 1
"""Seconds after which a refused login may be tried again."""
ADDRESS_FACTOR = 3
"""How many times as often as one user at an address all users at the address may fail."""


class _Pool:
    """The threads that hash, and the places in them and before them."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(THREADS, thread_name_prefix="eventsource-login")
        self.places = threading.BoundedSemaphore(THREADS + MAX_WAITING)


_pools: dict[int, _Pool] = {}
"""By process id: the threads of a process do not live on in its fork."""


async def check_password(request: HttpRequest, name: str, password: str) -> Any:
    """Return the user whom Django's ``authenticate()`` finds, or ``None``.

    It calls the synchronous ``authenticate()`` of each backend.

    :raises RateLimited: after too many failures, or while too many logins wait.
    """
    pool = _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), _Pool())
    if not pool.places.acquire(blocking=False):
        raise RateLimited(BUSY_SECONDS, "Too many logins at once")
    try:
        work = sync_to_async(_authenticate, thread_sensitive=False, executor=pool.executor)
        return await work(request, name, password)
    finally:
        pool.places.release()


def _authenticate(request: HttpRequest, name: str, password: str) -> Any:
    try:
        windows = _windows(network_of(address_of(request)), name)
        for window, most in windows:
            if window.count() >= most:
                raise RateLimited(window.seconds_left, "Too many failed logins")
        user = authenticate(request, username=name, password=password)
        if user is None:
            for window, _ in windows:
                window.add()
        return user
    finally:
        connections.close_all()


def _windows(network: str, name: str) -> list[tuple[Window, int]]:
    """Return what a failure counts against, each with the most failures allowed.

    Never a user alone: anybody could lock that user out. So nothing if the server passes
    no address.
    """
    rate = conf.login_rate
    if rate is None or not network:
        return []
    most, seconds = rate
    return [
        (Window("login", network, seconds), most * ADDRESS_FACTOR),
        (Window("login", f"{network} {name}", seconds), most),
    ]
