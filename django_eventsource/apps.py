"""The app's configuration."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.core import checks
from django.db import connections, router
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _

from .checks import check_broker, check_handover, check_processes, check_server, check_settings
from .control import on_logout


class EventSourceConfig(AppConfig):
    """Registers the system checks and the receiver that prepares the tables."""

    name = "django_eventsource"
    verbose_name = _("Server-sent events")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        checks.register(check_settings, "eventsource")
        checks.register(check_server, "eventsource")
        checks.register(check_processes, "eventsource")
        checks.register(check_handover, "eventsource")
        checks.register(check_broker, "eventsource", deploy=True)
        post_migrate.connect(self.prepare, sender=self)
        user_logged_out.connect(on_logout, dispatch_uid="django_eventsource")

    def prepare(self, using: str, **kwargs: Any) -> None:
        """Set the floor in the migrated or emptied database, if the tables are there."""
        head = self.get_model("TokenHead")
        tables = connections[using].introspection.table_names()
        if router.allow_migrate_model(using, head) and head._meta.db_table in tables:
            self.models_module.set_floor(using)  # type: ignore[union-attr]
