"""Tests of the admin pages on a second database."""

from __future__ import annotations

import pytest
from django.urls import reverse
from django.utils import timezone

from django_eventsource.models import TokenHead


@pytest.mark.django_db(databases=["default", "postgres"])
def test_the_pages_show_the_rows_of_the_database_of_the_history(admin_client, settings):
    """With USING, the pages need no database router."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.database.DatabaseHistory",
        "OPTIONS": {"USING": "postgres"},
    }
    row = TokenHead.objects.using("postgres").create(
        key="k", token="elsewhere", first=1, kept=1, last=2, updated=timezone.now()
    )
    for page, args in [("changelist", ()), ("change", (row.pk,))]:
        response = admin_client.get(
            reverse(f"admin:django_eventsource_tokenhead_{page}", args=args)
        )
        assert "elsewhere" in response.content.decode()
