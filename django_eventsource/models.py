"""The tables of the database history.

:class:`TokenHead` contains the newest position of each token, and :class:`StoredEvent` the events.
:class:`PendingEvent` is the outbox: the events of transactions, before they have their sequence
numbers. :class:`ProcessLease` and :class:`TokenPresence` contain the listeners. :class:`Console`
has no table. It has the permissions of the admin's console.
"""

import time
from typing import Any

from django.db import models
from django.utils import timezone
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _

__all__ = ["Console", "PendingEvent", "ProcessLease", "StoredEvent", "TokenHead", "TokenPresence"]

FLOOR_KEY = ""
"""The key of the row that contains the floor. The sequence numbers of new epochs are above it."""


def shorten(text: str, chars: int = 40) -> str:
    """Return the beginning of a text."""
    return Truncator(text).chars(chars)


class NotNullIndex(models.Index):
    """An index of the rows whose last column is not null.

    Most events have no own id and no key. A database without partial indexes indexes all rows.
    It is not an index with a ``condition``, because Django warns of those on such a database.
    """

    def create_sql(
        self, model: type[models.Model], schema_editor: Any, using: str = "", **kwargs: Any
    ) -> Any:
        condition = None
        if schema_editor.connection.features.supports_partial_indexes:
            condition = models.Q(**{f"{self.fields[-1]}__isnull": False})
        index = models.Index(fields=self.fields, name=self.name, condition=condition)
        return index.create_sql(model, schema_editor, using, **kwargs)


class TokenHead(models.Model):
    """A token with an epoch. The row's lock orders the token's publishers.

    No index contains a column that a publisher changes. So PostgreSQL writes a new row, but no
    entries of indexes (a heap-only tuple).
    """

    key = models.CharField(max_length=32, unique=True, editable=False)
    token = models.CharField(_("token"), max_length=255)
    first = models.BigIntegerField(_("first sequence number"))
    kept = models.BigIntegerField(_("oldest sequence number kept"))
    last = models.BigIntegerField(_("last sequence number"))
    closed = models.BigIntegerField(_("sequence number of the last close"), null=True)
    # Offsets count the bytes of the data of the token's events, from the beginning of the epoch.
    start_offset = models.BigIntegerField(_("offset of the oldest event kept"), default=0)
    end_offset = models.BigIntegerField(_("offset of the end"), default=0)
    updated = models.DateTimeField(_("last published"))

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("token")
        verbose_name_plural = _("tokens")

    def __str__(self) -> str:
        return shorten(self.token)

    @property
    def size(self) -> int:
        """The bytes of the data of the events that are kept."""
        return self.end_offset - self.start_offset


class EventFields(models.Model):
    """The columns that stored and pending events share."""

    action = models.CharField(_("action"), max_length=255)
    data = models.BinaryField(_("data"))
    event_id = models.CharField(_("own id"), max_length=255, null=True)  # noqa: DJ001
    kind = models.CharField(_("kind"), max_length=6)
    created = models.DateTimeField(_("published"))
    idempotency_key = models.CharField(max_length=32, null=True, editable=False)  # noqa: DJ001

    class Meta:
        abstract = True

    @property
    def size(self) -> int:
        """The bytes of the data."""
        return len(self.data)

    def text(self) -> str:
        """Return the data as text."""
        return bytes(self.data).decode(errors="replace")

    def excerpt(self) -> str:
        """Return the beginning of the data, on one line."""
        return shorten(" ".join(self.text().split()), 80)


class StoredEvent(EventFields):
    """A durable event with its sequence number."""

    # The head's row is deleted only after its events. The database checks it.
    head = models.ForeignKey(
        TokenHead,
        models.DO_NOTHING,
        related_name="events",
        db_index=False,
        verbose_name=_("token"),
    )
    seq = models.BigIntegerField(_("sequence number"))
    # So a read finds the last event of a page without a sum over the events.
    end_offset = models.BigIntegerField(_("offset of the end"))
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
            NotNullIndex(fields=["head", "event_id"], name="eventsource_event_id"),
            # With the head, so that a history check need not read the events.
            models.Index(fields=["created", "head"], name="eventsource_created"),
            NotNullIndex(fields=["head", "idempotency_key"], name="eventsource_key"),
        ]

    def __str__(self) -> str:
        return shorten(f"{self.action} {self.event_id or self.seq}")


class PendingEvent(EventFields):
    """A durable event that a transaction wrote, before it has its sequence number."""

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
    """A server process with listeners. They count until the lease expires.

    The row's lock orders the changes of the lease.
    """

    key = models.CharField(max_length=32, unique=True, editable=False)
    process = models.CharField(_("process"), max_length=255)
    # The database's clock sets it, in UTC whatever USE_TZ is.
    until = models.DateTimeField(_("valid until"), db_index=True)

    class Meta:
        default_permissions = ("view",)
        verbose_name = _("process")
        verbose_name_plural = _("processes")

    def __str__(self) -> str:
        return shorten(self.process)


class Console(ProcessLease):
    """The page of the admin that shows the processes. It has no rows of its own."""

    class Meta:
        proxy = True
        default_permissions = ("view",)
        permissions = [("close_streams", "Can close the streams of every token and user")]
        verbose_name = verbose_name_plural = _("console")


class TokenPresence(models.Model):
    """The listeners of one token in one process."""

    # The lease's row is deleted only after these rows. The database checks it.
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
    # A JSON object with the number of listeners of each identity. It is text, because the JSON
    # types of PostgreSQL refuse some strings.
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


def set_floor(using: str) -> None:
    """Create the row of the floor if it is missing, with the clock in microseconds as its number.

    It runs after every ``migrate`` and ``flush``. A sequence number that a listener received
    before the tables were emptied is then below the floor, so it is not taken for a new one.

    :param using: the alias of the database.
    """
    now = timezone.now()
    floor = TokenHead(key=FLOOR_KEY, first=0, kept=0, last=time.time_ns() // 1000, updated=now)
    TokenHead.objects.using(using).bulk_create([floor], ignore_conflicts=True)
