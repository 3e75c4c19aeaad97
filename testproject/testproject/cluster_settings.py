"""Settings of the demo site on several processes. (*) marks what differs from one process.

`make demo-cluster` sets the environment variables.
"""

import os

from .settings import *  # noqa: F403

# (*) One database for all processes.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ.get("EVENTSOURCE_DEMO_PGHOST", "127.0.0.1"),
        "USER": "postgres",
        "NAME": "postgres",
    }
}

REDIS_URL = os.environ.get("EVENTSOURCE_DEMO_REDIS", "redis://127.0.0.1:6379")

# (*) Live-only events reach the other processes. Without a shared layer only durable events reach
# them, through the database.
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [{"address": REDIS_URL, "socket_timeout": None}]},
    }
}

# (*) Events are stored in Redis or Valkey. Without this setting they are stored in the database.
EVENTSOURCE_HISTORY = {
    "BACKEND": "django_eventsource.history.redis.RedisHistory",
    "OPTIONS": {"HOSTS": [REDIS_URL]},
}
