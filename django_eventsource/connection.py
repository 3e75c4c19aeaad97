"""HTTP for clients of event streams: where requests go, and what went wrong, in words.

Needs httpx, and no Django.
"""

from __future__ import annotations

import calendar
import contextlib
import email.utils
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from types import AsyncGeneratorType
from typing import Any, cast

import httpx

from .exceptions import ClientError
from .frames import CONTENT_TYPE

CONNECT_TIMEOUT_SECONDS = 10.0
EXCERPT_TIMEOUT_SECONDS = 5.0
"""How long to wait for more of a body that explains a status."""

# UnicodeError is what the standard library raises for an over-long host name.
FAILURES = (ClientError, httpx.HTTPError, httpx.InvalidURL, UnicodeError)
"""What a request can raise, all of which :meth:`Target.failure` puts in words."""

# Not UnsupportedProtocol and TooManyRedirects: what a URL or a redirect says does not pass.
_NETWORK_FAILURES = (
    httpx.TimeoutException,
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Auth = httpx.Auth | tuple[str, str]

_MAX_EXCERPT_BYTES = 1024
_MAX_EXCERPT_CHARACTERS = 200
# Whatever the proxy settings of the environment say, this machine is reached directly.
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
# What a caller may set and any origin may see.
_HARMLESS = {"accept", "accept-encoding", "cache-control", "host", "user-agent"}
# To the last @: an unencoded password may contain any character.
_USERINFO = re.compile(r"^([a-z]+://)?.*@", re.DOTALL | re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")


class Target:
    """Where requests go and what they carry. No I/O.

    :param url: an http or https URL. A user and password in it are sent as HTTP Basic.
    :param headers: the caller's request headers, as a mapping or as pairs; never changed.
    :param auth: how requests authenticate. An ``Authorization`` in ``headers`` wins.
    :raises ValueError: for a URL, header name or header value that cannot be sent.
    """

    def __init__(self, url: str, headers: Headers, auth: Auth | None) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()  # the error of httpx may quote a part of the password
        if parsed.scheme not in _DEFAULT_PORTS or not parsed.host:
            raise ValueError(
                f"{hide_secrets(url)!r} is not a valid http:// or https:// URL with a host."
            )
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        self.headers = httpx.Headers([_check_header(name, value) for name, value in pairs])
        if auth is None and parsed.userinfo:
            auth = (parsed.username, parsed.password)
        # An explicit header wins: it is the more deliberate of the two.
        self.auth = None if "Authorization" in self.headers else auth
        self.url = parsed.copy_with(username="", password="", fragment=None)
        self.name = printable(self.url)

    def options(
        self, verify: bool | ssl.SSLContext, read_timeout_seconds: float | None
    ) -> dict[str, Any]:
        """Give the arguments of an httpx client."""
        return {
            "auth": self.auth,
            "verify": verify,
            "mounts": dict.fromkeys(_LOOPBACK),
            "timeout": httpx.Timeout(CONNECT_TIMEOUT_SECONDS, read=read_timeout_seconds),
        }

    def hooks(self) -> dict[str, list[Callable[..., None]]]:
        """Return the event hooks of an ``httpx.Client``."""
        return {"request": [self.guard], "response": [cut_body]}

    def async_hooks(self) -> dict[str, list[Callable[..., Awaitable[None]]]]:
        """Return the event hooks of an ``httpx.AsyncClient``."""

        async def guard(request: httpx.Request) -> None:
            self.guard(request)

        async def cut(response: httpx.Response) -> None:
            cut_body(response)

        return {"request": [guard], "response": [cut]}

    def guard(self, request: httpx.Request) -> None:
        """Keep secrets of a request out of the log, and from another origin after a redirect.

        The caller's headers may contain credentials under any name; httpx removes
        ``Authorization`` only.
        """
        request.url = _LoggedURL(request.url)
        if _may_carry_credentials(self.url, request.url):
            return
        for name in set(self.headers) - _HARMLESS:
            request.headers.pop(name, None)

    def failure(self, error: Exception, sentence: str) -> ClientError:
        """Put the error in one line that begins with the sentence and the URL."""
        if isinstance(error, ClientError):
            return error
        failure = ClientError(f"{sentence} {self.name}: {reason(error)}.")
        failure.__cause__ = error
        return failure


class _LoggedURL(httpx.URL):
    """A URL whose text, which httpx logs, is without user, password and query.

    Requests are made of the parts of a URL, and relative redirects of its path.
    """

    def __str__(self) -> str:
        return printable(self)


def _check_header(name: str, value: str) -> tuple[bytes, bytes]:
    value = value.strip(" \t")
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no HTTP header name.")
    forbidden = _HEADER_FORBIDDEN.search(value)
    if forbidden:
        raise ValueError(
            f"The value of the header {name} holds {forbidden[0]!r}, which cannot be sent."
        )
    return name.encode("ascii"), value.encode()


def _may_carry_credentials(origin: httpx.URL, url: httpx.URL) -> bool:
    """Tell whether the URL is of the same origin, or its upgrade from http to https."""
    if origin.host != url.host:
        return False
    ports = [target.port or _DEFAULT_PORTS.get(target.scheme) for target in (origin, url)]
    if origin.scheme == url.scheme:
        return ports[0] == ports[1]
    return url.scheme == "https" and ports == [80, 443]


def hide_secrets(url: str) -> str:
    """Return the text of a URL, valid or not, without user, password, query and fragment."""
    return re.split("[?#]", _USERINFO.sub(r"\1***@", url))[0]


def printable(url: httpx.URL) -> str:
    """Give the URL without what may be secret: user, password, and query."""
    return str(url.copy_with(username="", password="", query=None, fragment=None))


# What went wrong, in words


def is_network_failure(error: Exception) -> bool:
    """Return whether an error is a failure of the network or of the server, which may pass.

    A certificate that is not trusted is not such a failure.
    """
    return isinstance(error, _NETWORK_FAILURES) and not any(
        isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)
    )


def reason(error: BaseException) -> str:
    """Say in a few words, without a full stop, why a connection failed."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the server's certificate is not trusted ({cause.verify_message}). Name the "
                "authority's certificate (--cafile, or verify= with an ssl.SSLContext), or do "
                "not check (--insecure, or verify=False)"
            )
        if isinstance(cause, ssl.SSLError):
            text = (cause.reason or "the handshake failed").lower().replace("_", " ")
            return f"no TLS connection: {text}"
        if isinstance(cause, OSError) and cause.strerror:
            return _lower_first(_strerror(cause))
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_SECONDS:g} s"
    if isinstance(error, httpx.ReadTimeout):
        seconds = error.request.extensions["timeout"]["read"]
        return f"nothing was received for {seconds:g} s"
    if isinstance(error, httpx.RemoteProtocolError) and "peer closed" in str(error):
        return "the connection was closed in the middle of it"
    text = " ".join(str(error).split()).rstrip(".")
    return _lower_first(text) or type(error).__name__


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _strerror(error: OSError) -> str:
    # asyncio puts an address of its own in place of the system's text.
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give the error and the causes behind it, the outermost first."""
    todo: deque[object] = deque([error])
    while todo:
        cause = todo.popleft()
        if isinstance(cause, BaseException):
            yield cause
            # httpcore cuts the chain, and keeps what it caught as its argument.
            todo.extend((*cause.args, cause.__cause__))
            # What anyio raises when a name has several addresses.
            if isinstance(cause, BaseExceptionGroup):
                todo.extend(cause.exceptions)


# Responses


class _CutStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of a response, which ends after the chunk that reaches ``length`` bytes."""

    def __init__(self, stream: Any, length: int) -> None:
        self._stream = stream
        self._length = length

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream if self._length else ():
            yield chunk
            self._length -= len(chunk)
            if self._length <= 0:
                break

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._length:
            async for chunk in self._stream:
                yield chunk
                self._length -= len(chunk)
                if self._length <= 0:
                    break

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()


def cut_body(response: httpx.Response) -> None:
    """Cut the body of a response other than 200 to the excerpt that may explain the status.

    httpx reads and decompresses the body of a redirect, and of a response that an
    ``httpx.Auth`` answers, without a limit.
    """
    if response.status_code != httpx.codes.OK:
        is_text = media_type(response) == "text/plain" and content_encoding(response) is None
        response.stream = _CutStream(response.stream, _MAX_EXCERPT_BYTES if is_text else 0)


def aiter_raw(response: httpx.Response) -> AsyncGeneratorType[bytes, None]:
    """Return the body's chunks as the generator that httpx makes but does not declare."""
    return cast("AsyncGeneratorType[bytes, None]", response.aiter_raw())


def media_type(response: httpx.Response) -> str:
    content_type: str = response.headers.get("Content-Type", "")
    return content_type.partition(";")[0].strip().lower()


def content_encoding(response: httpx.Response) -> str | None:
    """Return the Content-Encoding of a response, or ``None`` if the body is not encoded."""
    encoding: str = response.headers.get("Content-Encoding", "")
    names = {name.strip().lower() for name in encoding.split(",")}
    return encoding if names - {"", "identity"} else None


def refusal(response: httpx.Response, body: bytes) -> ClientError:
    """Put an answer that is of no use in one line, with the beginning of its body."""
    status = response.status_code
    name = printable(response.url)
    if status == httpx.codes.OK:
        return ClientError(f"{name} answered with {_misfit(response)}", status)
    text = f"{name} answered {status} {httpx.codes.get_reason_phrase(status)}".rstrip()
    if body.strip():
        line = body.decode(errors="replace").strip().splitlines()[0]
        text += ": " + "".join(filter(str.isprintable, line))[:_MAX_EXCERPT_CHARACTERS]
    elif "Location" in response.headers:
        location = response.headers["Location"].partition("?")[0]
        text += f": it is at {location[:_MAX_EXCERPT_CHARACTERS]!r}"
    text = text if text.endswith(".") else f"{text}."
    return ClientError(text, status, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that ``Retry-After`` asks to wait; see RFC 9110, section 10.2.3."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    date = email.utils.parsedate(value)
    if date is None:
        return None
    try:
        # An HTTP date is always in GMT.
        return max(0.0, calendar.timegm(date) - time.time())
    except (ValueError, OverflowError):
        return None


def _misfit(response: httpx.Response) -> str:
    encoding = content_encoding(response)
    if encoding is not None:
        return (
            f"Content-Encoding {encoding!r}, though the client accepts identity only. "
            "Turn off compression for this URL."
        )
    kind = media_type(response)
    given = f"the content type {kind!r}" if kind else "no content type"
    return f"{given}, not {CONTENT_TYPE}."


def read_excerpt(response: httpx.Response) -> bytes:
    """Read the beginning of a body that may explain the status."""
    body = b""
    if _has_excerpt(response):
        with contextlib.suppress(httpx.HTTPError):
            for chunk in response.iter_raw():
                body += chunk
                if _is_enough(body):
                    break
    return body


async def aread_excerpt(response: httpx.Response) -> bytes:
    """Do what :func:`read_excerpt` does, in asynchronous code."""
    body = b""
    if _has_excerpt(response):
        async with contextlib.aclosing(aiter_raw(response)) as chunks:
            with contextlib.suppress(httpx.HTTPError):
                async for chunk in chunks:
                    body += chunk
                    if _is_enough(body):
                        break
    return body


def _has_excerpt(response: httpx.Response) -> bool:
    # httpcore looks the time-out up again before it reads the body.
    response.request.extensions["timeout"]["read"] = EXCERPT_TIMEOUT_SECONDS
    return response.status_code != httpx.codes.OK


def _is_enough(body: bytes) -> bool:
    return b"\n" in body.lstrip()
