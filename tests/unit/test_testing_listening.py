"""The listener of the test kit, in the test classes of Django and in asynchronous tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.asgi import get_asgi_application
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient, TestCase, TransactionTestCase
from django.urls import NoReverseMatch, include, path
from testproject.asgi import application

from django_eventsource import apublish, apublish_many
from django_eventsource.events import Event, StringEvent
from django_eventsource.grants import make_grant
from django_eventsource.history import get_history
from django_eventsource.streaming.registry import registry
from django_eventsource.testing import (
    ClientStream,
    atrim_history,
    capture_events,
    listen,
    move_time,
    recycle_server,
)
from django_eventsource.testing.connection import open_connections
from django_eventsource.views import EventSourceView
from tests.support.waiting import until

ALLOW_ANY = "django_eventsource.policies.AllowAny"


class Stamped(Event):
    """A durable event with an id of its own."""

    ACTIONS = ["ping"]
    id = property(lambda self: f"own-{self.value[0]}")


class WithState(EventSourceView):
    async def initial_state(self, request: Any, token: str) -> list[tuple[str, Any]]:
        return [("ping", "x" * 100_000)]


urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("live/<action>/<token>", EventSourceView.as_view(event_class=StringEvent)),
    path("state/<action>/<token>", WithState.as_view()),
    path("stamped/<action>/<token>", EventSourceView.as_view(event_class=Stamped)),
]


class Tampered:
    """The project's application, whose events are changed on their way to the client."""

    def __init__(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        self._change = change
        self._held: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def tampering(message: Any) -> None:
            blocks = message.get("body", b"").split(b"\n\n")
            if b"data:" in blocks[0]:
                self._held += blocks[:-1]
                if len(self._held) < 3:
                    return
                body = b"".join(block + b"\n\n" for block in self._change(self._held))
                message = message | {"body": body}
            await send(message)

        await application(scope, receive, tampering)


def lost(blocks: list[bytes]) -> list[bytes]:
    return [blocks[0], *blocks[2:]]


def doubled(blocks: list[bytes]) -> list[bytes]:
    return [*blocks[:2], *blocks[1:]]


def swapped(blocks: list[bytes]) -> list[bytes]:
    return blocks[::-1]


async def publish_abc() -> list[Event]:
    return await apublish_many([("t", "ping", text) for text in "abc"])


async def enter(stream: ClientStream) -> None:
    await stream.__aenter__()


async def after_an_hour(work: Awaitable[None]) -> None:
    """Await work, and move the time by hours while it waits."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0)
        with move_time(3601):
            await asyncio.sleep(0)
    await task


def grant() -> str:
    return make_grant("t", listen=True)


class InTestCase(TestCase):
    """The request sees the transaction of the test."""

    @classmethod
    def setUpTestData(cls):
        cls.user = User.objects.create_user("ann")
        cls.user.user_permissions.add(Permission.objects.get(codename="listen_event"))

    async def test_a_user_with_the_permission_receives_what_is_published(self):
        async with listen("t", user=self.user) as stream:
            async with capture_events():
                await apublish("t", "ping", "a")
            assert (await stream.next("ping")).data == "a"
            await stream.cut()
            async with capture_events():
                await apublish("t", "ping", "b")
            assert (await stream.next("ping")).data == "b"
            await stream.assert_complete()

    async def test_an_anonymous_listener_is_refused(self):
        async with listen("t") as stream:
            assert stream.status == 401
            with pytest.raises(AssertionError, match="cannot be opened: the response is 401"):
                await stream.next()

    async def test_a_logout_ends_the_stream_of_the_client(self):
        await self.async_client.aforce_login(self.user)
        async with listen("t", client=self.async_client) as stream:
            async with capture_events():
                await self.async_client.alogout()
            with pytest.raises(AssertionError, match="401"):
                await stream.next()

    async def test_requests_that_overlap_keep_the_transaction(self):
        async with listen("t", user=self.user) as first:
            async with listen("t", user=self.user) as second:
                async with capture_events():
                    await apublish("t", "ping", "a")
                await second.next("ping")
            await first.next("ping")
            assert await User.objects.acount() == 1
            assert len(open_connections._tasks) == 1
        assert not open_connections._tasks


class InTransactionTestCase(TransactionTestCase):
    async def test_a_stream_survives_a_disconnect(self):
        async with listen("t", grant=grant()) as stream:
            await apublish("t", "ping", "a")
            await stream.next("ping")
            await stream.cut()
            await apublish("t", "ping", "b")
            assert (await stream.next("ping")).data == "b"
            await stream.assert_complete()


class TestStream:
    """The listener in asynchronous tests of pytest."""

    @pytest.fixture(autouse=True)
    def site(self, settings, memory_history) -> Iterator[None]:
        settings.ROOT_URLCONF = __name__
        settings.EVENTSOURCE_POLICY = ALLOW_ANY
        yield
        assert not list(registry.streams())

    async def test_a_live_only_event_that_follows_the_beginning_is_received(self):
        async with listen("t", url="/live/poll/t") as stream:
            await apublish("t", "ping", "a", StringEvent)
            assert (await stream.next("ping")).data == "a"
            with pytest.raises(AssertionError, match="its event class is live only"):
                await stream.assert_complete()

    async def test_a_large_initial_state_comes_before_the_first_id(self):
        await apublish("t", "ping", "a")
        async with listen("t", url="/state/poll/t") as stream:
            assert len((await stream.next("ping")).data) == 100_000
            await apublish("t", "ping", "b")
            assert (await stream.next("ping")).data == "b"
            await stream.assert_complete()

    async def test_events_before_the_last_event_id_are_replayed(self):
        first = await apublish("t", "ping", "a")
        await apublish("t", "ping", "b")
        async with listen("t", last_event_id=str(first.id)) as stream:
            assert (await stream.next()).data == "b"
            await stream.assert_complete()
            assert stream.last_event_id == stream.events[-1].id

    async def test_the_response_can_be_looked_at(self):
        async with listen("t", headers={"X-Test": "1"}) as stream:
            assert stream.status == 200
            assert stream.headers["content-type"] == "text/event-stream"
            assert stream.is_open
            assert stream.body.startswith(b"id: ")
        assert not stream.is_open

    async def test_before_the_beginning_there_is_no_response(self):
        stream = listen("t")
        assert (stream.status, stream.headers, stream.is_open) == (None, {}, False)

    async def test_an_unexpected_event_is_shown_with_what_was_received(self):
        async with listen("t") as stream:
            await apublish_many([("t", "ping", "a"), ("t", "ping", "b")])
            await stream.next("ping")
            with pytest.raises(AssertionError) as caught:
                await stream.next("close")
        first, second = (event.id for event in stream.events)
        assert str(caught.value) == (
            f"Expected the event 'close' of 't', and received ping 'b' (id {second}). "
            f"Received: ping 'a' (id {first}); ping 'b' (id {second})."
        )

    async def test_a_missing_event_is_reported_with_what_was_received(self):
        async with listen("t", timeout_seconds=3600) as stream:
            with pytest.raises(AssertionError) as caught:
                await after_an_hour(stream.next("ping"))
        assert str(caught.value) == "No event 'ping' of 't' in 3600 seconds. Received: nothing."

    async def test_a_stream_that_was_closed_cannot_be_opened_again(self):
        async with listen("t") as stream:
            await apublish("t", "close")
            await stream.next("close")
            with pytest.raises(AssertionError, match="the response is 204"):
                await stream.next()
            await stream.assert_complete()

    async def test_a_stalled_client_receives_everything_after_it_has_resumed(self, settings):
        settings.EVENTSOURCE_STREAM_BUFFER_BYTES = 16 * 1024
        async with listen("t") as stream:
            await apublish("t", "ping", "before")
            await until(lambda: stream.events)
            stream.stall()
            for n in range(50):
                await apublish("t", "ping", f"{n} {'x' * 1000}")
            assert (await stream.next("ping")).data == "before"
            assert len(stream.events) == 1
            for call in (stream.next, stream.assert_complete):
                with pytest.raises(RuntimeError, match="call resume"):
                    await call()
            stream.resume()
            for n in range(50):
                assert (await stream.next("ping")).data.startswith(f"{n} ")
            await stream.assert_complete()

    async def test_a_stalled_client_that_disconnects_has_not_received_what_was_sent(self):
        async with listen("t") as stream:
            stream.stall()
            await apublish("t", "ping", "a")
            await stream.cut()
            assert stream.events == []
            with pytest.raises(RuntimeError, match="is not open"):
                stream.stall()
            assert (await stream.next("ping")).data == "a"

    async def test_the_server_disconnects_a_client_that_stalls(self):
        async with listen("t") as stream:
            stream.stall()
            await apublish("t", "ping", "a")
            await until(lambda: stream._connection._may_send._waiters)
            with move_time(31):
                await until(lambda: not stream.is_open)
            with pytest.raises(RuntimeError, match="is not open"):
                stream.resume()
            assert (await stream.next("ping")).data == "a"

    async def test_a_stream_of_own_ids_is_complete(self):
        async with listen("t", url="/stamped/poll/t") as stream:
            for text in "abc":
                await apublish("t", "ping", text, Stamped)
                if text == "b":
                    await stream.cut()
            await stream.assert_complete()
            assert [event.id for event in stream.events] == ["own-a", "own-b", "own-c"]

    async def test_live_only_events_and_reconnection_times_are_not_compared(self):
        async with listen("t") as stream:
            for text, event_class in zip("abcd", (StringEvent, None) * 2, strict=True):
                await apublish("t", "ping", text, event_class)
                await stream.next("ping")
                await apublish("t", "retry", "1000")
            await stream.assert_complete()
            assert [event.data for event in stream.events] == ["a", "b", "c", "d"]

    async def test_a_missing_event_makes_a_stream_incomplete(self):
        async with listen("t", application=Tampered(lost), timeout_seconds=3600) as stream:
            events = await publish_abc()
            await until(lambda: len(stream.events) == 2)
            with pytest.raises(AssertionError) as caught:
                await after_an_hour(stream.assert_complete())
        a, b, c = (event.id for event in events)
        assert str(caught.value) == (
            f"The stream of 't' is not complete. Missing: ping 'b' (id {b}). "
            f"Published: ping 'a' (id {a}); ping 'b' (id {b}); ping 'c' (id {c}). "
            f"Received: ping 'a' (id {a}); ping 'c' (id {c})."
        )

    async def test_an_event_that_was_received_twice_makes_a_stream_incomplete(self):
        async with listen("t", application=Tampered(doubled)) as stream:
            await publish_abc()
            with pytest.raises(AssertionError, match=r"Received more often .* ping 'b' .*Pub"):
                await stream.assert_complete()

    async def test_another_order_makes_a_stream_incomplete(self):
        async with listen("t", application=Tampered(swapped)) as stream:
            await publish_abc()
            with pytest.raises(AssertionError, match="The order differs"):
                await stream.assert_complete()

    async def test_a_reset_makes_a_stream_incomplete(self):
        async with listen("t") as stream:
            await apublish("t", "ping", "a")
            await stream.next("ping")
            await stream.cut()
            await apublish("t", "ping", "b")
            await atrim_history()
            assert '"reason": "expired"' in (await stream.next("reset")).data
            with pytest.raises(AssertionError, match="has dropped events since"):
                await stream.assert_complete()

    async def test_a_reset_is_reported_although_the_events_are_stored(self):
        async with listen("t", last_event_id="unknown") as stream:
            await stream.next("reset")
            with pytest.raises(AssertionError, match=r"It received reset .*unknown"):
                await stream.assert_complete()

    async def test_a_stream_continues_after_the_server_was_recycled(self):
        async with listen("t") as stream, listen("u") as other:
            await recycle_server()
            await until(lambda: not (stream.is_open or other.is_open))
            assert b"retry: " in stream.body
            await apublish("t", "ping", "a")
            await stream.next("ping")
            await stream.assert_complete()

    async def test_an_application_without_the_wrapper_can_be_tested(self):
        async with listen("t", application=get_asgi_application()) as stream:
            await apublish("t", "ping", "a")
            await stream.next("ping")
            await stream.cut()
            await apublish("t", "ping", "b")
            await stream.assert_complete()

    async def test_an_exception_of_the_application_is_raised(self):
        async def broken(scope: Any, receive: Any, send: Any) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with listen("t", application=broken):
                pass
        # It does not replace an exception of the test.
        with pytest.raises(KeyError):
            async with listen("t", application=broken):
                raise KeyError

    async def test_an_application_that_does_not_respond_is_reported(self):
        async def silent(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            assert (await receive())["type"] == "http.disconnect"

        with pytest.raises(AssertionError, match=r"No response of 't' in 3600 seconds\."):
            await after_an_hour(enter(listen("t", application=silent, timeout_seconds=3600)))
        assert not open_connections._tasks

    async def test_an_application_that_ignores_the_disconnect_is_reported(self):
        async def deaf(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b":\n", "more_body": True})
            await asyncio.Event().wait()

        stream = listen("t", application=deaf, timeout_seconds=3600)
        await enter(stream)
        with pytest.raises(AssertionError, match=r"did not end the request 3600 seconds after"):
            await after_an_hour(stream.cut())

    async def test_a_stream_that_does_not_reach_its_newest_event_is_reported(self, monkeypatch):
        reads: list[str] = []

        async def never(token: str, *args: Any, **options: Any) -> Any:
            reads.append(token)
            await asyncio.Event().wait()

        monkeypatch.setattr(get_history(), "aread", never)
        opening = asyncio.ensure_future(enter(listen("t", timeout_seconds=3600)))
        await until(lambda: "t" in reads)
        with pytest.raises(AssertionError, match="No end of the stored events"):
            await after_an_hour(opening)


def test_a_user_and_a_client_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        listen("t", user=User(), client=AsyncClient())


def test_without_an_asgi_application_the_setting_is_named(settings):
    del settings.ASGI_APPLICATION
    with pytest.raises(ImproperlyConfigured, match="ASGI_APPLICATION"):
        listen("t")


def test_without_the_urls_the_argument_is_named(settings):
    settings.ROOT_URLCONF = ()
    with pytest.raises(NoReverseMatch, match="url="):
        listen("t")


def test_a_grant_is_appended_to_the_query():
    assert listen("t", url="/x?a=1", grant="g")._url == "/x?a=1&grant=g"
