"""The tables of the database history.

:class:`TokenHead` says where a token's history stands, :class:`StoredEvent` is the
history, :class:`PendingEvent` the outbox of transactions that have committed but whose
events have no sequence number yet. :class:`ProcessLease` and :class:`TokenPresence` say
who listens.
"""

from __future__ import annotations

import time
from typing import Any

from django.db import models
from django.utils import timezone
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _

FLOOR_KEY = ""
"""The key of the row that keeps the floor: the highest number of any forgotten token."""


def shorten(text: str, chars: int = 40) -> str:
    """Return the beginning of a text: for a title, unless more characters are allowed."""
    return Truncator(text).chars(chars)


class TokenHead(models.Model):
    """One token with a history. The row's lock orders the token's publishers."""

    key = models.CharField(max_length=32, unique=True, editable=False)
    token = models.CharField(_("token"), max_length=255)
    first = models.BigIntegerField(_("first sequence number"))
    kept = models.BigIntegerField(_("oldest sequence number kept"))
    last = models.BigIntegerField(_("last sequence number"))
    closed = models.BigIntegerField(_("sequence number of the last close"), null=True)
    size = models.BigIntegerField(_("bytes kept"), default=0)
    updated = models.DateTimeField(_("last published"), db_index=True)

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("token")
        verbose_name_plural = _("tokens")

    def __str__(self) -> str:
        return shorten(self.token)


class EventFields(models.Model):
    """What an event is made of, stored or pending."""

    action = models.CharField(_("action"), max_length=255)
    data = models.BinaryField(_("data"))
    event_id = models.CharField(_("own id"), max_length=255, null=True)  # noqa: DJ001
    kind = models.CharField(_("kind"), max_length=6)
    created = models.DateTimeField(_("published"))

    class Meta:
        abstract = True

    def text(self) -> str:
        """Give the data as text."""
        return bytes(self.data).decode(errors="replace")

    def excerpt(self) -> str:
        """Give the beginning of the data, on one line."""
        return shorten(" ".join(self.text().split()), 80)


class StoredEvent(EventFields):
    """A durable event in its place in its token's history."""

    # The head's row is deleted only after its events; the database checks it.
    head = models.ForeignKey(
        TokenHead,
        models.DO_NOTHING,
        related_name="events",
        db_index=False,
        verbose_name=_("token"),
    )
    seq = models.BigIntegerField(_("sequence number"))
    size = models.PositiveIntegerField(_("bytes"))
    ref = models.UUIDField(null=True, editable=False)

    class Meta:
        default_permissions = ("view",)
        permissions = [
            ("listen_event", "Can listen to the events of every token"),
            ("send_event", "Can send events to every token"),
        ]
        verbose_name = _("stored event")
        verbose_name_plural = _("stored events")
        constraints = [
            models.UniqueConstraint(fields=["head", "seq"], name="eventsource_head_seq"),
        ]
        indexes = [
            models.Index(fields=["head", "event_id"], name="eventsource_event_id"),
            models.Index(fields=["created"], name="eventsource_created"),
        ]

    def __str__(self) -> str:
        return shorten(f"{self.action} {self.event_id or self.seq}")


class PendingEvent(EventFields):
    """A durable event whose transaction wrote it, before it has its sequence number."""

    key = models.CharField(max_length=32, db_index=True, editable=False)
    token = models.CharField(_("token"), max_length=255)
    ref = models.UUIDField(editable=False)

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("pending event")
        verbose_name_plural = _("pending events")

    def __str__(self) -> str:
        return f"{shorten(self.action)} (pending)"


class ProcessLease(models.Model):
    """Until when the listeners of one process count. The row's lock orders its changes."""

    key = models.CharField(max_length=32, unique=True, editable=False)
    process = models.CharField(_("process"), max_length=255)
    # By the database's own clock, and in UTC, whatever USE_TZ says.
    until = models.DateTimeField(_("valid until"), db_index=True)

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("process")
        verbose_name_plural = _("processes")

    def __str__(self) -> str:
        return shorten(self.process)


class TokenPresence(models.Model):
    """The listeners of one token in one process."""

    # The lease's row is deleted only after these; the database checks it.
    lease = models.ForeignKey(
        ProcessLease,
        models.DO_NOTHING,
        related_name="tokens",
        db_index=False,
        verbose_name=_("process"),
    )
    key = models.CharField(max_length=32, db_index=True, editable=False)
    token = models.CharField(_("token"), max_length=255)
    listeners = models.PositiveIntegerField(_("listeners"))
    # Text, since PostgreSQL's JSON cannot hold every string. How often each identity is there.
    identities = models.TextField(_("identities"))

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("presence")
        verbose_name_plural = _("presences")
        constraints = [
            models.UniqueConstraint(fields=["lease", "key"], name="eventsource_lease_key"),
        ]

    def __str__(self) -> str:
        return f"{shorten(self.token)} ({self.listeners})"


def set_floor(using: str, **kwargs: Any) -> None:
    """Make sure that the floor is there: at first the clock, in microseconds.

    Received after every ``migrate`` and ``flush``: no number that listeners were given
    before the tables were emptied is known after it.
    """
    now = timezone.now()
    floor = TokenHead(key=FLOOR_KEY, first=0, kept=0, last=time.time_ns() // 1000, updated=now)
    TokenHead.objects.using(using).bulk_create([floor], ignore_conflicts=True)
