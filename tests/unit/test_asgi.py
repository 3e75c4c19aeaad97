"""The ASGI wrapper: which streams it sends, and how they end."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction
from django.core.asgi import get_asgi_application
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import request_finished
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import include, path
from django.utils.decorators import sync_and_async_middleware

from django_eventsource.asgi import Handover, Receiver, serve
from django_eventsource.history import History, Kind, get_history
from django_eventsource.operations.stream_timeouts import StreamTimeouts
from django_eventsource.operations.supervisor import get_supervisor
from django_eventsource.protocol.cursors import parse_cursor
from django_eventsource.protocol.frames import Decoder
from django_eventsource.publishing import apublish
from django_eventsource.signals import Listener, Reason, stream_closed
from django_eventsource.streaming.open_stream import OpenStream
from django_eventsource.streaming.registry import registry
from django_eventsource.streaming.response import Slot
from django_eventsource.streaming.writer import PIECE_BYTES, SMALL_PIECE_BYTES
from tests.support.events import add, draft
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = [
    pytest.mark.usefixtures("memory_history"),
    # Django looks for a file's connections to close at the end of each request.
    pytest.mark.django_db(databases="__all__"),
]

Message = dict[str, Any]


async def plain_stream(request: HttpRequest) -> StreamingHttpResponse:
    """Return a streaming response without events."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    return StreamingHttpResponse(parts(), content_type="text/plain")


async def broken(request: HttpRequest) -> HttpResponse:
    """Raise an exception."""
    raise ValueError("broken on purpose")


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("plain", plain_stream),
    path("broken", broken),
]


@pytest.fixture(autouse=True)
def site(settings) -> None:
    settings.ROOT_URLCONF = __name__
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    settings.EVENTSOURCE_POLL_SECONDS = 0.02


@pytest.fixture(autouse=True)
def no_stream_is_left() -> Iterator[None]:
    """Check that each test leaves no stream registered."""
    yield
    gc.collect()
    assert not list(registry.streams())


