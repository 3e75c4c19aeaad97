"""One request of a listener to an ASGI application in the same process, without a socket."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from unittest.mock import patch
from urllib.parse import unquote

from asgiref.sync import SyncToAsync
from django.db.backends.base.base import BaseDatabaseWrapper

from ..asgi import Application, Message


class _OpenConnections:
    """Keeps the database connections of the test open, while there is a request.

    Django closes those of the thread that are not used any more at the beginning and at the end of
    each request. In a TestCase this would end the test's transaction. Django's own test client
    prevents it too.
    """

    def __init__(self) -> None:
        self._patch = patch.object(
            BaseDatabaseWrapper, "close_if_unusable_or_obsolete", lambda connection: None
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def keep_while(self, task: asyncio.Task[None]) -> None:
        """Keep them open until a task is done."""
        if not self._tasks:
            self._patch.start()
        self._tasks.add(task)
        task.add_done_callback(self._discard)

    def _discard(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._patch.stop()


open_connections = _OpenConnections()


class Connection:
    """A request whose response is received piece by piece, as over a socket without a buffer.

    :param on_data: called with each piece of the body.
    :param on_news: called after anything has happened.
    """

    def __init__(self, on_data: Callable[[bytes], None], on_news: Callable[[], None]) -> None:
        self.status: int | None = None
        """The status of the response; ``None`` before its beginning."""
        self.headers: dict[str, str] = {}
        """The headers of the response, with names in lower case."""
        self._on_data = on_data
        self._on_news = on_news
        self._requested = False
        self._disconnected = asyncio.Event()
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._task: asyncio.Task[None]

    def start(self, application: Application, url: str, headers: Mapping[str, str]) -> None:
        """Call the application in a task.

        :param url: the path, with a query or without.
        """
        # Django's handler would serve each request in a thread and with database connections of
        # its own, which do not see the transaction of a TestCase. With a context that has no
        # thread, the work is done in the thread in which the test's own synchronous work is done.
        context = contextvars.Context()
        context.run(SyncToAsync.thread_sensitive_context.set, None)  # type: ignore[arg-type]
        call = self._call(application, scope_of(url, headers))
        self._task = asyncio.get_running_loop().create_task(call, context=context)
        open_connections.keep_while(self._task)
        self._task.add_done_callback(lambda task: self._on_news())

    async def _call(self, application: Application, scope: Message) -> None:
        await application(scope, self._receive, self._respond)

    async def _receive(self) -> Message:
        if not self._requested:
            self._requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _respond(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            pairs = message.get("headers", ())
            self.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in pairs}
            return
        await self._may_send.wait()
        # As the servers do, ignore what is sent after the client has disconnected.
        if not self._disconnected.is_set():
            self._on_data(message.get("body", b""))
            self._on_news()

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended the response, or the connection."""
        return self._task.done()

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read."""
        return not self._may_send.is_set()

    def stall(self) -> None:
        """Do not read: the server's next ``send()`` waits."""
        self._may_send.clear()

    def resume(self) -> None:
        """Read again."""
        self._may_send.set()

    async def disconnect(self, seconds: float) -> None:
        """Disconnect, and wait until the application has ended the request.

        :param seconds: the most seconds to wait.
        :raises Exception: the exception of the application.
        """
        self._disconnected.set()
        self._may_send.set()
        await asyncio.wait({self._task}, timeout=seconds)
        if not self._task.done():
            self._task.cancel()
            raise AssertionError(
                f"The application did not end the request {seconds} seconds after the client had "
                "disconnected."
            )
        self._task.result()


def scope_of(url: str, headers: Mapping[str, str]) -> Message:
    """Return the ASGI scope of a GET request.

    :param url: the path, percent-encoded, with a query or without.
    """
    path, _, query = url.partition("?")
    pairs = [("host", "testserver"), ("accept", "text/event-stream"), *headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        # UTF-8, as browsers send the last event id.
        "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
        "client": ("127.0.0.1", 50_000),
        "server": ("testserver", 80),
    }
