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
from django_eventsource.history import get_history
from django_eventsource.models import (
    FLOOR_KEY,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
)
from django_eventsource.operations.details import DETAILS_PREFIX
from django_eventsource.operations.productions import Production
from django_eventsource.protocol.tokens import DETAILS_TOKEN

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
    """Create rows of every model, and that of the floor."""
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
        StoredEvent.objects.create(head=head, seq=seq, end_offset=0, **fields)
        PendingEvent.objects.create(
            key="k", token="42:<42>", event_id=f"id{seq}", ref=uuid4(), **fields
        )


def admin_url(model, page, *args):
    return reverse(f"admin:django_eventsource_{model}_{page}", args=args)


@each_model
def test_the_list_of_each_model_shows_its_rows(admin_client, rows, model):
    response = admin_client.get(admin_url(model, "changelist"))
    assert response.status_code == 200
    shown = response.content.decode()
    assert shown.count("<tr>") >= MODELS[model].objects.count()
    assert "42:&lt;42&gt;" in shown


def test_the_list_of_events_shows_escaped_data(admin_client, rows):
    shown = admin_client.get(admin_url("storedevent", "changelist")).content.decode()
    assert "b &amp; &lt;b&gt;" in shown
    assert "ünï😀" in shown


def test_the_list_of_events_joins_the_tokens(admin_client, rows, django_assert_max_num_queries):
    """A hundred events need no further queries."""
    with django_assert_max_num_queries(8):
        admin_client.get(admin_url("storedevent", "changelist"))


@each_model
def test_the_page_of_each_row_has_no_input_field(admin_client, rows, model):
    rows = MODELS[model].objects.all()
    for row in rows.exclude(key=FLOOR_KEY) if model == "tokenhead" else rows:
        response = admin_client.get(admin_url(model, "change", row.pk))
        assert response.status_code == 200
        assert 'name="_save"' not in response.content.decode()


def test_the_floor_is_not_shown(admin_client, rows):
    response = admin_client.get(admin_url("tokenhead", "changelist"))
    assert response.context["cl"].result_count == TokenHead.objects.count() - 1


@pytest.mark.django_db(transaction=True)
def test_the_leases_and_claims_of_productions_and_of_the_console_are_not_shown(admin_client):
    """The rows do not stand for processes, tokens or listeners of users."""
    Production(id="one", token="t", interrupted="").claim()
    get_history().announce(f"{DETAILS_PREFIX}p", {DETAILS_TOKEN: ["{}"]}, 60)
    assert ProcessLease.objects.count() == 3
    for model in ("tokenhead", "storedevent", "processlease", "tokenpresence"):
        page = admin_client.get(admin_url(model, "changelist"))
        assert not page.context["cl"].result_list


def test_the_page_of_an_event_shows_its_lines(admin_client, rows):
    event = StoredEvent.objects.get(seq=2)
    shown = admin_client.get(admin_url("storedevent", "change", event.pk)).content.decode()
    assert "a<br>b &amp; &lt;b&gt;" in shown


EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize("model", MODELS)
def test_no_text_of_a_client_is_markup_on_a_page(admin_client, db, model):
    """A publisher chooses the token, the action, the id and the data."""
    now = timezone.now()
    head = TokenHead.objects.create(
        key="k", token=EVIL, first=1, kept=1, last=1, updated=now, closed=1
    )
    lease = ProcessLease.objects.create(key="p", process=EVIL, until=now)
    fields = {"action": EVIL, "event_id": EVIL, "data": EVIL.encode(), "created": now}
    fields["kind"] = "event"
    StoredEvent.objects.create(head=head, seq=1, end_offset=1, **fields)
    PendingEvent.objects.create(key="k", token=EVIL, ref=uuid4(), **fields)
    TokenPresence.objects.create(
        lease=lease, key="k", token=EVIL, listeners=1, identities=f'{{"{EVIL}": 1}}'
    )
    row = MODELS[model].objects.last()
    for url in (admin_url(model, "changelist"), admin_url(model, "change", row.pk)):
        for query in ({}, {"q": EVIL}, {"action": EVIL}):
            shown = admin_client.get(url, query, follow=True).content.decode()
            assert EVIL not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.parametrize("query", ["42", "nothing"])
@pytest.mark.parametrize("model", ["tokenhead", "storedevent"])
def test_a_search_finds_tokens_and_events_by_token(admin_client, rows, model, query):
    response = admin_client.get(admin_url(model, "changelist"), {"q": query})
    count = MODELS[model].objects.exclude(key=FLOOR_KEY).count() if model == "tokenhead" else 4
    assert response.context["cl"].result_count == (count if query == "42" else 0)


