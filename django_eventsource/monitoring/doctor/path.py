"""Findings about the path from a publisher through the public URL to a listener."""

from __future__ import annotations

import email.utils
import ipaddress
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from ...conf import conf
from .canary import MARGIN_SECONDS, Observation
from .clocks import TOLERATED_SECONDS, describe, difference_seconds
from .finding import (
    DEPLOY,
    DOCTOR,
    ERROR,
    INFO,
    MACHINES,
    NGINX,
    SETTINGS,
    TROUBLESHOOTING,
    WARNING,
    Finding,
)

DATE_SECONDS = 5
"""The age of a ``Date`` header at most. A busy server renews it late."""


def wsgi(seen: Observation) -> Iterator[Finding]:
    """Report a server that serves the project through WSGI."""
    if seen.served_by_wsgi:
        yield Finding(
            ERROR,
            "The request for a stream reached the project through WSGI.",
            "Serve the project's ASGI application with daphne, uvicorn, hypercorn, granian or "
            "`gunicorn -k asgi`.",
            number=14,
            page=DEPLOY,
        )


def buffering(seen: Observation) -> Iterator[Finding]:
    """Report a proxy that buffers the stream."""
    if seen.buffered:
        yield Finding(
            ERROR,
            "The event arrived with the end of the stream only: a proxy buffers the response.",
            "Disable the buffering of this URL. In nginx remove X-Accel-Buffering from "
            "`proxy_ignore_headers`, or set `proxy_buffering off`.",
            number=15,
            page=NGINX,
        )


def separate_processes(seen: Observation) -> Iterator[Finding]:
    """Report processes that do not share events, of which only some reach the stream."""
    if 0 < seen.arrived < seen.sent:
        yield Finding(
            ERROR,
            f"Only {seen.arrived} of {seen.sent} posted events arrived: several processes serve "
            "the URL, and each keeps its events in its own memory.",
            "Use DatabaseHistory or RedisHistory in EVENTSOURCE_HISTORY, and for live-only events "
            "a channel layer that processes share. Or run one process.",
            number=16,
            page=MACHINES,
        )


def lost_canary(seen: Observation) -> Iterator[Finding]:
    """Report an event that did not arrive at all."""
    if not seen.sent or seen.arrived or seen.buffered:
        return
    publisher = "this process published" if seen.direct else "was posted to the server"
    yield Finding(
        ERROR,
        f"An event that {publisher} did not arrive on the open stream.",
        "Start this command with the settings and environment variables of the server: the "
        "database, the Redis servers, the channel layer and the SECRET_KEY must be the same."
        if seen.direct
        else "Read the log of the server.",
        number=17,
        page=TROUBLESHOOTING,
    )


def compression(seen: Observation) -> Iterator[Finding]:
    """Report a stream that is compressed."""
    if seen.encoding is not None:
        yield Finding(
            ERROR,
            f"The stream has Content-Encoding {seen.encoding}, although none was accepted: many "
            "clients cannot read it.",
            "Disable compression for this URL in the proxy and in middleware.",
            number=18,
            page=NGINX,
        )
    elif seen.accepted_encoding is not None:
        yield Finding(
            WARNING,
            f"The stream has Content-Encoding {seen.accepted_encoding} for a client that accepts "
            "it, as browsers do: compression delays events and costs memory for each stream.",
            "Remove text/event-stream from the types that the proxy compresses (`gzip_types` of "
            "nginx).",
            number=19,
            page=NGINX,
        )


def delayed_compression(seen: Observation) -> Iterator[Finding]:
    """Report a stream that does not arrive in time if the client accepts compression."""
    if seen.delayed_if_accepted:
        yield Finding(
            ERROR,
            "A client that accepts compression, as browsers do, received no data in time: a proxy "
            "compresses and buffers the response.",
            "Remove text/event-stream from the types that the proxy compresses (`gzip_types` of "
            "nginx), and disable the buffering of this URL.",
            number=26,
            page=NGINX,
        )


def idle_timeout(seen: Observation) -> Iterator[Finding]:
    """Report a connection that was cut while it was idle."""
    if seen.cut_seconds is not None:
        yield Finding(
            ERROR,
            f"The connection was cut after {seen.cut_seconds:.1f} s without data. "
            f"EVENTSOURCE_KEEPALIVE_SECONDS is {_keepalive()}.",
            "Make the idle time-outs of all proxies longer than that (`proxy_read_timeout` of "
            "nginx), or set EVENTSOURCE_KEEPALIVE_SECONDS to less than the shortest of them.",
            number=20,
            page=NGINX,
        )


def missing_keepalive(seen: Observation) -> Iterator[Finding]:
    """Report a stream on which no keepalive arrived in time."""
    keepalive = conf.keepalive_seconds
    if keepalive is None or seen.cut_seconds is not None or seen.keepalives:
        return
    if seen.idle_seconds >= keepalive + MARGIN_SECONDS:
        yield Finding(
            WARNING,
            f"No keepalive arrived for {seen.idle_seconds:.0f} s. "
            f"EVENTSOURCE_KEEPALIVE_SECONDS is {_keepalive()}.",
            "Check that the server has the same settings, that the view does not replace "
            "keepalive_seconds, and that no proxy removes comments.",
            number=21,
            page=SETTINGS,
        )


def _keepalive() -> str:
    seconds = conf.keepalive_seconds
    return "None" if seconds is None else f"{seconds:g}"


def http_1_0(seen: Observation) -> Iterator[Finding]:
    """Report a response that has no marked end."""
    if seen.http_version == "HTTP/1.0":
        yield Finding(
            WARNING,
            "The response is HTTP/1.0: a client cannot distinguish its end from a failure, and "
            "each request needs a new connection.",
            "Let the proxy speak HTTP/1.1 (`proxy_http_version 1.1` of nginx).",
            number=22,
            page=NGINX,
        )


def no_http2(seen: Observation) -> Iterator[Finding]:
    """Report a server whose browsers can open six streams only."""
    if seen.offers_http2 is False:
        yield Finding(
            INFO,
            "The server offers HTTP/1.1 only: a browser opens at most six streams of a site, in "
            "all its tabs.",
            "Enable HTTP/2 in the proxy (`http2 on` of nginx).",
            number=23,
            page=NGINX,
        )


def no_tls(seen: Observation) -> Iterator[Finding]:
    """Report a public URL without TLS."""
    url = urlsplit(seen.url)
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        yield Finding(
            WARNING,
            "The URL is http: every machine on the network path can read the events and the "
            "grants, and browsers use HTTP/2 with https only.",
            "Serve the URL with https.",
            number=24,
            page=NGINX,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_clock(seen: Observation) -> Iterator[Finding]:
    """Report a server whose ``Date`` differs from the clock of this machine."""
    try:
        date = email.utils.parsedate_to_datetime(seen.date or "").timestamp()
    except ValueError:
        return
    seconds = difference_seconds(seen.requested_at - DATE_SECONDS, date, seen.responded_at)
    if abs(seconds) > TOLERATED_SECONDS:
        yield Finding(
            WARNING,
            f"The server has a clock that is {describe(seconds)}: grants, leases and the age of "
            "events depend on the clocks.",
            "Synchronize the clocks of all machines, for example with chrony.",
            number=25,
            page=DOCTOR,
        )


FINDINGS: list[Callable[[Observation], Iterator[Finding]]] = [
    wsgi,
    buffering,
    separate_processes,
    lost_canary,
    compression,
    delayed_compression,
    idle_timeout,
    missing_keepalive,
    http_1_0,
    no_http2,
    no_tls,
    server_clock,
]
"""The functions, in the order in which the doctor calls them."""
