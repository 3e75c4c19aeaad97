"""Sending events to an event source over HTTP. Needs httpx, and no Django."""

from __future__ import annotations

import contextlib
import json
import ssl
from typing import Any, Self

import httpx

from .connection import (
    FAILURES,
    Auth,
    Headers,
    Target,
    content_encoding,
    read_excerpt,
    refusal,
)
from .exceptions import ClientError

_MAX_ANSWER_BYTES = 64 * 1024


class EventSender:
    """Send events to one URL by HTTP POST, over one connection.

    Close it, best by ``with``.

    :param url: where to post, ``.../<action>/<token>``.
    :param headers: more request headers, as a mapping or as pairs; never changed.
    :param auth: a user and a password for HTTP Basic, or any ``httpx.Auth``. An
        ``Authorization`` in ``headers`` wins.
    :param verify: ``False`` to accept any certificate, or an ``ssl.SSLContext``.
    :param content_type: the media type of what is sent.
    :param timeout_seconds: how long to wait for each answer.
    :raises ValueError: for an argument that cannot be used.
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
        self._headers = httpx.Headers(
            {
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "Content-Type": content_type,
            }
        )
        self._headers.update(self._target.headers)
        self._http = httpx.Client(
            **self._target.options(verify, timeout_seconds),
            event_hooks=self._target.hooks(),
            # Well below the time after which servers close an idle connection.
            limits=httpx.Limits(keepalive_expiry=1.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Closing twice is harmless."""
        self._http.close()

    def send(self, value: str | bytes) -> str | None:
        """Send one event.

        :param value: the event's value; bytes are UTF-8.
        :returns: the event's id, or ``None`` for an event that has none.
        :raises ClientError: when there is no answer, or any but the event's id. After a
            timeout or a broken connection the event may have been published or not.
        """
        body = value.encode() if isinstance(value, str) else value
        try:
            with self._http.stream(
                "POST", self._target.url, content=body, headers=self._headers
            ) as response:
                if response.status_code != httpx.codes.OK or content_encoding(response):
                    raise refusal(response, read_excerpt(response))
                return self._event_id(response)
        except FAILURES as error:
            failure = self._target.failure(error, "Cannot send to")
            raise failure from failure.__cause__

    def _event_id(self, response: httpx.Response) -> str | None:
        answer = b""
        for chunk in response.iter_raw():
            answer += chunk
            if len(answer) > _MAX_ANSWER_BYTES:
                break
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            event_id = json.loads(answer)["id"]
            if event_id is None or isinstance(event_id, str):
                return event_id
        raise ClientError(
            f"{self._target.name} did not answer with the id of an event: it publishes no events.",
            response.status_code,
        )


def send(url: str, value: str | bytes, **options: Any) -> str | None:
    """Send one event by HTTP POST and give its id, or ``None`` if it has none.

    Takes the arguments and raises the errors of :class:`EventSender`.
    """
    with EventSender(url, **options) as sender:
        return sender.send(value)
