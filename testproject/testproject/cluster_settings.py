"""Settings of the demo site on several processes. What they need more is marked with (*).

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

# (*) Events reach the other processes at once. Without a shared layer they would within
# half a second, through the database.
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [{"address": REDIS_URL, "socket_timeout": None}]},
    }
}

# (*) Events are stored in Redis or Valkey. Without this they would be in the database.
EVENTSOURCE_HISTORY = {
    "BACKEND": "django_eventsource.history.redis.RedisHistory",
    "OPTIONS": {"HOSTS": [REDIS_URL]},
}
