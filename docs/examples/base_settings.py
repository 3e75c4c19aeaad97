"""The settings that all examples share. What django-eventsource needs is marked with (*)."""

import os
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
EXAMPLE = os.environ["DJANGO_SETTINGS_MODULE"].partition(".")[0]

# For a site that only this machine can open. Never use it in production.
SECRET_KEY = "example-only-not-a-secret"  # noqa: S105
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]

INSTALLED_APPS = [
    "daphne",  # (*) `manage.py runserver` serves ASGI
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.staticfiles",
    "channels",  # (*)
    "django_eventsource",  # (*)
]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
ASGI_APPLICATION = "asgi.application"  # (*)
TEMPLATES = [
    {"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": [EXAMPLES]},
]
# Each example has its own database, so that a page shows the events of its example only.
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": EXAMPLES / f"{EXAMPLE}.sqlite3"},
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "static/"
# `npm install` creates node_modules. An example that needs no package runs without it.
STATICFILES_DIRS = [EXAMPLES / "static", *EXAMPLES.glob("node_modules")]
USE_TZ = True
