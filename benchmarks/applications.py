"""The ASGI applications that Django serves: with Handover and without."""

from __future__ import annotations

import gc
import os

from django.core.asgi import get_asgi_application

from django_eventsource.asgi import Handover

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")

inside = get_asgi_application()
handed_over = Handover(inside)

if os.environ.get("BENCH_FREEZE") != "no":
    gc.collect()
    gc.freeze()
