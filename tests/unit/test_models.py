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
    fields = {"action": "ping", "data": b"x", "kind": "event", "size": 1} | fields
    return StoredEvent.objects.create(head=head, created=timezone.now(), **fields)


def delete_and_check(row):
    row.delete()
    connection.check_constraints()


def test_rows_name_themselves(head):
    """A token, an event with and without an id of its own, and a pending event have names."""
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
def test_data_is_kept_byte_by_byte(head, text):
    """Data comes back as the text that it was, line ends included."""
    event = stored(head, seq=1, data=text.encode())
    event.refresh_from_db()
    assert event.text() == text


def test_sequence_number_is_taken_once(head):
    """The database itself refuses a second event in the same place of a token."""
    stored(head, seq=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        stored(head, seq=1)


def test_events_never_lose_their_token(head):
    """A token's row cannot go while it has events: the database checks it at the commit."""
    stored(head, seq=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        delete_and_check(head)


def test_token_is_one_row(head):
    """A token has one head, which its publishers lock."""
    with pytest.raises(IntegrityError), transaction.atomic():
        TokenHead.objects.create(
            key="k", token="other", first=1, kept=1, last=1, updated=timezone.now()
        )


def floor():
    return TokenHead.objects.get(key=FLOOR_KEY).last


@pytest.mark.django_db
def test_floor_is_the_clock():
    """The floor starts at the clock, above all that an earlier database ever gave out."""
    TokenHead.objects.filter(key=FLOOR_KEY).delete()
    before = time.time_ns() // 1000
    set_floor("default")
    assert before <= floor() <= time.time_ns() // 1000


@pytest.mark.django_db
def test_floor_that_is_there_stays():
    """A floor that was raised since is not touched."""
    TokenHead.objects.filter(key=FLOOR_KEY).update(last=2**60)
    set_floor("default")
    assert floor() == 2**60


@pytest.mark.django_db
def test_permissions():
    """The permissions to listen and to send exist, and none to write history by hand."""
    found = Permission.objects.filter(content_type__app_label="django_eventsource")
    assert set(found.values_list("codename", flat=True)) == {
        "listen_event",
        "send_event",
        "view_tokenhead",
        "view_storedevent",
        "view_pendingevent",
        "view_processlease",
        "view_tokenpresence",
    }


@pytest.mark.django_db
def test_migrations_are_complete():
    """The migrations make the tables that the models describe."""
    output = StringIO()
    call_command("makemigrations", "django_eventsource", check=True, dry_run=True, stdout=output)
    assert "No changes detected" in output.getvalue()


def test_excerpt_is_short_and_on_one_line():
    """A list shows the beginning of the data; bytes that are no UTF-8 break no page."""
    assert StoredEvent(data=b"a\n b").excerpt() == "a b"
    assert len(StoredEvent(data=b"x" * 1000).excerpt()) == 80
    assert StoredEvent(data=b"\xff").excerpt() == "\ufffd"
