"""Wake-ups through PostgreSQL's NOTIFY and LISTEN."""

import secrets
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..wake_ups import Groups, WakeUps

CHANNEL = "django_eventsource"

# Each commit of a notification holds a lock of the whole server. Without a wait for the disk it
# holds the lock for a shorter time. The setting ends with the transaction, so a connection pooler
# does not pass it on to another client.
NOTIFY = "SELECT set_config('synchronous_commit', 'off', true), pg_notify(%s, %s)"

# The defaults detect after hours that the network has dropped an idle connection.
CONNECTION = {
    "fallback_application_name": "django-eventsource",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}


def is_psycopg3(connection: Any) -> bool:
    """Return whether a connection of PostgreSQL uses psycopg 3."""
    return bool(connection.Database.__name__ == "psycopg")


def listen_params(using: str, dsn: Any) -> dict[str, Any]:
    """Return the connection parameters in the option ``LISTEN_DSN``.

    :raises ImproperlyConfigured: if it is not a connection string for psycopg 3.
    """
    connection: Any = connections[using]
    if connection.vendor != "postgresql" or not is_psycopg3(connection):
        raise ImproperlyConfigured(
            f"EVENTSOURCE_HISTORY LISTEN_DSN requires PostgreSQL with psycopg 3, but "
            f"DATABASES[{using!r}] uses {connection.Database.__name__}. Remove the option."
        )
    psycopg = connection.Database
    params: dict[str, Any] = {}
    if isinstance(dsn, str):
        with suppress(psycopg.Error):
            params = psycopg.conninfo.conninfo_to_dict(dsn)
    if not params:
        # The value itself may contain a password.
        raise ImproperlyConfigured(
            "EVENTSOURCE_HISTORY LISTEN_DSN must be a connection string of libpq such as "
            f'"host=10.0.0.5 port=5432", or None, not this {type(dsn).__name__}.'
        )
    return params


class PostgresWakeUps(WakeUps):
    """Notifications that contain the groups. They need psycopg 3.

    :param using: the alias of the database.
    :param listen_params: the connection parameters for LISTEN that replace those of the alias.
    """

    tick_seconds = 0.2
    """Seconds after which :meth:`watch` yields, whether there is news or not."""

    def __init__(self, using: str, listen_params: dict[str, Any]) -> None:
        self._using = using
        self._listen_params = listen_params
        self._process = secrets.token_hex(4)

    def watch(self) -> Generator[Groups, None, None]:
        connection = self._connect(self._listen_params)
        with closing(connection), DefaultSelector() as selector:
            connection.execute(f"LISTEN {CHANNEL}")
            selector.register(connection.fileno(), EVENT_READ)
            yield None  # what was published before was not received
            while True:
                yield ()
                if selector.select(self.tick_seconds):
                    yield from self._received(connection.pgconn)

    def _received(self, pgconn: Any) -> Iterator[Groups]:
        pgconn.consume_input()
        while (notification := pgconn.notifies()) is not None:
            process, *groups = notification.extra.decode(errors="replace").split(",")
            # A process delivers its own events to its hubs directly.
            if process != self._process:
                yield groups or None

    def send(self, batches: Iterable[Groups]) -> None:
        with closing(self._connect({})) as connection:
            for groups in batches:
                connection.execute(NOTIFY, [CHANNEL, ",".join([self._process, *(groups or ())])])

    def _connect(self, params: dict[str, Any]) -> Any:
        # The wrapper of this thread is not connected itself: its connection could be of a pool.
        wrapper: Any = connections[self._using]
        params = CONNECTION | wrapper.get_connection_params() | params
        return wrapper.Database.connect(**params | {"autocommit": True})
