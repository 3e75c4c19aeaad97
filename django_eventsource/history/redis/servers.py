"""The Redis servers of a history: addresses, connections and repeated attempts."""

import binascii
import importlib
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.crypto import salted_hmac

from ..._timing import Backoff, spread
from .scripts import Script

T = TypeVar("T")

SHORT_TIMEOUT_SECONDS = 1.0
"""Seconds for which a call that its caller repeats anyway is repeated here."""
PROBE_SECONDS = 1.0
"""Seconds after a failed call in which other calls fail at once. Then one call is tried."""
RETRY_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
"""Seconds between attempts, at most."""

SETTING = "EVENTSOURCE_HISTORY HOSTS"
HOST_FORMS = (
    'URLs such as "redis://127.0.0.1:6379", (host, port) tuples, and dictionaries with '
    '"address" or with keyword arguments of redis.Redis, and with "cluster": True where the '
    "server is a node of a cluster"
)
TRANSIENT = re.compile(
    r"^(BUSY|MISCONF|NOREPLICAS) "
    # Versions before 7 report a lack of memory inside of a script as an error of the script.
    "|command not allowed when used memory"
)
"""Error replies after which the same call may succeed later. Others have an exception class."""
OTHER_PROJECT = (
    "If another project uses this server, set PREFIX in the OPTIONS of EVENTSOURCE_HISTORY to a "
    "text that only this project uses. If this project's SECRET_KEY was changed, add the old one "
    "to SECRET_KEY_FALLBACKS. If no project uses the keys with this prefix any more, delete that "
    "key."
)
ERROR_HINTS = {
    "OutOfMemoryError": "Raise its memory limit (maxmemory), or lower MAX_EVENTS or MAX_AGE.",
    "MISCONF": "It cannot write its data to disk. Check its log and the disk.",
    "NoPermissionError": "Its user may not run this command. Allow the command (ACL SETUSER).",
    "ReadOnlyError": "It is a replica. HOSTS must name the primary.",
}
"""What to do about an error, by its class or by the first word of its text."""


