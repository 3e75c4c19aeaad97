"""The measurements. Each compares figures of the same run; the figures are medians."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from redis import Redis

from benchmarks import contenders, load
from benchmarks.attack import attacking
from benchmarks.contenders import Contender, Running
from benchmarks.stores import valkey

Result = dict[str, Any]

CPU = "cpu_us_per_delivery"
INSTRUCTIONS = "instructions_per_delivery"
"""What the processor counted, with the kernel's; ``None`` on machines that do not count."""

PACED = {"listeners": 1000, "events": 60, "rate": 20}
FLOOD = {"listeners": 500, "events": 500, "publishers": 8}
ATTACKED = {"listeners": 200, "events": 200, "rate": 20}
ATTACKERS = 20
GROWTH = (100, 300, 1000, 3000)
TOKENS = (1, 10, 100, 1000)
PER_SECOND = 10_000
"""Deliveries a second while the number of listeners grows: no server is near its limit."""


def streams(contender: Contender, running: Running, **options: Any) -> Result:
    """Warm a server up, then open streams and publish to them."""
    common: dict[str, Any] = {
        "port": running.port,
        "listen": contender.listen,
        "publish": contender.publish,
        "size": 64,
        "pid": running.pids,
    }
    warm = {**options, "listeners": 200, "events": 10, "rate": 50, "tokens": 1}
    load.run(**common, **warm, idle=0.3)
    if contender is contenders.NAIVE:
        # It takes forty times as long, so a few events are enough.
        options = {**options, "events": min(options["events"], 10), "rate": 1}
    result = load.run(**common, **options, idle=1.0, timeout=120)
    if result["lost"] or result["opened"] != options["listeners"]:
        raise RuntimeError(f"{contender.name} did not deliver everything: {result}")
    return result


def side_by_side(
    some: Iterable[Contender], rounds: int, options: Mapping[str, Any]
) -> dict[str, list[Result]]:
    """Measure the contenders in turn, repeatedly, so that noise affects all of them alike."""
    results: dict[str, list[Result]] = {}
    for _ in range(rounds):
        for contender in some:
            with contenders.run(contender) as running:
                result = streams(contender, running, **options)
            results.setdefault(contender.name, []).append(result)
            print(f"  {contender.name}: {result['cpu_us_per_delivery']:.1f} us", flush=True)
    return results


def median(results: Sequence[Result], *names: str) -> float | None:
    """Return the median of a figure, which may be nested; ``None`` if there is none."""
    figures = [_figure(result, names) for result in results]
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


def between(some: Sequence[Result], others: Sequence[Result], *names: str) -> float | None:
    """Return the ratio of two medians."""
    one, other = median(some, *names), median(others, *names)
    return None if one is None or other is None else one / other


def ratio(
    results: Mapping[str, Sequence[Result]], one: Contender, other: Contender, *names: str
) -> float | None:
    """Return the median of the ratios of each round; ``None`` if one was not measured."""
    if one.name not in results or other.name not in results:
        return None
    pairs = zip(results[one.name], results[other.name], strict=True)
    ratios = []
    for a, b in pairs:
        mine, others = _figure(a, names), _figure(b, names)
        if mine is not None and others:
            ratios.append(mine / others)
    return statistics.median(ratios) if ratios else None


def _figure(result: Result, names: Sequence[str]) -> float | None:
    value: Any = result
    for name in names:
        value = value[name]
    return None if value is None else float(value)


def growth(some: Sequence[Contender], rounds: int) -> dict[str, dict[int, list[Result]]]:
    """Measure increasing numbers of listeners, at the same number of deliveries a second."""
    found: dict[str, dict[int, list[Result]]] = {}
    for listeners in GROWTH:
        rate = PER_SECOND / listeners
        options = {"listeners": listeners, "events": max(int(rate * 4), 12), "rate": rate}
        print(f" {listeners} listeners", flush=True)
        for name, results in side_by_side(some, rounds, options).items():
            found.setdefault(name, {})[listeners] = results
    return found


