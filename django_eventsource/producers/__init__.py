"""Publish text or values while they are produced, so that no page loses them.

The chunks that a source yields are published as events of the action ``delta``. There is exactly
one end: ``done``, ``failed``, ``stopped`` or ``interrupted``.
"""

from .producer import produce
from .start import astart_production, astop_production, start_production, stop_production

__all__ = [
    "astart_production",
    "astop_production",
    "produce",
    "start_production",
    "stop_production",
]
