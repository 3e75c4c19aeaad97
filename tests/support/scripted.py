"""A server that runs a script: one function for each connection, on a real socket.

::

    with Server(stream(b"data: 1\\n\\n"), respond(204)) as server:
        assert [event.data for event in EventSourceClient(server.url)] == ["1"]
    assert server.requests[1].path == "/"

The end of the ``with`` block raises the error of a script.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

TIMEOUT_SECONDS = 10
"""Seconds after which a script that hangs fails."""


@dataclass
class Request:
    """One request: header names in lower case, values as bytes."""

    method: str
    path: str
    headers: dict[str, bytes] = field(default_factory=dict)
    body: bytes = b""


class Connection:
    """One accepted connection, on which a script sends and receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def read_request(self) -> Request | None:
        """Return one request, or ``None`` if the client closed the connection."""
        line = self._file.readline().decode()
        if not line:
            return None
        method, path, _ = line.split(" ")
        request = Request(method, path)
        while (line_bytes := self._file.readline().rstrip(b"\r\n")) != b"":
            name, _, value = line_bytes.partition(b":")
            request.headers[name.decode().lower()] = value.strip(b" ")
        request.body = self._file.read(int(request.headers.get("content-length", b"0")))
        return request

    def send(self, data: bytes) -> None:
        """Send bytes without a change."""
        self._sock.sendall(data)

    def head(self, status: int = 200, **headers: str) -> None:
        """Send a status line and headers, with hyphens for the underscores in their names."""
        lines = [f"HTTP/1.1 {status} Whatever"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def open_stream(self, content_type: str = "text/event-stream") -> None:
        """Send the head of a chunked event stream."""
        self.head(Content_Type=content_type, Transfer_Encoding="chunked")

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """Send the end of a chunked body."""
        self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """Make close() reset the connection (RST), as the kill of a process does."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def wait_for_close(self) -> None:
        """Wait until the client has closed its side."""
        # Closing with unread data in its buffer resets the connection.
        with contextlib.suppress(ConnectionResetError):
            assert self._file.read() == b""

    def close(self) -> None:
        self._file.close()
        self._sock.close()


Step = Callable[[Connection], None]


class Server:
    """Run one step for each connection, in order, in a thread."""

    def __init__(self, *steps: Step, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.failed_handshakes = 0
        self._steps = list(steps)
        self._context = context
        self._error: BaseException | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        scheme = "https" if context else "http"
        self.origin = f"{scheme}://127.0.0.1:{self.port}"
        self.url = f"{self.origin}/"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # Wake accept() if the script has not ended.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_SECONDS)
        assert not self._thread.is_alive(), "the script did not end"
        if kind is None:
            if self._error is not None:
                raise self._error
            assert not self._steps, f"{len(self._steps)} connections were never made"

    def _run(self) -> None:
        # After it is closed, connections are refused.
        with self._listener:
            while self._steps:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                sock.settimeout(TIMEOUT_SECONDS)
                try:
                    self._serve(sock)
                except Exception as error:  # noqa: BLE001
                    self._error = error
                    return

    def _serve(self, sock: socket.socket) -> None:
        if self._context is not None:
            try:
                sock = self._context.wrap_socket(sock, server_side=True)
            except OSError:
                self.failed_handshakes += 1
                sock.close()
                return
        connection = Connection(sock)
        try:
            request = connection.read_request()
            if request is not None:
                self.requests.append(request)
                self._steps.pop(0)(connection)
        finally:
            connection.close()


def respond(status: int, body: bytes = b"", **headers: str) -> Step:
    """Return a step that sends a complete response with its length."""

    def step(connection: Connection) -> None:
        connection.head(status, Content_Length=str(len(body)), **headers)
        connection.send(body)

    return step


def redirect(location: str, status: int = 302) -> Step:
    """Return a step that sends a redirect."""
    return respond(status, Location=location)


def stream(*chunks: bytes) -> Step:
    """Return a step that sends an event stream and its end."""

    def step(connection: Connection) -> None:
        connection.open_stream()
        for chunk in chunks:
            connection.chunk(chunk)
        connection.end()

    return step


def cut(*chunks: bytes) -> Step:
    """Return a step that closes an event stream between two chunks, without its end."""

    def step(connection: Connection) -> None:
        connection.open_stream()
        for chunk in chunks:
            connection.chunk(chunk)

    return step


def keep_open(*chunks: bytes) -> Step:
    """Return a step that keeps an event stream open until the client closes it."""

    def step(connection: Connection) -> None:
        connection.open_stream()
        for chunk in chunks:
            connection.chunk(chunk)
        connection.wait_for_close()

    return step


def basic_auth(user: str, password: str) -> bytes:
    """Return the ``Authorization`` header of HTTP Basic, in UTF-8 (RFC 7617)."""
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())
