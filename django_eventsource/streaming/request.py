"""Functions that read the body, tokens, last event id and other parameters of a request."""

import re

from django.http import HttpRequest, RawPostDataException

from ..exceptions import InvalidParameter, InvalidToken
from ..grants import hash_session_key
from ..protocol.frames import CONTENT_TYPE
from ..protocol.tokens import check_token

JSON = "application/json"
MAX_ACCEPT_LENGTH = 1000
"""The most characters of an ``Accept`` header that is parsed. Django's parser takes a time that
grows with the square of the length."""


def keep_body(request: HttpRequest, limit: int) -> bool:
    """Read the body up to a limit, and return whether that is the whole body.

    The body is stored where Django stores it, so that a CSRF check can parse it later.

    :param limit: the largest number of bytes.
    :raises RawPostDataException: if middleware has consumed the body.
    """
    if getattr(request, "_read_started", False) and not hasattr(request, "_body"):
        raise RawPostDataException(
            "Middleware has consumed the request's body, so the view cannot read it. "
            "Let middleware read request.body, not the request itself."
        )
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:18]) > limit:
        return False
    request._body = request.read(limit + 1)
    return len(request._body) <= limit


def read_tokens(request: HttpRequest, token: str, most: int) -> list[str]:
    """Return the path's token and those of the query (``?token=b&token=c``) without duplicates.

    :param token: the path's token.
    :param most: the largest number of tokens.
    :raises InvalidToken: if one is not a valid token, or if there are too many.
    """
    tokens = list(dict.fromkeys([token, *request.GET.getlist("token")]))
    if len(tokens) > most:
        raise InvalidToken(
            f"The request has {len(tokens)} tokens; one stream carries at most {most}."
        )
    return [check_token(one) for one in tokens]


def last_event_id(request: HttpRequest) -> str:
    """Return the last event id of the header or the query; ``""`` if the client sent none."""
    text = request.headers.get("Last-Event-ID", "")
    if text:
        # Servers decode headers as Latin-1, but the HTML standard encodes this one as UTF-8.
        return text.encode("latin-1", "replace").decode("utf-8", "replace")
    return request.GET.get("last_event_id", "")


def prefers_json(request: HttpRequest) -> bool:
    """Return whether the client prefers JSON to a stream (RFC 9110, section 12.5.1).

    A header that is too long, or that Django cannot parse, means a stream.
    """
    accept = request.headers.get("Accept", "")
    if "application/" not in accept.lower() or len(accept) > MAX_ACCEPT_LENGTH:
        return False
    try:
        return request.get_preferred_type([CONTENT_TYPE, JSON]) == JSON
    except (ValueError, LookupError):
        return False


def refuse_parameter(request: HttpRequest, name: str, advice: str) -> None:
    """Check that the query does not have a parameter that would have no effect.

    :param advice: the end of the error: what the client may send instead.
    :raises InvalidParameter: if the query has it.
    """
    if name in request.GET:
        raise InvalidParameter(f"?{name}= has no effect here: {advice}")


def number_of(request: HttpRequest, name: str, default: int) -> int:
    """Return a whole number of the query.

    :raises InvalidParameter: if the text is not one.
    """
    text = request.GET.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InvalidParameter(f"{name} must be a whole number, not {text[:40]!r}.")
    return int(text)


def session_of(request: HttpRequest) -> str:
    """Return the hash of the session's key; ``""`` without a session."""
    key = getattr(getattr(request, "session", None), "session_key", None)
    return hash_session_key(key) if key else ""
