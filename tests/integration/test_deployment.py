"""Tests of the server commands of the deployment page, as printed: a shutdown ends all streams."""

from __future__ import annotations

import asyncio
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.listeners import HTTP11, Connection, reconnection_ms
from tests.support.pages import block_of, blocks
from tests.support.processes import environment
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

OPEN = {"EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny"}
STREAMS = 20
SECONDS = 8
"""Seconds for a shutdown, on a busy machine too: less than any server waits for open responses."""
MAX_REQUESTS = 30
DEPLOYMENT = "docs/howto/deploy.rst"
COMMANDS = [
    line
    for block in blocks(DEPLOYMENT, "sh")
    for line in block.splitlines()
    if line.endswith("mysite.asgi:application")
]
RECYCLING = [line for line in COMMANDS if "max-requests" in line]


DJANGOS_ASGI = """
import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")

application = get_asgi_application()
"""
"""The code that ``startproject`` writes into ``asgi.py``."""


class Command:
    """A server that runs a command of the page on a free port.

    :param line: the command. The port and the number of requests are replaced.
    :param directory: the project's directory, in which the command runs.
    """

    def __init__(self, line: str, directory: Path) -> None:
        self.address = ("127.0.0.1", free_port())
        line = line.replace("8000", str(self.address[1]))
        name, *options = shlex.split(line.replace(" 1000 ", f" {MAX_REQUESTS} "))
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                [Path(sys.executable).with_name(name), *options],
                cwd=directory,
                env=environment(**OPEN),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def processes(self) -> list[psutil.Process]:
        """Return a process and those that it started."""
        return [self.process, *self.process.children(recursive=True)]

    @property
    def workers(self) -> list[psutil.Process]:
        """Return the processes that have open connections."""
        return [
            process
            for process in self.processes
            if any(
                one.status == psutil.CONN_ESTABLISHED and one.laddr.port == self.address[1]
                for one in process.net_connections("tcp")
            )
        ]

    async def ready(self) -> None:
        """Wait until the server responds."""
        _, writer = await self.accepted()
        writer.transport.abort()
        await self.request()

    async def accepted(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection, as soon as the server accepts it."""
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            while True:
                try:
                    return await asyncio.open_connection(*self.address)
                except OSError:
                    assert self.process.poll() is None, self.log.read_text()
                    await asyncio.sleep(0.05)

    async def request(self) -> None:
        """Send a request that is no stream and read the response."""
        connection = await Connection.open(self.address, "/nowhere")
        assert connection.status == 404
        while await connection.read():
            pass
        connection.close()

    def kill(self) -> None:
        """Kill the processes that still run."""
        if self.process.poll() is None:
            for process in reversed(self.processes):
                process.kill()
            self.process.wait(PROCESS_PATIENCE_SECONDS)


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The directory of a project with the page's ``mysite/asgi.py``."""
    (tmp_path / "mysite").mkdir()
    wrapped = block_of(DEPLOYMENT, "mysite/asgi.py")
    (tmp_path / "mysite" / "asgi.py").write_text(f"{DJANGOS_ASGI}\n\n{wrapped}\n")
    return tmp_path


@asynccontextmanager
async def running(line: str, project: Path) -> AsyncIterator[tuple[Command, list[HTTP11]]]:
    """Run a command and open streams."""
    command = Command(line, project)
    try:
        await command.ready()
        yield command, await open_streams(command)
    finally:
        command.kill()


async def open_streams(command: Command) -> list[HTTP11]:
    """Open streams, over HTTP/1.1."""
    paths = (f"/events/poll/{n}" for n in range(STREAMS))
    return await asyncio.gather(*(HTTP11.open(command.address, path) for path in paths))


async def end_of(stream: HTTP11) -> int:
    """Read a stream to the end of its body; return the reconnection time of its last line."""
    try:
        return reconnection_ms(await stream.rest())
    finally:
        stream.close()


async def check_ends(streams: list[HTTP11]) -> None:
    """Check that every stream ends with a complete body and a reconnection time."""
    found = await asyncio.gather(*map(end_of, streams), return_exceptions=True)
    assert [one for one in found if isinstance(one, BaseException)] == []
    assert all(500 <= one <= 5000 for one in found if isinstance(one, int))


async def check_sigterm(command: Command, line: str, streams: list[HTTP11]) -> None:
    """Send SIGTERM, check that all streams and the server end in time."""
    began = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(command.process.wait, PROCESS_PATIENCE_SECONDS)
    seconds = time.monotonic() - began
    await check_ends(streams)
    assert status == status_after(line), command.log.read_text()
    assert seconds < SECONDS
    print(f"{line}: {len(streams)} ends after SIGTERM, exit status {status}, {seconds:.1f} s")


def status_after(line: str) -> int:
    """Return the exit status after SIGTERM, which uvicorn sends to itself again."""
    return -signal.SIGTERM if line.startswith("uvicorn") and "--workers" not in line else 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in RECYCLING])
async def test_sigterm_ends_every_stream_of_a_documented_command(line: str, project: Path) -> None:
    """Each body is complete, its last line is ``retry:``, and the server exits."""
    async with running(line, project) as (command, streams):
        await check_sigterm(command, line, streams)
        assert "Traceback" not in command.log.read_text()


@pytest.mark.parametrize("line", RECYCLING)
async def test_recycling_a_worker_ends_every_stream(line: str, project: Path) -> None:
    """Each body is complete, its last line is ``retry:``, and the worker exits with 0.

    Then the same is true of the new worker and SIGTERM.
    """
    async with running(line, project) as (command, streams):
        (worker,) = command.workers
        requests = asyncio.create_task(request_often(command))
        await check_ends(streams)
        began = time.monotonic()
        await asyncio.to_thread(psutil.wait_procs, [worker], PROCESS_PATIENCE_SECONDS)
        seconds = time.monotonic() - began
        requests.cancel()
        await asyncio.wait([requests])
        assert not worker.is_running()
        assert seconds < SECONDS
        # gunicorn's log reports any other exit status of a worker, and hypercorn exits with it.
        assert "exited with code" not in command.log.read_text()
        assert "was sent SIG" not in command.log.read_text()
        print(f"{line}: {STREAMS} ends, the worker exits after {seconds:.1f} s")
        if worker.pid == command.process.pid:
            assert command.process.wait() == 0
        else:
            await check_sigterm(command, line, await open_streams(command))
        assert "Traceback" not in command.log.read_text()


async def request_often(command: Command) -> None:
    """Send as many requests as a worker accepts."""
    for _ in range(MAX_REQUESTS):
        await command.request()


async def test_a_wsgi_worker_logs_which_command_serves_the_application(project: Path) -> None:
    """gunicorn's default worker calls the application as WSGI, and responds 500."""
    command = Command("gunicorn --bind 127.0.0.1:8000 mysite.asgi", project)
    try:
        # On Python 3.14, the head of gunicorn 27.0.1's own error responses has no end: its text
        # goes through `textwrap.dedent()`, which removes the carriage return of the empty line.
        reader, writer = await command.accepted()
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(PROCESS_PATIENCE_SECONDS):
            assert (await reader.readline()).split()[1] == b"500"
        writer.transport.abort()
    finally:
        command.kill()
    log = command.log.read_text()
    assert "called as a WSGI application" in log
    assert "`gunicorn -k asgi mysite.asgi:application`" in log
