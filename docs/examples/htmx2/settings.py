"""Settings of the example for htmx 2."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "htmx2.urls"
