"""Settings of the tests: those of the demo site, PostgreSQL, and MariaDB if it is installed.

Unit tests run on SQLite alone: ``tests/conftest.py`` removes the other databases for them.
"""

import json
import os
import tempfile
from pathlib import Path

from tests.support import mariadb

from .settings import *  # noqa: F403
from .settings import DATABASES
from .settings import INSTALLED_APPS as DEMO_APPS

# Server processes that a test starts read the same variables, and so use the same databases.
TEST_DIR = Path(os.environ.get("EVENTSOURCE_TEST_DIR") or tempfile.mkdtemp(prefix="eventsource-"))
# Each process of pytest-xdist has servers of its own.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and TEST_DIR.name != WORKER:
    TEST_DIR /= WORKER
    TEST_DIR.mkdir()
os.environ["EVENTSOURCE_TEST_DIR"] = str(TEST_DIR)
# The directory of the lock of the PostgreSQL wheel, which warns if the variable is not set, or if
# other users can read the directory. The wheel makes the parents of its data readable.
RUNTIME_DIR = TEST_DIR / "runtime"
RUNTIME_DIR.mkdir(mode=0o700, exist_ok=True)
os.environ.setdefault("XDG_RUNTIME_DIR", str(RUNTIME_DIR))
TEST_DATABASE = os.environ.get("EVENTSOURCE_TEST_DATABASE", "")

SECRET_KEY = "tests"
# The tests start daphne as a server only. Without its app and that of htmx, unit tests run where
# they are not installed. The other apps let the tests put every middleware of Django around a
# stream.
INSTALLED_APPS = [
    *(app for app in DEMO_APPS if app not in ("daphne", "django_htmx")),
    "django.contrib.sites",
    "django.contrib.flatpages",
    "django.contrib.redirects",
    "tests.support.shop",
]
SITE_ID = 1
DEBUG = False
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Django's own defaults, without tuning, because a user's project may have none.
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

# The settings that a test changes in a process that it starts.
globals().update(json.loads(os.environ.get("EVENTSOURCE_TEST_SETTINGS", "{}")))
