"""Settings of the example for fetch-event-source."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "fetch_event_source.urls"
