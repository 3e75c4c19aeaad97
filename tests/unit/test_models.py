"""Tests of the tables."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from django.contrib.auth.models import Permission
from django.core.management import call_command
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from django_eventsource.models import (
    FLOOR_KEY,
    NotNullIndex,
    PendingEvent,
    ProcessLease,
    StoredEvent,
    TokenHead,
    TokenPresence,
    set_floor,
)


@pytest.fixture
def head(db):
    return TokenHead.objects.create(
        key="k", token="42:42", first=1, kept=1, last=2, updated=timezone.now()
    )


def stored(head, **fields):
    fields = {"action": "ping", "data": b"x", "kind": "event", "end_offset": 1} | fields
    return StoredEvent.objects.create(head=head, created=timezone.now(), **fields)


def delete_and_check(row):
    row.delete()
    connection.check_constraints()


def test_the_text_of_a_row_names_its_token_or_event(head):
    pending = PendingEvent(action="ping")
    assert [str(head), str(stored(head, seq=1)), str(stored(head, seq=2, event_id="a"))] == [
        "42:42",
        "ping 1",
        "ping a",
    ]
    assert str(pending) == "ping (pending)"
    assert str(ProcessLease(process="p")) == "p"
    assert str(TokenPresence(token="42:42", listeners=3)) == "42:42 (3)"


@pytest.mark.parametrize("text", ["", "a\nb\n", "ünï😀\u2028"], ids=ascii)
def test_data_is_returned_unchanged(head, text):
    """Line ends are kept too."""
    event = stored(head, seq=1, data=text.encode())
    event.refresh_from_db()
    assert event.text() == text


def test_the_database_refuses_a_second_event_with_a_sequence_number(head):
    stored(head, seq=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        stored(head, seq=1)


def test_the_database_refuses_to_delete_a_token_with_events(head):
    """It checks the foreign key at the commit."""
    stored(head, seq=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        delete_and_check(head)


def test_the_database_refuses_a_second_head_of_a_token(head):
    with pytest.raises(IntegrityError), transaction.atomic():
        TokenHead.objects.create(
            key="k", token="other", first=1, kept=1, last=1, updated=timezone.now()
        )


def floor():
    return TokenHead.objects.get(key=FLOOR_KEY).last


@pytest.mark.django_db
def test_the_floor_starts_at_the_clock():
    """It is above all numbers that an earlier database has assigned."""
    TokenHead.objects.filter(key=FLOOR_KEY).delete()
    before = time.time_ns() // 1000
    set_floor("default")
    assert before <= floor() <= time.time_ns() // 1000


@pytest.mark.django_db
def test_set_floor_keeps_an_existing_floor():
    TokenHead.objects.filter(key=FLOOR_KEY).update(last=2**60)
    set_floor("default")
    assert floor() == 2**60


@pytest.mark.django_db
def test_permissions_to_listen_send_view_and_close_exist():
    """No permission to change the history exists."""
    found = Permission.objects.filter(content_type__app_label="django_eventsource")
    assert set(found.values_list("codename", flat=True)) == {
        "listen_event",
        "send_event",
        "view_tokenhead",
        "view_storedevent",
        "view_pendingevent",
        "view_processlease",
        "view_tokenpresence",
        "view_console",
        "close_streams",
    }


@pytest.mark.django_db
def test_the_migrations_create_the_tables_of_the_models():
    output = StringIO()
    call_command("makemigrations", "django_eventsource", check=True, dry_run=True, stdout=output)
    assert "No changes detected" in output.getvalue()


def test_an_excerpt_is_short_and_on_one_line():
    """Bytes that are not UTF-8 do not fail."""
    assert StoredEvent(data=b"a\n b").excerpt() == "a b"
    assert len(StoredEvent(data=b"x" * 1000).excerpt()) == 80
    assert StoredEvent(data=b"\xff").excerpt() == "\ufffd"


@pytest.mark.parametrize("supported", [True, False])
def test_an_index_of_ids_leaves_out_events_without_one_where_that_is_possible(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no condition of Django, which would warn on a database without partial indexes."""
    monkeypatch.setattr(connection.features, "supports_partial_indexes", supported)
    indexes = [one for one in StoredEvent._meta.indexes if isinstance(one, NotNullIndex)]
    assert [index.fields for index in indexes] == [
        ["head", "event_id"],
        ["head", "idempotency_key"],
    ]
    editor = connection.schema_editor(collect_sql=True)
    for index in indexes:
        sql = str(index.create_sql(StoredEvent, editor))
        condition = f'("head_id", "{index.fields[-1]}") WHERE "{index.fields[-1]}" IS NOT NULL'
        assert sql.endswith(condition) is supported
        assert sql.endswith('")') is not supported
        assert index.condition is None
