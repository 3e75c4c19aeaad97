"""The scenarios of productions: pages that are loaded again, a fault, and exact counts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from django_eventsource import astop_production
from tests.faults.answers import Answers
from tests.faults.producer import whole

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


async def test_pages_that_join_reload_and_reconnect_show_the_same_text() -> None:
    """They join before, during and after the answers."""
    async with Answers("answers read at random", history="redis", layer="pubsub") as cluster:
        await cluster.listen(16, cuts=True)
        process = await cluster.start_producer("p", dict.fromkeys(cluster.tokens, 0.0))
        listening = asyncio.ensure_future(cluster.listen(16, cuts=True))
        await cluster.wait_for_end(process)
        await listening
        await cluster.listen(8, cuts=True)
        await cluster.check_answers({token: ["done"] for token in cluster.tokens})
        assert {page.text for page in cluster.pages} == {whole("p", 100)}
        assert cluster.ends == {token: ["done"] for token in cluster.tokens}
        assert any(page.loads for page in cluster.pages)


async def test_producers_killed_between_two_chunks() -> None:
    """Each of their answers is interrupted once. The next answer of the token is done."""
    async with Answers(
        "producers killed",
        history="postgres",
        layer="pubsub",
        # A lease expires after six seconds.
        EVENTSOURCE_PRESENCE_SECONDS=2,
    ) as cluster:
        await cluster.listen(cuts=True)
        halves = cluster.tokens[::2], cluster.tokens[1::2]
        dying = [
            await cluster.start_producer(f"dying{n}", dict.fromkeys(half, 0.0), count=10_000)
            for n, half in enumerate(halves)
        ]
        await cluster.wait_for_pages(lambda page: page.deltas)
        for process in dying:
            await asyncio.sleep(cluster.chance.uniform(0, 0.3))
            process.kill()
            await process.wait()
        await cluster.wait_for_pages(lambda page: page.end == "interrupted")
        process = await cluster.start_producer("next", dict.fromkeys(cluster.tokens, 0.0))
        await cluster.wait_for_end(process)
        await cluster.check_answers({token: ["interrupted", "done"] for token in cluster.tokens})
        assert {page.text for page in cluster.pages} == {whole("next", 100)}


async def test_valkey_emptied_in_the_middle_of_answers() -> None:
    """Each page receives a reset. In the end it shows the whole text, also what was lost."""
    async with Answers(
        "Valkey emptied, answers", history="redis", layer="pubsub", loses=True
    ) as cluster:
        assert cluster.valkey is not None
        await cluster.listen(cuts=True)
        process = await cluster.start_producer("p", dict.fromkeys(cluster.tokens, 0.0), pause=True)
        paused = set()
        async for words in cluster.lines(process):
            paused.update(words[1:2] if words[0] == "paused" else [])
            if len(paused) == len(cluster.tokens):
                break
        await cluster.settle()
        for token in cluster.tokens:
            cluster.lost[token] = await cluster.history.call(cluster.stored, token)
        with cluster.valkey.client() as client:
            client.flushall()
        await cluster.wait_for_pages(lambda page: page.resets)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        await cluster.wait_for_end(process)
        await cluster.check_answers({token: ["done"] for token in cluster.tokens}, resets=True)
        assert {page.text for page in cluster.pages} == {whole("p", 100)}


async def test_a_stop_at_the_moment_of_the_end(settings: Any) -> None:
    """Each answer has one end, which is the one that ``produce()`` returns."""

    async def stop(token: str) -> None:
        await asyncio.sleep(1.2)
        await astop_production(token)

    async with Answers(
        "stop and done together", history="postgres", layer=None, tokens=24
    ) as cluster:
        settings.EVENTSOURCE_HISTORY = cluster.settings["EVENTSOURCE_HISTORY"]
        await cluster.listen(cuts=True)
        # Request and end are the closer to each other, the nearer a token is to the middle. No
        # request is sent for the first source, and the last one does not end without it.
        ends = {token: 0.1 * n for n, token in enumerate(cluster.tokens)}
        first, *_, last = ends
        ends[last] = 600
        process = await cluster.start_producer("p", ends, count=5)
        async with asyncio.TaskGroup() as group:
            async for words in cluster.lines(process):
                if words[0] == "last" and words[1] != first:
                    group.create_task(stop(words[1]))
        assert await process.wait() == 0
        await cluster.check_answers(cluster.ends)
        assert (cluster.ends[first], cluster.ends[last]) == (["done"], ["stopped"])
        assert all(found in (["done"], ["stopped"]) for found in cluster.ends.values())
