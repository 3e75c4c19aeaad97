"""The checks that policies use: client addresses, rate limits, passwords."""
