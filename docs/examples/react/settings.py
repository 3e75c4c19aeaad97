"""Settings of the example for React."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "react.urls"
