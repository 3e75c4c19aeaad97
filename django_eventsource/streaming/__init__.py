"""One open response."""
