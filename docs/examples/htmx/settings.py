"""Settings of the example for htmx 4."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "htmx.urls"
EVENTSOURCE_EVENT_CLASS = "htmx.events.HtmlEvent"
