"""``manage.py eventsource_doctor``, with real servers, stores and nginx."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme
from django.db import connections

from django_eventsource.history import get_history
from django_eventsource.monitoring.doctor import stores
from django_eventsource.monitoring.doctor.canary import offers_http2
from django_eventsource.monitoring.doctor.finding import Finding
from django_eventsource.testing import move_time
from tests.conftest import MEMORY
from tests.support.commands import Run
from tests.support.examples import free_port
from tests.support.histories import ALIASES, MARIADB
from tests.support.processes import POSTGRES, environment, serve
from tests.support.proxies import NGINX
from tests.support.scripted import Connection, Server, keep_open, respond, stream
from tests.support.valkey import ValkeyServer, valkey
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db
commits = pytest.mark.django_db(transaction=True)
commits_in_every_database = pytest.mark.django_db(transaction=True, databases=ALIASES)
every_database = pytest.mark.django_db(databases=ALIASES)

PATIENT = ("--timeout", str(PROCESS_PATIENCE_SECONDS))
"""A healthy server responds at once. On a loaded machine this may take long."""
HURRIED = ("--timeout", "0.3")
"""For a server that never sends what the doctor waits for."""


def doctor(*arguments: str) -> tuple[dict[str, Any], int]:
    """Run the command, and return its JSON object and its exit status."""
    run = Run("eventsource_doctor", "--json", *arguments)
    result: dict[str, Any] = json.loads(run.out)
    return result, 0 if run.error is None else run.error.returncode


def found(*arguments: str) -> list[str]:
    """Return the ids of the findings of a run that was complete."""
    result, _ = doctor(*arguments)
    assert result["error"] is None, result["error"]
    return [one["id"].removeprefix("eventsource.") for one in result["findings"]]


def ids(findings: Iterator[Finding]) -> list[str]:
    return [str(one.id).removeprefix("eventsource.") for one in findings]


def use(settings: Any, **overrides: Any) -> dict[str, Any]:
    """Change the settings of this process, and return the changes for a server."""
    for name, value in overrides.items():
        setattr(settings, name, value)
    return overrides


def redis_history(*servers: ValkeyServer, **options: Any) -> dict[str, Any]:
    """Return the settings of a history and a layer on Valkey servers."""
    urls = [server.url for server in servers]
    return {
        "EVENTSOURCE_HISTORY": {
            "BACKEND": "django_eventsource.history.redis.RedisHistory",
            "OPTIONS": {"HOSTS": urls, **options},
        },
        "CHANNEL_LAYERS": {
            "default": {
                "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
                "CONFIG": {"hosts": urls[:1], "symmetric_encryption_keys": ["tests"]},
            }
        },
    }


@pytest.fixture
def durable_valkey() -> Iterator[ValkeyServer]:
    with valkey("--appendonly", "yes") as server:
        yield server


def wait_until_it_serves(port: int) -> None:
    """Wait until a server responds, so that a short time-out is long enough."""
    response = httpx2.get(f"http://127.0.0.1:{port}/", timeout=PROCESS_PATIENCE_SECONDS)
    assert response.status_code == 200


# Healthy projects


@contextmanager
def durable_mariadb(alias: str) -> Iterator[None]:
    """Set up the server of the tests, which is faster and less safe, like a default one."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT @@innodb_flush_log_at_trx_commit")
        (value,) = cursor.fetchone()
        cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit=1")
        try:
            yield
        finally:
            cursor.execute(f"SET GLOBAL innodb_flush_log_at_trx_commit={value}")


@commits_in_every_database
@pytest.mark.parametrize("history", ["memory", "sqlite", "postgres", MARIADB, "redis"])
def test_a_healthy_project_has_no_finding(
    history: str, settings: Any, request: pytest.FixtureRequest
) -> None:
    """The canary arrives, and the second keepalive ends the command."""
    overrides: dict[str, Any] = {"EVENTSOURCE_KEEPALIVE_SECONDS": 1}
    if history in {"mariadb", "redis"}:
        overrides |= redis_history(request.getfixturevalue("durable_valkey"))
    if history not in {"sqlite", "redis"}:
        overrides["EVENTSOURCE_HISTORY"] = {
            "memory": MEMORY,
            "postgres": POSTGRES,
            "mariadb": {"OPTIONS": {"USING": "mariadb"}},
        }[history]
    with (
        durable_mariadb(history) if history == "mariadb" else nullcontext(),
        serve("uvicorn", **use(settings, **overrides)) as server,
    ):
        result, status = doctor("-P", str(server.port), *PATIENT)
    assert (result["findings"], result["error"], status) == ([], None, 0)
    canary = result["canary"]
    assert canary["direct"] is (history != "memory")
    assert canary["arrived"] == canary["sent"]
    assert canary["keepalives"] == 2
    assert canary["cut_seconds"] is None


