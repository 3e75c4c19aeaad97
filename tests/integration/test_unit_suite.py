"""Tests of the unit tests themselves: what they need to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.waiting import PROCESS_PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]

OF_THIS_RUN = {"EVENTSOURCE_TEST_DIR", "PYTEST_XDIST_WORKER", "XDG_RUNTIME_DIR"}
"""The environment variables that test_settings and xdist set for this run."""

COLLECT = """
import sys
import tomllib

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is not in the group test-unit", name=name)

refused = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
import pytest
plugins = ["pytest_django.plugin", "pytest_asyncio.plugin", "_hypothesis_pytestplugin"]
options = [option for plugin in plugins for option in ("-p", plugin)]
sys.exit(pytest.main(["-q", "--collect-only", *options, *sys.argv[2:]]))
"""


def group(name: str) -> set[str]:
    """Return the distributions of a dependency group of pyproject.toml, with normalized names."""
    found: set[str] = set()
    for item in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][name]:
        if isinstance(item, dict):
            found |= group(item["include-group"])
        else:
            found.add(normalize(re.split(r"[\[<>=~ ]", item)[0]))
    return found


def normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def collect(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Collect tests in a process in which the packages of the other tests cannot be imported."""
    distributions = group("test") - group("test-unit")
    refused = {
        module
        for module, names in packages_distributions().items()
        if {normalize(name) for name in names} & distributions
    }
    # The process has a test directory of its own, because it removes it at its end.
    kept = {name: value for name, value in os.environ.items() if name not in OF_THIS_RUN}
    return subprocess.run(
        [sys.executable, "-c", COLLECT, ",".join(sorted(refused)), *arguments],
        cwd=ROOT,
        env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_SECONDS,
        check=False,
    )


def test_the_unit_tests_import_only_what_their_group_installs() -> None:
    """They are collected without the packages that the integration tests need."""
    result = collect("tests/unit")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_of_another_package_is_detected() -> None:
    """An integration test cannot be collected in this way."""
    result = collect("tests/integration/test_redis_layers.py")
    assert result.returncode != pytest.ExitCode.OK
    assert "is not in the group test-unit" in result.stdout + result.stderr


def test_the_group_of_all_tests_includes_the_one_of_the_unit_tests() -> None:
    assert group("test-unit") < group("test")
