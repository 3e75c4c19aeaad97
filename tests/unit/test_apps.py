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
from django_eventsource.checks import check_handover, check_processes, check_server, check_settings
from django_eventsource.models import TokenHead
from django_eventsource.operations.close_requests import on_logout


def test_the_package_name_in_installed_apps_loads_the_app():
    config = apps.get_app_config("django_eventsource")
    assert isinstance(config, EventSourceConfig)
    assert str(config.verbose_name) == "Server-sent events"


def test_the_migrations_do_not_depend_on_default_auto_field(settings):
    settings.DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    config = apps.get_app_config("django_eventsource")
    assert config.default_auto_field == "django.db.models.BigAutoField"
    assert {model._meta.pk.get_internal_type() for model in config.get_models()} == {
        "BigAutoField"
    }


def test_the_system_checks_are_registered():
    assert registry.registry.tag_exists("eventsource")
    registered = registry.registry.registered_checks
    assert {check_settings, check_server, check_processes, check_handover} <= registered


def test_the_logout_receiver_is_connected_once():
    """ready() may be called several times."""
    apps.get_app_config("django_eventsource").ready()
    receivers = user_logged_out._live_receivers(User)
    assert sum(on_logout in found for found in receivers) == 1


class NotHere:
    """A router that excludes this app from the database."""

    def allow_migrate(self, db, app_label, **hints):
        return app_label != "django_eventsource"


@pytest.mark.django_db(transaction=True)
def test_floor_is_set_after_a_flush():
    """The new floor is higher than the one before."""
    before = TokenHead.objects.get().last
    call_command("flush", interactive=False, verbosity=0)
    assert TokenHead.objects.get().last > before


@pytest.mark.django_db
def test_no_floor_is_written_to_a_database_that_the_routers_exclude(settings):
    TokenHead.objects.all().delete()
    settings.DATABASE_ROUTERS = [f"{__name__}.NotHere"]
    apps.get_app_config("django_eventsource")._prepare("default")
    assert not TokenHead.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_the_app_can_be_migrated_to_zero_and_back():
    try:
        call_command("migrate", "django_eventsource", "zero", verbosity=0)
        assert not {"django_eventsource_tokenhead"} & set(connection.introspection.table_names())
    finally:
        call_command("migrate", "django_eventsource", verbosity=0)
    assert TokenHead.objects.count() == 1
