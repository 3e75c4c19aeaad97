"""The settings that the tests run on: the demo site's, PostgreSQL, MariaDB if there is one."""

import json
import os
import tempfile
from pathlib import Path

from tests import mariadb

from .settings import *  # noqa: F403
from .settings import DATABASES, INSTALLED_APPS

# Server processes that a test starts find the same databases through these variables.
TEST_DIR = Path(os.environ.get("EVENTSOURCE_TEST_DIR") or tempfile.mkdtemp(prefix="eventsource-"))
# Tests that run beside these have servers of their own.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and TEST_DIR.name != WORKER:
    TEST_DIR /= WORKER
    TEST_DIR.mkdir()
os.environ["EVENTSOURCE_TEST_DIR"] = str(TEST_DIR)
# Where the PostgreSQL wheel keeps its lock; it warns when it has to choose itself.
os.environ.setdefault("XDG_RUNTIME_DIR", str(TEST_DIR))
TEST_DATABASE = os.environ.get("EVENTSOURCE_TEST_DATABASE", "")

SECRET_KEY = "tests"
# So that the tests can put every middleware there is around a stream.
INSTALLED_APPS += [
    "django.contrib.sites",
    "django.contrib.flatpages",
    "django.contrib.redirects",
]
SITE_ID = 1
DEBUG = False
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Django's own defaults: no tuning that a user might not have.
DATABASES["default"] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": TEST_DATABASE or TEST_DIR / "unused.sqlite3",
    "TEST": {"NAME": TEST_DIR / "test.sqlite3"},
}
DATABASES["postgres"] = {
    "ENGINE": "django.db.backends.postgresql",
    "HOST": str(TEST_DIR / "pg"),
    "USER": "postgres",
    "NAME": "test_eventsource" if TEST_DATABASE else "postgres",
    "TEST": {"NAME": "test_eventsource", "DEPENDENCIES": []},
}
if not mariadb.MISSING:
    DATABASES["mariadb"] = {
        "ENGINE": "django.db.backends.mysql",
        "HOST": str(TEST_DIR / "mariadb" / "socket"),
        "USER": "root",
        "NAME": "test_eventsource" if TEST_DATABASE else "mysql",
        "TEST": {"NAME": "test_eventsource", "DEPENDENCIES": []},
    }

# What a test wants to be different in a process that it starts.
globals().update(json.loads(os.environ.get("EVENTSOURCE_TEST_SETTINGS", "{}")))
