"""All open streams of a process."""
