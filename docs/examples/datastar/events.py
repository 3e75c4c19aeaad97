"""The Event class of the example, and a function that publishes events of datastar-py."""

from datastar_py.consts import EventType

from django_eventsource import publish
from django_eventsource.client import Decoder
from django_eventsource.events import StringIdEvent


class DatastarEvent(StringIdEvent):
    """A durable event that Datastar applies to the page."""

    ACTIONS = [*EventType, *StringIdEvent.ACTIONS]


def publish_datastar(token: str, text: str) -> DatastarEvent:
    """Publish an event as ``ServerSentEventGenerator`` of datastar-py returns it."""
    (event,) = Decoder().feed(text.encode())
    return publish(token, event.event, event.data, DatastarEvent)
