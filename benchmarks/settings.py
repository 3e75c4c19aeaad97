"""The settings of the Django projects that are measured: those of `startproject`, and this app's.

``BENCH_HISTORY`` is ``memory`` (default), ``database`` or ``redis``; ``BENCH_LAYER`` is
``memory`` or ``redis``; ``BENCH_REDIS`` is the URL of a server; ``BENCH_DATABASE`` is the path of
an SQLite file, or the URL of a PostgreSQL server. ``BENCH_MIDDLEWARE=none`` removes all
middleware; ``BENCH_PEER=django_eventstream`` adds an app; ``BENCH_LOGIN_RATE=none`` throttles no
logins; with ``BENCH_WAKE_UP=off`` the database does not wake the hubs;
``BENCH_WRITE_TO_TRANSPORT=no`` uses only the server's ``send``.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SECRET_KEY = "benchmarks only"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "benchmarks.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "channels",
    "django_eventsource",
    *filter(None, [os.environ.get("BENCH_PEER")]),
]
MIDDLEWARE = (
    []
    if os.environ.get("BENCH_MIDDLEWARE") == "none"
    else [
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ]
)
DATABASE = os.environ.get("BENCH_DATABASE", ":memory:")
DATABASES: dict[str, dict[str, Any]] = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATABASE}
}
if DATABASE.startswith("postgresql:"):
    url = urlsplit(DATABASE)
    DATABASES["default"] = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.strip("/") or "postgres",
        "USER": unquote(url.username or "postgres"),
        "HOST": parse_qs(url.query).get("host", [url.hostname or ""])[0],
        "PORT": str(url.port or ""),
    }
LOGGING_CONFIG = None
# Logging a line for each refused login would distort the measurement.
logging.getLogger("django.request").setLevel(logging.ERROR)

REDIS = os.environ.get("BENCH_REDIS", "")
CHANNEL_LAYERS = {
    "memory": {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
    "redis": {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [{"address": REDIS, "socket_timeout": None}]},
        }
    },
}[os.environ.get("BENCH_LAYER", "memory")]

EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
if os.environ.get("BENCH_LOGIN_RATE") == "none":
    EVENTSOURCE_LOGIN_RATE = None
EVENTSOURCE_WRITE_TO_TRANSPORT = os.environ.get("BENCH_WRITE_TO_TRANSPORT") != "no"
EVENTSOURCE_HISTORY = {
    "memory": {"BACKEND": "django_eventsource.history.memory.MemoryHistory"},
    "database": {
        "BACKEND": "django_eventsource.history.database.DatabaseHistory",
        "OPTIONS": {"WAKE_UP": False} if os.environ.get("BENCH_WAKE_UP") == "off" else {},
    },
    "redis": {
        "BACKEND": "django_eventsource.history.redis.RedisHistory",
        "OPTIONS": {"HOSTS": [REDIS]},
    },
}[os.environ.get("BENCH_HISTORY", "memory")]
