"""The HTTP part that the listening clients and the sender share: requests, responses, errors.

It does not import Django.
"""

import contextlib
import datetime
import email.utils
import http.cookiejar
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx2

from ..exceptions import ClientError
from ..protocol.frames import CONTENT_TYPE

# The standard library raises UnicodeError for a host name that is too long.
REQUEST_ERRORS = (ClientError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError)
"""The errors of a request. :meth:`Target.client_error` describes each of them."""

# After an UnsupportedProtocol or TooManyRedirects another attempt would fail too.
_NETWORK_ERRORS = (
    httpx2.TimeoutException,
    httpx2.NetworkError,
    httpx2.RemoteProtocolError,
    httpx2.ProxyError,
)

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Auth = httpx2.Auth | tuple[str, str]

_MAX_COOKIES = 50
_MAX_EXCERPT_BYTES = 1024
_MAX_EXCERPT_CHARACTERS = 200
# A proxy of the environment is not used for this machine.
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
# A redirect to another origin keeps these headers, because they contain no credentials.
_SAFE_HEADERS = {"accept", "accept-encoding", "cache-control", "host", "user-agent"}
# It matches up to the last @, because an unencoded password may contain any character.
_USERINFO = re.compile(r"^([a-z]+://)?.*@", re.DOTALL | re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")


class Target:
    """The URL of the requests, their headers and their authentication. No I/O.

    :param url: an http or https URL. A user and password in it are sent as HTTP Basic.
    :param headers: the caller's request headers, as a mapping or as pairs; never changed.
    :param auth: how requests authenticate. An ``Authorization`` in ``headers`` wins.
    :raises ValueError: if the URL, a header name or a header value is not valid.
    """

    connect_seconds = 10.0
    """Seconds after which a connection has failed."""
    excerpt_seconds = 5.0
    """Seconds without data after which a client stops reading the body of an error response."""

    def __init__(self, url: str, headers: Headers, auth: Auth | None) -> None:
        parsed = parse_url(url)
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        self.headers = httpx2.Headers([_check_header(name, value) for name, value in pairs])
        if auth is None and parsed.userinfo:
            auth = (parsed.username, parsed.password)
        self.auth = None if "Authorization" in self.headers else auth
        self.url = parsed.copy_with(username="", password="", fragment=None)
        self.name = printable(self.url)

    def add_to_query(self, text: str) -> None:
        """Add a parameter to the URL. The rest of its query stays as it is."""
        query = b"&".join(filter(None, (self.url.query, text.encode())))
        self.url = self.url.copy_with(query=query)

    def options(
        self, verify: bool | ssl.SSLContext, read_timeout_seconds: float | None
    ) -> dict[str, Any]:
        """Return the arguments of an httpx2 client, except its event hooks."""
        return {
            "auth": self.auth,
            "cookies": _CookieJar(),
            "verify": verify,
            "mounts": dict.fromkeys(_LOOPBACK),
            "timeout": httpx2.Timeout(self.connect_seconds, read=read_timeout_seconds),
        }

    def hooks(self) -> dict[str, list[Callable[..., None]]]:
        """Return the event hooks of an ``httpx2.Client``."""
        return {"request": [self.protect_secrets], "response": [truncate_body]}

    def async_hooks(self) -> dict[str, list[Callable[..., Awaitable[None]]]]:
        """Return the event hooks of an ``httpx2.AsyncClient``."""

        async def on_request(request: httpx2.Request) -> None:
            self.protect_secrets(request)

        async def on_response(response: httpx2.Response) -> None:
            truncate_body(response)

        return {"request": [on_request], "response": [on_response]}

    def protect_secrets(self, request: httpx2.Request) -> None:
        """Keep secrets out of the log, and do not send them to another origin after a redirect.

        The caller's headers may contain credentials under any name; httpx2 removes
        ``Authorization`` only. Its cookie jar compares hosts and no ports.
        """
        request.url = _LoggedURL(request.url)
        if not _may_receive_credentials(self.url, request.url):
            for name in {"cookie", *self.headers} - _SAFE_HEADERS:
                request.headers.pop(name, None)

    def client_error(self, error: Exception, sentence: str) -> ClientError:
        """Return the error as a ``ClientError`` whose one line starts with a sentence and the URL.

        A ``ClientError`` is returned unchanged.
        """
        if isinstance(error, ClientError):
            return error
        client_error = ClientError(f"{sentence} {self.name}: {reason(error)}.")
        client_error.__cause__ = error
        return client_error


class _CookieJar(http.cookiejar.CookieJar):
    """The cookies of a client, at most :data:`_MAX_COOKIES`.

    A server could send new names in each response, and a client that reconnects would keep all.
    """

    def set_cookie(self, cookie: http.cookiejar.Cookie) -> None:
        if len(self) >= _MAX_COOKIES:
            self.clear()
        super().set_cookie(cookie)


class _LoggedURL(httpx2.URL):
    """A URL whose text, which httpx2 logs, has no user, password and query.

    httpx2 builds requests from the parts of a URL, and relative redirects from its path.
    """

    def __str__(self) -> str:
        return printable(self)


def parse_url(url: str) -> httpx2.URL:
    """Return an http or https URL.

    :raises ValueError: if it is not valid. The error contains no secrets of the URL.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()  # The error of httpx2 may quote a part of the password.
    if parsed.scheme not in _DEFAULT_PORTS or not parsed.host:
        raise ValueError(
            f"{hide_secrets(url)!r} is not a valid http:// or https:// URL with a host."
        )
    return parsed


def _check_header(name: str, value: str) -> tuple[bytes, bytes]:
    value = value.strip(" \t")
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid HTTP header name.")
    forbidden = _HEADER_FORBIDDEN.search(value)
    if forbidden:
        raise ValueError(
            f"The value of the header {name} contains {forbidden[0]!r}, which cannot be sent."
        )
    return name.encode("ascii"), value.encode()


def _may_receive_credentials(origin: httpx2.URL, url: httpx2.URL) -> bool:
    """Whether a URL has the same origin, or is the upgrade of it from http to https."""
    if origin.host != url.host:
        return False
    ports = [target.port or _DEFAULT_PORTS.get(target.scheme) for target in (origin, url)]
    if origin.scheme == url.scheme:
        return ports[0] == ports[1]
    return url.scheme == "https" and ports == [80, 443]


def hide_secrets(url: str) -> str:
    """Return the text of a URL, valid or not, without user, password, query and fragment."""
    return re.split("[?#]", _USERINFO.sub(r"\1***@", url))[0]


def printable(url: httpx2.URL) -> str:
    """Return the text of a URL without the parts that may be secret."""
    return str(url.copy_with(username="", password="", query=None, fragment=None))


# Errors


def is_network_error(error: Exception) -> bool:
    """Whether another attempt may succeed, because the network or the server failed.

    An untrusted certificate is not such an error, and a redirect to a text that is not a URL.
    """
    # httpx2 raises RemoteProtocolError for such a redirect, while it handles its InvalidURL.
    if not isinstance(error, _NETWORK_ERRORS) or isinstance(error.__context__, httpx2.InvalidURL):
        return False
    return not any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))


def reason(error: BaseException) -> str:
    """Return the reason of a failed connection, as a clause without a full stop."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the server's certificate is not trusted ({cause.verify_message}). Pass the "
                "certificate of its authority (--cafile, or verify= with an ssl.SSLContext), "
                "or accept any certificate (--insecure, or verify=False)"
            )
        if isinstance(cause, ssl.SSLError):
            text = (cause.reason or "the handshake failed").lower().replace("_", " ")
            return f"the TLS connection failed: {text}"
        if isinstance(cause, OSError) and cause.strerror:
            return _lower_first(_strerror(cause))
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {Target.connect_seconds:g} s"
    if isinstance(error, httpx2.ReadTimeout):
        seconds = error.request.extensions["timeout"]["read"]
        return f"no data was received for {seconds:g} s"
    if isinstance(error, httpx2.RemoteProtocolError) and "peer closed" in str(error):
        return "the connection was closed before the response was complete"
    text = " ".join(str(error).split()).rstrip(".")
    return _lower_first(text) or type(error).__name__


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _strerror(error: OSError) -> str:
    # asyncio replaces the system's text by one with an address.
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, the outermost first."""
    todo: deque[object] = deque([error])
    while todo:
        cause = todo.popleft()
        if isinstance(cause, BaseException):
            yield cause
            # httpcore2 raises its errors `from None`, with the cause as an argument.
            todo.extend((*cause.args, cause.__cause__))
            # anyio raises a group if a name has several addresses.
            if isinstance(cause, BaseExceptionGroup):
                todo.extend(cause.exceptions)


# Responses


class _Excerpt(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The body of a response to the end of its first line, or to the chunk at ``length`` bytes."""

    def __init__(self, stream: Any, length: int) -> None:
        self._stream = stream
        self._length = length
        self._body = b""

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream if self._length else ():
            yield chunk
            if self._is_complete(chunk):
                break

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._length:
            async for chunk in self._stream:
                yield chunk
                if self._is_complete(chunk):
                    break

    def _is_complete(self, chunk: bytes) -> bool:
        self._body += chunk
        return len(self._body) >= self._length or b"\n" in self._body.lstrip()

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()


