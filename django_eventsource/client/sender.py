"""Sending events over HTTP. The module does not import Django."""

import contextlib
import json
import re
import ssl
from typing import Any, Self

import httpx2

from ..exceptions import ClientError
from ..protocol.tokens import check_key
from ._http import (
    REQUEST_ERRORS,
    Auth,
    Headers,
    Target,
    content_encoding,
    read_excerpt,
    response_error,
)

_MAX_RESPONSE_BYTES = 64 * 1024
# Servers remove the spaces around a header's value.
_NOT_IN_HEADER = re.compile(r"^[ \t]|[ \t]$|[\x00-\x08\x0a-\x1f\x7f]")


class EventSender:
    """Send events to one URL by HTTP POST, over one connection.

    Close it, preferably with ``with``.

    :param url: the URL of the POST requests, ``.../<action>/<token>``.
    :param headers: more request headers, as a mapping or as pairs; never changed.
    :param auth: a user and a password for HTTP Basic, or any ``httpx2.Auth``. An
        ``Authorization`` in ``headers`` wins.
    :param verify: ``False`` to accept any certificate, or an ``ssl.SSLContext``.
    :param content_type: the media type of the values.
    :param timeout_seconds: the seconds without data after which a request has failed.
    :raises ValueError: if an argument is not valid.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Headers = (),
        auth: Auth | None = None,
        verify: bool | ssl.SSLContext = True,
        content_type: str = "text/plain; charset=utf-8",
        timeout_seconds: float = 30.0,
    ) -> None:
        self._target = Target(url, headers, auth)
        self._headers = httpx2.Headers(
            {
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "Content-Type": content_type,
            }
        )
        self._headers.update(self._target.headers)
        self._http = httpx2.Client(
            **self._target.options(verify, timeout_seconds),
            event_hooks=self._target.hooks(),
            # This is far less than the time after which servers close an idle connection.
            limits=httpx2.Limits(keepalive_expiry=1.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. You can call it twice."""
        self._http.close()

    def send(self, value: str | bytes, key: str | None = None) -> str | None:
        """Send one event.

        :param value: the event's value; bytes are UTF-8.
        :param key: a text of at most 255 bytes. If this sender has published an event with the
            same key to the token, no other one is published. ``None`` sends no key.
        :returns: the event's id, or ``None`` for an event without an id. If the key was used
            before, it is the id of the first event with the key.
        :raises ValueError: if the key is not valid.
        :raises ClientError: if there is no response, or a response without an event id. After a
            timeout or a broken connection the server may have published the event.
        """
        body = value.encode() if isinstance(value, str) else value
        headers = self._headers
        if key is not None:
            headers = headers.copy()
            headers.update([(b"Idempotency-Key", _header_value(key))])
        try:
            with self._http.stream(
                "POST", self._target.url, content=body, headers=headers
            ) as response:
                if response.status_code != httpx2.codes.OK or content_encoding(response):
                    raise response_error(
                        response, read_excerpt(response, self._target.excerpt_seconds)
                    )
                return self._event_id(response)
        except REQUEST_ERRORS as error:
            failure = self._target.client_error(error, "Cannot send to")
            raise failure from failure.__cause__

    def _event_id(self, response: httpx2.Response) -> str | None:
        body = b""
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _MAX_RESPONSE_BYTES:
                break
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            event_id = json.loads(body)["id"]
            if event_id is None or isinstance(event_id, str):
                return event_id
        raise ClientError(
            f"{self._target.name} responded without an event id, so it published no event.",
            response.status_code,
        )


def _header_value(key: str) -> bytes:
    if _NOT_IN_HEADER.search(check_key(key)):
        raise ValueError(
            f"The key {key!r} cannot be sent in a header: it must not contain control characters, "
            "or start or end with a space."
        )
    return key.encode()


def send(url: str, value: str | bytes, *, key: str | None = None, **options: Any) -> str | None:
    """Send one event by HTTP POST.

    :param url: the URL of the POST request, ``.../<action>/<token>``.
    :param value: the event's value; bytes are UTF-8.
    :param key: the key of the event, as for :meth:`EventSender.send`.
    :param options: the keyword arguments of :class:`EventSender`.
    :returns: the event's id, or ``None`` for an event without an id.
    :raises ValueError: if an argument is not valid.
    :raises ClientError: as :meth:`EventSender.send` does.
    """
    with EventSender(url, **options) as sender:
        return sender.send(value, key)
