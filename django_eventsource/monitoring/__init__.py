"""What the processes report about themselves: statistics, metrics and health."""
