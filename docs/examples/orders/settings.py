"""Settings of the example of a list that follows a model."""

from base_settings import *  # noqa: F403
from base_settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "orders"]
ROOT_URLCONF = "orders.urls"
