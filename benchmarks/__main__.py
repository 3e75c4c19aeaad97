"""``python -m benchmarks``: measure everything, and write ``docs/explanation/performance.rst``.

It takes 20 minutes. Run nothing else on the machine meanwhile: a loop of constant work runs
before and after each section, and the page names the sections during which the machine was busy.
``--rounds`` is the number of times that each comparison is made. The page shows medians, and
ratios of figures of the same round. ``--only`` names sections, and does not write the page.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django

from benchmarks import (
    calibration,
    counts,
    latency,
    measure,
    posting,
    publishing,
    replay,
    report,
    stores,
)
from benchmarks import contenders as who
from benchmarks.measure import CPU, FLOOD, INSTRUCTIONS, PACED, between, median, ratio
from benchmarks.report import number, table

RAW = Path(__file__).resolve().parent / "build" / "results.json"
ALL = (
    *(who.NCHAN, who.BARE, who.HANDED_OVER, who.SEND, who.INSIDE),
    *(who.BARE_UVLOOP, who.HANDED_OVER_UVLOOP, who.UNFROZEN_UVLOOP),
    *(who.BARE_DAPHNE, who.DAPHNE),
    *(who.SSE_STARLETTE, who.EVENTSTREAM, who.NAIVE),
)


def present(*some: who.Contender) -> list[who.Contender]:
    """Return the contenders that can be measured here, and print the others."""
    for one in some:
        if one.missing:
            print(f"  {one.name}: left out: {one.missing}")
    return [one for one in some if not one.missing]


def paced(rounds: int) -> dict[str, Any]:
    """Measure a thousand listeners of one token, 20 events a second."""
    return measure.side_by_side(present(*ALL), rounds, PACED)


def flood(rounds: int) -> dict[str, Any]:
    """Measure eight publishers that publish as fast as the server responds."""
    some = present(who.NCHAN, who.BARE, who.HANDED_OVER, who.INSIDE, who.EVENTSTREAM)
    return measure.side_by_side(some, rounds, FLOOD)


def growth(rounds: int) -> dict[str, Any]:
    """Measure increasing numbers of listeners."""
    return measure.growth(present(who.BARE, who.HANDED_OVER), max(1, rounds // 2))


def tokens(rounds: int) -> dict[int, Any]:
    """Measure increasing numbers of tokens."""
    return measure.tokens(who.HANDED_OVER)


def attacked(rounds: int) -> dict[str, Any]:
    """Measure streams under an attack on HTTP Basic."""
    return measure.attacked(who.HANDED_OVER, rounds)


def broker(rounds: int) -> dict[int, float]:
    """Count the requests to Redis of one publish."""
    return measure.broker(who.HANDED_OVER)


def histories(rounds: int) -> dict[str, Any]:
    """Measure the operations of each history."""
    found = {}
    for name in stores.NAMES:
        found[name] = stores.in_process("stores", name)
        print(f"  {name}: {found[name]['many_per_second']:,.0f} events/s", flush=True)
    return found


def publish(rounds: int) -> dict[str, Any]:
    """Measure what publishing costs, against the least that the same store can do."""
    found = {}
    for name in publishing.NAMES:
        found[name] = stores.in_process("publishing", name, rounds * 4)
        print(f"  {name}: {found[name]['publish_ratio']:.2f}", flush=True)
    return found


def post(rounds: int) -> dict[str, Any]:
    """Measure the CPU time of a POST, against other async views."""
    return posting.measure(rounds)


def replayed(rounds: int) -> dict[str, Any]:
    """Measure a replay, against fetching the same rows with the driver."""
    found = {}
    for name in replay.NAMES:
        found[name] = stores.in_process("replay", name, rounds * 2)
        print(f"  {name}: {found[name]['ratio']:.2f}", flush=True)
    return found


def wake_up(rounds: int) -> dict[str, Any]:
    """Measure the latency of an event of another process, without a shared layer."""
    found = {}
    for name in latency.NAMES:
        found[name] = stores.in_process("latency", name, max(1, rounds // 2))
        print(f"  {name}: p50 {found[name]['on']['p50']:.1f} ms", flush=True)
    return found


def count(rounds: int) -> dict[str, Any]:
    """Count the statements and the round trips of publishing and of an idle history check."""
    return {name: stores.in_process("counts", name) for name in counts.installed()}


SECTIONS: dict[str, Callable[[int], Any]] = {
    "paced": paced,
    "flood": flood,
    "opening": measure.opening,
    "growth": growth,
    "tokens": tokens,
    "attacked": attacked,
    "broker": broker,
    "histories": histories,
    "publish": publish,
    "post": post,
    "replay": replayed,
    "wake-up": wake_up,
    "count": count,
}


def goals(found: dict[str, Any]) -> str:
    """Return a table of the main ratios and their goals."""
    paced, flood, opening = found["paced"], found["flood"], found["opening"]
    ours, bare = who.HANDED_OVER, who.BARE
    grown, bare_grown = found["growth"][ours.name], found["growth"][bare.name]
    uvloop = who.HANDED_OVER_UVLOOP
    stream, view = opening.values()

    def both(results: Any, one: who.Contender, other: who.Contender) -> tuple[float | None, ...]:
        return tuple(ratio(results, one, other, figure) for figure in (CPU, INSTRUCTIONS))

    rows: list[tuple[str, tuple[float | None, ...], float]] = [
        ("CPU per delivery, against bare ASGI, uvicorn", both(paced, ours, bare), 0.45),
        (
            "CPU per delivery, against bare ASGI, uvicorn with uvloop",
            both(paced, uvloop, who.BARE_UVLOOP),
            0.55,
        ),
        ("CPU per delivery, against nchan, uvicorn", both(paced, ours, who.NCHAN), 1.0),
        (
            "CPU per delivery, against nchan, uvicorn with uvloop",
            both(paced, uvloop, who.NCHAN),
            1.0,
        ),
        (
            "CPU per delivery with ``send`` only, against bare ASGI (Python 3.12 and newer)",
            both(paced, who.SEND, bare),
            0.85,
        ),
        (
            "CPU per delivery, against bare ASGI, daphne",
            both(paced, who.DAPHNE, who.BARE_DAPHNE),
            1.05,
        ),
        ("CPU per delivery in a flood, against nchan", both(flood, ours, who.NCHAN), 0.4),
        (
            "CPU per delivery without ``Handover``, against django-eventstream",
            both(paced, who.INSIDE, who.EVENTSTREAM),
            0.35,
        ),
        (
            "memory per idle stream, against bare ASGI",
            (ratio(paced, ours, bare, "rss_per_stream_kib"), None),
            1.1,
        ),
        (
            "opening a stream, against a bare async view",
            tuple(
                between(stream, view, figure) for figure in ("open_cpu_us", "open_instructions")
            ),
            1.15,
        ),
        (
            "latency p99, against bare ASGI, uvicorn",
            (ratio(paced, ours, bare, "latency_ms", "p99"), None),
            1.0,
        ),
        (
            "latency p99, against bare ASGI, uvicorn with uvloop",
            (ratio(paced, uvloop, who.BARE_UVLOOP, "latency_ms", "p99"), None),
            1.0,
        ),
        (
            "latency p99, against bare ASGI, 3,000 listeners",
            (between(grown[3000], bare_grown[3000], "latency_ms", "p99"), None),
            1.1,
        ),
        (
            "CPU per delivery, 3,000 listeners against 100",
            tuple(between(grown[3000], grown[100], figure) for figure in (CPU, INSTRUCTIONS)),
            1.2,
        ),
    ]
    one, many = found["broker"].values()
    rows.append(
        ("round trips to Redis of a publish, 3,000 listeners against 1", (many / one, None), 1.0)
    )
    return table(
        ("Ratio", "Measured", "in instructions", "Goal"),
        [
            (what, number(value, 2), number(counted, 2), f"{most:.2f}")
            for what, (value, counted), most in rows
        ],
        "52 16 16 16",
    )


def store_goals(found: dict[str, Any]) -> str:
    """Return a table of the ratios to the bare store, the counted requests, and their goals."""
    rows = [
        *publishing.rows(found["publish"]),
        *posting.rows(found["post"]),
        *latency.rows(found["wake-up"]),
        *replay.rows(found["replay"]),
    ]
    return table(
        ("Ratio or number", "Measured", "Goal"),
        [
            *((what, number(value, 2), goal) for what, value, goal in rows),
            *(
                (what, number(value, 0), f"at most {most}")
                for what, value, most in counts.rows(found["count"])
            ),
        ],
        "60 20 20",
    )


def figures(found: dict[str, Any], rounds: int) -> str:
    """Return all tables and the places of the plots."""
    cpu = CPU
    parts = [
        f"Measured with Python {platform.python_version()} and Django {django.__version__} on "
        f"{platform.system()}, {rounds} round{'' if rounds == 1 else 's'}.\n",
        calibration.warning(found["calibration"]) + "\n",
        goals(found),
        _title(f"{PACED['listeners']:,} listeners of one token, {PACED['rate']} events a second"),
        table(
            (
                *("Server", "CPU per delivery, µs", "instructions", "memory per stream, KiB"),
                *("threads", "latency p50, ms", "p99, ms"),
            ),
            [
                (
                    name,
                    number(median(results, cpu)),
                    number(median(results, INSTRUCTIONS), 0),
                    number(median(results, "rss_per_stream_kib")),
                    number(median(results, "threads_after"), 0),
                    number(median(results, "latency_ms", "p50")),
                    number(median(results, "latency_ms", "p99")),
                )
                for name, results in found["paced"].items()
            ],
            "28 12 12 12 12 12 12",
        ),
        _image("paced"),
        _title(f"A flood: {FLOOD['listeners']} listeners, {FLOOD['publishers']} publishers"),
        table(
            (
                *("Server", "CPU per delivery, µs", "instructions"),
                *("deliveries a second", "latency p50, ms"),
            ),
            [
                (
                    name,
                    number(median(results, cpu)),
                    number(median(results, INSTRUCTIONS), 0),
                    number(median(results, "deliveries_per_second"), 0),
                    number(median(results, "latency_ms", "p50")),
                )
                for name, results in found["flood"].items()
            ],
            "32 17 17 17 17",
        ),
        _title("Growth"),
        "At 10,000 deliveries a second, whatever the number of listeners:\n",
        table(
            ("Listeners", *(f"{name}: CPU, µs; memory, KiB" for name in found["growth"])),
            [
                (
                    f"{count:,}",
                    *(
                        f"{number(median(by_count[count], cpu))}; "
                        f"{number(median(by_count[count], 'rss_per_stream_kib'))}"
                        for by_count in found["growth"].values()
                    ),
                )
                for count in measure.GROWTH
            ],
            "20 40 40",
        ),
        _image("growth"),
        "1,000 listeners of one token, or of many:\n",
        table(
            ("Tokens", "CPU per delivery, µs", "latency p99, ms", "publish p50, ms", "p99, ms"),
            [
                (
                    f"{count:,}",
                    number(result[cpu]),
                    number(result["latency_ms"]["p99"]),
                    number(result["publish_latency_ms"]["p50"]),
                    number(result["publish_latency_ms"]["p99"]),
                )
                for count, result in found["tokens"].items()
            ],
            "20 20 20 20 20",
        ),
        _title("Under attack"),
        f"{measure.ATTACKED['listeners']} listeners of one token, {measure.ATTACKED['rate']} "
        f"events a second, and {measure.ATTACKERS} connections that log in with invented users "
        "by HTTP Basic, each from an address of its own as far as the throttle can tell:\n",
        table(
            ("", "latency p50, ms", "p99, ms"),
            [
                (
                    name,
                    number(median(results, "latency_ms", "p50")),
                    number(median(results, "latency_ms", "p99")),
                )
                for name, results in found["attacked"].items()
            ],
            "40 30 30",
        ),
        _title("Histories"),
        table(
            (
                *("History", "``publish_many()``, events/s", "``publish()``, events/s"),
                *(
                    "replay, events/s",
                    "1,000 listeners reconnect: reads",
                    "heads of 10,000 tokens, ms",
                ),
            ),
            [
                (
                    name,
                    number(result["many_per_second"], 0),
                    number(result["single_per_second"], 0),
                    number(result["replayed_per_second"], 0),
                    number(result["reads"], 0),
                    number(result["heads_ms"], 0),
                )
                for name, result in found["histories"].items()
            ],
            "15 17 17 17 17 17",
        ),
        _title("Publishing and reading, against the bare store"),
        store_goals(found),
        "Calls a second in one process without streams. The inserted row is small, with two "
        "indexes, or like that of an event. On Redis the insert is a script with XADD:\n",
        table(
            (
                *("Store", "an insert", "of a row like an event", "``publish()``"),
                *("insert in ``atomic()``", "the same and ``publish()``"),
            ),
            [
                (
                    name,
                    *(number(result["per_second"].get(work), 0) for work in publishing.WORKS),
                )
                for name, result in found["publish"].items()
            ],
            "15 17 17 17 17 17",
        ),
    ]
    return "\n".join(parts)


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"


def _image(name: str) -> str:
    return f".. image:: performance/{name}.png\n   :alt: {name}\n"


def draw(found: dict[str, Any]) -> None:
    """Draw the plots."""
    cpu = CPU
    report.bars(
        "paced",
        "CPU per delivery: 1,000 listeners, 20 events a second",
        {name: median(results, cpu) or 0.0 for name, results in found["paced"].items()},
        across="microseconds",
    )
    report.plot(
        "growth",
        "CPU per delivery at 10,000 deliveries a second",
        {
            name: {count: median(results, cpu) or 0.0 for count, results in by_count.items()}
            for name, by_count in found["growth"].items()
        },
        across="listeners of one token",
        up="microseconds",
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of times that each comparison is made (5)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        help="measure these sections only, and do not write the page",
    )
    options = parser.parse_args()
    # So that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 65_536), hard), hard))
    found: dict[str, Any] = {"calibration": {}}
    for name in options.only or SECTIONS:
        print(name, flush=True)
        with calibration.calibrated(found["calibration"], name):
            found[name] = SECTIONS[name](options.rounds)
    if busy := calibration.warning(found["calibration"]):
        print(busy)
    if options.only:
        json.dump(found, sys.stdout, indent=1)
        return
    RAW.write_text(json.dumps(found, indent=1))
    draw(found)
    report.write(figures(found, options.rounds))
    print(f"{report.PAGE} was written.")


if __name__ == "__main__":
    main()
