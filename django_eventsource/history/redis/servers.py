"""The Redis servers of a history: their addresses, connections, and when to try again."""

from __future__ import annotations

import binascii
import importlib
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.crypto import salted_hmac

from .redis_scripts import Script

T = TypeVar("T")

IMPATIENT_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 1.0
"""How soon one caller tries a server again that was found away."""

SETTING = "EVENTSOURCE_HISTORY HOSTS"
HOST_FORMS = (
    'URLs such as "redis://127.0.0.1:6379", (host, port) tuples, and dictionaries with '
    '"address" or with keyword arguments of redis.Redis, and with "cluster": True where the '
    "server is a node of a cluster"
)
PASSING = re.compile(
    r"^(BUSY|MISCONF|NOREPLICAS) "
    # Versions before 7 report it from inside of a script as an error of the script.
    "|command not allowed when used memory"
)
"""Error replies after which the same call may succeed later, besides those with a class."""
OTHER_PROJECT = (
    "If another project uses this server, set PREFIX in the OPTIONS of EVENTSOURCE_HISTORY to a "
    "text that only this project uses. If this project's SECRET_KEY was changed, add the old one "
    "to SECRET_KEY_FALLBACKS. If no project uses the keys with this prefix any more, delete that "
    "key."
)
WAYS_OUT = {
    "OutOfMemoryError": "Give it more memory (maxmemory), or keep less: MAX_EVENTS, MAX_AGE.",
    "MISCONF": "It cannot write its data to disk: look at its log and at the disk.",
    "NoPermissionError": "Its user may not run this command: allow it (ACL SETUSER).",
    "ReadOnlyError": "It is a replica: HOSTS must name the primary.",
}
"""What to do about errors: by their class, or by how they begin."""


