"""Progress: a process publishes how many rows it has processed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import uuid

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache

from django_eventsource import track

ROWS = 300
ROW_SECONDS = 0.05


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        run = uuid.uuid4().hex
        start(token_of(run), fails=request.POST["end"] == "failed")
        return redirect(f"{request.path}?run={run}")
    run = request.GET.get("run", "")
    token = token_of(run) if re.fullmatch("[0-9a-f]{32}", run) else None
    return render(request, "testproject/progress.html", {"token": token, "rows": ROWS})


def token_of(run: str) -> str:
    """Return the token of a run. Each run has its own."""
    return f"demo:progress:{run}"


def start(token: str, *, fails: bool) -> None:
    """Start a process that continues when the server ends, as the worker of a task queue does."""
    command = [sys.executable, "-m", __name__, token, str(fails)]
    subprocess.Popen(command, cwd=settings.BASE_DIR, start_new_session=True)


def work(token: str, *, fails: bool) -> None:
    for row in track(range(ROWS), token):
        time.sleep(ROW_SECONDS)
        if fails and row == ROWS // 2:
            sys.exit(1)


if __name__ == "__main__":
    django.setup()
    work(sys.argv[1], fails=sys.argv[2] == "True")
