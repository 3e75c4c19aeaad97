"""The demo site as an ASGI application."""

import os

from django.core.asgi import get_asgi_application

from django_eventsource.asgi import Handover

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")

application = Handover(get_asgi_application())
