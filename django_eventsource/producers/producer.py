"""One production: from a source to the events of a token."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypedDict, TypeVar

from asgiref.sync import sync_to_async
from django.db import close_old_connections, transaction

from .._logging import ThrottledLogger
from .._timing import Backoff
from ..conf import MAX_NUMBER, check_event_class, conf
from ..events import Event, is_durable
from ..exceptions import EventTooLarge, InvalidEvent, InvalidParameter
from ..history import Draft, Kind, Position, get_history
from ..operations.productions import INTERRUPTED, RENEWALS, Production, renewal_seconds
from ..protocol.cursors import Cursor, parse_cursor
from ..protocol.field_rules import shown
from ..protocol.frames import Decoder
from ..protocol.tokens import check_token
from ..publishing import publish_event
from ..streaming.stream import EventStream
from .chunks import DELTA, make_chunks
from .sources import Source, aclose_unread, check_source, iterate

logger = logging.getLogger("django_eventsource.producers")

T = TypeVar("T")
OnComplete = Callable[[Any], object]
DescribeError = Callable[[Exception], str]

STOP = "stop"
STOPPED = "stopped"
DONE = "done"
FAILED = "failed"

INTERVAL_SECONDS = 0.05
MAX_BYTES = 16 * 1024 * 1024

FAILED_MESSAGE = "An error occurred."
"""The value of ``failed``, which pages may show."""


class Options(TypedDict, total=False):
    """The arguments of a production that have a default. ``produce()`` describes them."""

    event_class: type[Event] | None
    on_complete: OnComplete | None
    interval_seconds: float
    max_bytes: int
    describe_error: DescribeError | None


async def produce(
    token: str,
    source: Source,
    *,
    event_class: type[Event] | None = None,
    on_complete: OnComplete | None = None,
    interval_seconds: float = INTERVAL_SECONDS,
    max_bytes: int = MAX_BYTES,
    describe_error: DescribeError | None = None,
) -> Event:
    """Publish what a source yields as events of a token, and then exactly one end.

    The chunks are events of the action ``delta``. The end is ``done`` with everything that the
    source has yielded; ``failed`` with a message; ``stopped`` after :func:`stop_production`; or
    ``interrupted`` if this call was cancelled or its process died. The actions need not be in the
    ``ACTIONS`` of the class, which list what clients may post.

    The values of a class of text are texts. Those of a JSON class are lists of chunks. The value
    of ``done`` is empty, or ``null``, if everything has more bytes than one event may have.

    :param token: the token, which has no other production.
    :param source: an asynchronous or synchronous iterator of chunks: texts, or JSON values for a
        JSON class. A synchronous one runs in a thread.
    :param event_class: a durable class; ``EVENTSOURCE_EVENT_CLASS`` by default.
    :param on_complete: a synchronous function that is called with everything that the source has
        yielded, a text or a list of chunks. It runs in a thread, in one transaction with the
        publication of ``done``. If it raises an error, the end is ``failed``.
    :param interval_seconds: the fewest seconds between two deltas.
    :param max_bytes: the most bytes of all chunks. If the source yields more, the end is
        ``failed``.
    :param describe_error: returns the message of ``failed`` for an error. The default is the same
        text for all errors.
    :returns: the end.
    :raises ProductionRunning: if the token has another production. Nothing was published. The
        source was closed and not read, so pass another one to the next call.
    :raises TransactionManagementError: in a transaction, because the production would begin before
        the commit; or, after ``failed``, if the transaction of ``on_complete`` was rolled back
        without an exception.
    :raises ValueError: if the token, the class or a number is not valid. Nothing was published.
    :raises TypeError: if the source is not iterable, or ``on_complete`` is asynchronous.
    :raises Exception: the error of the source or of ``on_complete``, after ``failed``.
    """
    producer = Producer(
        token,
        source,
        event_class=event_class,
        on_complete=on_complete,
        interval_seconds=interval_seconds,
        max_bytes=max_bytes,
        describe_error=describe_error,
    )
    await producer.aclaim()
    return await producer.run()


class Producer:
    """One production, in the process that runs it. The parameters are those of ``produce()``."""

    WAITING_BYTES = 256 * 1024
    """The bytes that may wait to be published. The source is not read on before that."""
    PATIENCE_SECONDS = 30.0
    """Seconds for which an event is published again while the history fails."""
    BACKOFF_SECONDS = (0.1, 0.5, 1, 2, 5)
    """Seconds between attempts after failures that follow one another."""
    CLOSE_SECONDS = 5.0
    """Seconds for which the end waits until the source is closed."""
    LISTEN_SECONDS = 1.0
    """Seconds after which the token is read again when its stream has ended."""

    def __init__(
        self,
        token: str,
        source: Source,
        *,
        event_class: type[Event] | None = None,
        on_complete: OnComplete | None = None,
        interval_seconds: float = INTERVAL_SECONDS,
        max_bytes: int = MAX_BYTES,
        describe_error: DescribeError | None = None,
    ) -> None:
        check_token(token)
        self.event_class = check_durable(event_class)
        check_source(source)
        call = getattr(on_complete, "__call__", None)  # noqa: B004
        if inspect.iscoroutinefunction(on_complete) or inspect.iscoroutinefunction(call):
            raise TypeError(
                "on_complete must be a synchronous function, because it runs in a transaction; "
                f"not {shown(on_complete)}."
            )
        for name, value in (("interval_seconds", interval_seconds), ("max_bytes", max_bytes)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 < value <= MAX_NUMBER):
                raise InvalidParameter(f"{name} must be a positive number, not {shown(value)}.")
        self.token = token
        self._source = source
        self._on_complete = on_complete
        self._interval_seconds = interval_seconds
        self._max_bytes = max_bytes
        self._describe_error = describe_error
        self._chunks = make_chunks(self.event_class)
        interrupted = Draft.of(self.event_class(token, INTERRUPTED, None)).data.decode()
        self._production = Production(id=uuid.uuid4().hex, token=token, interrupted=interrupted)
        self._position: Position
        self._renewing: asyncio.Task[None]
        self._in_doubt = False
        """Whether the history has dropped the lease, so that another process may have published
        the end."""
        self._ended_by: str | None = None
        """The end that was requested: ``stopped``, or ``interrupted`` by another process."""
        self._news = asyncio.Event()
        """Set if there are chunks to publish, or no more of them."""
        self._room = asyncio.Event()
        self._stop = asyncio.Event()

    def claim(self) -> None:
        """Claim the token.

        :raises ProductionRunning: if it has another production.
        :raises TransactionManagementError: in a transaction.
        """
        self._position = self._production.claim()

    async def aclaim(self) -> None:
        """Call :meth:`claim` in a thread. If it raises an error, close the source."""
        history = get_history()
        try:
            await _finished(history.call(self.claim))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                with contextlib.suppress(Exception):  # then another process publishes the end
                    await _finished(history.call(self.release))
            await aclose_unread(self._source)
            raise

    def release(self) -> None:
        """Withdraw the claim of a production that does not run."""
        self._production.release()

    async def run(self) -> Event:
        """Publish the chunks and the end, and return the end."""
        collecting = asyncio.create_task(self._collect())
        collecting.add_done_callback(lambda task: self._news.set())
        self._renewing = asyncio.create_task(self._renew_forever())
        tasks = [collecting, asyncio.create_task(self._listen()), self._renewing]
        try:
            try:
                await self._publish_deltas(collecting)
                if self._ended_by is not None:
                    return await self._end(self._ended_by)
                return await self._complete()
            except asyncio.CancelledError:
                await self._end(INTERRUPTED)
                raise
            except Exception as error:
                await self._publish_end(self._failed(error), None)
                raise
        finally:
            await self._close(tasks)

    # Tasks

    async def _collect(self) -> None:
        """Read the source, at most so far ahead of what is published."""
        async with aclosing(iterate(self._source)) as chunks:
            async for chunk in chunks:
                self._chunks.add(chunk)
                if self._chunks.size > self._max_bytes:
                    raise InvalidEvent(
                        f"The source yielded more than max_bytes ({self._max_bytes}) bytes."
                    )
                self._news.set()
                # An asynchronous source may never suspend, and would stop the event loop.
                await asyncio.sleep(0)
                while self._chunks.waiting > self.WAITING_BYTES:
                    self._room.clear()
                    await self._room.wait()
        self._chunks.finish()

    async def _listen(self) -> None:
        """Receive the request to stop, from any process, and an end by another process."""
        position = self._position
        while True:
            try:
                decoder = Decoder()
                async for data in EventStream(self.token, position):
                    for event in decoder.feed(data):
                        if event.event in (STOP, INTERRUPTED):
                            self._ended_by = STOPPED if event.event == STOP else INTERRUPTED
                            self._stop.set()
                            self._news.set()
                            return
                # Also after a close of the token, which ends its streams.
                cursor = parse_cursor(decoder.last_event_id) or position.cursor
                seq = (await get_history().alocate(self.token, cursor)).seq
                position = Position(seq=seq, cursor=Cursor.at(seq, reopened=True))
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "Cannot receive requests to stop a production; retrying.", error=error
                )
            await asyncio.sleep(self.LISTEN_SECONDS)

    async def _renew_forever(self) -> None:
        seconds = renewal_seconds()
        while True:
            await asyncio.sleep(seconds)
            seconds = renewal_seconds()
            try:
                await _finished(get_history().call(self._renew))
            except Exception as error:  # noqa: BLE001
                ThrottledLogger(logger).error(
                    "The lease of a production could not be renewed; retrying.", error=error
                )
                # Sooner than another process looks twice for dead productions.
                seconds /= RENEWALS

    def _renew(self) -> None:
        if not self._production.renew():
            self._in_doubt = True

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        ended, pending = await asyncio.wait(tasks, timeout=self.CLOSE_SECONDS)
        # An error of the source after the request to stop is of no interest.
        await asyncio.gather(*ended, return_exceptions=True)
        if pending:
            logger.warning("The source of a production of %r does not end.", self.token)

    # Publishing

    async def _publish_deltas(self, collecting: asyncio.Task[None]) -> None:
        """Publish all chunks, until the end of the source or the request to stop.

        :raises Exception: the error of the source, after its chunks were published.
        """
        number = 0
        while self._ended_by is None:
            if self._chunks.waiting:
                number += 1
                event = self.event_class(self.token, DELTA, self._chunks.take())
                self._room.set()
                # With a key, so that an attempt whose success is not known can be repeated.
                key = f"delta:{self._production.id}:{number}"
                await self._publish(lambda: publish_event(event, key))  # noqa: B023
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_seconds):
                        await self._stop.wait()
            elif collecting.done():
                return await collecting
            else:
                await self._news.wait()
                self._news.clear()
        return None

    async def _complete(self) -> Event:
        """Call ``on_complete``, and publish ``done`` in the same transaction."""
        done, kind = self._done()
        if self._on_complete is not None:
            if await self._was_interrupted():
                return await self._end(INTERRUPTED)
            await _finished(sync_to_async(self._complete_in_transaction)(done, kind))
        # If it is published already, the key prevents a second one. In a history outside of the
        # database, publishing may have failed after the commit.
        return await self._publish_end(done, kind)

    async def _was_interrupted(self) -> bool:
        """Return whether another process has published the end, which may not be received yet."""
        await self._publish(self._renew)
        return self._in_doubt and await self._publish(self._find_interrupted)

    def _find_interrupted(self) -> bool:
        after = self._position.seq
        while entries := get_history().read(self.token, after).entries:
            if any(entry.draft.action == INTERRUPTED for entry in entries):
                return True
            after = entries[-1].seq
        return False

    def _complete_in_transaction(self, done: Event, kind: Kind | None) -> None:
        assert self._on_complete is not None
        using = get_history().using
        commits: list[bool] = []
        # No request begins or ends in this thread.
        close_old_connections()
        try:
            with transaction.atomic(using):
                transaction.on_commit(lambda: commits.append(True), using)
                self._on_complete(self._chunks.whole())
                self._production.publish_end(done, kind)
            if not commits:
                raise transaction.TransactionManagementError(
                    "The transaction of on_complete was rolled back without an exception: "
                    "on_complete has called set_rollback(), or has handled a database error "
                    "outside of transaction.atomic()."
                )
        finally:
            close_old_connections()

    def _done(self) -> tuple[Event, Kind | None]:
        event = self.event_class(self.token, DONE, self._chunks.value())
        try:
            draft = Draft.of(event)
        except EventTooLarge:
            return self.event_class(self.token, DONE, None), None
        # If the class has the close action "done", it closes the token.
        return event, Kind.WHOLE if draft.kind == Kind.EVENT else None

    async def _end(self, action: str, value: str | None = None) -> Event:
        return await self._publish_end(self.event_class(self.token, action, value), None)

    async def _publish_end(self, event: Event, kind: Kind | None) -> Event:
        """Publish the end, and return the one that is stored, which may be another one."""
        end = await self._publish(lambda: self._store_end(event, kind))
        # A renewal after the release would announce the leases again.
        self._renewing.cancel()
        await asyncio.wait([self._renewing])
        await self._publish(self._production.release)
        return end

    def _store_end(self, event: Event, kind: Kind | None) -> Event:
        self._production.publish_end(event, kind)
        assert event._seq is not None
        entries = get_history().read(self.token, event._seq - 1, max_events=1).entries
        if not entries or entries[0].seq != event._seq or entries[0].draft.action == event.action:
            return event
        stored = self.event_class(self.token, entries[0].draft.action, None)
        stored._seq = event._seq
        vars(stored)["id"] = entries[0].id
        return stored

    async def _publish(self, work: Callable[[], T]) -> T:
        """Call a function that publishes, and repeat it while the history fails.

        :raises Exception: the error of the history, if it fails for too long.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.PATIENCE_SECONDS
        backoff = Backoff(self.BACKOFF_SECONDS)
        history = get_history()
        while True:
            try:
                return await _finished(history.call_for(self.token, work))
            except history.storage_errors as error:
                if loop.time() > deadline:
                    raise
                ThrottledLogger(logger).error(
                    "An event of a production could not be published; retrying.", error=error
                )
            await asyncio.sleep(backoff.next())

    def _failed(self, error: Exception) -> Event:
        if self._describe_error is not None:
            try:
                text = self._chunks.message(str(self._describe_error(error)))
                event = self.event_class(self.token, FAILED, text)
                Draft.of(event)
            except Exception:
                logger.exception("describe_error of a production failed.")
            else:
                return event
        return self.event_class(self.token, FAILED, self._chunks.message(FAILED_MESSAGE))


def check_durable(event_class: type[Event] | None) -> type[Event]:
    """Return the class of the events of a production.

    :raises InvalidEvent: if it is live-only.
    """
    event_class = conf.event_class if event_class is None else check_event_class(event_class)
    if not is_durable(event_class):
        raise InvalidEvent(
            "A production needs a durable event class, so that no page loses a part of it. "
            f"Events of {event_class.__name__} are live only: pass event_class=StringIdEvent or "
            "JSONIdEvent."
        )
    return event_class


async def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Await work that must not end in the middle if this task is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
