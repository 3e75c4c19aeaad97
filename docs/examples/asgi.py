"""The ASGI application of all examples."""

from django.core.asgi import get_asgi_application

from django_eventsource.asgi import Handover

application = Handover(get_asgi_application())
