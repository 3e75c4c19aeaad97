"""Tests of client addresses, and of the networks by which limits count them."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache
from django.test import AsyncClient, AsyncRequestFactory

from django_eventsource.access.addresses import address_of, network_of
from django_eventsource.exceptions import RateLimited
from django_eventsource.policies import check_rate
from django_eventsource.signals import Reason
from django_eventsource.streaming.registry import registry


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("unix:/run/socket", "unix:/run/socket"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_address_is_counted_by_its_64_bit_prefix(address: str, network: str) -> None:
    """Any other text is returned unchanged."""
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("given", "address"), [("192.0.2.1", "192.0.2.1"), ("::1", "::1"), ("", ""), (None, "")]
)
def test_the_address_is_empty_if_the_server_passes_none(given: str | None, address: str) -> None:
    """A server on a Unix socket has no address."""
    request = AsyncRequestFactory().get("/")
    request.META["REMOTE_ADDR"] = given
    assert address_of(request) == address
    del request.META["REMOTE_ADDR"]
    assert address_of(request) == ""


def request_from(address: str) -> Any:
    request = AsyncRequestFactory().post("/")
    request.META["REMOTE_ADDR"] = address
    return request


class ClientAt(AsyncClient):
    """A client with an address that a test sets."""

    address = ""

    def _base_scope(self, **request: Any) -> Any:
        return super()._base_scope(client=[self.address, 0], **request)


async def test_the_send_rate_counts_an_ipv6_client_once(settings: Any) -> None:
    """A client that changes its address within its /64 has one count."""
    settings.EVENTSOURCE_SEND_RATE = (2, 10**6)
    cache.clear()
    for last in ("1", "2"):
        await check_rate(request_from(f"2001:db8::{last}"))
    with pytest.raises(RateLimited):
        await check_rate(request_from("2001:db8::3"))
    await check_rate(request_from("2001:db8:0:1::3"))
    cache.clear()


@pytest.mark.usefixtures("memory_history")
async def test_the_stream_limit_counts_an_ipv6_client_once(settings: Any) -> None:
    """A second stream from the same /64 is over the limit. The listener keeps its address."""
    settings.EVENTSOURCE_MAX_STREAMS_PER_ADDRESS = 1
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    client = ClientAt()
    responses = []
    for client.address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"):
        responses.append(await client.get("/events/poll/t"))
    assert [response.streaming for response in responses] == [True, False, True]
    addresses = {stream.listener.address for stream in registry.streams()}
    assert {"2001:db8::1", "2001:db8:0:1::1"} <= addresses
    for stream in registry.streams():
        stream.abort(Reason.CLOSE_REQUESTED)