def tokens(contender: Contender) -> dict[int, Result]:
    """Measure a thousand listeners of one token, and of many."""
    found = {}
    for count in TOKENS:
        rate = PER_SECOND / 1000 * count
        options = {"listeners": 1000, "tokens": count, "events": int(rate * 4), "rate": rate}
        if rate > 200:
            options |= {"rate": 200, "events": 1000}
        with contenders.run(contender) as running:
            found[count] = streams(contender, running, **options)
        print(f"  {count} tokens: {found[count]['cpu_us_per_delivery']:.1f} us", flush=True)
    return found


def opening(rounds: int) -> dict[str, list[Result]]:
    """Open streams, and request a bare async view as often, with Django's default middleware."""
    ours = Contender(
        name="a stream",
        application=contenders.HANDED_OVER.application,
        listen="/events/poll/t",
        publish="",
    )
    bare = Contender(
        name="a bare async view", application=ours.application, listen="/bare", publish=""
    )
    found: dict[str, list[Result]] = {}
    for _ in range(rounds):
        for contender in (ours, bare):
            with contenders.run(contender) as running:
                common = {"port": running.port, "listen": contender.listen, "pid": running.pids}
                load.run(**common, listeners=200, idle=0.2)
                result = load.run(**common, listeners=600, idle=0.2)
            found.setdefault(contender.name, []).append(result)
            print(f"  {contender.name}: {result['open_cpu_us']:.0f} us", flush=True)
    return found


def attacked(contender: Contender, rounds: int) -> dict[str, list[Result]]:
    """Measure streams while connections log in with invented users, and without them.

    No login is throttled, as if each came from an address of its own.
    """
    found: dict[str, list[Result]] = {"no attack": [], "under attack": []}
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            "BENCH_DATABASE": f"{directory}/users.sqlite3",
            "BENCH_LOGIN_RATE": "none",
        }
        contenders.migrate(**environment)
        for _ in range(rounds):
            with contenders.run(contender, **environment) as running:
                found["no attack"].append(streams(contender, running, **ATTACKED))
                with attacking(running.port, "/closed/poll/t", ATTACKERS) as answers:
                    result = streams(contender, running, **ATTACKED)
            if set(answers) != {401}:
                raise RuntimeError(f"The attack was not answered 401: {dict(answers)}.")
            found["under attack"].append(result)
            for name, results in found.items():
                print(f"  {name}: p99 {results[-1]['latency_ms']['p99']:.1f} ms", flush=True)
    return found


def broker(contender: Contender) -> dict[int, float]:
    """Count the requests to Redis of one publish: append scripts and messages, by listeners."""
    found = {}
    with tempfile.TemporaryDirectory() as directory, valkey(directory) as url:
        redis = {"BENCH_HISTORY": "redis", "BENCH_LAYER": "redis", "BENCH_REDIS": url}
        for listeners in (1, GROWTH[-1]):
            asked = []
            with contenders.run(contender, **redis) as running:
                # The same time with one event, to subtract the requests that are not for events.
                for events, stay in ((1, 6.0), (31, 0.0)):
                    before = _redis_counts(url)
                    load.run(
                        port=running.port,
                        listen=contender.listen,
                        publish=contender.publish,
                        listeners=listeners,
                        events=events,
                        rate=5,
                        stay=stay,
                        timeout=120,
                    )
                    asked.append(_redis_counts(url) - before)
            found[listeners] = (asked[1] - asked[0]) / 30
            print(f"  {listeners} listeners: {found[listeners]:.2f} a publish", flush=True)
    return found


def _redis_counts(url: str) -> int:
    """Return how many append scripts ran, and how many messages were sent."""
    with closing(Redis.from_url(url)) as client:
        stats: Any = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("xadd", "publish"))
