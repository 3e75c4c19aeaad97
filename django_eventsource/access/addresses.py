"""Client addresses, and what limits count them as."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network

from django.http import HttpRequest

IPV6_PREFIX = 64
"""Bits that the addresses of one IPv6 client have in common."""


def address_of(request: HttpRequest) -> str:
    """Return the address that the request came from; empty if the server passes none."""
    return str(request.META.get("REMOTE_ADDR") or "")


def network_of(address: str) -> str:
    """Return what limits count an address as: for IPv6 its /64, else the address itself."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), IPV6_PREFIX), strict=False))