@commits
def test_a_live_only_class_with_a_shared_layer_stores_no_canary(
    settings: Any, durable_valkey: ValkeyServer
) -> None:
    overrides = {
        "CHANNEL_LAYERS": redis_history(durable_valkey)["CHANNEL_LAYERS"],
        "EVENTSOURCE_EVENT_CLASS": "django_eventsource.events.JSONEvent",
    }
    with serve("uvicorn", **use(settings, **overrides)) as server:
        result, _ = doctor("-P", str(server.port), "--idle", "0.1", *PATIENT)
    assert (result["findings"], result["error"]) == ([], None)
    assert result["canary"]["direct"]
    assert get_history().newest(stores.DOCTOR_TOKEN) == get_history().newest("never used")


@commits
def test_a_stream_that_the_server_ends_in_order_was_not_cut(settings: Any) -> None:
    """With --idle the doctor watches more than one keepalive."""
    overrides = use(
        settings, EVENTSOURCE_KEEPALIVE_SECONDS=0.2, EVENTSOURCE_STREAM_MAX_AGE_SECONDS=2
    )
    with serve("uvicorn", **overrides) as server:
        result, _ = doctor("-P", str(server.port), "--idle", "60", *PATIENT)
    assert (result["findings"], result["error"]) == ([], None)
    assert result["canary"]["keepalives"] > 1
    assert result["canary"]["idle_seconds"] < 60


# Mistakes between the publisher and the listener


