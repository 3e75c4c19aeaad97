"""What the view reads of a request: tokens, last event id, body, and who it is from."""

from __future__ import annotations

from django.http import HttpRequest, RawPostDataException

from .conf import conf
from .cursors import max_length
from .events import CURSOR_MARK
from .exceptions import InvalidToken
from .grants import hash_session_key
from .history.base import MAX_CURSOR_LENGTH
from .tokens import check_token

NO_CURSOR = " "
"""Stands for a last event id that was never one: ids hold no space."""


def keep_body(request: HttpRequest, limit: int) -> bool:
    """Read the body, and no more of it than allowed; ``False`` when there is more.

    It is kept as Django keeps it, so that a CSRF check that parses it leaves it intact.

    :raises RawPostDataException: when middleware has consumed it before.
    """
    if getattr(request, "_read_started", False) and not hasattr(request, "_body"):
        raise RawPostDataException(
            "Middleware has consumed the request's body: nothing is left to publish."
        )
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:18]) > limit:
        return False
    body = request.read(limit + 1)
    request._body = body
    return len(body) <= limit


def read_tokens(request: HttpRequest, token: str, most: int) -> list[str]:
    """Give the path's token and those of the query (``?token=b&token=c``), each once.

    :raises InvalidToken: when one is no token, or there are too many.
    """
    tokens = list(dict.fromkeys([token, *request.GET.getlist("token")]))
    if len(tokens) > most:
        raise InvalidToken(
            f"{len(tokens)} tokens are asked for; one stream carries at most {most}."
        )
    return [check_token(one) for one in tokens]


def last_event_id(request: HttpRequest, tokens: int = 1) -> str | None:
    """Give the listener's last event id: the header's, else the query's, else ``None``.

    It is untrusted: what never was an id comes back as one that no event has.
    """
    text = request.headers.get("Last-Event-ID", "")
    if text:
        # Servers hand headers on as Latin-1; the standard sends this one as UTF-8.
        text = text.encode("latin-1", "replace").decode("utf-8", "replace")
    else:
        text = request.GET.get("last_event_id", "")
    if not text:
        return None
    # Of as many tokens as it may be: a page may come back with fewer.
    most = max_length(max(tokens, conf.stream_max_tokens)) if text.startswith(CURSOR_MARK) else 0
    visible = text.isascii() and text.isprintable() and " " not in text
    return text if visible and len(text) <= max(most, MAX_CURSOR_LENGTH) else NO_CURSOR


def session_of(request: HttpRequest) -> str:
    """Give the hash of the session's key; empty without a session."""
    key = getattr(getattr(request, "session", None), "session_key", None)
    return hash_session_key(key) if key else ""
