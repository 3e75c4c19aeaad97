"""The app's configuration."""

from django.apps import AppConfig
from django.core import checks
from django.utils.translation import gettext_lazy as _

from .checks import check_settings, check_server


class EventSourceConfig(AppConfig):
    """Registers the system checks."""

    name = "django_eventsource"
    verbose_name = _("Server-sent events")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        checks.register(check_settings, "eventsource")
        checks.register(check_server, "eventsource")
