"""The servers that are compared, each in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
DJANGO = {"DJANGO_SETTINGS_MODULE": "benchmarks.settings", "PYTHONPATH": str(ROOT)}
NCHAN_MODULES = (
    "/usr/lib/nginx/modules/ngx_nchan_module.so",
    "/usr/lib64/nginx/modules/ngx_nchan_module.so",
)
NGINX = """
load_module {module};
daemon off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 16384; }}
http {{
  access_log off; keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /listen {{ nchan_subscriber eventsource; nchan_channel_id t;
                          nchan_subscriber_first_message newest; }}
    location = /publish {{ nchan_publisher; nchan_channel_id t;
                           nchan_message_buffer_length 10000; }}
  }}
}}
"""


H11 = ("--loop", "asyncio", "--http", "h11")
UVLOOP = ("--loop", "uvloop", "--http", "httptools")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to serve streams."""

    name: str
    application: str
    """The ASGI application, ``module:name``; empty for nginx."""
    listen: str
    publish: str
    server: str = "uvicorn"
    flavour: tuple[str, ...] = H11
    """The options of uvicorn that choose its event loop and its HTTP parser."""
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """The packages without which it cannot run."""

    @property
    def missing(self) -> str:
        """The reason why it cannot be measured here; empty if it can."""
        if self.server == "nginx":
            return "" if _nchan() else "nginx with nchan is not installed"
        absent = [name for name in (self.server, *self.needs) if find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else ""


OURS = {"listen": "/events/poll/t%d", "publish": "/events/ping/t%d"}
PLAIN = {"BENCH_MIDDLEWARE": "none"}

BARE = Contender(
    name="bare ASGI", application="benchmarks.bare:application", listen="/", publish="/"
)
HANDED_OVER = Contender(
    name="django-eventsource",
    application="benchmarks.applications:handed_over",
    environment=PLAIN,
    **OURS,
)
SEND = Contender(
    name="django-eventsource, send only",
    application=HANDED_OVER.application,
    environment={**PLAIN, "BENCH_WRITE_TO_TRANSPORT": "no"},
    **OURS,
)
BARE_UVLOOP = replace(
    BARE, name="bare ASGI, uvloop", flavour=UVLOOP, needs=("uvloop", "httptools")
)
HANDED_OVER_UVLOOP = replace(
    HANDED_OVER,
    name="django-eventsource, uvloop",
    flavour=UVLOOP,
    needs=("uvloop", "httptools"),
)
UNFROZEN_UVLOOP = replace(
    HANDED_OVER_UVLOOP,
    name="django-eventsource, uvloop, without gc.freeze()",
    environment={**PLAIN, "BENCH_FREEZE": "no"},
)
INSIDE = Contender(
    name="django-eventsource, without Handover",
    application="benchmarks.applications:inside",
    environment=PLAIN,
    **OURS,
)
NAIVE = Contender(
    name="a channel for each connection",
    application="benchmarks.applications:inside",
    listen="/naive",
    publish="/naive",
    environment=PLAIN,
)
EVENTSTREAM = Contender(
    name="django-eventstream",
    application="benchmarks.applications:inside",
    listen="/eventstream/",
    publish="/eventstream/send",
    environment={**PLAIN, "BENCH_PEER": "django_eventstream"},
    needs=("django_eventstream",),
)
SSE_STARLETTE = Contender(
    name="sse-starlette",
    application="benchmarks.sse_starlette_app:application",
    listen="/x",
    publish="/x",
    needs=("sse_starlette",),
)
NCHAN = Contender(
    name="nginx with nchan", application="", listen="/listen", publish="/publish", server="nginx"
)
BARE_DAPHNE = Contender(
    name="bare ASGI, daphne",
    application="benchmarks.bare:application",
    listen="/",
    publish="/",
    server="daphne",
)
DAPHNE = Contender(
    name="django-eventsource, daphne",
    application="benchmarks.applications:handed_over",
    server="daphne",
    environment=PLAIN,
    **OURS,
)


@dataclass(frozen=True)
class Running:
    """A running server."""

    port: int
    pids: list[int]


@contextmanager
def run(contender: Contender, **environment: str) -> Iterator[Running]:
    """Start a server on a free port, wait until it accepts connections, and stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="eventsource-bench-") as directory:
        process = subprocess.Popen(
            _command(contender, port, Path(directory)),
            cwd=ROOT,
            env=os.environ | DJANGO | contender.environment | environment,
        )
        try:
            _wait(port, process)
            yield Running(port, [process.pid, *_children(process.pid)])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def migrate(**environment: str) -> None:
    """Create the tables of the database in the environment variable."""
    command = [sys.executable, "-W", "ignore", "-m", "django", "migrate"]
    command += ["--verbosity", "0", "--skip-checks"]
    subprocess.run(command, cwd=ROOT, env=os.environ | DJANGO | environment, check=True)


def _command(contender: Contender, port: int, directory: Path) -> list[str]:
    where = {"uvicorn": ["--host", "127.0.0.1", "--port"], "daphne": ["-b", "127.0.0.1", "-p"]}
    quiet = {
        "uvicorn": ["--no-access-log", "--log-level", "error", "--lifespan", "off"],
        "daphne": ["-v", "0"],
    }
    if contender.server == "nginx":
        (directory / "nginx.conf").write_text(NGINX.format(module=_nchan(), port=port))
        return [_nginx(), "-p", str(directory), "-c", "nginx.conf"]
    python = [sys.executable, "-W", "ignore", "-m", contender.server]
    options = [*where[contender.server], str(port), *quiet[contender.server]]
    if contender.server == "uvicorn":
        options += contender.flavour
    return [*python, *options, contender.application]


def _nchan() -> str:
    """Return the path of nginx's module, if both are installed."""
    found = [path for path in NCHAN_MODULES if Path(path).exists()]
    return found[0] if found and _nginx() else ""


def _nginx() -> str:
    found = [path for path in ("/usr/sbin/nginx", "/usr/bin/nginx") if Path(path).exists()]
    return found[0] if found else ""


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start: {process.args!r}.") from None
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    """Return the children of a process, such as nginx's worker."""
    time.sleep(0.2)
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
