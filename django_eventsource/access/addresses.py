"""Client addresses, and the networks by which limits count them."""

from ipaddress import IPv6Address, IPv6Network

from django.http import HttpRequest

IPV6_PREFIX = 64
"""The bits that the addresses of one IPv6 client have in common."""


def address_of(request: HttpRequest) -> str:
    """Return the address of the client, or ``""`` if the server passes none."""
    return str(request.META.get("REMOTE_ADDR") or "")


def network_of(address: str) -> str:
    """Return the network by which limits count an address: its /64 for IPv6, else the address."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), IPV6_PREFIX), strict=False))
