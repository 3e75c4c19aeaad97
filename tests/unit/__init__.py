"""Tests with Django and pytest alone: no server, no socket."""