class Exchange:
    """One request, as a server sees it."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.blocks_after: int | None = None
        """The number of messages after which the client stops reading."""
        self.news = asyncio.Event()

    async def receive(self) -> Message:
        return await self.incoming.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.news.set()
        if self.blocks_after is not None and len(self.sent) >= self.blocks_after:
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def is_complete(self) -> bool:
        """Whether the end of the body was sent."""
        return self.sent[-1]["type"] == "http.response.body" and not self.sent[-1].get("more_body")

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                self.news.clear()
                await self.news.wait()

    def run(self, application: Any, url: str, method: str = "GET") -> asyncio.Task[None]:
        self.incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        return asyncio.create_task(application(scope_of(url, method), self.receive, self.send))

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})


def scope_of(url: str, method: str = "GET") -> dict[str, Any]:
    path, _, query = url.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"accept-encoding", b"gzip")],
        "client": ("127.0.0.1", 12345),
        "server": ("127.0.0.1", 80),
    }


async def finish(task: Awaitable[None]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await task


def stream_of(token: str = "t", cursor: str | None = None) -> OpenStream:
    """Return a stream as the view makes it: admitted, and not begun."""
    position = get_history().locate(token, parse_cursor(cursor))
    stream = OpenStream(token, position, listener=Listener(tokens=(token,)), asked=cursor)
    assert registry.admit(stream) is None
    return stream


def leaves(stream: OpenStream) -> Any:
    """Return an application that puts a stream into the slot, as Django does."""

    async def application(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        scope[Slot.KEY].stream = stream
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return application


# Responses


async def test_a_stream_is_sent_with_headers_opening_events_and_end() -> None:
    exchange = Exchange()
    task = exchange.run(Handover(get_asgi_application()), "/events/poll/t")
    await exchange.until(lambda: len(exchange.sent) >= 2)
    await apublish("t", "ping", "a")
    await exchange.until(lambda: b"data: a" in exchange.body)
    await apublish("t", "close", "bye")
    await finish(task)
    assert exchange.status == 200
    assert dict(exchange.sent[0]["headers"])[b"Content-Type"].startswith(b"text/event-stream")
    assert [message["type"] for message in exchange.sent].count("http.response.start") == 1
    assert [message.get("more_body") for message in exchange.sent[1:-1]] == [True] * (
        len(exchange.sent) - 2
    )
    assert exchange.is_complete
    assert [event.data for event in Decoder().feed(exchange.body)] == ["a", "bye"]


async def test_the_body_is_sent_after_django_has_finished_the_request(history_start: str) -> None:
    order: list[str] = []
    exchange = Exchange()

    def on_finished(**kwargs: Any) -> None:
        order.append(f"finished after {len(exchange.sent)} messages")

    request_finished.connect(on_finished)
    try:
        task = exchange.run(
            Handover(get_asgi_application()), f"/events/poll/t?last_event_id={history_start}"
        )
        await exchange.until(lambda: b"data: bye" in exchange.body)
        await finish(task)
    finally:
        request_finished.disconnect(on_finished)
    assert order == ["finished after 1 messages"]


@pytest.fixture
def history_start(memory_history: History) -> str:
    """Return the id before three events and a close."""
    (start,) = add(memory_history, "start")
    add(memory_history, *"abc")
    memory_history.append("t", [draft("bye", kind=Kind.CLOSE)])
    return str(start.seq)


async def test_the_wrapper_sends_the_same_headers_and_bytes_as_django(history_start: str) -> None:
    answers = []
    for application in (get_asgi_application(), Handover(get_asgi_application())):
        exchange = Exchange()
        url = f"/events/poll/t?last_event_id={history_start}"
        await finish(exchange.run(application, url))
        answers.append((exchange.sent[0], exchange.body, exchange.is_complete))
    assert answers[0] == answers[1]
    assert b"data: c\n" in answers[0][1]


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("HEAD", "/events/poll/t", 200),
        ("OPTIONS", "/events/poll/t", 200),
        ("GET", "/events/nothing/t", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/events/poll/t", 405),
        ("GET", "/events/poll/" + "a" * 256, 400),
        ("GET", "/events/poll/", 400),
        ("GET", "/plain", 200),
        ("GET", "/broken", 500),
    ],
)
async def test_other_responses_pass_unchanged(
    method: str, url: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    for application in (get_asgi_application(), Handover(get_asgi_application())):
        exchange = Exchange()
        await finish(exchange.run(application, url, method))
        answers.append(exchange.sent)
    assert answers[0] == answers[1]
    assert answers[0][0]["status"] == status
    assert len(answers[0]) >= 2


async def test_the_response_over_a_limit_is_sent_whole(settings) -> None:
    settings.EVENTSOURCE_MAX_STREAMS = 1
    held = stream_of()
    exchange = Exchange()
    await finish(exchange.run(Handover(get_asgi_application()), "/events/poll/t"))
    assert (exchange.status, exchange.is_complete) == (200, True)
    assert exchange.body.startswith(b"event: retry\nretry: ")
    await held.aclose()


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "something.new"])
async def test_other_protocols_pass_unchanged(kind: str) -> None:
    got: list[tuple[Any, ...]] = []

    async def application(*given: Any) -> None:
        got.append(given)

    given = ({"type": kind}, object(), object())
    await Handover(application)(*given)  # type: ignore[arg-type]
    assert len(got[0]) == 3
    assert all(one is other for one, other in zip(got[0], given, strict=True))
    assert given[0] == {"type": kind}


async def test_the_scope_of_the_server_is_not_changed() -> None:
    """A server may use one scope for several requests."""
    stream = stream_of()
    await stream.aclose()
    scope = scope_of("/")
    before = dict(scope)
    exchange = Exchange()
    await Handover(leaves(stream))(scope, exchange.receive, exchange.send)
    assert scope == before


async def test_instances_are_counted() -> None:
    before = Handover.made
    Handover(get_asgi_application())
    assert Handover.made == before + 1


def test_a_call_as_a_wsgi_application_raises_and_names_the_fix() -> None:
    """A WSGI server does not await the coroutine."""
    application: Any = Handover(get_asgi_application())
    with pytest.raises(ImproperlyConfigured, match="gunicorn -k asgi") as error:
        application({"wsgi.version": (1, 0), "REQUEST_METHOD": "GET"}, lambda *args: None)
    assert "called as a WSGI application" in str(error.value)


@pytest.mark.parametrize("is_asgi", [inspect.iscoroutinefunction, iscoroutinefunction])
def test_servers_detect_an_asgi_application(is_asgi: Callable[[Any], bool]) -> None:
    application = Handover(get_asgi_application())
    assert is_asgi(application.__call__)
    assert is_asgi(Handover.__call__)


# Middleware that changes the stream


async def upper(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for part in parts:
        yield part.upper()


def sets_the_content(response: Any) -> HttpResponseBase:
    response.streaming_content = upper(response.streaming_content)
    return response  # type: ignore[no-any-return]


def makes_another_response(response: Any) -> HttpResponseBase:
    return StreamingHttpResponse(upper(response.streaming_content), headers=response.headers)


def iterates_over_the_response(response: Any) -> HttpResponseBase:
    return StreamingHttpResponse(upper(response), headers=response.headers)


def answers_otherwise(response: Any) -> HttpResponseBase:
    return HttpResponse("MAINTENANCE", status=503)


def around(change: Callable[[Any], HttpResponseBase]) -> Any:
    """Make a middleware factory available under a dotted path."""

    @sync_and_async_middleware
    def factory(get_response: Any) -> Any:
        async def middleware(request: HttpRequest) -> HttpResponseBase:
            return change(await get_response(request))

        return middleware

    return factory


Sets = around(sets_the_content)
MakesAnother = around(makes_another_response)
Iterates = around(iterates_over_the_response)
AnswersOtherwise = around(answers_otherwise)


@pytest.mark.parametrize("name", ["Sets", "MakesAnother", "Iterates"])
async def test_a_stream_that_middleware_wraps_is_sent_by_django(
    name: str, settings, history_start: str
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.{name}"]
    exchange = Exchange()
    url = f"/events/poll/t?last_event_id={history_start}"
    await finish(exchange.run(Handover(get_asgi_application()), url))
    assert exchange.is_complete
    assert b"DATA: A\n" in exchange.body
    assert b"DATA: BYE\n" in exchange.body
    assert b"data: " not in exchange.body


@pytest.mark.parametrize("name", ["Sets", "MakesAnother"])
async def test_a_disconnect_ends_a_wrapped_stream(name: str, settings) -> None:
    settings.MIDDLEWARE = [f"{__name__}.{name}"]
    exchange = Exchange()
    task = exchange.run(Handover(get_asgi_application()), "/events/poll/t")
    await exchange.until(lambda: exchange.body)
    assert registry.count("t") == 1
    exchange.hang_up()
    await finish(task)
    assert registry.count("t") == 0


async def test_a_stream_that_middleware_drops_is_not_counted(settings) -> None:
    settings.MIDDLEWARE = [f"{__name__}.AnswersOtherwise"]
    exchange = Exchange()
    await finish(exchange.run(Handover(get_asgi_application()), "/events/poll/t"))
    assert (exchange.status, exchange.body) == (503, b"MAINTENANCE")
    gc.collect()
    assert registry.count("t") == 0


async def test_gzip_middleware_does_not_change_streams(settings, history_start: str) -> None:
    settings.MIDDLEWARE = ["django.middleware.gzip.GZipMiddleware"]
    exchange = Exchange()
    url = f"/events/poll/t?last_event_id={history_start}"
    await finish(exchange.run(Handover(get_asgi_application()), url))
    assert b"data: bye\n" in exchange.body


# Ends


async def test_a_disconnect_ends_the_stream_at_once() -> None:
    """Nothing more is sent, and the reason is reported."""
    reasons = []

    async def on_closed(**kwargs: Any) -> None:
        reasons.append(kwargs["reason"])
        exchange.news.set()

    stream_closed.connect(on_closed)
    try:
        exchange = Exchange()
        task = exchange.run(Handover(get_asgi_application()), "/events/poll/t")
        await exchange.until(lambda: exchange.body)
        exchange.incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        exchange.hang_up()
        await finish(task)
        assert registry.count("t") == 0
        assert len(exchange.sent) == 2
        await exchange.until(lambda: reasons)
        assert reasons == [Reason.CLIENT_DISCONNECTED]
    finally:
        stream_closed.disconnect(on_closed)


async def test_a_disconnect_ends_a_stalled_stream() -> None:
    exchange = Exchange()
    exchange.blocks_after = 2
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    exchange.hang_up()
    await finish(task)
    assert stream.reason is Reason.CLIENT_DISCONNECTED
    assert not exchange.is_complete


async def test_a_disconnect_that_django_received_ends_the_stream() -> None:
    """Servers report a disconnect once, and Django may receive it while the view finishes."""
    stream = stream_of()
    leave = leaves(stream)
    exchange = Exchange()

    async def application(scope: Message, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        await leave(scope, receive, send)
        exchange.hang_up()
        assert (await receive())["type"] == "http.disconnect"

    task = exchange.run(Handover(application), "/")
    try:
        await asyncio.wait([task], timeout=1)
        assert stream.reason is Reason.CLIENT_DISCONNECTED
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_an_exception_of_the_application_reaches_the_server() -> None:
    async def application(scope: Message, receive: Any, send: Any) -> None:
        raise ValueError("broken on purpose")

    with pytest.raises(ValueError, match="broken on purpose"):
        await finish(Exchange().run(Handover(application), "/"))


async def test_a_stream_is_not_sent_or_counted_after_an_exception() -> None:
    leave = leaves(stream_of())

    async def application(scope: Message, receive: Any, send: Any) -> None:
        await leave(scope, receive, send)
        raise ValueError("broken on purpose")

    exchange = Exchange()
    with pytest.raises(ValueError, match="broken on purpose") as kept:
        await finish(exchange.run(Handover(application), "/"))
    assert registry.count("t") == 0, kept
    assert len(exchange.sent) == 1


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_cancellation_by_the_server_closes_the_stream(stalled: bool) -> None:
    exchange = Exchange()
    exchange.blocks_after = 2 if stalled else None
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finish(task)
    assert task.cancelled()
    assert stream.reason is not None
    assert registry.count("t") == 0


async def test_an_exception_of_send_closes_the_stream() -> None:
    stream = stream_of()

    async def send(message: Message) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await serve(stream, Receiver(Exchange().receive), send)
    assert registry.count("t") == 0


async def test_an_error_before_the_first_chunk_closes_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twisted raises one if a producer is registered already."""
    stream = stream_of()
    assert registry.count("t") == 1

    def fail(send: Any) -> None:
        raise RuntimeError("a producer is registered already")

    monkeypatch.setattr("django_eventsource.streaming.writer.register_producer", fail)
    before = asyncio.all_tasks()
    with pytest.raises(RuntimeError, match="registered already"):
        await finish(Exchange().run(Handover(leaves(stream)), "/"))
    assert registry.count("t") == 0
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before, "nobody listens for its end any more"


