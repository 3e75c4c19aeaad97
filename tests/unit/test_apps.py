"""Tests of the app's configuration."""

from __future__ import annotations

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.contrib.auth.signals import user_logged_out
from django.core.checks import registry
from django.core.management import call_command
from django.db import connection

from django_eventsource.apps import EventSourceConfig
from django_eventsource.checks import (
    check_handover,
    check_processes,
    check_server,
    check_settings,
)
from django_eventsource.control import on_logout
from django_eventsource.models import TokenHead


def test_app_is_found_by_its_package_name():
    """`"django_eventsource"` in INSTALLED_APPS is enough."""
    config = apps.get_app_config("django_eventsource")
    assert isinstance(config, EventSourceConfig)
    assert str(config.verbose_name) == "Server-sent events"


def test_keys_do_not_depend_on_the_project(settings):
    """The migrations fit whatever DEFAULT_AUTO_FIELD a project has."""
    settings.DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    config = apps.get_app_config("django_eventsource")
    assert config.default_auto_field == "django.db.models.BigAutoField"
    assert {model._meta.pk.get_internal_type() for model in config.get_models()} == {
        "BigAutoField"
    }


def test_checks_are_registered():
    """The system checks are registered under the app's tag when it is ready."""
    assert registry.registry.tag_exists("eventsource")
    registered = registry.registry.registered_checks
    assert {check_settings, check_server, check_processes, check_handover} <= registered


def test_a_logout_is_received_once():
    """The receiver is connected when the app is ready, and once however often that is."""
    apps.get_app_config("django_eventsource").ready()
    receivers = user_logged_out._live_receivers(User)
    assert sum(on_logout in found for found in receivers) == 1


class NotHere:
    """A router of a project that keeps this app's tables in another database."""

    def allow_migrate(self, db, app_label, **hints):
        return app_label != "django_eventsource"


@pytest.mark.django_db(transaction=True)
def test_floor_is_set_after_a_flush():
    """Emptied tables are prepared again, with a higher floor than before."""
    before = TokenHead.objects.get().last
    call_command("flush", interactive=False, verbosity=0)
    assert TokenHead.objects.get().last > before


@pytest.mark.django_db
def test_database_of_other_apps_is_left_alone(settings):
    """Nothing is written to a database that the routers keep this app out of."""
    TokenHead.objects.all().delete()
    settings.DATABASE_ROUTERS = [f"{__name__}.NotHere"]
    apps.get_app_config("django_eventsource").prepare("default")
    assert not TokenHead.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_app_can_be_unmigrated():
    """Migrating back to nothing removes the tables without an error; forth again prepares them."""
    try:
        call_command("migrate", "django_eventsource", "zero", verbosity=0)
        assert not {"django_eventsource_tokenhead"} & set(connection.introspection.table_names())
    finally:
        call_command("migrate", "django_eventsource", verbosity=0)
    assert TokenHead.objects.count() == 1
