"""Settings of the example for pages on another origin."""

from base_settings import *  # noqa: F403
from base_settings import INSTALLED_APPS, MIDDLEWARE
from corsheaders.defaults import default_headers

ROOT_URLCONF = "cors.urls"

INSTALLED_APPS = ["corsheaders", *INSTALLED_APPS]
MIDDLEWARE = ["corsheaders.middleware.CorsMiddleware", *MIDDLEWARE]
CORS_URLS_REGEX = r"^/events/"
# In production: CORS_ALLOWED_ORIGINS = ["https://www.example.com"]
CORS_ALLOWED_ORIGIN_REGEXES = [r"^http://localhost:\d+$"]
CORS_ALLOW_HEADERS = [*default_headers, "last-event-id"]
