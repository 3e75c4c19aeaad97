"""The environment of a scenario with productions: pages show them, and are loaded again."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections
from django.utils.module_loading import import_string

from django_eventsource.history import History
from django_eventsource.operations.productions import unended
from tests.faults.checker import Block, Truth, check, describe, parse
from tests.faults.cluster import LINES, QUIET_SECONDS, SEED, Away, Cluster, Failure, tail
from tests.support.histories import before_oldest

ENDS = ("done", "failed", "stopped", "interrupted")


class Page(Away):
    """A page that shows a production. It loses its connection and is loaded again at random."""

    cut_bytes = 3000

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.path += "?rewind=all"
        self.loads: list[list[bytes]] = []
        """The blocks of each load before the last one."""
        self.settles = False
        """Whether the page is not cut or loaded again any more."""
        self.text = ""
        self.end = ""
        self.deltas = 0
        """The number of deltas in all loads."""
        self.resets = 0

    async def _listen(self) -> None:
        if self.connections and not self.settles and self.chance.random() < 0.3:
            self.loads.append(self.blocks)
            self.blocks = []
            self.last_event_id = None
            self.text = self.end = ""
        await super()._listen()

    def _take(self, blocks: list[bytes]) -> None:
        super()._take(blocks)
        for block in map(parse, blocks):
            self.apply(block)

    def apply(self, block: Block) -> None:
        """Do what the script of the documentation does."""
        if block.event == "delta":
            self.deltas += 1
            self.text = (self.text if not self.end else "") + str(block.data)
            self.end = ""
        elif block.event == "reset":
            self.resets += 1
        elif block.event in ENDS:
            self.end = block.event
            if block.event == "done" and block.data:
                self.text = block.data


class Answers(Cluster):
    """Three servers, processes that produce, and pages. The parameters are those of Cluster."""

    listener_class = Page

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        setting = self.settings["EVENTSOURCE_HISTORY"]
        self.history: History = import_string(setting["BACKEND"])(**setting["OPTIONS"])
        self.lost: dict[str, dict[int, Block]] = {token: {} for token in self.tokens}
        """The events that the history has lost."""
        self.ends: dict[str, list[str]] = {token: [] for token in self.tokens}
        """The ends that ``produce()`` has returned."""

    async def _close(self) -> None:
        await super()._close()
        # Those of the thread in which this process reads the history.
        await sync_to_async(connections.close_all)()

    @property
    def pages(self) -> list[Page]:
        """The pages of all tokens."""
        return [page for page in self.listeners if isinstance(page, Page)]

    async def start_producer(
        self, name: str, tokens: dict[str, float], *, pause: bool = False, **plan: Any
    ) -> asyncio.subprocess.Process:
        """Start a process that produces; its plan is that of :mod:`tests.faults.producer`."""
        plan = {"count": 100, "pace": 0.01, **plan}
        plan |= {"seed": SEED, "name": name, "tokens": tokens, "pause": pause}
        return await self.start_process("tests.faults.producer", plan)

    async def lines(self, process: asyncio.subprocess.Process) -> Any:
        """Yield the words of each line of a process, and record the ends."""
        assert process.stdout is not None
        async for raw in process.stdout:
            words = raw.decode().split()
            if words[0] == "end":
                self.ends[words[1]].append(words[2])
            yield words

    async def wait_for_end(self, process: asyncio.subprocess.Process) -> None:
        """Wait until all productions of a process have ended."""
        async for _ in self.lines(process):
            pass
        if status := await process.wait():
            raise Failure(f"A producer ended with {status}:\n{tail(self.stderr)}")

    def stored(self, token: str) -> dict[int, Block]:
        """Return the events of a token by their sequence numbers."""
        found = {}
        after = before_oldest(self.history, token)
        while entries := self.history.read(token, after).entries:
            for entry in entries:
                draft = entry.draft
                found[entry.seq] = Block(str(entry.seq), draft.action, draft.data.decode())
            after = entries[-1].seq
        return found

    async def settle(self) -> None:
        """Wait until each page has received the newest event."""
        newest = {token: max(await self.history.call(self.stored, token)) for token in self.tokens}
        for page in self.pages:
            page.settles, page.cuts = True, False
        await self.wait_for_pages(lambda page: page.place >= newest[page.token])

    async def wait_for_pages(self, condition: Any) -> None:
        """Wait until all pages fulfil a condition."""
        while not all(map(condition, self.pages)):
            self._see_tasks()
            await asyncio.sleep(0.01)

    async def check_answers(self, expected: dict[str, list[str]], *, resets: bool = False) -> None:
        """Compare what each page has received and shows with the history.

        :param expected: the ends of each token, in their order.
        :param resets: whether each page has to receive a reset. A page that reconnects at the
            moment of the fault may receive two. If false, no page may receive one.
        """
        await self.settle()
        await asyncio.sleep(QUIET_SECONDS)
        history = {token: await self.history.call(self.stored, token) for token in self.tokens}
        problems = []
        for token, events in history.items():
            actions = [block.event for block in events.values() if block.event in ENDS]
            if actions != expected[token]:
                problems.append(f"the ends of {token!r} are {actions}, not {expected[token]}")
        if left := await self.history.call(unended, self.history):
            problems.append(f"the history contains productions without an end: {left}")
        sums: Counter[str] = Counter()
        for page in self.pages:
            events = {**self.lost[page.token], **history[page.token]}
            truth = Truth({seq: _text(block) for seq, block in events.items()})
            for blocks in [*page.loads, page.blocks]:
                parsed = [block for block in map(parse, blocks) if block.id is not None]
                if not parsed:
                    continue  # cut before the first cursor
                found = check(
                    truth, map(_named, map(parse, blocks)), max(events) * (blocks is page.blocks)
                )
                sums["missed"] += len(found.missed)
                sums["duplicated"] += len(found.duplicated)
                sums["out of order"] += len(found.disordered)
                sums["unreported gaps"] += found.gaps
                if not found.clean:
                    problems.append(describe("a page", page.token, truth, found))
            shown = _shown(history[page.token])
            if (page.text, page.end) != shown:
                wrong, right = ((end, text[-60:]) for text, end in ((page.text, page.end), shown))
                problems.append(f"a page of {page.token!r} shows {wrong}, not {right}")
            if bool(page.resets) != resets:
                problems.append(f"a page of {page.token!r} received {page.resets} resets")
            if page.refusals:
                problems.append(f"a page was refused: {page.refusals[:2]}")
        if problems:
            raise Failure("\n".join([self.name, *problems[:30], self._logs()]))
        LINES.append(
            {
                "scenario": self.name,
                "seed": SEED,
                "listeners": len(self.pages),
                "events": sum(map(len, [*history.values(), *self.lost.values()])),
                "connections": sum(page.connections for page in self.pages),
                "resets": sum(page.resets for page in self.pages),
                **{
                    key: sums[key]
                    for key in ("missed", "duplicated", "out of order", "unreported gaps")
                },
                "seconds": round(time.monotonic() - self.began, 1),
            }
        )


def _text(block: Block) -> str:
    # The ends of two productions of a token may have the same data.
    return f"{block.id} {block.event} {block.data}"


def _named(block: Block) -> Block:
    if block.event == "reset" or block.data is None:
        return block
    return Block(block.id, block.event, _text(block))


def _shown(events: dict[int, Block]) -> tuple[str, str]:
    """Return the text and the end that a page of a token has to show."""
    page = Page([("", 0)], "", random.Random(0))
    for block in events.values():
        page.apply(block)
    return page.text, page.end
