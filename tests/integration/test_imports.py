"""What the package imports, each time in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import django_eventsource
from tests.support.processes import ROOT, run_python
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

LOADED = """
import sys
roots = {name.partition(".")[0] for name in sys.modules}
print(*sorted(roots & {"channels", "django", "httpcore", "httpcore2", "httpx", "httpx2"}))
print(*sorted(name for name in sys.modules if name.startswith("django_eventsource.client")))
"""


def run_without_django(code: str) -> str:
    """Run code in a Python process that has no settings module, and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
        timeout=PROCESS_PATIENCE_SECONDS,
    ).stdout


@pytest.mark.parametrize("module", ["asgi", "views", "urls"])
def test_the_serving_modules_load_no_http_client(module: str) -> None:
    """A process that serves streams does not spend memory on the clients."""
    out = run_python(f"import django_eventsource.{module}\n{LOADED}")
    assert out.splitlines() == ["channels django", ""]


def test_importing_the_client_imports_neither_django_nor_channels() -> None:
    """A script that only listens needs no settings module."""
    out = run_without_django(f"import django_eventsource.client\n{LOADED}")
    assert "httpx2" in out.split()
    assert not {"channels", "django"} & set(out.split())


def test_the_client_works_with_unconfigured_settings() -> None:
    """The clients and the sender access no setting, even if Django is imported."""
    out = run_without_django(
        "from django.conf import settings\n"
        "from django_eventsource.client import EventSender, EventSourceClient\n"
        "with EventSourceClient('http://h/'), EventSender('http://h/'):\n"
        "    print(settings.configured)"
    )
    assert out == "False\n"


def test_a_name_of_the_package_is_imported_at_its_first_use() -> None:
    """Only the access to publish() imports the publishing module."""
    out = run_without_django(
        "import sys, django_eventsource\n"
        "print('publish' in dir(django_eventsource))\n"
        "print('django_eventsource.publishing' in sys.modules)\n"
        "print(django_eventsource.publish.__module__)"
    )
    assert out.split() == ["True", "False", "django_eventsource.publishing"]


def test_each_public_name_can_be_imported() -> None:
    """The names of ``__all__`` are functions, and another name is an AttributeError."""
    assert all(callable(getattr(django_eventsource, name)) for name in django_eventsource.__all__)
    assert set(django_eventsource.__all__) <= set(dir(django_eventsource))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = django_eventsource.nothing
