"""The event loop on which synchronous code sends, with a real broker."""

from __future__ import annotations

from typing import Any

from tests.support.processes import run_python


def test_a_process_sends_on_one_connection_and_closes_it_at_exit(valkey_server: Any) -> None:
    """Nothing is printed."""
    program = (
        "from django_eventsource import publish\n"
        "for n in range(20): publish('t', 'ping', str(n))\n"
        "print('done')"
    )
    layers = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [valkey_server.url]},
        }
    }
    connections = "total_connections_received"
    with valkey_server.client() as client:
        before = int(client.info("stats")[connections])
        out = run_python(
            "from django.conf import settings\n"
            f"settings.CHANNEL_LAYERS = {layers!r}\n"
            "settings.EVENTSOURCE_HISTORY = "
            "{'BACKEND': 'django_eventsource.history.memory.MemoryHistory'}\n" + program
        )
        assert out == "done\n"
        assert int(client.info("stats")[connections]) - before <= 3