class Host:
    """One server: runs work on it, again while it cannot be reached.

    :param marker: the key that contains the fingerprint of the project that uses the prefix. It is
        compared once, before the first work.
    """

    def __init__(
        self,
        redis: Any,
        name: str,
        client: Any,
        timeout: float,
        marker: str,
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self.name = name
        """The address, without any password."""
        self._client = client
        self._connect = connect
        self._timeout = timeout
        self._marker = marker
        self._is_ours = False
        self._failure: Exception | None = None
        self._look_again_at = 0.0
        errors = redis.exceptions
        self._no_script = errors.NoScriptError
        self._read_only = errors.ReadOnlyError
        self._refused = (errors.AuthenticationError, errors.AuthorizationError)
        self._errors = errors.RedisError
        self._cluster_error = errors.RedisClusterException
        self._away = (errors.ConnectionError, errors.TimeoutError)
        self._passing = (
            errors.ConnectionError,
            errors.TimeoutError,
            errors.ReadOnlyError,
            errors.ClusterDownError,
            errors.MasterDownError,
            errors.TryAgainError,
        )

    @property
    def client(self) -> Any:
        """The client of redis-py."""
        if self._client is None and self._connect is not None:
            self._client = self._connect()
        return self._client

    @client.setter
    def client(self, client: Any) -> None:
        self._client = client

    def again(self, work: Callable[[float | None], T], *, patient: bool = False) -> T:
        """Run work until it succeeds, fails for good, or the time is up.

        :param work: is given the seconds since the first attempt began; ``None`` if it
            is the first.
        :param patient: try for the whole time-out. What is not patient is for somebody who
            asks again anyway: it tries for a moment, and not at all on a server that was
            found away just now, so that a thousand do not wait one after the other.
        """
        if not patient:
            self._give_up_early()
        patience = self._timeout if patient else min(self._timeout, IMPATIENT_SECONDS)
        began = time.monotonic()
        elapsed: float | None = None
        pause = 0.01
        while True:
            try:
                result = self._attempt(work, elapsed)
            except self._errors as error:
                elapsed = time.monotonic() - began
                # A server that answers, whatever it says, is not away.
                away = isinstance(error, self._away) and not isinstance(error, self._refused)
                self._failure = error if away else None
                self._look_again_at = time.monotonic() + LOOK_AGAIN_SECONDS
                if not self._passes(error) or elapsed >= patience:
                    self._explain(error, elapsed)
                    raise
                if isinstance(error, self._read_only):
                    # Its name may lead to another server by now.
                    self.client.close()
            else:
                self._failure = None
                return result
            # Those who retried in step would collide again.
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311
            pause = min(pause * 2, 1.0)
            elapsed = time.monotonic() - began

    def _attempt(self, work: Callable[[float | None], T], elapsed: float | None) -> T:
        try:
            if not self._is_ours:
                self._check_marker()
            return work(elapsed)
        except self._cluster_error as error:
            # It is no RedisError, and it passes.
            raise self._away[0](str(error)) from error

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

    def _give_up_early(self) -> None:
        """Fail at once where the server was away a moment ago; now and then let one try."""
        failure, now = self._failure, time.monotonic()
        if failure is None:
            return
        if now < self._look_again_at:
            raise self._away[0](f"{failure} (a moment ago)")
        self._look_again_at = now + self._timeout

    def _passes(self, error: Exception) -> bool:
        if isinstance(error, self._refused):
            return False
        return isinstance(error, self._passing) or PASSING.search(str(error)) is not None

    def _explain(self, error: Exception, elapsed: float) -> None:
        names = (type(error).__name__, str(error).partition(" ")[0])
        way_out = next((WAYS_OUT[name] for name in names if name in WAYS_OUT), "")
        tried = f"tried for {elapsed:.1f} s. " if self._passes(error) else ""
        error.add_note(f"Redis server of the history: {self.name}. {tried}{way_out}".rstrip())

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script that may run twice."""
        return self.again(lambda _: self.run_once(script, keys, args))

    def run_once(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script, also on a server that does not know it (any more)."""
        try:
            return self.client.evalsha(script.sha, len(keys), *keys, *args)
        except self._no_script:
            return self.client.eval(script.source, len(keys), *keys, *args)

    def pipe(
        self,
        commands: Sequence[Sequence[Any]],
        first: tuple[Script, str, Sequence[Any]] | None = None,
    ) -> list[Any]:
        """Run commands, after a script on one key if one is given, in one round trip.

        All of them may run twice.
        """
        return self.again(lambda _: self._pipe(commands, first))

    def _pipe(
        self, commands: Sequence[Sequence[Any]], first: tuple[Script, str, Sequence[Any]] | None
    ) -> list[Any]:
        pipeline = self.client.pipeline(transaction=False)
        if first is not None:
            script, key, args = first
            pipeline.execute_command("EVALSHA", script.sha, 1, key, *args)
        for command in commands:
            pipeline.execute_command(*command)
        results: list[Any] = pipeline.execute(raise_on_error=False)
        if first is not None and isinstance(results[0], self._no_script):
            results[0] = self.run_once(script, [key], args)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def fingerprint(secret_key: str | bytes) -> bytes:
    """Return what identifies a project by its SECRET_KEY, without revealing it."""
    salt = "django_eventsource.history.redis"
    return salted_hmac(salt, "project", secret_key, algorithm="sha256").hexdigest().encode()


class Hosts:
    """The servers, and which of them holds what.

    :param prefix: what all keys begin with.
    :raises ImproperlyConfigured: when redis-py is missing or an address is wrong.
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
        """What all failures of the servers are."""
        marker = f"{prefix}:project"
        self.all = [_make_host(redis, host, timeout, marker) for host in hosts]

    def of(self, key: str) -> Host:
        """Give the server that holds a key: the same in every process."""
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
    # redis-py must not try again by itself: an append that timed out may have run. And
    # events are bytes.
    no_retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    client.set_retry(no_retry)
    pool.connection_kwargs.update(decode_responses=False, retry_on_timeout=False)
    known = {**pool.connection_kwargs, **kwargs}
    name = known.get("path") or known.get("master_name")
    name = name or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
    return Host(redis, str(name), client, timeout, marker)


def _make_cluster(redis: Any, kwargs: dict[str, Any], timeout: float, marker: str) -> Host:
    """Make the client of a cluster when it is first needed: making it asks the cluster."""
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
    return Host(redis, re.sub(r"//[^@]*@", "//", name), None, timeout, marker, connect)


def _timeouts(timeout: float) -> dict[str, float]:
    """Let a call fail and be tried again before its time is up."""
    return {"socket_timeout": timeout / 3, "socket_connect_timeout": timeout / 3}


def _not_acceptable(host: Any, why: Exception | None = None) -> ImproperlyConfigured:
    said = f": {why}" if why else ""
    return ImproperlyConfigured(f"{SETTING} must be {HOST_FORMS}; not {_shown(host)}{said}.")


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
    """Show addresses without their passwords."""
    text = re.sub(r"//[^'@]*@", "//", repr(value))
    return re.sub(r"(password'): '[^']*'", r"\1: '...'", text)