def test_a_filter_finds_events_by_action_and_kind(admin_client, rows):
    page = admin_url("storedevent", "changelist")
    for query, count in [({"action": "ping"}, 4), ({"kind": "close"}, 0)]:
        assert admin_client.get(page, query).context["cl"].result_count == count


@pytest.fixture
def processes(db):
    """Create two processes with listeners of one token; the lease of the second has expired."""
    for number, seconds in [(1, 60), (2, -60)]:
        lease = ProcessLease.objects.create(
            key=f"p{number}",
            process=f"web-{number}.example.com:{number}234:{uuid4().hex}",
            until=timezone.now() + timedelta(seconds=seconds),
        )
        TokenPresence.objects.create(lease=lease, key="k", token="t", listeners=7, identities="{}")


def columns(client, model):
    """Return the titles and the rows of a list, as texts and as names of icons."""
    page = client.get(admin_url(model, "changelist")).content.decode()
    table = page[page.index('id="result_list"') :].replace("<wbr>", "")
    table = re.sub(r'<img src="[^"]*icon-(\w+)\.svg"[^>]*>', r"\1", table)
    rows = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")]
    found = [[strip_tags(item).strip() for item in row] for row in rows if row]
    return found[0], found[1:]


def test_processes_are_shown_by_host_and_pid(admin_client, processes):
    """A process whose lease has expired is marked."""
    titles, rows = columns(admin_client, "processlease")
    assert titles == ["Host", "Process id", "Alive", "Valid until"]
    assert sorted(row[:3] for row in rows) == [
        ["web-1.example.com", "1234", "yes"],
        ["web-2.example.com", "2234", "no"],
    ]


def test_listeners_of_a_dead_process_are_not_counted(admin_client, processes):
    """The row is shown with 0 listeners."""
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


def test_the_titles_of_the_lists_are_terms_of_the_readme(admin_client, rows):
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


def test_each_column_title_sorts_the_list(admin_client, rows, processes):
    for name in MODELS:
        for column in range(1, 7):
            response = admin_client.get(admin_url(name, "changelist"), {"o": column})
            assert response.status_code == 200


def test_the_list_of_tokens_shows_count_size_and_close(admin_client, rows):
    TokenHead.objects.filter(token="42:<42>").update(kept=3, start_offset=1024, end_offset=3072)
    (row,) = columns(admin_client, "tokenhead")[1]
    assert row[1:5] == ["4", "2", "2.0\xa0KB", "yes"]
    TokenHead.objects.filter(token="42:<42>").update(last=5)
    (row,) = columns(admin_client, "tokenhead")[1]
    assert row[1:5] == ["5", "3", "2.0\xa0KB", "no"]


def test_the_page_of_a_token_shows_its_size(admin_client, rows):
    """And no offsets, which say nothing to a reader."""
    head = TokenHead.objects.get(token="42:<42>")
    TokenHead.objects.filter(pk=head.pk).update(start_offset=1024, end_offset=3072)
    page = admin_client.get(admin_url("tokenhead", "change", head.pk)).content.decode()
    assert "2.0\xa0KB" in page
    assert not re.search(r"\boffset of", page, re.I)


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
    """No character is lost, and words that fit are not broken."""
    assert cell(text) == shown.replace("|", "<wbr>")


@each_model
def test_a_superuser_cannot_add_change_or_delete_rows(admin_client, rows, model):
    row = MODELS[model].objects.last()
    before = list(MODELS[model].objects.values())
    for page, args in [("add", ()), ("change", (row.pk,)), ("delete", (row.pk,))]:
        assert admin_client.post(admin_url(model, page, *args), {"post": "yes"}).status_code == 403
    chosen = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    admin_client.post(admin_url(model, "changelist"), chosen)
    assert list(MODELS[model].objects.values()) == before


@each_model
def test_the_pages_offer_viewing_only(rf, admin_user, model):
    request = rf.get("/")
    request.user = admin_user
    found = admin.site.get_model_admin(MODELS[model]).get_model_perms(request)
    assert found == {"add": False, "change": False, "delete": False, "view": True}


def test_a_page_needs_the_view_permission(client, django_user_model, rows):
    client.force_login(django_user_model.objects.create_user("staff", is_staff=True))
    assert client.get(admin_url("storedevent", "changelist")).status_code == 403
