"""SQL for the tables of the database history."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from django.db import connections
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


class Statement:
    """A statement that returns rows.

    :param using: the alias of the database.
    :param sql: the statement, with the parameters ``$1``, ``$2`` and so on.
    :param types: the type of each parameter. Only PostgreSQL needs to know them.
    """

    def __init__(self, using: str, sql: str, types: Sequence[str]) -> None:
        self._using = using
        self._numbers = [int(number) - 1 for number in re.findall(r"\$(\d+)", sql)]
        self._text = re.sub(r"\$\d+", "%s", sql)

    def fetch(self, params: Sequence[Any]) -> Sequence[Any]:
        """Execute the statement and return its rows.

        :param params: the values of ``$1``, ``$2`` and so on.
        """
        connection = connections[self._using]
        with connection.cursor() as cursor:
            self._run(connection, cursor, params)
            rows: Sequence[Any] = cursor.fetchall()
            return rows

    def _run(self, connection: Any, cursor: Any, params: Sequence[Any]) -> None:
        """Execute the statement."""
        cursor.execute(self._text, [params[number] for number in self._numbers])


def values_of(connection: Any, draft: Draft) -> tuple[Any, ...]:
    """Return the parameters for the columns ``action``, ``data``, ``event_id`` and ``kind``."""
    data = connection.Database.Binary(draft.data)
    return draft.action, data, draft.event_id, draft.kind.value


def end_offsets(end: int, drafts: Sequence[Draft]) -> list[int]:
    """Return the offset of the end of each draft, of which the last one ends at ``end``."""
    start = end - sum(len(draft.data) for draft in drafts)
    return [*accumulate((len(draft.data) for draft in drafts), initial=start)][1:]


def is_plain(drafts: Sequence[Draft]) -> bool:
    """Return whether one insert can store drafts: without a key, and from 1 to ``BATCH``."""
    return 0 < len(drafts) <= BATCH and not any(draft.key for draft in drafts)


def last_close(drafts: Sequence[Draft]) -> int | None:
    """Return the position of the last close among drafts, counted from 1; ``None`` without one."""
    return max((n for n, one in enumerate(drafts, 1) if one.kind is Kind.CLOSE), default=None)
