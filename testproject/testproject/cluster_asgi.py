"""The demo site as an ASGI application that serves its static files too."""

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

from .asgi import application as site

application = ASGIStaticFilesHandler(site)
