"""Tests of ``make demo-cluster``: three servers with one site."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import psutil
import pytest

from tests.support.demosite import MANAGE
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.slow


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command as make does."""
    others = ("DJANGO_SETTINGS_MODULE", "XDG_RUNTIME_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    return subprocess.Popen(
        [sys.executable, str(MANAGE), "demo_cluster", *arguments],
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ports_of(process: subprocess.Popen[str]) -> list[int]:
    """Read the ports and the commands that the command prints."""
    assert process.stdout is not None
    text = ""
    guard = threading.Timer(PROCESS_PATIENCE_SECONDS, process.kill)
    guard.start()
    while not re.search(r"send_event \S+ close.*\n", text):
        line = process.stdout.readline()
        assert line, text
        text += line
    guard.cancel()
    return [int(port) for port in re.findall(r"^ +http://127\.0\.0\.1:(\d+)/", text, re.M)]


def manage(*arguments: str) -> str:
    """Run a management command of the demo site, as its page shows it."""
    done = subprocess.run(
        [sys.executable, str(MANAGE), *arguments],
        env={k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"},
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_event_of_one_server_reaches_the_listeners_of_the_others() -> None:
    """Ctrl-C ends every process without an error message."""
    process = start("--port", "0")
    try:
        ports = ports_of(process)
        assert len(ports) == 3
        for port in ports:
            page = httpx2.get(f"http://127.0.0.1:{port}/live/", timeout=PROCESS_PATIENCE_SECONDS)
            assert page.status_code == 200
            (script,) = re.findall(r'<script[^>]* src="([^"]+)"', page.text)
            assert httpx2.get(f"http://127.0.0.1:{port}{script}").status_code == 200
        heard: list[str] = []
        first, last = str(ports[0]), str(ports[-1])
        listening = threading.Thread(
            target=lambda: heard.append(
                manage("listen_events", "42", "-P", first, "--last-event-id", before)
            )
        )
        before = manage("send_event", "42", "ping", "zero", "-P", last).strip()
        listening.start()
        manage("send_event", "42", "ping", "one", "-P", last)
        manage("send_event", "42", "close", "-P", str(ports[1]))
        listening.join(PROCESS_PATIENCE_SECONDS)
        assert heard == ["ping: one\nclose: \n"]
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 5
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
        assert process.returncode == 0
        assert errors == ""
        _, alive = psutil.wait_procs(family, timeout=PROCESS_PATIENCE_SECONDS)
        assert alive == []
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=PROCESS_PATIENCE_SECONDS)


def test_a_port_in_use_is_reported_in_one_line() -> None:
    """No process is left running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, errors = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in errors
    assert "make demo-cluster PORT=..." in errors
