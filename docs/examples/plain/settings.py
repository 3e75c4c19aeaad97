"""Settings of the example for a plain EventSource."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "plain.urls"
