"""The attacks that the security review tried, as bounded tests."""
