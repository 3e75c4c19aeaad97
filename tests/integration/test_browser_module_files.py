"""Tests of the size and of the types of the browser module, with esbuild and TypeScript."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

import django_eventsource
from tests.support.examples import EXAMPLES, npm_packages
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

__all__ = ["npm_packages"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("npm_packages")]

STATIC = Path(django_eventsource.__file__).parent / "static" / "eventsource"
PROGRAM = """\
import { connect, type EventStream, type State } from "./eventsource.js";

const states: State[] = [];
const stream: EventStream = connect(new URL("https://example.com/events/poll/news"), {
  share: true,
  pauseHidden: true,
  renew: "/renew/news",
  withCredentials: false,
  onState: (state, status) => states.push(status === 401 ? "closed" : state),
});
const show = (event: MessageEvent<string>): string => event.data.trim() + event.lastEventId;
connect("/events/poll/news", { share: "user 7" });
stream.addEventListener("ping", show, { once: true });
stream.addEventListener("ping", { handleEvent: show });
stream.removeEventListener("ping", show);
const cursor: string = stream.cursor;
if (stream.state === "open" && stream.status === 200 && cursor) stream.close();
"""
MISTAKES = [
    "connect();",
    "connect('/', { shared: true });",
    "connect('/', { share: 7 });",
    "stream.state = 'open';",
    "stream.state === 'opened';",
    "stream.addEventListener('ping', (event: MouseEvent) => event.x);",
]


def run(program: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(EXAMPLES / "node_modules" / ".bin" / program), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_SECONDS,
    )


def test_the_module_has_less_than_four_kilobytes_minified_and_compressed() -> None:
    done = run("esbuild", "eventsource.js", "--minify", "--format=esm", directory=STATIC)
    assert done.returncode == 0, done.stderr
    assert "connect" in done.stdout
    assert len(gzip.compress(done.stdout.encode(), 9)) < 4000


def test_the_types_accept_every_use_and_no_mistake(tmp_path: Path) -> None:
    shutil.copy(STATIC / "eventsource.d.ts", tmp_path)
    (tmp_path / "program.ts").write_text(PROGRAM + "\n".join(MISTAKES))
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "es2022"]
    done = run("tsc", *options, "--moduleResolution", "bundler", "program.ts", directory=tmp_path)
    first = PROGRAM.count("\n") + 1
    lines = [
        line.partition("(")[2].partition(",")[0]
        for line in done.stdout.splitlines()
        if line.startswith("program")
    ]
    assert lines == [str(first + number) for number in range(len(MISTAKES))], done.stdout
