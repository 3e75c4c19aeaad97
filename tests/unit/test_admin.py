"""Tests of the admin's pages."""

from __future__ import annotations

import re
from datetime import timedelta
from uuid import uuid4

import pytest
from django.contrib import admin
from django.urls import reverse
from django.utils import timezone
from django.utils.html import strip_tags

from django_eventsource.admin import cell
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


@pytest.fixture
def processes(db):
    """Two processes with listeners of one token; the second one has died."""
    for number, seconds in [(1, 60), (2, -60)]:
        lease = ProcessLease.objects.create(
            key=f"p{number}",
            process=f"web-{number}.example.com:{number}234:{uuid4().hex}",
            until=timezone.now() + timedelta(seconds=seconds),
        )
        TokenPresence.objects.create(lease=lease, key="k", token="t", listeners=7, identities="{}")


def columns(client, model):
    """Give the titles and the rows of a list, as text and as the names of icons."""
    page = client.get(admin_url(model, "changelist")).content.decode()
    table = page[page.index('id="result_list"') :].replace("<wbr>", "")
    table = re.sub(r'<img src="[^"]*icon-(\w+)\.svg"[^>]*>', r"\1", table)
    rows = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")]
    found = [[strip_tags(item).strip() for item in row] for row in rows if row]
    return found[0], found[1:]


def test_processes_are_shown_by_host_and_pid(admin_client, processes):
    """A process is named as an operator finds it, and a dead one is marked."""
    titles, rows = columns(admin_client, "processlease")
    assert titles == ["Host", "Process id", "Alive", "Valid until"]
    assert sorted(row[:3] for row in rows) == [
        ["web-1.example.com", "1234", "yes"],
        ["web-2.example.com", "2234", "no"],
    ]


def test_listeners_of_a_dead_process_are_not_counted(admin_client, processes):
    """They are shown with the process that had them, and as none."""
    titles, rows = columns(admin_client, "tokenpresence")
    assert titles == ["Token", "Host", "Process id", "Alive", "Listeners"]
    assert sorted(rows) == [
        ["t", "web-1.example.com", "1234", "yes", "7"],
        ["t", "web-2.example.com", "2234", "no", "0"],
    ]
    dead = TokenPresence.objects.get(lease__key="p2")
    page = admin_client.get(admin_url("tokenpresence", "change", dead.pk)).content.decode()
    assert "web-2.example.com" in page.replace("<wbr>", "")
    assert "icon-no.svg" in page


def test_no_internal_words_in_the_lists(admin_client, rows):
    """Titles are the terms of the README."""
    titles = {name: columns(admin_client, name)[0] for name in MODELS}
    assert titles["tokenhead"] == [
        "Token",
        "Last sequence number",
        "Events kept",
        "Size",
        "Closed",
        "Last published",
    ]
    assert titles["storedevent"] == ["Sequence number", "Token", "Action", "Data", "Published"]
    assert titles["pendingevent"] == ["Token", "Action", "Data", "Published"]
    for name, model in MODELS.items():
        page = admin_client.get(admin_url(name, "change", model.objects.last().pk))
        assert not re.search(r"\b(head|lease)\b", strip_tags(page.content.decode()), re.I)


def test_each_column_sorts(admin_client, rows, processes):
    """A title that is a link orders the list by that column."""
    for name in MODELS:
        for column in range(1, 7):
            response = admin_client.get(admin_url(name, "changelist"), {"o": column})
            assert response.status_code == 200


def test_the_state_of_a_token(admin_client, rows):
    """How many events are kept, their size, and whether the newest one is a close."""
    TokenHead.objects.filter(token="42:<42>").update(kept=3, size=2048)
    (row,) = columns(admin_client, "tokenhead")[1]
    assert row[1:5] == ["4", "2", "2.0\xa0KB", "yes"]
    TokenHead.objects.filter(token="42:<42>").update(last=5)
    (row,) = columns(admin_client, "tokenhead")[1]
    assert row[1:5] == ["5", "3", "2.0\xa0KB", "no"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("web-1.example.com", "web-1.exampl|e.com"),
        ("twelve chars", "twelve chars"),
        (
            "a few words, " + "x" * 30 + " and more",
            f"a few words, |{'x' * 12}|{'x' * 12}|xxxxxx and more",
        ),
        ("a\n" + "y" * 14 + "\u2028<" + "z" * 12, f"a\n|{'y' * 12}|yy\u2028|&lt;{'z' * 11}|z"),
        ("x" * 255, "|".join(["x" * 12] * 4 + ["x" * 11 + "…"])),
    ],
    ids=["empty", "host", "short", "words", "lines", "long"],
)
def test_long_words_may_be_broken(text, shown):
    """No character is lost before the end, and words that fit stay whole."""
    assert cell(text) == shown.replace("|", "<wbr>")


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
