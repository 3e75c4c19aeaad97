"""The demo site as an ASGI application without the wrapper for streams."""

from django.core.asgi import get_asgi_application

application = get_asgi_application()