def certificate(directory: Path) -> str:
    """Write a certificate for nginx, and return the path of its authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    return str(directory / "ca.pem")


@commits
@pytest.mark.slow
def test_each_mistake_in_nginx_is_found(tmp_path: Path, settings: Any) -> None:
    """The same server behind an nginx without a mistake has no finding."""
    version, timeout, listen = (
        "proxy_http_version 1.1;",
        "proxy_read_timeout 60s;",
        "listen 127.0.0.1:8080;",
    )
    pem = str(tmp_path / "server.pem")
    tls = f"ssl_certificate {pem}; ssl_certificate_key {pem};"
    buffers = "proxy_ignore_headers X-Accel-Buffering;"
    gzip = "gzip on; gzip_types text/event-stream;"
    soon = ("--idle", "0.1")
    mistakes: list[tuple[str, str, Sequence[str], list[str]]] = [
        (timeout, timeout, soon, []),
        # With HTTP/1.1 nginx passes each chunk of the server on, even if it buffers.
        (version, buffers, ("--timeout", "3"), ["D015"]),
        (timeout, gzip, soon, ["D019"]),
        (timeout, f"{buffers} {gzip}", (*soon, "--timeout", "3"), ["D026"]),
        (timeout, "proxy_read_timeout 1s;", ("--idle", "60"), ["D020"]),
        (listen, f"listen 127.0.0.1:8080 ssl; {tls}", soon, ["D023"]),
        (listen, f"listen 127.0.0.1:8080 ssl http2; {tls}", soon, []),
    ]
    cafile = certificate(tmp_path)
    with serve("uvicorn", **use(settings, EVENTSOURCE_KEEPALIVE_SECONDS=30)) as server:
        for number, (old, new, options, expected) in enumerate(mistakes):
            directory = tmp_path / str(number)
            directory.mkdir()
            scheme = "https" if "ssl" in new else "http"
            with NGINX.run(directory, server.port, (old, new)) as (host, port):
                url = f"{scheme}://{host}:{port}"
                arguments = ["--url", url, *PATIENT, *options]
                arguments += ["--cafile", cafile] if scheme == "https" else []
                assert found(*arguments) == expected, new


@pytest.mark.slow
def test_processes_that_do_not_share_events_are_found(tmp_path: Path, settings: Any) -> None:
    """nginx sends the requests to two processes in turn, and each has its own history."""
    overrides = use(settings, EVENTSOURCE_HISTORY=MEMORY)
    with serve("uvicorn", **overrides) as one, serve("uvicorn", **overrides) as two:
        for server in (one, two):
            wait_until_it_serves(server.port)
        changes = [
            (
                "    map ",
                "    upstream both { server 127.0.0.1:8000; "
                f"server 127.0.0.1:{two.port}; }}\n    map ",
            ),
            (
                "proxy_pass http://127.0.0.1:8000;\n            proxy_http_version",
                "proxy_pass http://both;\n            proxy_http_version",
            ),
        ]
        with NGINX.run(tmp_path, one.port, *changes) as (host, port):
            # The canaries of the other process never arrive.
            arguments = ("--url", f"http://{host}:{port}", "--idle", "0.1", "--timeout", "4")
            assert found(*arguments) == ["D016"]


def test_a_wsgi_server_is_found() -> None:
    with serve("gunicorn django.core.wsgi:get_wsgi_application()", "-k", "sync") as server:
        assert found("-P", str(server.port), *PATIENT) == ["D014"]


@commits_in_every_database
def test_a_server_with_another_history_is_found() -> None:
    """The canary is stored in SQLite, and the server reads PostgreSQL."""
    with serve("uvicorn", EVENTSOURCE_HISTORY=POSTGRES) as server:
        wait_until_it_serves(server.port)
        assert found("-P", str(server.port), "--timeout", "1") == ["D017"]


def test_a_posted_canary_that_does_not_arrive_is_found(settings: Any) -> None:
    """The server accepts each POST, and its stream stays silent."""
    settings.EVENTSOURCE_HISTORY = MEMORY
    settings.EVENTSOURCE_EVENT_CLASS = "django_eventsource.events.JSONIdEvent"
    posts: list[bytes] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        in_threads(listener, lambda one: accept_posts(one, posts)) as port,
    ):
        result, status = doctor("-P", str(port), *HURRIED)
        assert [one["id"] for one in result["findings"]] == ["eventsource.D017"]
    assert (status, result["canary"]["sent"]) == (1, 6)
    # The last one closes the token.
    assert len(posts) == 7
    *canaries, end = map(json.loads, posts)
    assert all(value.startswith("canary-") for value in canaries)
    assert end == "end"


def accept_posts(connection: Connection, posts: list[bytes]) -> None:
    request = connection.read_request()
    if request is None:
        return
    if request.method == "GET":
        keep_open(b": open\n\n")(connection)
        return
    posts.append(request.body)
    respond(200, b'{"id": "1"}', Content_Type="application/json")(connection)


@contextmanager
def in_threads(listener: socket.socket, serve_one: Callable[[Connection], None]) -> Iterator[int]:
    """Serve each connection in a thread during a block, and yield the port."""
    threads: list[threading.Thread] = []

    def work(sock: socket.socket) -> None:
        connection = Connection(sock)
        try:
            with suppress(OSError):
                serve_one(connection)
        finally:
            connection.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threads.append(threading.Thread(target=work, args=[sock]))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        for thread in (accepting, *threads):
            thread.join(PROCESS_PATIENCE_SECONDS)


# Mistakes that a scripted server makes


def raw(head: bytes) -> Callable[[Connection], None]:
    """Return a step that sends the head of a stream and its first bytes."""

    def step(connection: Connection) -> None:
        connection.send(head + b"Content-Type: text/event-stream\r\n\r\n: open\n\n")
        connection.wait_for_close()

    return step


def test_an_old_http_version_and_another_clock_are_found() -> None:
    date = b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
    with Server(raw(b"HTTP/1.0 200 OK\r\n" + date)) as server:
        assert found("-P", str(server.port), *HURRIED) == ["D017", "D022", "D025"]


def test_a_server_that_does_not_respond_is_found() -> None:
    """The doctor has no response to judge."""
    with Server(Connection.wait_for_close) as server:
        assert found("-P", str(server.port), *HURRIED) == ["D017"]


def test_an_encoding_that_was_not_accepted_is_found() -> None:
    """No canary is published, because the doctor cannot read the stream."""
    with Server(raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n")) as server:
        result, status = doctor("-P", str(server.port), *PATIENT)
    assert [one["id"] for one in result["findings"]] == ["eventsource.D018"]
    assert (status, result["canary"]["sent"]) == (1, 0)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (respond(404), "responded with 404 Not Found. Pass the path before "),
        (respond(403, b"no", Content_Type="text/plain"), "Forbidden: no. Start this command"),
        (respond(502), "responded with 502 Bad Gateway."),
        (respond(204), "responded with 204 No Content."),
        (respond(200, b"x", Content_Type="text/html"), "with the content type 'text/html', not "),
        # After its first bytes, a canary would perhaps be sent.
        (stream(), "ended the stream at once, so that the client reconnects"),
    ],
)
def test_a_url_without_a_stream_is_an_error(step: Any, error: str) -> None:
    """The error has what to do, and the exit status is 2."""
    with Server(step) as server:
        result, status = doctor("-P", str(server.port), *PATIENT)
    assert error in result["error"]
    assert (result["findings"], result["canary"], status) == ([], None, 2)


def test_a_connection_that_is_cut_before_the_canary_arrives_is_an_error() -> None:
    def cut(connection: Connection) -> None:
        connection.open_stream()

    with Server(cut) as server:
        run = Run("eventsource_doctor", "-P", str(server.port), *PATIENT)
    assert "the connection was closed before the response was complete" in str(run.error)
    assert run.out == "No canary was sent.\n"


def test_a_port_on_which_no_server_listens_is_an_error() -> None:
    result, status = doctor("-P", str(free_port()))
    assert result["error"].endswith(": connection refused.")
    assert status == 2


def test_ctrl_c_ends_the_command_with_status_2() -> None:
    """The stream has no first bytes, for which the canary waits."""
    command = [sys.executable, "-m", "django", "eventsource_doctor", *PATIENT]
    with Server(keep_open()) as server:
        process = subprocess.Popen(
            [*command, "-P", str(server.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        while not server.requests:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PROCESS_PATIENCE_SECONDS)
    assert (process.returncode, err) == (2, "CommandError: Interrupted.\n")
    assert out == "No canary was sent.\n"


@pytest.mark.parametrize(("protocol", "offered"), [("h2", True), ("http/1.1", False)])
def test_the_protocol_of_the_tls_handshake_is_found(protocol: str, offered: bool) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols([protocol])
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def handshake() -> None:
            # The client may reset the connection when it has the protocol.
            with suppress(OSError), listener.accept()[0] as sock:
                context.wrap_socket(sock, server_side=True).close()

        thread = threading.Thread(target=handshake)
        thread.start()
        assert offers_http2(httpx2.URL(f"https://localhost:{port}/")) is offered
        thread.join(PROCESS_PATIENCE_SECONDS)
    assert offers_http2(httpx2.URL(f"https://localhost:{port}/")) is None
    assert offers_http2(httpx2.URL(f"http://localhost:{port}/")) is None


# Mistakes in the stores


@commits
def test_sqlite_that_may_lose_commits_is_found() -> None:
    with connections["default"].cursor() as cursor:
        cursor.execute("PRAGMA synchronous=NORMAL")
    assert ids(stores.sqlite_without_synchronous(get_history())) == ["D007"]
    connections["default"].close()
    assert ids(stores.sqlite_without_synchronous(get_history())) == []


@every_database
def test_postgresql_that_may_lose_commits_is_found(settings: Any) -> None:
    settings.EVENTSOURCE_HISTORY = POSTGRES
    with connections["postgres"].cursor() as cursor:
        cursor.execute("SET synchronous_commit=off")
        assert found() == ["D008"]
        cursor.execute("SET synchronous_commit=on")
        assert found() == []


@every_database
@pytest.mark.parametrize("alias", [MARIADB])
def test_mariadb_that_may_lose_commits_and_wakes_no_process_is_found(
    alias: str, settings: Any
) -> None:
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"USING": alias}}
    assert found() == ["D005", "D009"]
    with durable_mariadb(alias):
        assert found() == ["D005"]


def test_redis_servers_that_lose_events_are_found(
    settings: Any, durable_valkey: ValkeyServer
) -> None:
    """Each server is checked."""
    with valkey("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as lossy:
        use(settings, **redis_history(durable_valkey, lossy))
        result, status = doctor()
        assert [one["id"] for one in result["findings"]] == [
            "eventsource.D010",
            "eventsource.D011",
        ]
        assert all(f":{lossy.port} " in one["message"] for one in result["findings"])
        assert status == 1
        # The policy has no effect without a limit.
        lossy.run("CONFIG", "SET", "maxmemory", "0")
        assert found() == ["D010"]


def test_the_primaries_of_a_cluster_are_checked(settings: Any) -> None:
    with valkey("--cluster-enabled", "yes", "--appendonly", "yes") as server:
        server.run("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in server.run("CLUSTER", "INFO"):
            pass
        overrides = redis_history(server)
        form = {"host": "127.0.0.1", "port": server.port, "cluster": True}
        overrides["EVENTSOURCE_HISTORY"]["OPTIONS"]["HOSTS"] = [form]
        use(settings, **overrides)
        assert found() == []
        server.run("CONFIG", "SET", "appendonly", "no")
        assert found() == ["D010"]


@commits
def test_the_database_of_an_outbox_is_checked(settings: Any, durable_valkey: ValkeyServer) -> None:
    use(settings, **redis_history(durable_valkey, OUTBOX=True))
    with connections["default"].cursor() as cursor:
        cursor.execute("PRAGMA synchronous=OFF")
    assert found() == ["D007"]
    connections["default"].close()


@every_database
@pytest.mark.parametrize("alias", ["postgres", MARIADB])
def test_a_database_with_another_clock_and_few_connections_is_found(
    alias: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_HISTORY = {"OPTIONS": {"USING": alias}}
    monkeypatch.setattr(stores, "FREE_CONNECTIONS", 10**6)
    history = get_history()
    assert ids(stores.few_connections(history)) == ["D013"]
    with move_time(60):
        (finding,) = stores.different_clock(history)
    assert "The database server has a clock that is 60 s behind this machine's" in finding.msg


def test_a_redis_server_with_another_clock_is_found(
    settings: Any, durable_valkey: ValkeyServer
) -> None:
    use(settings, **redis_history(durable_valkey))
    with move_time(60):
        assert ids(stores.different_clock(get_history())) == ["D012"]


def test_a_store_that_is_down_is_found(settings: Any) -> None:
    """No canary is sent."""
    down = free_port()
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.redis.RedisHistory",
        "OPTIONS": {"HOSTS": [("127.0.0.1", down)], "TIMEOUT": 0.3},
    }
    with Server() as server:
        result, status = doctor("-P", str(server.port))
    ids_found = [one["id"].removeprefix("eventsource.") for one in result["findings"]]
    assert ids_found == ["D005", "D002"]
    assert f"Redis server of the history: 127.0.0.1:{down}" in result["findings"][1]["message"]
    assert (result["canary"], result["error"], status) == (None, None, 1)


def test_a_channel_layer_that_is_down_is_found(settings: Any) -> None:
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {
                "hosts": [f"redis://127.0.0.1:{free_port()}"],
                "symmetric_encryption_keys": ["tests"],
            },
        }
    }
    assert found() == ["D003"]


def test_an_empty_database_is_found(tmp_path: Path) -> None:
    """The findings of an empty database are printed for a reader."""
    done = subprocess.run(
        [sys.executable, "-m", "django", "eventsource_doctor"],
        capture_output=True,
        text=True,
        env=environment() | {"EVENTSOURCE_TEST_DATABASE": str(tmp_path / "empty.sqlite3")},
        timeout=PROCESS_PATIENCE_SECONDS,
    )
    assert done.returncode == 1
    assert done.stderr == "CommandError: 2 findings.\n"
    assert done.stdout.splitlines()[:3] == [
        "eventsource.D001 ERROR: Migrations of django_eventsource were not applied to the "
        "database 'default': 0001_initial.",
        "    Remedy: Run `manage.py migrate --database default`.",
        "    See docs/howto/databases.rst",
    ]
    assert "eventsource.D002 ERROR: The database 'default' failed: no such table" in done.stdout
