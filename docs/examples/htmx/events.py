"""The Event class of the example."""

from django_eventsource.events import StringIdEvent


class HtmlEvent(StringIdEvent):
    """Durable HTML. An event of the action ``message`` has no name on the wire."""

    ACTIONS = ["message", *StringIdEvent.ACTIONS]
