"""The configuration of the app."""

from typing import Any

from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.core import checks
from django.db import connections, router
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _

from .checks import (
    check_access,
    check_broker,
    check_handover,
    check_metrics,
    check_outbox,
    check_processes,
    check_server,
    check_settings,
)
from .conf import define_defaults
from .monitoring import metrics
from .operations.close_requests import on_logout


class EventSourceConfig(AppConfig):
    """Defines the settings, registers checks and receivers, and installs multi-process metrics."""

    name = "django_eventsource"
    verbose_name = _("Server-sent events")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        define_defaults()
        for check in (check_settings, check_server, check_processes, check_handover):
            checks.register(check, "eventsource")
        for check in (check_access, check_broker, check_metrics):
            checks.register(check, "eventsource", deploy=True)
        checks.register(check_outbox, checks.Tags.database)
        post_migrate.connect(self._prepare, sender=self)
        user_logged_out.connect(on_logout, dispatch_uid="django_eventsource")
        metrics.install()

    def _prepare(self, using: str, **kwargs: Any) -> None:
        # `manage.py flush` deletes the floor and emits the same signal as `manage.py migrate`.
        head = self.get_model("TokenHead")
        tables = connections[using].introspection.table_names()
        if router.allow_migrate_model(using, head) and head._meta.db_table in tables:
            self.models_module.set_floor(using)  # type: ignore[union-attr]
