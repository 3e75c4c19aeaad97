"""Compile the load generator, ``sseload.c``, and run it.

::

    from benchmarks import load

    result = load.run(
        port=8000, listen="/events/poll/t", listeners=500,
        publish="/events/ping/t", events=200, rate=50, pid=[server.pid],
    )
    print(result["cpu_us_per_delivery"])

``sseload.c`` and ``sseload --help`` describe the options and the figures.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

SOURCE = Path(__file__).resolve().parent / "sseload.c"
CACHE = SOURCE.parent / "build"
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra")
COMPILERS = ("cc", "gcc", "clang")

PATIENCE_SECONDS = 30.0
"""What the generator gets above its own timeout, which it may need for a long report."""

TIMEOUT_SECONDS = 60.0
"""The generator's own timeout, unless another one is given."""

Value: TypeAlias = str | int | float | None
Option: TypeAlias = Value | list[Value] | tuple[Value, ...]


class LoadError(Exception):
    """The load generator could not be compiled, or failed."""


class NoCompilerError(LoadError):
    """No C compiler is installed."""


def compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, or the first one that is installed."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise NoCompilerError(f"$CC is {asked[0]!r}, and there is no such program")
        return asked
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise NoCompilerError(
        f"the load generator needs a C compiler, and there is none of {', '.join(COMPILERS)}:"
        " install one (Debian: apt-get install gcc libc6-dev), or say in $CC where it is"
    )


def compile_to(target: Path, *flags: str) -> Path:
    """Compile the source to a file, which other processes see complete or not at all."""
    command = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Before the source is read: a later change makes the compiled file outdated.
    modified = SOURCE.stat().st_mtime_ns
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compiling-") as directory:
        made = Path(directory) / target.name
        done = subprocess.run(
            [*command, *FLAGS, *flags, "-o", str(made), str(SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LoadError(f"{shlex.join(done.args)}:\n{done.stderr or done.stdout}")
        os.utime(made, ns=(modified, modified))
        return made.replace(target)


def build() -> Path:
    """Return the compiled generator; compile it if the source has changed."""
    target = CACHE / "sseload"
    try:
        if target.stat().st_mtime_ns == SOURCE.stat().st_mtime_ns:
            return target
    except FileNotFoundError:
        pass
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return compile_to(target)


def arguments(options: dict[str, Option]) -> list[str]:
    """Return options as command line arguments; ``None`` leaves one out, a list repeats it."""
    given: list[str] = []
    for name, option in options.items():
        values = option if isinstance(option, list | tuple) else [option]
        flag = f"--{name.replace('_', '-')}"
        given += [f"{flag}={value}" for value in values if value is not None]
    return given


def run(**options: Option) -> dict[str, Any]:
    """Run the generator to its end, and return what it measured."""
    command = [str(build()), *arguments(options)]
    seconds = options.get("timeout")
    timeout = float(seconds) if isinstance(seconds, int | float) else TIMEOUT_SECONDS
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout + PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"sseload did not end: {shlex.join(command)}") from error
    if done.returncode != 0:
        raise LoadError(done.stderr.strip() or f"sseload ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
