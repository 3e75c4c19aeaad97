"""The fault suite: servers and brokers that are cut off, killed, paused and sent wrong data."""
