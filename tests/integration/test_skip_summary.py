"""Tests of the summary of skipped tests, in a pytest run of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason="no mariadbd was found")
@pytest.mark.parametrize("n", range(3))
def test_marked(n): pass

def test_called():
    pytest.skip("`chromium` is not on the PATH.")
"""


def run(directory: Path, source: str, *options: str) -> list[str]:
    """Run pytest on a file, and return the lines that it printed."""
    (directory / "test_it.py").write_text(source)
    done = subprocess.run(
        [
            *[
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "tests.support.skip_summary",
                "-c",
                "/dev/null",
            ],
            *["-p", "no:cacheprovider", "-p", "no:django", *options, "--rootdir", ".", "."],
        ],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "in parallel"])
def test_the_last_lines_name_each_reason_once_with_its_number_of_tests(tmp_path, options):
    """They precede pytest's own last line. The most frequent reason is the first."""
    *_, title, first, second, result = run(
        tmp_path, "def test_passes(): pass" + SKIPPING, *options
    )
    assert "skipped on this machine" in title
    assert first == "3 tests: no mariadbd was found"
    assert second == "1 test: `chromium` is not on the PATH."
    assert "1 passed, 4 skipped" in result


def test_a_run_without_skipped_tests_has_no_summary_of_them(tmp_path):
    assert "on this machine" not in "\n".join(run(tmp_path, "def test_passes(): pass"))
