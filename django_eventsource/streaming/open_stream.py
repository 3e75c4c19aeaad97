"""A stream together with its listener, its deadlines, and the connection that it is sent on."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ..delivery.subscription import Writer
from ..history import Position
from ..signals import Listener, Reason
from .stream import EventStream
from .transport import unsent

NEVER = float("inf")


class OpenStream(EventStream):
    """A stream that has a listener. Its times are on the monotonic clock, in seconds.

    The class adds the state for the registry, for the sweep of the supervisor, and for the
    wrapper in :mod:`django_eventsource.asgi`.

    :param token: the first token, as for :class:`EventStream`.
    :param position: where the stream starts in the history of that token.
    :param listener: the client.
    :param recheck: asks the policy again; returns whether the listener may continue.
    :param sender: the class of the view, which is the sender of the signals.
    :param options: other arguments of :class:`EventStream`.
    """

    __slots__ = (
        "_is_sending",
        "_task",
        "_unsent",
        "admitted_at",
        "ends_at",
        "listener",
        "loop",
        "on_end",
        "recheck",
        "recheck_at",
        "sender",
        "transport",
        "was_cut",
    )

    def __init__(
        self,
        token: str,
        position: Position,
        *,
        listener: Listener,
        recheck: Callable[[], Awaitable[bool]] | None = None,
        sender: type | None = None,
        **options: Any,
    ) -> None:
        self.listener = listener
        self.recheck = recheck
        self.sender = sender
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop that serves the stream; set when it is admitted."""
        self.on_end: Callable[[OpenStream], None] | None = None
        """Called once when the stream has ended, in any thread; set when it is admitted."""
        self.admitted_at = self.ends_at = self.recheck_at = NEVER
        self.transport: Any = None
        """The server's transport; ``None`` if the server is unknown or Django sends the stream."""
        self.was_cut = False
        """Whether :meth:`abort` cancelled the task that sends the stream."""
        self._task: asyncio.Task[Any] | None = None
        self._is_sending = False
        self._unsent: int | None = None
        super().__init__(token, position, **options)

    def __del__(self) -> None:
        super().__del__()
        if getattr(self, "on_end", None) is not None:
            self.reason = self.reason or Reason.CLIENT_DISCONNECTED
            self._report_end()

    def begin_sending(self, task: asyncio.Task[Any] | None) -> None:
        """Set the task that sends the stream, which stays registered until :meth:`end_sending`.

        :param task: the task that :meth:`abort` cancels.
        """
        self._task = task
        self._is_sending = True

    def note_progress(self) -> None:
        """Record that the server has accepted data, and that more is sent to it now."""
        self.sending_since = time.monotonic()

    def write_with(self, writer: Writer) -> None:
        """Set the writer that the feed uses while the stream's task waits."""
        self._subscriber.writer = writer

    def note_pending_write(self, size: int) -> None:
        """Record that a write of the feed has to wait or has failed, and wake the stream's task.

        :param size: the bytes of the write.
        """
        self._subscriber.in_flight = size
        self.note_progress()
        self._subscriber.wake()

    def end_sending(self) -> None:
        """Close the stream: its last byte was sent, or the connection is closed."""
        self._is_sending = False
        self._task = self.transport = self._subscriber.writer = None
        self._close(Reason.CLIENT_DISCONNECTED)

    def abort(self, reason: Reason) -> None:
        """End the stream at once, drop its buffer, and cancel the task that sends it.

        Call it in the event loop's thread.
        """
        self._close(reason)
        task, self._task = self._task, None
        if task is not None:
            self.was_cut = task.cancel()

    def stalled_for(self, now: float) -> float:
        """Return the seconds for which the client has not read anything that was sent.

        Call it periodically. The client has made progress if fewer bytes are unsent than at the
        previous call.
        """
        if self.sending_since is None:
            return 0.0
        size = unsent(self.transport)
        if size is not None and self._unsent is not None and size < self._unsent:
            self.sending_since = now
        self._unsent = size
        return now - self.sending_since

    def _close(self, reason: Reason) -> None:
        super()._close(reason)
        if not self._is_sending:
            self._report_end()

    def _report_end(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self)