def truncate_body(response: httpx2.Response) -> None:
    """Truncate the body of a response other than 200 to the excerpt for the error message.

    Otherwise httpx2 would read and decompress the whole body of a redirect, and of a response
    after which an ``httpx2.Auth`` sends another request.
    """
    if response.status_code != httpx2.codes.OK:
        is_text = media_type(response) == "text/plain" and content_encoding(response) is None
        response.stream = _Excerpt(response.stream, _MAX_EXCERPT_BYTES if is_text else 0)


def media_type(response: httpx2.Response) -> str:
    content_type: str = response.headers.get("Content-Type", "")
    return content_type.partition(";")[0].strip().lower()


def content_encoding(response: httpx2.Response) -> str | None:
    """Return the Content-Encoding of a response, or ``None`` if the body is not encoded."""
    encoding: str = response.headers.get("Content-Encoding", "")
    names = {name.strip().lower() for name in encoding.split(",")}
    return encoding if names - {"", "identity"} else None


def response_error(response: httpx2.Response, excerpt: bytes) -> ClientError:
    """Return the error for a response that is not usable, with the first line of its body."""
    status = response.status_code
    name = printable(response.url)
    if status == httpx2.codes.OK:
        return ClientError(f"{name} responded with {_mismatch(response)}", status)
    text = f"{name} responded with {status} {httpx2.codes.get_reason_phrase(status)}".rstrip()
    if excerpt.strip():
        line = excerpt.decode(errors="replace").strip().splitlines()[0]
        text += ": " + "".join(filter(str.isprintable, line))[:_MAX_EXCERPT_CHARACTERS]
    elif "Location" in response.headers:
        location = response.headers["Location"].partition("?")[0]
        text += f": the location is {location[:_MAX_EXCERPT_CHARACTERS]!r}"
    text = text if text.endswith(".") else f"{text}."
    return ClientError(text, status, _retry_after(response))


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds of ``Retry-After`` (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        # An HTTP date is always in GMT.
        date = email.utils.parsedate_to_datetime(value).replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _mismatch(response: httpx2.Response) -> str:
    encoding = content_encoding(response)
    if encoding is not None:
        return (
            f"Content-Encoding {encoding!r}, but the client accepts uncompressed responses only. "
            "Turn off compression for this URL."
        )
    kind = media_type(response)
    content_type = f"the content type {kind!r}" if kind else "no content type"
    return f"{content_type}, not {CONTENT_TYPE}."


def read_excerpt(response: httpx2.Response, seconds: float) -> bytes:
    """Return the beginning of an error response's body, as :func:`truncate_body` left it.

    :param seconds: the seconds without data after which the rest is left out.
    """
    body = b""
    if response.status_code != httpx2.codes.OK:
        # httpcore2 reads the timeout of the request again before it reads the body.
        response.request.extensions["timeout"]["read"] = seconds
        with contextlib.suppress(httpx2.HTTPError):
            for chunk in response.iter_raw():
                body += chunk
    return body


async def aread_excerpt(response: httpx2.Response, seconds: float) -> bytes:
    """Do the same as :func:`read_excerpt`, in asynchronous code."""
    body = b""
    if response.status_code != httpx2.codes.OK:
        response.request.extensions["timeout"]["read"] = seconds
        with contextlib.suppress(httpx2.HTTPError):
            async for chunk in response.aiter_raw():
                body += chunk
    return body
