"""Django signals. Receivers may be plain functions or coroutine functions.

What a receiver raises is logged, and harms neither the stream nor the publisher.
"""

from __future__ import annotations

from django.dispatch import Signal

stream_opened = Signal()
"""A stream begins. Arguments: ``listener`` (a :class:`~django_eventsource.listeners.Listener`)
and ``request``. The sender is the view's class."""

stream_closed = Signal()
"""A stream has ended. Arguments: ``listener``, ``reason`` (a
:class:`~django_eventsource.streams.Reason`) and ``seconds``, for which it was open. The
sender is the view's class."""

event_published = Signal()
"""An event was published: its transaction, if there is one, has committed. Argument:
``event``, with its id. The sender is the event's class."""
