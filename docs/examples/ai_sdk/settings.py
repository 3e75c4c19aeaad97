"""Settings of the example for the AI SDK."""

from base_settings import *  # noqa: F403

ROOT_URLCONF = "ai_sdk.urls"
