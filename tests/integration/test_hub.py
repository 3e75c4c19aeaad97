"""Hubs and forks of their process."""

from __future__ import annotations

from tests.support.processes import run_python

FORK = """
import asyncio, os
from django_eventsource.delivery.hub import get_hub, hubs

async def start():
    return get_hub()

loop = asyncio.new_event_loop()
parents = loop.run_until_complete(start())
ready = len(loop._ready)
child = os.fork()
if not child:
    assert hubs() == []
    parents.deliver("g", [])
    assert len(loop._ready) == ready
    own = asyncio.new_event_loop()
    assert own.run_until_complete(start()) is not parents
    os._exit(7)
_, status = os.waitpid(child, 0)
assert hubs() == [parents]
loop.run_until_complete(asyncio.wait_for(asyncio.to_thread(int), 10))
print(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_starts_hubs_of_its_own() -> None:
    """The hubs of the parent continue to run."""
    assert run_python(FORK).strip() == "7"
