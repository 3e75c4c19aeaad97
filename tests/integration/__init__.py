"""Tests with real servers, brokers and databases."""
