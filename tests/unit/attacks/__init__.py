"""Attacks that a security review tried."""
