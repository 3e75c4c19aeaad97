"""Bytes and names on a wire: pure, no I/O."""
