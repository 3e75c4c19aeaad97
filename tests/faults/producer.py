"""A process of the suite that produces answers: ``python -m tests.faults.producer PLAN``.

It runs a production for each token of the plan, which is JSON, and prints one line for each step:
``last token`` before a source ends, ``paused token`` before it waits for a line of the standard
input, and ``end token action id`` for what ``produce()`` returns.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import django

django.setup()

from django_eventsource import produce  # noqa: E402
from tests.faults.publisher import say  # noqa: E402


def chunk(name: str, number: int) -> str:
    """Return a text that no other production yields."""
    return f"{name} {number}\n"


def whole(name: str, count: int) -> str:
    """Return everything that a production yields."""
    return "".join(chunk(name, number) for number in range(count))


class Producer:
    """Runs the productions of a plan.

    :param plan: ``name``, ``seed``, ``count`` (of chunks), ``pace`` (the mean of seconds between
        two chunks), ``pause`` (whether to wait in the middle) and ``tokens``, a dictionary from
        token to the seconds between the last chunk and the end.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.may_continue = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for token, seconds in self.plan["tokens"].items():
                group.create_task(self.produce(token, seconds))
            if self.plan["pause"]:
                await asyncio.to_thread(sys.stdin.readline)
                self.may_continue.set()

    async def produce(self, token: str, seconds: float) -> None:
        end = await produce(token, self.source(token, seconds), interval_seconds=0.01)
        say("end", token, end.action, end.id)

    async def source(self, token: str, seconds: float) -> AsyncIterator[str]:
        count, name = self.plan["count"], self.plan["name"]
        chance = random.Random(f"{self.plan['seed']} {name} {token}")
        for number in range(count):
            await asyncio.sleep(chance.uniform(0, 2 * self.plan["pace"]))
            yield chunk(name, number)
            if self.plan["pause"] and number == count // 2:
                say("paused", token)
                await self.may_continue.wait()
        say("last", token)
        await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(Producer(json.loads(sys.argv[1])).run())
