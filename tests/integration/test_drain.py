"""Readiness and draining of real servers."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from django_eventsource import publish
from tests.support.listeners import Connection, reconnection_ms
from tests.support.processes import ROOT, Server, environment, serve
from tests.support.valkey import ValkeyServer
from tests.support.waiting import PROCESS_PATIENCE_SECONDS, until

MONITORED: dict[str, Any] = {
    "ROOT_URLCONF": "tests.support.monitored_urls",
    "EVENTSOURCE_POLICY": "django_eventsource.policies.AllowAny",
}


def probe(server: Server, path: str = "/-/ready") -> tuple[int, Any]:
    """Return the status and the JSON of a probe."""
    url = f"http://127.0.0.1:{server.port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=PROCESS_PATIENCE_SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


async def until_status(server: Server, status: int, times: int = 1) -> None:
    """Wait until so many probes in a row have a status. Any worker may respond."""

    async def has_status() -> bool:
        for _ in range(times):
            if (await sync_to_async(probe)(server))[0] != status:
                return False
        return True

    await until(has_status, seconds=PROCESS_PATIENCE_SECONDS, interval_seconds=0.05)


async def open_streams(server: Server, number: int) -> list[Connection]:
    streams = [await Connection.open(server.address, "/events/poll/t") for _ in range(number)]
    for stream in streams:
        assert b"id: " in await stream.read()
    return streams


async def rest_of(stream: Connection) -> bytes:
    body = await stream.rest()
    stream.close()
    return body


def drain(*options: str, **overrides: Any) -> str:
    """Run the command, and return what it printed."""
    command = ["testproject/manage.py", "eventsource_drain", "--seconds", "0.5", *options]
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(**overrides),
        timeout=PROCESS_PATIENCE_SECONDS,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
async def test_one_server_of_a_host_drains_and_then_the_others() -> None:
    """The streams of the others stay open. All workers of a server drain."""
    publish_one = sync_to_async(publish)
    with ExitStack() as stack:
        workers = stack.enter_context(serve("gunicorn", "-w", "2", **MONITORED))
        others = [stack.enter_context(serve(kind, **MONITORED)) for kind in ("uvicorn", "daphne")]
        for server in (workers, *others):
            await until_status(server, 200)
        ending = await open_streams(workers, 4)
        staying = [stream for other in others for stream in await open_streams(other, 1)]
        assert workers.process is not None
        printed = await sync_to_async(drain)("--pid", str(workers.process.pid), **MONITORED)
        assert printed.startswith("Draining ")
        for stream in ending:
            assert 500 <= reconnection_ms(await rest_of(stream)) <= 5000
        await until_status(workers, 503, times=8)
        assert (await sync_to_async(probe)(workers))[1]["draining"] is True
        refused = await Connection.open(workers.address, "/events/poll/t")
        body = await rest_of(refused)
        assert (refused.status, body.count(b"\n\n")) == (200, 1)
        assert reconnection_ms(body) >= 2000
        assert (await sync_to_async(probe)(workers, "/-/live"))[0] == 200
        await publish_one("t", "ping", "still open")
        for stream in staying:
            await stream.read_until(b"still open")
        for other in others:
            await until_status(other, 200)
        await sync_to_async(drain)(**MONITORED)
        for stream in staying:
            assert b"retry: " in await rest_of(stream)
        for other in others:
            assert (await sync_to_async(probe)(other))[0] == 503


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
async def test_readiness_and_draining_work_with_redis(valkey_server: ValkeyServer) -> None:
    """A process is not ready while the store and the layer of its site are down."""
    url = f"redis://127.0.0.1:{valkey_server.port}"
    site = MONITORED | {
        "EVENTSOURCE_HISTORY": {
            "BACKEND": "django_eventsource.history.redis.RedisHistory",
            "OPTIONS": {"HOSTS": [url], "TIMEOUT": 1},
        },
        "CHANNEL_LAYERS": {
            "default": {
                "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
                "CONFIG": {"hosts": [url]},
            }
        },
        "EVENTSOURCE_POLL_SECONDS": 0.2,
    }
    with serve("uvicorn", **site) as server:
        await until_status(server, 200)
        valkey_server.stop()
        try:
            await until_status(server, 503)
            assert (await sync_to_async(probe)(server))[1]["history"] is False
        finally:
            valkey_server.start()
        await until_status(server, 200)
        (stream,) = await open_streams(server, 1)
        await sync_to_async(drain)(**site)
        assert b"retry: " in await rest_of(stream)
        await until_status(server, 503)
