"""Settings of the example for the browser module."""

from base_settings import *  # noqa: F403
from base_settings import INSTALLED_APPS, MIDDLEWARE

ROOT_URLCONF = "browser_module.urls"

INSTALLED_APPS = ["django.contrib.sessions", *INSTALLED_APPS]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    *MIDDLEWARE,
]
LOGIN_URL = "login"
