"""The fault suite: real servers and brokers that are cut, killed, paused and lied to."""
