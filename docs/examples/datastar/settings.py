"""Settings of the example for Datastar."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "datastar.urls"
EVENTSOURCE_EVENT_CLASS = "datastar.events.DatastarEvent"
