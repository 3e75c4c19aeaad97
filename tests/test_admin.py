"""Tests of the admin's pages."""

from __future__ import annotations

from uuid import uuid4

import pytest
from django.contrib import admin
from django.urls import reverse
from django.utils import timezone

from django_eventsource.models import (
    FLOOR_KEY,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
)

MODELS = {
    "tokenhead": TokenHead,
    "storedevent": StoredEvent,
    "pendingevent": PendingEvent,
    "processlease": ProcessLease,
    "tokenpresence": TokenPresence,
}
TEXTS = ["", "a\nb & <b>", "ünï😀\u2028", "\x00\x01\x7f"]

each_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture
def rows(db):
    """Rows of every kind, the floor's among them."""
    now = timezone.now()
    assert TokenHead.objects.get().key == FLOOR_KEY
    head = TokenHead.objects.create(
        key="k", token="42:<42>", first=1, kept=1, last=4, updated=now, closed=4
    )
    lease = ProcessLease.objects.create(key="p", process="42:<42>", until=now)
    TokenPresence.objects.create(
        lease=lease, key="k", token="42:<42>", listeners=2, identities='{"a": 2}'
    )
    for seq, text in enumerate(TEXTS, 1):
        fields = {"action": "ping", "data": text.encode(), "kind": "event", "created": now}
        StoredEvent.objects.create(head=head, seq=seq, size=len(text.encode()), **fields)
        PendingEvent.objects.create(
            key="k", token="42:<42>", event_id=f"id{seq}", ref=uuid4(), **fields
        )


def admin_url(model, page, *args):
    return reverse(f"admin:django_eventsource_{model}_{page}", args=args)


@each_model
def test_list_renders(admin_client, rows, model):
    """The list of every model shows its rows, whatever their data."""
    response = admin_client.get(admin_url(model, "changelist"))
    assert response.status_code == 200
    shown = response.content.decode()
    assert shown.count("<tr>") >= MODELS[model].objects.count()
    assert "42:&lt;42&gt;" in shown


def test_list_of_events_shows_their_text(admin_client, rows):
    """Data is shown as text, and escaped."""
    shown = admin_client.get(admin_url("storedevent", "changelist")).content.decode()
    assert "b &amp; &lt;b&gt;" in shown
    assert "ünï😀" in shown


def test_list_of_events_is_one_query_for_all_tokens(
    admin_client, rows, django_assert_max_num_queries
):
    """A hundred events do not ask for their token a hundred times."""
    with django_assert_max_num_queries(8):
        admin_client.get(admin_url("storedevent", "changelist"))


@each_model
def test_page_of_each_row_renders(admin_client, rows, model):
    """Every row has a page, without a field to write in."""
    rows = MODELS[model].objects.all()
    for row in rows.exclude(key=FLOOR_KEY) if model == "tokenhead" else rows:
        response = admin_client.get(admin_url(model, "change", row.pk))
        assert response.status_code == 200
        assert 'name="_save"' not in response.content.decode()


def test_the_floor_is_not_shown(admin_client, rows):
    """The row that keeps the floor is no token."""
    response = admin_client.get(admin_url("tokenhead", "changelist"))
    assert response.context["cl"].result_count == TokenHead.objects.count() - 1


def test_page_shows_the_lines(admin_client, rows):
    """A multi-line value is shown with its lines."""
    event = StoredEvent.objects.get(seq=2)
    shown = admin_client.get(admin_url("storedevent", "change", event.pk)).content.decode()
    assert "a<br>b &amp; &lt;b&gt;" in shown


@pytest.mark.parametrize("query", ["42", "nothing"])
@pytest.mark.parametrize("model", ["tokenhead", "storedevent"])
def test_search_by_token(admin_client, rows, model, query):
    """Tokens and events are found by their token."""
    response = admin_client.get(admin_url(model, "changelist"), {"q": query})
    count = MODELS[model].objects.exclude(key=FLOOR_KEY).count() if model == "tokenhead" else 4
    assert response.context["cl"].result_count == (count if query == "42" else 0)


def test_filter_by_action_and_kind(admin_client, rows):
    """Events are found by their action and kind."""
    page = admin_url("storedevent", "changelist")
    for query, count in [({"action": "ping"}, 4), ({"kind": "finish"}, 0)]:
        assert admin_client.get(page, query).context["cl"].result_count == count


@each_model
def test_nobody_writes_history_by_hand(admin_client, rows, model):
    """Not even a superuser adds, changes or deletes a row."""
    row = MODELS[model].objects.last()
    before = list(MODELS[model].objects.values())
    for page, args in [("add", ()), ("change", (row.pk,)), ("delete", (row.pk,))]:
        assert admin_client.post(admin_url(model, page, *args), {"post": "yes"}).status_code == 403
    chosen = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    admin_client.post(admin_url(model, "changelist"), chosen)
    assert list(MODELS[model].objects.values()) == before


@each_model
def test_permissions_of_the_pages(rf, admin_user, model):
    """The pages offer viewing, and nothing else."""
    request = rf.get("/")
    request.user = admin_user
    found = admin.site.get_model_admin(MODELS[model]).get_model_perms(request)
    assert found == {"add": False, "change": False, "delete": False, "view": True}


def test_page_needs_the_view_permission(client, django_user_model, rows):
    """Staff without the view permission see nothing of the history."""
    client.force_login(django_user_model.objects.create_user("staff", is_staff=True))
    assert client.get(admin_url("storedevent", "changelist")).status_code == 403


@pytest.mark.django_db(databases=["default", "postgres"])
def test_pages_look_where_the_history_is(admin_client, settings):
    """With USING, the pages show that database's rows, without a router."""
    settings.EVENTSOURCE_HISTORY = {
        "BACKEND": "django_eventsource.history.database.DatabaseHistory",
        "OPTIONS": {"USING": "postgres"},
    }
    row = TokenHead.objects.using("postgres").create(
        key="k", token="elsewhere", first=1, kept=1, last=2, updated=timezone.now()
    )
    for page, args in [("changelist", ()), ("change", (row.pk,))]:
        response = admin_client.get(admin_url("tokenhead", page, *args))
        assert "elsewhere" in response.content.decode()
