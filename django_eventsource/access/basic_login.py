"""Checks of HTTP Basic passwords, in a few threads, with a limit on failures.

A password hash takes a large part of a second of CPU. Separate threads compute it, so that it does
not block the event loop. They are few, so that clients with invented users cannot use all CPU. The
queue is bounded, so that a login does not wait without end.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import authenticate
from django.db import connections
from django.http import HttpRequest

from .. import _runtime
from ..conf import conf
from ..exceptions import RateLimited
from .addresses import address_of, network_of
from .time_windows import Window

THREADS = 2
"""The number of passwords that one process hashes at the same time."""
MAX_WAITING = 32
"""The number of logins of one process that may wait for a thread. The next one is refused."""
BUSY_SECONDS = 1
"""Seconds after which a refused login may be tried again."""
ADDRESS_FACTOR = 3
"""The failures that all users at an address may have, as a multiple of those of one user."""


class _Pool:
    """The threads that hash passwords, and a count of the logins that run or wait."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.executor = ThreadPoolExecutor(THREADS, thread_name_prefix="eventsource-login")
        self.places = threading.BoundedSemaphore(THREADS + max_waiting)


_pool = _Pool()


@_runtime.on_reset
def _renew_pool() -> None:
    global _pool
    _pool = _Pool()


async def check_password(request: HttpRequest, name: str, password: str) -> Any:
    """Return the user that Django's ``authenticate()`` accepts, or ``None``.

    It calls the synchronous ``authenticate()`` of each backend.

    :raises RateLimited: after too many failures, or while too many logins wait.
    """
    pool = _pool
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
    """Return the windows that count a failure, each with the most failures allowed.

    No window counts a user alone, because any client could then lock that user out. So there is
    none if the server passes no address.
    """
    rate = conf.login_rate
    if rate is None or not network:
        return []
    most, seconds = rate
    return [
        (Window("login", network, seconds), most * ADDRESS_FACTOR),
        (Window("login", f"{network} {name}", seconds), most),
    ]