@pytest.mark.parametrize("during_the_request", [False, True])
async def test_a_stream_ends_when_receive_fails(
    during_the_request: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its body is complete and the error is logged, because a disconnect cannot be detected."""
    exchange = Exchange()
    stream = stream_of()
    leave = leaves(stream)
    fails = asyncio.Event()

    async def receive() -> Message:
        await fails.wait()
        raise RuntimeError("no such thing")

    async def application(scope: Message, receive: Any, send: Any) -> None:
        await cancelled(receive)
        if during_the_request:
            fails.set()
        await leave(scope, receive, send)

    exchange.receive = receive  # type: ignore[method-assign]
    task = exchange.run(Handover(application), "/")
    await exchange.until(lambda: exchange.body)
    fails.set()
    await finish(task)
    assert exchange.is_complete
    assert stream.reason is Reason.FAILED
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("django_eventsource.asgi", "ERROR")
    assert "receive() failed" in record.getMessage()
    assert "no such thing" in str(record.exc_info)


async def cancelled(receive: Any) -> None:
    """Call ``receive`` and cancel the call, as Django does when it has sent its response."""
    call = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()


async def test_the_servers_receive_is_not_cancelled_before_the_stream_has_ended() -> None:
    """gunicorn's ASGI worker reports a disconnect after a cancelled call."""
    exchange = Exchange()
    stream = stream_of()
    leave = leaves(stream)
    calls: list[str] = []

    async def receive() -> Message:
        calls.append("called")
        try:
            return await exchange.incoming.get()
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise

    async def application(scope: Message, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        await cancelled(receive)
        await leave(scope, receive, send)

    task = asyncio.create_task(Handover(application)(scope_of("/"), receive, exchange.send))
    exchange.incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await exchange.until(lambda: exchange.body)
    assert calls == ["called", "called"]
    stream.end(Reason.CLOSE_REQUESTED)
    await finish(task)
    await asyncio.sleep(0)
    assert exchange.is_complete
    assert calls == ["called", "called", "cancelled"]


async def test_the_next_call_returns_the_message_of_a_cancelled_call() -> None:
    exchange = Exchange()
    stream = stream_of()
    leave = leaves(stream)

    async def application(scope: Message, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        await cancelled(receive)
        exchange.hang_up()
        await asyncio.sleep(0.01)
        await leave(scope, receive, send)

    await finish(exchange.run(Handover(application), "/"))
    assert stream.reason is Reason.CLIENT_DISCONNECTED


# Aborting a connection


class Transport:
    def __init__(self) -> None:
        self.aborts = 0

    def abort(self) -> None:
        self.aborts += 1


class Known(Exchange):
    """A request of a server whose transport can be found."""

    def __init__(self) -> None:
        super().__init__()
        self.transport = Transport()


@pytest.mark.parametrize("reason", [Reason.STALLED, Reason.SHUTDOWN])
async def test_aborting_a_stream_aborts_its_connection_once(reason: Reason) -> None:
    """The application returns without an exception."""
    exchange = Known()
    exchange.blocks_after = 2
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    stream.abort(reason)
    await finish(task)
    assert not task.cancelled()
    assert task.cancelling() == 0
    assert exchange.transport.aborts == 1
    assert not exchange.is_complete
    assert stream.reason is reason


async def test_a_disconnect_does_not_abort_the_connection() -> None:
    """The connection may carry other requests."""
    exchange = Known()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    exchange.hang_up()
    await finish(task)
    assert exchange.transport.aborts == 0


@pytest.mark.parametrize("kind", [Known, Exchange])
async def test_a_client_that_does_not_read_the_end_is_disconnected(
    kind: type[Exchange], settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EVENTSOURCE_STREAM_STALL_SECONDS = 0.1
    monkeypatch.setattr(StreamTimeouts, "SWEEP_SECONDS", 0.02)
    exchange = kind()
    exchange.blocks_after = 3  # the start, the opening, and then the end
    stream = OpenStream("t", get_history().locate("t", None), listener=Listener(tokens=("t",)))
    assert get_supervisor().admit(stream) is None
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    stream.end(Reason.CLOSE_REQUESTED)
    await exchange.until(lambda: len(exchange.sent) == 3)
    try:
        await asyncio.wait([task], timeout=1)
        assert task.done()
        assert task.exception() is None
        if isinstance(exchange, Known):
            assert exchange.transport.aborts == 1
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_stream_of_an_unknown_server_is_aborted_without_an_end_of_the_body() -> None:
    exchange = Exchange()
    exchange.blocks_after = 2
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    stream.abort(Reason.STALLED)
    await finish(task)
    assert not exchange.is_complete
    assert registry.count("t") == 0


@pytest.mark.parametrize("kind", [Exchange, Known])
async def test_an_unknown_server_receives_smaller_pieces(
    kind: type[Exchange], memory_history: History
) -> None:
    (start,) = add(memory_history, "start")
    add(memory_history, "x" * 3 * PIECE_BYTES)
    stream = stream_of("t", str(start.seq))
    exchange = kind()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.body) > 3 * PIECE_BYTES)
    stream.end(Reason.CLOSE_REQUESTED)
    await finish(task)
    sizes = [len(message["body"]) for message in exchange.sent[1:]]
    assert max(sizes) == (SMALL_PIECE_BYTES if kind is Exchange else PIECE_BYTES)
    assert all(message["body"] for message in exchange.sent[1:-1])
    (event,) = Decoder().feed(exchange.body)
    assert event.data == "x" * 3 * PIECE_BYTES


class Lost(Known):
    """A server whose connection is lost during the first large piece, and that never waits."""

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if len(message["body"]) == PIECE_BYTES:
            self.hang_up()


async def test_no_further_piece_is_sent_after_a_disconnect(memory_history: History) -> None:
    """The server's send() returns at once then."""
    (start,) = add(memory_history, "start")
    add(memory_history, "x" * 100 * PIECE_BYTES)
    stream = stream_of("t", str(start.seq))
    exchange = Lost()
    await finish(serve(stream, Receiver(exchange.receive), exchange.send))
    assert stream.reason is Reason.CLIENT_DISCONNECTED
    assert len(exchange.sent) < 10


async def test_django_sends_a_large_event_in_pieces_too(
    memory_history: History,
) -> None:
    (start,) = add(memory_history, "start")
    add(memory_history, "x" * 3 * PIECE_BYTES)
    exchange = Exchange()
    exchange.blocks_after = 4  # the head, the opening, and two pieces
    url = f"/events/poll/t?last_event_id={start.seq}"
    task = exchange.run(get_asgi_application(), url)
    await exchange.until(lambda: len(exchange.sent) == 4)
    assert [len(message["body"]) for message in exchange.sent[2:]] == [PIECE_BYTES, PIECE_BYTES]
    exchange.hang_up()
    await finish(task)


# Daphne


class Request:
    """Twisted's request, with its behaviour at the end of a response."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.channel: Any = self
        self.producer: Any = None
        self.complaints: list[str] = []
        self.transport = self
        self.aborts = 0

    def registerProducer(self, producer: Any, streaming: bool) -> None:  # noqa: N802
        assert streaming
        self.producer = producer

    def unregisterProducer(self) -> None:  # noqa: N802
        self.producer = None
        self.channel.transport  # noqa: B018 - Twisted goes through its channel

    def abortConnection(self) -> None:  # noqa: N802
        self.aborts += 1
        self.lose()

    def lose(self) -> None:
        """Lose the connection, as daphne does."""
        self.channel = None
        if self.producer is not None:
            self.producer.stopProducing()
        self.exchange.hang_up()

    async def reply(self, message: Message) -> None:
        """Stand for daphne's handle_reply(), which never waits and ignores a lost connection."""
        if getattr(self, "channel", None) is None:
            return
        self.exchange.sent.append(message)
        self.exchange.news.set()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            if self.producer is not None:
                self.complaints.append("Producer was not unregistered")
                self.unregisterProducer()
            del self.channel
            self.exchange.hang_up()


class Daphne(Exchange):
    def __init__(self) -> None:
        super().__init__()
        self.request = Request(self)
        self.send = functools.partial(reply, self.request)  # type: ignore[method-assign, assignment]


async def reply(request: Request, message: Message) -> None:
    await request.reply(message)


async def test_nothing_is_written_while_the_buffer_of_daphne_is_full() -> None:
    exchange = Daphne()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    await apublish("t", "ping", "a")
    await exchange.until(lambda: b"data: a" in exchange.body)
    exchange.request.producer.pauseProducing()
    for word in "bcd":
        await apublish("t", "ping", word)
        await asyncio.sleep(0.05)
    written = exchange.body.count(b"data: ")
    assert written == 2  # one chunk may have been taken before the pause
    exchange.request.producer.resumeProducing()
    await exchange.until(lambda: b"data: d" in exchange.body)
    exchange.hang_up()
    await finish(task)
    assert [event.data for event in Decoder().feed(exchange.body)] == list("abcd")


async def test_each_piece_waits_for_the_buffer_of_daphne() -> None:
    exchange = Daphne()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    exchange.request.producer.pauseProducing()
    value = "x" * 500_000
    await apublish("t", "ping", value)
    await exchange.until(lambda: len(exchange.sent) == 3)
    for number in range(3, 9):
        assert len(exchange.sent) == number
        assert len(exchange.sent[-1]["body"]) == 64 * 1024
        exchange.request.producer.resumeProducing()
        exchange.request.producer.pauseProducing()
        await exchange.until(lambda number=number: len(exchange.sent) > number)
    exchange.request.producer.resumeProducing()
    await exchange.until(lambda: exchange.body.endswith(b"\n\n"))
    assert [event.data for event in Decoder().feed(exchange.body)] == [value]
    exchange.hang_up()
    await finish(task)


async def test_the_producer_is_unregistered_before_the_end_of_the_body() -> None:
    exchange = Daphne()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    stream.end(Reason.CLOSE_REQUESTED)
    await finish(task)
    assert exchange.is_complete
    assert exchange.request.complaints == []
    assert exchange.request.producer is None


async def test_a_stream_of_a_lost_daphne_connection_ends() -> None:
    exchange = Daphne()
    stream = stream_of()
    exchange.request.lose()
    await finish(serve(stream, Receiver(exchange.receive), exchange.send))
    assert exchange.request.producer is None
    assert exchange.sent == []


async def test_a_daphne_connection_that_is_lost_while_paused_ends_the_stream() -> None:
    exchange = Daphne()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    exchange.request.producer.pauseProducing()
    exchange.request.lose()
    await finish(task)
    assert stream.reason is Reason.CLIENT_DISCONNECTED


async def test_aborting_a_stream_aborts_the_daphne_connection_once() -> None:
    exchange = Daphne()
    stream = stream_of()
    task = exchange.run(Handover(leaves(stream)), "/")
    await exchange.until(lambda: len(exchange.sent) == 2)
    exchange.request.producer.pauseProducing()
    stream.abort(Reason.STALLED)
    await finish(task)
    assert exchange.request.aborts == 1
    assert not exchange.is_complete


# A server without asyncio tasks


class Steps:
    """Runs a coroutine without a task, as servers in other languages may do."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self.work = work
        self.done = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(self.step)

    def step(self, _: object = None) -> None:
        try:
            future = self.work.send(None)
        except StopIteration:
            self.done.set_result(None)
        except BaseException as error:  # noqa: BLE001
            self.done.set_exception(error)
        else:
            if future is None:
                asyncio.get_running_loop().call_soon(self.step)
            else:
                future._asyncio_future_blocking = False
                future.add_done_callback(self.step)


async def test_a_server_without_tasks_can_send_a_stream() -> None:
    exchange = Exchange()
    stream = stream_of()
    steps = Steps(serve(stream, Receiver(exchange.receive), exchange.send))
    await exchange.until(lambda: exchange.sent)
    exchange.hang_up()
    await finish(steps.done)
    assert stream.reason is Reason.CLIENT_DISCONNECTED
    assert len(exchange.sent) == 1


async def test_a_cancellation_by_a_server_without_tasks_reaches_it() -> None:
    exchange = Exchange()
    stream = stream_of()
    work = serve(stream, Receiver(exchange.receive), exchange.send)
    with pytest.raises(asyncio.CancelledError):
        work.throw(asyncio.CancelledError)
    await stream.aclose()
