"""SQL for the tables of the database history."""

from collections.abc import Sequence
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Field

from ...models import PendingEvent, StoredEvent, TokenHead
from ..outbox import BATCH
from ..records import Draft, Kind

TABLES = {"heads": TokenHead, "events": StoredEvent, "pending": PendingEvent}


def fill(connection: BaseDatabaseWrapper, template: str) -> str:
    """Return SQL whose names in braces are replaced with the quoted names of the database.

    :param connection: a connection to the database.
    :param template: the SQL. ``{heads}``, ``{events}`` and ``{pending}`` are the tables. Any other
        name is that of a field, whose column has the same name in each table.
    """
    quote = connection.ops.quote_name
    names = {name: quote(model._meta.db_table) for name, model in TABLES.items()}
    for model in TABLES.values():
        fields: Sequence[Field[Any, Any]] = model._meta.concrete_fields
        names |= {field.attname: quote(field.column or "") for field in fields}
    return template.strip().format_map(names)


def values_of(connection: Any, draft: Draft) -> tuple[Any, ...]:
    """Return the parameters for the columns ``action``, ``data``, ``event_id`` and ``kind``."""
    data = connection.Database.Binary(draft.data)
    return draft.action, data, draft.event_id, draft.kind.value


def is_plain(drafts: Sequence[Draft]) -> bool:
    """Return whether one insert can store drafts: without a key, and from 1 to ``BATCH``."""
    return 0 < len(drafts) <= BATCH and not any(draft.key for draft in drafts)


def last_close(drafts: Sequence[Draft]) -> int | None:
    """Return the position of the last close among drafts, counted from 1; ``None`` without one."""
    return max((n for n, one in enumerate(drafts, 1) if one.kind is Kind.CLOSE), default=None)
