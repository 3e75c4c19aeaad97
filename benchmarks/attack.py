"""Connections that send logins with invented users, one after the other, as an attacker does."""

from __future__ import annotations

import base64
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

TIMEOUT_SECONDS = 60.0


@contextmanager
def attacking(port: int, path: str, connections: int) -> Iterator[Counter[int]]:
    """Attack a server during a block; yield a count of the responses by status.

    Each connection sends its next request after the response to the one before.
    """
    answers: Counter[int] = Counter()
    lock = threading.Lock()
    over = threading.Event()

    def attack(number: int) -> None:
        attempt = 0
        connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
        while not over.is_set():
            attempt += 1
            user = base64.b64encode(f"invented-{number}-{attempt}:x".encode()).decode()
            try:
                connection.request("GET", path, headers={"Authorization": f"Basic {user}"})
                response = connection.getresponse()
                response.read()
            except (OSError, HTTPException):
                connection.close()
                continue
            with lock:
                answers[response.status] += 1
        connection.close()

    threads = [threading.Thread(target=attack, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()
