"""The suite's own processes: they publish, and read the history at the end.

``python -m tests.faults.publisher PLAN`` with a plan in JSON. It prints one line for each
text, before it does anything else: ``ack token id text``, ``committed token text`` (its id
is not known), ``failed token text``, ``rolledback token text``.
At the end one process publishes the last events, prints ``ended``, waits for a line, and
prints the events in the history.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import django
from asgiref.sync import sync_to_async

django.setup()

from django.db import close_old_connections, connections, transaction  # noqa: E402
from django.utils import timezone  # noqa: E402

from django_eventsource import publish  # noqa: E402
from django_eventsource.history import get_history  # noqa: E402
from tests.support.histories import before_oldest  # noqa: E402

PAUSE_SECONDS = 0.05
"""After a failure: a service that is away refuses thousands of texts in a second."""
HOUR = 3600
AS_A_SCRIPT = 150
"""Events that are published outside of any event loop, which costs the layer more."""


class Rollback(Exception):
    """Rolls a transaction back."""


def say(*words: object) -> None:
    """Print a line without buffering, because the process may be killed after it."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Publisher:
    """Publishes texts that no other publisher publishes, until enough are acknowledged."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.name = plan["name"]
        self.chance = random.Random(f"{plan['seed']} {self.name}")
        self.tokens = plan["tokens"]
        self.using = get_history().using
        self.outbox = getattr(get_history(), "_outbox", None) is not None
        self.pad = "." * plan.get("pad", 0)
        self.texts = 0
        self.published = 0

    def text(self) -> str:
        self.texts += 1
        return f"{self.name}-{self.texts}{self.pad}"

    def run(self) -> None:
        """Publish first as a script does, then as code in the event loop of a server does."""
        self.publish_until(min(AS_A_SCRIPT, self.plan["count"]))
        asyncio.run(sync_to_async(self.publish_until)(self.plan["count"]))

    def publish_until(self, count: int) -> None:
        back_at = self.plan.get("clock_back_at")
        while self.published < count:
            if back_at is not None and self.published >= back_at:
                back_at = self.plan["clock_back_at"] = None
                set_clock_back()
                self.tokens = [*self.tokens, *self.plan["later_tokens"]]
            how = self.chance.random()
            if how < 0.6:
                self.plain()
            elif how < 0.8:
                self.commit(self.chance.randint(1, 4))
            elif how < 0.9:
                self.roll_back(self.chance.randint(1, 3))
            else:
                self.commit(self.chance.randint(1, 3), inner=True)
            time.sleep(self.plan.get("pace", 0))

    def plain(self) -> None:
        token, text = self.chance.choice(self.tokens), self.text()
        try:
            event = publish(token, "ping", text)
        except Exception as error:  # noqa: BLE001
            self.failed([(token, text)], error)
        else:
            say("ack", token, event.id, text)
            self.published += 1

    def commit(self, count: int, *, inner: bool = False) -> None:
        """Publish in one transaction, of which a part may be rolled back."""
        pairs = [(self.chance.choice(self.tokens), self.text()) for _ in range(count)]
        dies = self.plan.get("die_at") is not None and self.published >= self.plan["die_at"]
        events = []
        try:
            with transaction.atomic(using=self.using):
                if dies:
                    transaction.on_commit(lambda: die(pairs), using=self.using)
                for token, text in pairs:
                    events.append(publish(token, "ping", text))
                if inner:
                    with suppress(Rollback), transaction.atomic(using=self.using):
                        self.publish_and_roll_back()
        except Exception as error:  # noqa: BLE001
            self.failed(pairs, error)
            return
        for (token, text), event in zip(pairs, events, strict=True):
            if event.id is not None:
                say("ack", token, event.id, text)
            elif self.outbox:
                say("committed", token, text)
            else:
                say("failed", token, text)  # on_commit logged why
                continue
            self.published += 1
        close_old_connections()

    def roll_back(self, count: int) -> None:
        try:
            with suppress(Rollback), transaction.atomic(using=self.using):
                for _ in range(count - 1):
                    publish(self.chance.choice(self.tokens), "ping", self.rolled_back_text())
                self.publish_and_roll_back()
        except Exception as error:  # noqa: BLE001
            self.failed([], error)

    def publish_and_roll_back(self) -> None:
        publish(self.chance.choice(self.tokens), "ping", self.rolled_back_text())
        raise Rollback

    def rolled_back_text(self) -> str:
        text = self.text()
        say("rolledback", "-", text)
        return text

    def failed(self, pairs: list[tuple[str, str]], error: Exception) -> None:
        for token, text in pairs:
            say("failed", token, text)
        print(f"{time.monotonic():.2f} {error!r}"[:300], file=sys.stderr)
        connections.close_all()
        time.sleep(PAUSE_SECONDS)

    def end(self) -> None:
        """Publish the last event of each token."""
        for token in self.plan["tokens"]:
            self.tokens = [token]
            wanted = self.published + 1
            while self.published < wanted:
                self.plain()


def die(pairs: list[tuple[str, str]]) -> None:
    """End the process between the commit and the notification."""
    for token, text in pairs:
        say("committed", token, text)
    os.kill(os.getpid(), signal.SIGKILL)


def set_clock_back() -> None:
    """Set this process's wall clock back by an hour."""
    clock, clock_ns, now = time.time, time.time_ns, timezone.now
    time.time = lambda: clock() - HOUR
    time.time_ns = lambda: clock_ns() - HOUR * 10**9
    timezone.now = lambda: now() - timedelta(seconds=HOUR)


def dump(tokens: list[str]) -> None:
    """Print all events in the history: ``kept token id text``."""
    history = get_history()
    heads = history.heads(tokens)  # it gives what is pending its place, too
    for token in tokens:
        place = before_oldest(history, token)
        while place < heads[token].seq:
            slice_ = history.read(token, place)
            assert slice_.complete
            for entry in slice_.entries:
                say("kept", token, entry.seq, entry.draft.data.decode())
                place = entry.seq


def main() -> None:
    plan = json.loads(sys.argv[1])
    if plan["do"] == "publish":
        Publisher(plan).run()
        return
    asyncio.run(sync_to_async(Publisher(plan).end)())
    say("ended")
    sys.stdin.readline()
    dump(plan["tokens"])


if __name__ == "__main__":
    main()
