"""The sender without a connection."""

from __future__ import annotations

import pytest

from django_eventsource.client import EventSender


def test_arguments_that_are_not_valid_raise() -> None:
    """The constructor checks the URL and the headers."""
    with pytest.raises(ValueError, match="not a valid http:// or https:// URL"):
        EventSender("ftp://h/")
    with pytest.raises(ValueError, match="header"):
        EventSender("http://h/", headers={"a b": "x"})