class Host:
    """One server, or one cluster.

    :param redis: the package.
    :param name: the address without a password, for messages.
    :param connect: returns the client of redis-py. It is called for the first command.
    :param timeout: seconds after which a failing call is not repeated any more.
    :param marker: the key that contains the fingerprint of the project that uses the prefix. It is
        compared once, before the first command.
    :param is_cluster: whether it is a cluster, as far as the settings show.
    """

    def __init__(
        self,
        redis: Any,
        name: str,
        connect: Callable[[], Any],
        timeout: float,
        marker: str,
        *,
        is_cluster: bool = False,
    ) -> None:
        self.name = name
        self.is_cluster = is_cluster
        """Whether a script can use the keys of one token only."""
        self._connect = connect
        self._timeout = timeout
        self._marker = marker
        self._is_ours = False
        self._failure: Exception | None = None
        self._probe_at = 0.0
        self._errors = errors = redis.exceptions
        self._refused = (errors.AuthenticationError, errors.AuthorizationError)
        self._unreachable = (errors.ConnectionError, errors.TimeoutError)
        self._transient = (
            *self._unreachable,
            errors.ReadOnlyError,
            errors.ClusterDownError,
            errors.MasterDownError,
            errors.TryAgainError,
        )

    @cached_property
    def client(self) -> Any:
        """The client of redis-py. It closes its connections when no one uses this server any more.

        Otherwise the garbage collector would close them, in an order in which a socket warns that
        it is still open.
        """
        client = self._connect()
        weakref.finalize(self, _close, client).atexit = False
        return client

    @property
    def is_unreachable(self) -> bool:
        """Whether the last call did not reach the server."""
        return self._failure is not None

    def retry(
        self,
        work: Callable[[float | None], T],
        *,
        patient: bool = False,
        seconds: float = SHORT_TIMEOUT_SECONDS,
    ) -> T:
        """Run work until it succeeds, fails permanently, or the time-out has passed.

        :param work: the work. It receives the time at which the first attempt began
            (``time.monotonic()``), or ``None`` in the first attempt.
        :param patient: whether to try for the whole time-out. Otherwise the caller itself repeats
            the call. It is then not tried at all if another call has just failed, so that many
            calls do not wait one after the other.
        :param seconds: seconds after which a call that is not patient is not repeated any more.
        :returns: what the work returns.
        :raises redis.exceptions.RedisError: if the work failed.
        """
        if not patient:
            self._raise_if_unreachable()
        patience = self._timeout if patient else min(self._timeout, seconds)
        began = time.monotonic()
        is_first = True
        backoff = Backoff(RETRY_SECONDS)
        while True:
            try:
                result = self._attempt(work, None if is_first else began)
            except self._errors.RedisError as error:
                elapsed = time.monotonic() - began
                # A server that responds, even with an error, can be reached.
                refused = isinstance(error, self._refused)
                unreachable = isinstance(error, self._unreachable) and not refused
                self._failure = error if unreachable else None
                self._probe_at = time.monotonic() + PROBE_SECONDS
                if not self.is_transient(error) or elapsed >= patience:
                    self._add_note(error, elapsed)
                    raise
                if isinstance(error, self._errors.ReadOnlyError):
                    # After a failover its name may resolve to another server.
                    self.client.close()
            else:
                self._failure = None
                return result
            seconds = backoff.next()
            time.sleep(spread(seconds / 2, seconds))
            is_first = False

    def _attempt(self, work: Callable[[float | None], T], began: float | None) -> T:
        try:
            if not self._is_ours:
                self._check_marker()
            return work(began)
        except self._errors.RedisClusterException as error:
            # It is not a subclass of RedisError.
            raise self._errors.ConnectionError(str(error)) from error

    def _check_marker(self) -> None:
        """Check that no other project uses the prefix on this server.

        :raises ImproperlyConfigured: if the marker was set with another SECRET_KEY.
        """
        own = fingerprint(settings.SECRET_KEY)
        found = self.client.get(self._marker)
        if found is None:
            self.client.set(self._marker, own, nx=True)
            # Another process may have set it first.
            found = self.client.get(self._marker) or own
        if found != own:
            if found not in map(fingerprint, settings.SECRET_KEY_FALLBACKS):
                raise ImproperlyConfigured(
                    f"The key {self._marker!r} on the Redis server {self.name} was set with "
                    f"another SECRET_KEY. {OTHER_PROJECT}"
                )
            self.client.set(self._marker, own)
        self._is_ours = True

    def _raise_if_unreachable(self) -> None:
        """Raise the last failure again, unless it is time for one call to probe the server."""
        failure, now = self._failure, time.monotonic()
        if failure is None:
            return
        if now < self._probe_at:
            raise self._errors.ConnectionError(f"{failure} (in an earlier call)")
        self._probe_at = now + self._timeout

    def is_transient(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        if isinstance(error, self._refused):
            return False
        return isinstance(error, self._transient) or TRANSIENT.search(str(error)) is not None

    def _add_note(self, error: Exception, elapsed: float) -> None:
        names = (type(error).__name__, str(error).partition(" ")[0])
        hint = next((ERROR_HINTS[name] for name in names if name in ERROR_HINTS), "")
        tried = f"Tried for {elapsed:.1f} s. " if self.is_transient(error) else ""
        error.add_note(f"Redis server of the history: {self.name}. {tried}{hint}".rstrip())

    def run(self, script: Script, keys: Sequence[str | bytes], args: Sequence[Any]) -> Any:
        """Run a script that may run twice."""
        return self.retry(lambda _: self.run_once(script, keys, args))

    def run_once(self, script: Script, keys: Sequence[str | bytes], args: Sequence[Any]) -> Any:
        """Run a script once, also if the server has not cached it."""
        try:
            return self.client.evalsha(script.sha, len(keys), *keys, *args)
        except self._errors.NoScriptError:
            return self.client.eval(script.source, len(keys), *keys, *args)

    def run_with_log(
        self, script: Script, keys: Sequence[str | bytes], log: str, args: Sequence[Any]
    ) -> Any:
        """Run a script once with the keys of a token, and the log of changes if that is possible.

        :param log: the key of the log. In a cluster, it is not on the node of the other keys.
        """
        if not self.is_cluster:
            try:
                return self.run_once(script, [*keys, log], args)
            except self._errors.ClusterCrossSlotError:
                # A node of a cluster, or a proxy, at an address without "cluster".
                self.is_cluster = True
        return self.run_once(script, keys, args)

    def executors(self) -> list[Callable[..., Any]]:
        """Return a function for each server, or for each primary of a cluster.

        The function executes a command that may run twice, and returns its result.
        """

        def execute(*command: Any, **options: Any) -> Any:
            return self.retry(lambda _: self.client.execute_command(*command, **options))

        client = self.retry(lambda _: self.client)
        if not hasattr(client, "get_primaries"):
            return [execute]
        return [partial(execute, target_nodes=node) for node in client.get_primaries()]

    def pipe(
        self,
        commands: Sequence[Sequence[Any]],
        first: tuple[Script, Sequence[str | bytes], Sequence[Any]] | None = None,
    ) -> list[Any]:
        """Run commands that may run twice, in one round trip.

        :param commands: the commands with their arguments.
        :param first: a script with its keys and arguments to run before the commands, or ``None``.
        :returns: the results, that of the script first.
        """
        return self.retry(lambda _: self._pipe(commands, first))

    def _pipe(
        self,
        commands: Sequence[Sequence[Any]],
        first: tuple[Script, Sequence[str | bytes], Sequence[Any]] | None,
    ) -> list[Any]:
        pipeline = self.client.pipeline(transaction=False)
        if first is not None:
            script, keys, args = first
            pipeline.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
        for command in commands:
            pipeline.execute_command(*command)
        results: list[Any] = pipeline.execute(raise_on_error=False)
        if first is not None and isinstance(results[0], self._errors.NoScriptError):
            results[0] = self.run_once(*first)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def _close(client: Any) -> None:
    """Close the connections of a client of redis-py, also those to the sentinels that it asks."""
    client.close()
    pool = getattr(client, "connection_pool", None)
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        sentinel.close()


def fingerprint(secret_key: str | bytes) -> bytes:
    """Return a text that identifies a project by its SECRET_KEY without revealing the key."""
    salt = "django_eventsource.history.redis"
    return salted_hmac(salt, "project", secret_key, algorithm="sha256").hexdigest().encode()


class Hosts:
    """The servers of a history.

    :param hosts: the option ``HOSTS``.
    :param timeout: seconds after which a failing call is not repeated any more.
    :param prefix: the text with which all keys begin.
    :raises ImproperlyConfigured: if redis-py is not installed or an address is not acceptable.
    """

    def __init__(self, hosts: Any, timeout: float, prefix: str) -> None:
        try:
            redis = importlib.import_module("redis")
        except ImportError as error:
            raise ImproperlyConfigured(
                "RedisHistory needs the package redis (redis-py), which is not installed: "
                "python -m pip install redis channels_redis"
            ) from error
        if not isinstance(hosts, list | tuple) or not hosts:
            raise ImproperlyConfigured(
                f"{SETTING} must be a list of {HOST_FORMS}; not {_shown(hosts)}."
            )
        self.error: type[Exception] = redis.exceptions.RedisError
        """The base class of the exceptions that the servers raise."""
        marker = f"{prefix}:project"
        self.all = [_make_host(redis, host, timeout, marker) for host in hosts]

    def of(self, key: str) -> Host:
        """Return the server that stores a token's key. It is the same in every process."""
        crc = binascii.crc32(key.encode()) & 0xFFF
        return self.all[crc * len(self.all) // 4096]


def _make_host(redis: Any, host: Any, timeout: float, marker: str) -> Host:
    kwargs = _keyword_arguments(host)
    if kwargs.pop("cluster", False):
        return _make_cluster(redis, kwargs, timeout, marker)
    try:
        client = _make_client(redis, {**_timeouts(timeout), **kwargs})
    except (TypeError, ValueError, AttributeError) as error:
        raise _not_acceptable(host, error) from error
    pool = client.connection_pool
    # redis-py must not repeat a call itself, because an append that timed out may have run. It
    # must not decode responses either, because events are bytes.
    no_retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    client.set_retry(no_retry)
    pool.connection_kwargs.update(decode_responses=False, retry_on_timeout=False)
    known = {**pool.connection_kwargs, **kwargs}
    address = f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
    name = known.get("path") or known.get("master_name") or address
    return Host(redis, str(name), lambda: client, timeout, marker)


def _make_cluster(redis: Any, kwargs: dict[str, Any], timeout: float, marker: str) -> Host:
    # The client is made for the first command, because redis-py then connects to the cluster.
    host = dict(kwargs)
    address = kwargs.pop("address", None)
    options: dict[str, Any] = {
        **_timeouts(timeout),
        **kwargs,
        "decode_responses": False,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }

    def connect() -> Any:
        try:
            if address is not None:
                return redis.RedisCluster.from_url(address, **options)
            return redis.RedisCluster(**options)
        except (TypeError, ValueError) as error:
            raise _not_acceptable(host, error) from error
        except redis.exceptions.RedisClusterException as error:
            if isinstance(error.__cause__, TypeError | ValueError):
                raise _not_acceptable(host, error.__cause__) from error
            raise

    name = str(address or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}")
    name = re.sub(r"//[^@]*@", "//", name)
    return Host(redis, name, connect, timeout, marker, is_cluster=True)


def _timeouts(timeout: float) -> dict[str, float]:
    # A third of the time-out, so that a call to a silent server is repeated within it.
    return {"socket_timeout": timeout / 3, "socket_connect_timeout": timeout / 3}


def _not_acceptable(host: Any, why: Exception | None = None) -> ImproperlyConfigured:
    reason = f": {why}" if why else ""
    return ImproperlyConfigured(f"{SETTING} must be {HOST_FORMS}; not {_shown(host)}{reason}.")


def _keyword_arguments(host: Any) -> dict[str, Any]:
    match host:
        case str():
            return {"address": host}
        case (str() as name, int() as port):
            return {"host": name, "port": port}
        case Mapping():
            return dict(host)
    raise _not_acceptable(host)


def _make_client(redis: Any, kwargs: dict[str, Any]) -> Any:
    if "address" in kwargs:
        return redis.Redis.from_url(kwargs.pop("address"), **kwargs)
    if "master_name" in kwargs:
        name, sentinels = kwargs.pop("master_name"), kwargs.pop("sentinels", [])
        sentinel = redis.sentinel.Sentinel(
            sentinels,
            sentinel_kwargs=kwargs.pop("sentinel_kwargs", None),
            **kwargs,
        )
        return sentinel.master_for(name)
    return redis.Redis(**kwargs)


def _shown(value: Any) -> str:
    """Return the text of addresses without their passwords."""
    text = re.sub(r"//[^'@]*@", "//", repr(value))
    return re.sub(r"(password'): '[^']*'", r"\1: '...'", text)
